"""Writes a folder, all or nothing: tensors as they come into safetensors shards, everything in place at the end."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from .plan import Maker, Plan, Step
from .readers import DTYPES, ConversionError


UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def parse_size(text: str | int) -> int:
    """Bytes of a size such as "5GB" or "500MiB".

    Raises:
        ConversionError: it is none, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", str(text).strip().upper())
    unit = match and match[2] if match and match[2] != "B" else ""
    if not match or unit not in UNITS or float(match[1]) * UNITS[unit] < 1:
        raise ConversionError(f"--max-shard-size {text!r}: write it as 5GB, 500MB or 2GiB.")
    return int(float(match[1]) * UNITS[unit])


@contextlib.contextmanager
def replace_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `output` to write into. It takes `output`'s place if the block ends well, else it goes.

    Raises:
        ConversionError: `output` exists and may not be replaced, or cannot be written.
    """
    _sweep(output)
    check_output(output, overwrite)
    parent = output.parent
    work, old = (parent / f".{output.name}.{word}-{os.getpid()}" for word in ("incomplete", "replaced"))
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work.mkdir()
        yield work
        check_output(output, overwrite)
        if output.exists():
            output.rename(old)
        try:
            work.rename(output)
        except OSError:
            if old.exists():
                old.rename(output)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        reason = f"{error.strerror} ({error.filename})" if error.filename else error.strerror or str(error)
        raise ConversionError(f"OUTPUT {output}: cannot be written: {reason}; nothing was changed.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_output(output: Path, overwrite: bool):
    """Refuses an OUTPUT that exists, unless it is a folder and may be overwritten."""
    if output.exists() and not output.is_dir():
        raise ConversionError(f"OUTPUT {output}: is a file.")
    if output.exists() and not overwrite and any(output.iterdir()):
        raise ConversionError(f"OUTPUT {output}: exists; --overwrite replaces it.")


def _sweep(output: Path):
    """Clears up after killed runs: what was half written goes, what was about to be replaced comes back."""
    for path in output.parent.glob(f".{output.name}.*-*") if output.parent.is_dir() else ():
        match = re.fullmatch(r"(incomplete|replaced)-(\d+)", path.name.removeprefix(f".{output.name}."))
        if match and not _is_running(int(match[2])):
            if match[1] == "replaced" and not output.exists():
                path.rename(output)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid != os.getpid()


def split_shards(steps: list[Step], max_bytes: int) -> list[list[Step]]:
    """Steps in their order, as many to a shard as fit; within one, wide dtypes first, so that all are aligned."""
    shards: list[list[Step]] = []
    size = max_bytes
    for step in steps:
        if not shards or size + step.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(step)
        size += step.num_bytes
    return [sorted(shard, key=lambda step: -step.dtype.itemsize) for shard in shards]


def write_weights(plan: Plan, folder: Path, max_shard_bytes: int, allow_nonfinite: bool, progress: bool | None = None):
    """Streams the tensors of a plan into shards, with an index where there are several.

    Args:
        progress: whether to show a bar; None for where a person looks on.
    """
    free = shutil.disk_usage(folder).free
    if plan.num_bytes > free:
        raise ConversionError(
            f"OUTPUT {folder.parent}: no space left: {plan.num_bytes / 1e9:.3f} GB needed, {free / 1e9:.3f} GB free."
        )
    shards, maker = split_shards(plan.steps, max_shard_bytes), Maker(plan, allow_nonfinite)
    weight_map = {}
    disable = None if progress is None else not progress
    with tqdm(total=plan.num_bytes, unit="B", unit_scale=True, desc="converting", disable=disable) as bar:
        for number, steps in enumerate(shards, start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            weight_map.update((step.target, name) for step in steps)
            with open(folder / name, "wb") as file:
                file.write(_header(steps))
                for step in steps:
                    for piece in maker.pieces(step):
                        bar.update(file.write(memoryview(piece.view(DTYPES["U8"]).numpy())))
    if len(shards) > 1:
        parameters = sum(step.num_bytes // step.dtype.itemsize for step in plan.steps)
        metadata = {"total_parameters": parameters, "total_size": plan.num_bytes}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _header(steps: list[Step]) -> bytes:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for step in steps:
        begin, end = end, end + step.num_bytes
        header[step.target] = {"dtype": NAMES[step.dtype], "shape": list(step.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
