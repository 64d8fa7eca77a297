"""Reads checkpoints one tensor at a time: safetensors or pickled, one file or shards. Nothing in them is executed."""

import json
import math
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch


class ConversionError(ValueError):
    """What is wrong with a source, an option or the output, in one line."""


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
PIECE = 16 << 20  # bytes of a tensor that are in memory at a time while it is only copied
REOPEN_AFTER = 256 << 20  # bytes read through a memory map before it is let go, so that its pages do not add up
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
SHARD = re.compile(r"(?:model|pytorch_model)-(\d+)-of-(\d+)\.(?:safetensors|bin)")


class _File(Protocol):
    path: Path

    def read(self, name: str) -> torch.Tensor: ...

    def pieces(self, name: str) -> Iterator[torch.Tensor]: ...


@dataclass(frozen=True)
class Handle:
    """A tensor on disk: what its file says of it, `load` to read it, `pieces` to read it flat and bit by bit."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: _File

    @property
    def place(self) -> str:
        return f"{self.file.path.name}: tensor {self.name}"

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> torch.Tensor:
        return self.file.read(self.name)

    def pieces(self) -> Iterator[torch.Tensor]:
        """Flat pieces in their order; each is good until the next is asked for."""
        return self.file.pieces(self.name)


class SafetensorsFile:
    """A .safetensors file, read by plain reads: a memory map would keep every page that was touched resident."""

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ConversionError(f"{path}: truncated in its header ({size} bytes).")
            try:
                header = json.loads(file.read(length), object_pairs_hook=self._no_duplicates)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ConversionError(f"{path}: its header is no JSON text: {error}.") from None
        header.pop("__metadata__", None)
        self._start = 8 + length
        self._offsets: dict[str, int] = {}
        self.handles: dict[str, Handle] = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ConversionError(f"{path.name}: tensor {name} has dtype {entry['dtype']}, which is not read.")
            handle = Handle(name, tuple(entry["shape"]), DTYPES[entry["dtype"]], self)
            first, last = entry["data_offsets"]
            if self._start + last > size:
                raise ConversionError(
                    f"{path}: truncated: tensor {name} ends at byte {self._start + last} of a file of {size} bytes."
                )
            if last - first != handle.num_bytes:
                raise ConversionError(f"{handle.place} has {last - first} bytes, its shape needs {handle.num_bytes}.")
            self.handles[name], self._offsets[name] = handle, first

    def _no_duplicates(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConversionError(f"{self.path}: tensor {twice} stands in it twice.")
        return found

    def read(self, name: str) -> torch.Tensor:
        handle = self.handles[name]
        buffer = torch.empty(handle.num_bytes, dtype=torch.uint8)
        for _ in self._fill(name, buffer):
            pass
        return buffer.view(handle.dtype).view(handle.shape)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        buffer = torch.empty(min(PIECE, self.handles[name].num_bytes), dtype=torch.uint8)
        for piece in self._fill(name, buffer):
            yield piece.view(self.handles[name].dtype)

    def _fill(self, name: str, buffer: torch.Tensor) -> Iterator[torch.Tensor]:
        """Reads a tensor into the buffer, as often as it takes, and yields what of the buffer is filled."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._start + self._offsets[name])
            left = self.handles[name].num_bytes
            while left:
                view, done = memoryview(buffer.numpy())[:left], 0
                while done < len(view):  # one read returns at most 2 GiB
                    if not (count := file.readinto(view[done:])):
                        raise ConversionError(f"{self.path}: truncated while tensor {name} was read.")
                    done += count
                left -= done
                yield buffer[:done]


