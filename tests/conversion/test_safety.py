"""No input and nobody else's folder is ever replaced; a conversion that ends early leaves OUTPUT as it was."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from builders import GATE, NAN, load, make_clip, make_decoder, refused
from llava_vr.conversion import plan
from llava_vr.convert_weights import convert, main


ROOT = Path(__file__).parents[2]
APART = "is, holds or lies inside the input folder"


def contents(folder: Path) -> dict[str, bytes | str]:
    """All files and links below a folder."""
    paths = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in paths
        if path.is_file()
    }


@pytest.fixture
def models(llava, tmp_path):
    """A result in "models/src", so that it is one that --overwrite might replace, and "other" beside it."""
    convert(llava(), tmp_path / "models" / "src")
    (tmp_path / "models" / "other").mkdir()
    (tmp_path / "models" / "other" / "mine.txt").write_text("kept")
    return tmp_path / "models"


@pytest.mark.parametrize(
    "output", ["src", "src/", "other/../src", ".", "..", "src/out", "src/sub/out"], ids=lambda place: f"models/{place}"
)
@pytest.mark.parametrize("linked", [False, True], ids=["as it is", "through a link"])
def test_output_is_apart_from_source(output, linked, models, tmp_path, capsys):
    place = models
    if linked:
        place = tmp_path / "link"
        place.symlink_to(models)
    before = contents(tmp_path)
    line = refused(models / "src", capsys, "--overwrite", output=place / output)
    assert f"OUTPUT {(models / output).resolve()}: " in line
    assert contents(tmp_path) == before


@pytest.mark.parametrize("option", ["--vision-tower", "--base-model"])
@pytest.mark.parametrize("place", [".", "out", "sub/out"])
def test_output_is_apart_from_the_other_inputs(option, place, llava, tmp_path, capsys):
    folder, given = llava(), tmp_path / "given"
    if option == "--vision-tower":
        make_clip().save_pretrained(given)
    else:  # one that --overwrite might replace
        convert(folder, given)
    before = contents(tmp_path)
    line = refused(folder, capsys, option, str(given), "--overwrite", output=given / place)
    assert APART in line or (option, place) == ("--vision-tower", ".") and "did not write it" in line
    assert contents(tmp_path) == before


def test_output_is_apart_from_a_tower_that_the_source_names(llava, clip_folder, capsys):
    assert APART in refused(llava(), capsys, output=clip_folder / "out")


def test_output_is_apart_from_the_base_of_an_artefact(llava, tmp_path, capsys):
    artefact = llava()
    make_decoder().save_pretrained(tmp_path / "base")
    tensors = load_file(artefact / "model.safetensors")
    projector = {name: tensor for name, tensor in tensors.items() if "mm_projector" in name}
    torch.save(projector, artefact / "mm_projector.bin")
    (artefact / "model.safetensors").unlink()
    assert APART in refused(artefact, capsys, "--base-model", str(tmp_path / "base"), output=tmp_path / "base" / "out")


def test_output_holds_a_file_that_the_source_links_to(models, tmp_path, capsys):
    convert(models / "src", tmp_path / "out")
    (models / "src" / "model.safetensors").unlink()
    (models / "src" / "model.safetensors").symlink_to(tmp_path / "out" / "model.safetensors")
    before = contents(tmp_path)
    assert APART in refused(models / "src", capsys, "--overwrite", output=tmp_path / "out")
    assert contents(tmp_path) == before
    convert(models / "src", tmp_path / "new")


@pytest.mark.parametrize("name", ["mine.txt", "config.json", "model.safetensors"])
def test_overwrite_replaces_results_only(name, llava, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"model_type": "llava"}')
    assert f"OUTPUT {out}: exists, and a conversion did not write it" in refused(llava(), capsys, "--overwrite")
    assert (out / name).read_text() == '{"model_type": "llava"}'


def test_overwrite_keeps_a_folder_inside_a_result(llava, tmp_path, capsys):
    folder, out = llava(), tmp_path / "out"
    convert(folder, out)
    (out / "checkpoint-100").mkdir()
    assert "a conversion did not write it" in refused(folder, capsys, "--overwrite")
    (out / "checkpoint-100").rmdir()
    assert main([str(folder), str(out), "--overwrite"]) == 0


def test_package_itself_is_never_replaced(llava, capsys, tmp_path):
    """Its folder has a config.json of LLaVA-VR."""
    copy = tmp_path / "package"
    (copy / "conversion").mkdir(parents=True)
    (copy / "config.json").write_bytes((ROOT / "config.json").read_bytes())
    assert "a conversion did not write it" in refused(llava(), capsys, "--overwrite", output=copy)


def test_empty_output_is_replaced(llava, tmp_path):
    (tmp_path / "out").mkdir()
    convert(llava(), tmp_path / "out")
    load(tmp_path / "out")


@pytest.mark.parametrize("target", ["result", "empty", "absent"])
def test_output_that_is_a_link(target, llava, tmp_path):
    folder, real, link = llava(), tmp_path / "real" / "folder", tmp_path / "out"
    real.parent.mkdir()
    if target == "result":
        convert(folder, real)
        (real / "mine.txt").write_text("old")
    elif target == "empty":
        real.mkdir()
    link.symlink_to(real)
    assert convert(folder, link, overwrite=target == "result").output == real
    assert link.is_symlink() and link.resolve() == real and not (real / "mine.txt").exists()
    load(link)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "real", "out"}
    assert [path.name for path in real.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("exists", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("point", ["weights", "before the exchange", "within the exchange"])
def test_interrupted(point, exists, llava, tmp_path, capsys, monkeypatch):
    folder, out = llava(), tmp_path / "out"
    if exists:
        convert(folder, out)
        (out / "mine.txt").write_text("kept")
    before, rename = contents(tmp_path), Path.rename

    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)

    def renamed(self, target):
        if Path(target) == out and self.name == "new":
            interrupt()
        rename(self, target)
        if self == out and point == "before the exchange":
            interrupt()

    if point == "weights":
        monkeypatch.setattr(plan.TensorBuilder, "build", interrupt)
    else:
        monkeypatch.setattr(Path, "rename", renamed)
    capsys.readouterr()
    assert main([str(folder), str(out), "--overwrite"]) == 130
    assert capsys.readouterr().err == "convert_weights.py: error: interrupted\n"
    assert contents(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_failure_while_writing_leaves_the_old_result(llava, tmp_path, capsys):
    convert(llava(), tmp_path / "out")
    before = contents(tmp_path / "out")
    assert GATE in refused(llava({GATE: NAN}), capsys, "--overwrite")
    assert contents(tmp_path / "out") == before


INTERRUPTED = """
import os, signal, sys
from llava_vr.conversion import plan
from llava_vr.convert_weights import main
plan.TensorBuilder.build = lambda *_: os.kill(os.getpid(), signal.SIGINT)
sys.exit(main(sys.argv[1:]))
"""
INTERRUPTED_IMPORT = """
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv[:1] = []
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.common
@pytest.mark.parametrize(
    ("code", "expected", "error"),
    [(INTERRUPTED, 130, "convert_weights.py: error: interrupted\n"), (INTERRUPTED_IMPORT, -signal.SIGINT, "")],
    ids=["while it converts", "while libraries are imported"],
)
def test_interrupted_process(code, expected, error, llava, tmp_path):
    script = [ROOT / "convert_weights.py"] if code == INTERRUPTED_IMPORT else []
    command = [sys.executable, "-c", code, *script, llava(), tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (expected, error)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
