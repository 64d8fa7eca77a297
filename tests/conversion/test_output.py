"""OUTPUT appears complete or not at all."""

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from builders import GATE, NAN, load, refused
from llava_vr.conversion import companions, plan
from llava_vr.convert_weights import convert, main


def test_existing_output(llava, tmp_path, capsys):
    folder, out = llava(), tmp_path / "out"
    convert(folder, out)
    (out / "mine.txt").write_text("kept")
    assert "--overwrite" in refused(folder, capsys)
    assert "unexpected" in refused(llava({"x": torch.ones(1)}), capsys, "--overwrite")
    assert GATE in refused(llava({GATE: NAN}), capsys, "--overwrite")  # found while writing
    assert (out / "mine.txt").read_text() == "kept"
    assert main([str(llava()), str(out), "--overwrite"]) == 0
    assert not (out / "mine.txt").exists() and (out / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_output_that_cannot_be_written(llava, tmp_path, capsys, monkeypatch):
    folder = llava()
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(folder, capsys, output=tmp_path / "file")
    line = refused(folder, capsys, output=tmp_path / "file" / "below")
    assert "cannot be written" in line or "Not a directory" in line
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        assert "cannot be written: [Errno 13] Permission denied" in refused(folder, capsys)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        assert "no space left" in refused(folder, capsys)
    with monkeypatch.context() as patch:
        error = Exception("No space left on device (os error 28)")  # as the tokenizers library raises it
        patch.setattr(companions.LlavaVrProcessor, "save_pretrained", lambda *_: (_ for _ in ()).throw(error))
        assert "cannot be written: No space left on device" in refused(folder, capsys)
    made, make = [], plan.TensorBuilder.build

    def full(self, step):
        made.append(step)
        if len(made) > 20:
            raise OSError(28, "No space left on device")
        return make(self, step)

    monkeypatch.setattr(plan.TensorBuilder, "build", full)
    assert "No space left on device" in refused(folder, capsys)


@pytest.mark.common
@pytest.mark.parametrize("point", ["weights", "files", "before the exchange", "within the exchange", "after it"])
@pytest.mark.parametrize("exists", [False, True], ids=["new", "overwrite"])
def test_killed_at_any_point(point, exists, llava, tmp_path, monkeypatch):
    folder, out = llava(), tmp_path / "out"
    if exists:
        convert(folder, out)
        (out / "mine.txt").write_text("kept")
    process = os.fork()
    if process == 0:
        calls, make, rename = [], plan.TensorBuilder.build, Path.rename

        def die(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)

        def counted(self, step):
            calls.append(step)
            return make(self, step) if len(calls) < 20 else die()

        def renamed(self, target):
            last = Path(target) == out
            if point == "before the exchange" or (point == "within the exchange" and last):
                die()
            rename(self, target)
            if last:
                die()

        if point == "weights":
            plan.TensorBuilder.build = counted
        elif point == "files":
            companions.shutil.copyfile = die
        else:
            Path.rename = renamed
        try:
            convert(folder, out, overwrite=True)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    if point == "after it":
        load(out)
    elif exists and point != "within the exchange":
        assert (out / "mine.txt").read_text() == "kept"
    else:
        assert not out.exists()
    convert(folder, out, overwrite=True)
    load(out)
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert left == []
