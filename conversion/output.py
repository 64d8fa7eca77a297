"""The folder OUTPUT: what may be replaced, and the exchange at the end."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from .readers import ConversionError, read_json


def check_output(output: Path, overwrite: bool):
    """Refuses an OUTPUT that exists, unless it is empty or a former result that may be replaced.

    A conversion writes no folders, so one that has some holds more than a result.
    """
    if output.exists() and not output.is_dir():
        raise ConversionError(f"OUTPUT {output}: is a file.")
    content = list(output.iterdir()) if output.exists() else []
    is_result = read_json(output / "config.json").get("model_type") == "llava_vr"
    if content and (not is_result or any(path.is_dir() for path in content)):
        raise ConversionError(f"OUTPUT {output}: exists, and a conversion did not write it: choose another folder.")
    if content and not overwrite:
        raise ConversionError(f"OUTPUT {output}: exists; --overwrite replaces it.")


def check_apart(output: Path, inputs: Iterable[Path]):
    """Refuses an OUTPUT that is, holds or lies inside an input folder, or holds a file that one has a link to."""
    for folder in inputs:
        files = (path.resolve() for path in (folder, *folder.iterdir()))
        if _is_within(output, folder) or (output.exists() and any(_is_within(path, output) for path in files)):
            raise ConversionError(
                f"OUTPUT {output}: is, holds or lies inside the input folder {folder}: choose another folder."
            )


def _is_within(path: Path, folder: Path) -> bool:
    return any(parent.exists() and parent.samefile(folder) for parent in (path, *path.parents))


@contextlib.contextmanager
def replace_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder to write into. It takes `output`'s place if the block ends well, else all is as it was.

    What a killed run left beside `output` is cleared up.

    Raises:
        ConversionError: `output` exists and may not be replaced, or cannot be written.
    """
    beside = re.compile(rf"\.{re.escape(output.name)}\.incomplete-(\d+)")
    work = output.parent / f".{output.name}.incomplete-{os.getpid()}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for path in output.parent.iterdir():
            if (match := beside.fullmatch(path.name)) and not _is_running(int(match[1])):
                _settle(path, output)
        (work / "new").mkdir(parents=True)
        yield work / "new"
        check_output(output, overwrite)
        if output.exists():
            output.rename(work / "old")
        (work / "new").rename(output)
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"OUTPUT {output}: cannot be written: {error}; nothing was changed.") from error
    finally:
        _settle(work, output)


def _settle(work: Path, output: Path):
    """Removes a working folder; what was to be replaced comes back if nothing has taken its place."""
    if (work / "old").exists() and not output.exists():
        (work / "old").rename(output)
    shutil.rmtree(work, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return pid != os.getpid()
