"""The command line, its reports and the upload."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from tqdm import tqdm

from builders import make_clip
from llava_vr.convert_weights import convert, main


ROOT = Path(__file__).parents[2]


def test_dry_run_prints_the_plan_and_writes_nothing(llava, tmp_path, capsys):
    folder = llava({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, shards=2)
    assert main([str(folder), str(tmp_path / "out"), "--dry-run", "--remember-layers", "1"]) == 0
    text = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    for tensor in ("model.mm_projector.0.weight -> model.multi_modal_projector.linear_1.weight [48, 32] float32",):
        assert tensor in text
    assert "new -> model.vision_remember.1.query.weight [1024, 48] float32" in text
    assert "rotary_emb.inv_freq [6] dropped: a buffer that the model computes itself" in text
    assert "11 new" in text or " new, " in text
    assert len(text.splitlines()) > 60


def test_help_and_summary(llava, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "examples:" in text
    for option in ("--vision-tower", "--base-model", "--remember-layers", "--remember-feature-layers", "--projector"):
        assert option in text
    for option in ("--dtype", "--max-shard-size", "--map", "--dry-run", "--verify", "--push-to-hub", "--overwrite"):
        assert option in text
    assert main([str(llava()), str(tmp_path / "out"), "--dtype", "bfloat16", "--verify"]) == 0
    text = capsys.readouterr().out
    assert "tensors mapped" in text and "GB" in text and " s)" in text and "verified: loads" in text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_progress_bar_and_counts_of_the_summary(llava, tmp_path, capsys):
    folder = llava({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)})
    held = len(load_file(folder / "model.safetensors"))
    convert(folder, tmp_path / "quiet")
    assert "converting" not in capsys.readouterr().err  # where nobody looks on
    result = convert(folder, tmp_path / "out", remember_layers=[1], progress=True)
    bar = capsys.readouterr().err.split("\r")[-1]
    written = load_file(tmp_path / "out" / "model.safetensors")
    size, tower = sum(tensor.nbytes for tensor in written.values()), len(make_clip().state_dict())
    assert "converting: 100%" in bar and f"{tqdm.format_sizeof(size)}/{tqdm.format_sizeof(size)}" in bar
    new, mapped = sum("vision_remember" in name for name in written), held - 1 + tower
    assert new + mapped == len(written)
    first, reason, last = result.summary().splitlines()
    assert first == f"LLaVA's research code: {mapped} tensors mapped, {new} new, 1 dropped; {size / 1e9:.3f} GB"
    assert "dropped 1: a buffer" in reason
    assert last == f"{tmp_path / 'out'} ({result.seconds:.1f} s)" and result.seconds > 0


def test_script_runs_as_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", str(tmp_path / "absent"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "convert_weights.py"), run_name="__main__")
    assert stop.value.code == 2 and capsys.readouterr().err.count("convert_weights.py: error: ") == 1


def test_push_to_hub_is_private_by_default(llava, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda _, name, **options: calls.append((name, options)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **options: calls.append(options))
    result = convert(llava(), tmp_path / "out", push_to_hub="me/model")
    assert calls[0] == ("me/model", {"private": True, "exist_ok": True})
    assert calls[1] == {"repo_id": "me/model", "folder_path": tmp_path / "out"}
    assert result.url == "https://huggingface.co/me/model"
    assert main([str(llava()), str(tmp_path / "second"), "--push-to-hub", "me/model", "--public"]) == 0
    assert calls[2][1]["private"] is False