class PickleFile:
    """A .bin file of torch, by its restricted unpickler (`weights_only=True`) and a memory map.

    One file at a time stays open, and no longer than `REOPEN_AFTER`: pages of a map stay resident once touched.
    """

    _opened: "PickleFile | None" = None

    def __init__(self, path: Path):
        self.path, self._touched, self._is_mapped = path, 0, True
        self._tensors = self._open()
        self.handles = {
            name: Handle(name, tuple(tensor.shape), tensor.dtype, self) for name, tensor in self._tensors.items()
        }
        self._tensors = {}

    def _open(self) -> dict[str, torch.Tensor]:
        try:
            try:
                content = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                self._is_mapped = False  # torch's format before 1.6
                content = torch.load(self.path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            cause = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise ConversionError(
                f"{self.path}: holds more than tensors{f' ({cause[1]})' if cause else ''} and was not unpickled: load "
                "it where you trust it and save its tensors with safetensors.torch.save_file."
            ) from None
        except (RuntimeError, EOFError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            raise ConversionError(f"{self.path}: truncated or no file of torch: {reason}") from None
        for key in ("state_dict", "model", "module"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        if not isinstance(content, dict):
            raise ConversionError(f"{self.path}: holds a {type(content).__name__}, not tensors by name.")
        for name, value in content.items():
            if not isinstance(value, torch.Tensor):
                raise ConversionError(f"{self.path.name}: {name} is a {type(value).__name__}, not a tensor.")
        return content

    def read(self, name: str) -> torch.Tensor:
        return self._tensor(name).clone(memory_format=torch.contiguous_format)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        yield from self._tensor(name).contiguous().flatten().split(PIECE // self.handles[name].dtype.itemsize)

    def _tensor(self, name: str) -> torch.Tensor:
        other, PickleFile._opened = PickleFile._opened, self
        if other not in (None, self):
            other._tensors = {}
        if self._is_mapped and self._touched > REOPEN_AFTER:
            self._tensors, self._touched = {}, 0
        self._tensors = self._tensors or self._open()
        self._touched += self.handles[name].num_bytes
        return self._tensors[name].detach()


def open_file(path: Path) -> SafetensorsFile | PickleFile:
    """A file of weights, of either format."""
    if not path.is_file():
        raise ConversionError(f"{path}: no such file.")
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; a missing file is an empty one."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path}: no JSON text: {error}.") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: holds a {type(content).__name__}, not an object.")
    return content


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a model's weights, whole or in shards."""
    return any((folder / name).is_file() for name in (*INDEX_FILES, *WEIGHT_FILES)) or bool(_shards(folder, ""))


def read_weights(folder: Path) -> dict[str, Handle]:
    """All tensors of a model's folder by name; safetensors where both formats are there, as transformers has it.

    Raises:
        ConversionError: a shard or a tensor is missing from the index or from the folder, or stands there twice.
    """
    for index_name, weight_name in zip(INDEX_FILES, WEIGHT_FILES):
        if (folder / index_name).is_file():
            return _read_sharded(folder, folder / index_name)
        if (folder / weight_name).is_file():
            return dict(open_file(folder / weight_name).handles)
        if shards := _shards(folder, Path(weight_name).suffix):
            numbers = {int(SHARD.fullmatch(path.name)[1]) for path in shards}
            missing = set(range(1, int(SHARD.fullmatch(shards[0].name)[2]) + 1)) - numbers
            if missing:
                raise ConversionError(f"{folder}: shards {sorted(missing)} of {shards[0].name} are missing.")
            return _join(shards)
    raise ConversionError(f"{folder}: no weights: none of {', '.join((*WEIGHT_FILES, *INDEX_FILES))}.")


def _shards(folder: Path, suffix: str) -> list[Path]:
    return sorted(p for p in folder.iterdir() if SHARD.fullmatch(p.name) and p.name.endswith(suffix))


def _read_sharded(folder: Path, index: Path) -> dict[str, Handle]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ConversionError(f"{index}: has no weight_map.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            tensor = next(key for key, value in weight_map.items() if value == name)
            raise ConversionError(f"{folder}: shard {name} of {index.name} is missing, with tensor {tensor}.")
    for path in _shards(folder, Path(names[0]).suffix if names else ""):
        if path.name not in names:
            raise ConversionError(f"{index}: shard {path.name} is missing from the index.")
    handles = _join([folder / name for name in names])
    for name, shard in weight_map.items():
        if name not in handles or handles[name].file.path.name != shard:
            raise ConversionError(f"{shard}: tensor {name} is in {index.name}, but not in the file.")
    for name, handle in handles.items():
        if name not in weight_map:
            raise ConversionError(f"{handle.place} is missing from {index.name}.")
    return handles


def _join(paths: list[Path]) -> dict[str, Handle]:
    handles: dict[str, Handle] = {}
    for path in paths:
        for name, handle in open_file(path).handles.items():
            if name in handles:
                raise ConversionError(f"{handle.place} stands in {handles[name].file.path.name} too.")
            handles[name] = handle
    return handles
