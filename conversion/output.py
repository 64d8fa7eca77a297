"""The folder OUTPUT: what may be replaced, and the exchange at the end."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .readers import ConversionError


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
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"OUTPUT {output}: cannot be written: {error}; nothing was changed.") from error
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
