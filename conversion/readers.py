"""Reads checkpoints one tensor at a time: safetensors or pickled, one file or shards. Nothing in them is executed."""

import contextlib
import json
import pickle
import re
import textwrap
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open


class ConversionError(ValueError):
    """What is wrong with a source, an option or the output, in one line."""


INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
SHARD = re.compile(r"(?:model|pytorch_model)-(\d+)-of-(\d+)\.(?:safetensors|bin)")
MAX_LAYERS = 10_000  # configuration classes make lists of as many entries
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SIZES += ("head_dim", "vocab_size", "image_size", "patch_size")


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns whatever a library raises on malformed content into a `ConversionError` that begins with `what`."""
    try:
        yield
    except (ConversionError, OSError):
        raise
    except Exception as error:  # each library and each class of it raises its own
        reason = f"{error} is missing or unknown" if isinstance(error, KeyError) else str(error)
        if isinstance(error, StrictDataclassError):
            reason = str(error.__cause__ or error)
        elif not isinstance(error, (KeyError, ValueError)):  # whose texts say all
            reason = f"{type(error).__name__}: {reason}"
        raise ConversionError(f"{what}: {textwrap.shorten(reason, 400)}") from error


@dataclass(frozen=True)
class Handle:
    """A tensor on disk: what its file says of it, and `load` to read it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: "SafetensorsFile | PickleFile"

    @property
    def place(self) -> str:
        return f"{self.file.path.name}: tensor {self.name}"

    def load(self) -> torch.Tensor:
        """The tensor, contiguous; it may lie in a memory map of the file."""
        return self.file.load(self.name)


class SafetensorsFile:
    """A .safetensors file. It is opened for each tensor, and so mapped as long as that one is in use."""

    def __init__(self, path: Path):
        self.path, self.handles = path, {}
        with reading(f"{path}: truncated or no safetensors file"), safe_open(path, "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                self.handles[name] = Handle(name, tuple(tensor.shape), tensor.dtype, self)
        with open(path, "rb") as raw:  # the format allows no name twice, but its parser takes the last
            header = json.loads(raw.read(int.from_bytes(raw.read(8), "little")), object_pairs_hook=list)
        for name, count in Counter(name for name, _ in header).items():
            if count > 1:
                raise ConversionError(f"{path}: tensor {name} stands in it twice.")

    def load(self, name: str) -> torch.Tensor:
        with reading(self.handles[name].place), safe_open(self.path, "pt") as file:
            return file.get_tensor(name)


class PickleFile:
    """A .bin file of torch, by its restricted unpickler (`weights_only=True`). It is mapped until `close_files`."""

    opened: ClassVar[dict["PickleFile", dict[str, torch.Tensor]]] = {}

    def __init__(self, path: Path):
        self.path, tensors = path, self._unpickle(path)
        self.handles = {name: Handle(name, tuple(t.shape), t.dtype, self) for name, t in tensors.items()}
        users = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
        self._shared = {name for name, tensor in tensors.items() if users[tensor.untyped_storage().data_ptr()] > 1}

    @staticmethod
    def _unpickle(path: Path) -> dict[str, torch.Tensor]:
        with reading(f"{path}: truncated or no file of torch"):
            try:  # torch's format before 1.6 is no zip file and cannot be mapped
                is_zip = zipfile.is_zipfile(path)
                content = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
            except pickle.UnpicklingError as error:
                found = re.search(r"GLOBAL ([\w.]+)", str(error))
                raise ConversionError(
                    f"{path}: holds more than tensors ({found[1] if found else 'or is malformed'}) and was not "
                    "unpickled: load it where you trust it and save its tensors with safetensors.torch.save_file."
                ) from error
        for key in ("state_dict", "model", "module"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        if not isinstance(content, dict):
            raise ConversionError(f"{path}: holds a {type(content).__name__}, not tensors by name.")
        for name, value in content.items():
            if not _is_plain(name, value):
                kind = f"{value.layout}, {value.device}" if isinstance(value, torch.Tensor) else type(value).__name__
                raise ConversionError(f"{path.name}: {name!r} ({kind}) is not a plain dense tensor with a name.")
        return content

    def load(self, name: str) -> torch.Tensor:
        if self not in self.opened:
            self.opened[self] = self._unpickle(self.path)
        tensor = self.opened[self][name].detach()
        return tensor.clone(memory_format=torch.contiguous_format) if name in self._shared else tensor.contiguous()


def close_files():
    """Lets go of the memory maps: their pages stay resident once touched."""
    PickleFile.opened.clear()


def _is_plain(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and type(value) in (torch.Tensor, torch.nn.Parameter)
        and (value.layout, value.device.type) == (torch.strided, "cpu")
        and not (value.is_nested or value.is_quantized)
        and value.untyped_storage().nbytes() >= value.nbytes  # not expanded from fewer values
    )


def open_file(path: Path) -> SafetensorsFile | PickleFile:
    """A file of weights, of either format."""
    if not path.is_file():
        raise ConversionError(f"{path}: no such file.")
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; a missing file is an empty one."""
    if not path.is_file():
        return {}
    with reading(f"{path}: no JSON text"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: holds a {type(content).__name__}, not an object.")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model's folder, with sizes that are safe to give to a configuration class."""
    path = folder / "config.json"
    config = read_json(path)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if not isinstance(part.get("model_type", ""), str):
            raise ConversionError(f"{path}: model_type must be a text, found {part['model_type']!r}.")
        for name in SIZES:
            size = part.get(name)
            if size is not None and (type(size) is not int or size < 1):
                raise ConversionError(f"{path}: {name} must be a positive whole number, found {size!r}.")
        if (part.get("num_hidden_layers") or 0) > MAX_LAYERS:
            raise ConversionError(f"{path}: num_hidden_layers is {part['num_hidden_layers']}, which no model has.")
    return config


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
            total = int(SHARD.fullmatch(shards[0].name)[2])
            if len(shards) != total:
                raise ConversionError(f"{folder}: {len(shards)} of {total} shards such as {shards[0].name} are there.")
            return _join(shards)
    raise ConversionError(f"{folder}: no weights: none of {', '.join((*WEIGHT_FILES, *INDEX_FILES))}.")


def _shards(folder: Path, suffix: str) -> list[Path]:
    return sorted(p for p in folder.iterdir() if SHARD.fullmatch(p.name) and p.name.endswith(suffix))


def _read_sharded(folder: Path, index: Path) -> dict[str, Handle]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ConversionError(f"{index}: has no weight_map.")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ConversionError(f"{index}: shard {shard!r} of tensor {tensor} is not the name of a file beside it.")
        if not (folder / shard).is_file():
            raise ConversionError(f"{folder}: shard {shard} of {index.name} is missing, with tensor {tensor}.")
    names = sorted(set(weight_map.values()))
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
