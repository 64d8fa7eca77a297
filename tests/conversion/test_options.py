"""Options, and configurations that are refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file

from builders import load, randomize, refused, theirs
from llava_vr.convert_weights import convert


CONFIGS = [
    ({"architectures": ["LlavaPhiForCausalLM"], "model_type": "llava_phi"}, "decoders that are read"),
    ({"architectures": ["LlavaMptForCausalLM"], "model_type": "llava_mpt"}, "decoders that are read"),
    ({"mm_resampler_type": "perceiver"}, "mm_resampler_type 'perceiver'"),
    ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch'"),
    ({"mm_patch_merge_type": "spatial_maxpool2x2"}, "mm_patch_merge_type 'spatial_maxpool2x2'"),
    ({"image_aspect_ratio": "highres"}, "image_aspect_ratio 'highres'"),
    ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "os.getcwd()"}, "image_grid_pinpoints 'os.getcwd()'"),
    ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[33, 32]]}, "image_grid_pinpoints must be"),
    ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
    ({"mm_vision_tower": "nobody/nothing-of-this-name"}, "--vision-tower"),
    ({"num_attention_heads": "four"}, "config.json"),
]


@pytest.mark.parametrize(("changes", "words"), CONFIGS, ids=[words for _, words in CONFIGS])
def test_configurations_that_are_refused_by_name(changes, words, llava, capsys):
    folder = llava()
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    assert words in refused(folder, capsys)


def test_other_projectors_are_refused_by_name(llava, capsys):
    linear = {f"model.mm_projector.{name}": None for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    folder = llava(linear | {"model.mm_projector.weight": torch.ones(48, 32)})
    assert "mm_projector_type 'mlp2x_gelu'" in refused(folder, capsys)


def test_sources_that_are_none(tmp_path, capsys, save_tokenizer, llava):
    assert "SOURCE" in refused(tmp_path / "absent", capsys)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty", capsys)
    (tmp_path / "empty" / "config.json").write_text("{]")
    assert "no JSON text" in refused(tmp_path / "empty", capsys)
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "whisper"}')
    assert "model_type 'whisper' is none of the sources" in refused(tmp_path / "empty", capsys)
    folder = llava()
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert "no weights" in refused(folder, capsys)
    folder = llava()
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    (folder / "tokenizer_config.json").unlink()
    assert "tokenizer.model needs tokenizer_config.json" in refused(folder, capsys)
    (folder / "tokenizer.model").unlink()
    assert "--base-model" in refused(folder, capsys)
    save_tokenizer(tmp_path / "base")
    convert(folder, tmp_path / "out", base_model=tmp_path / "base")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--map", "abc"], "--map 'abc'"),
        (["--map", "(=x"], "--map '(=x'"),
        (["--map", r"model=\9"], "--map"),
        (["--max-shard-size", "big"], "--max-shard-size 'big'"),
        (["--projector", "magic"], "--projector 'magic'"),
        (["--remember-layers", "5"], "remember_layers"),
        (["--remember-layers", "2"], "source: remember_layers must be different decoder layers from 0 to 1"),
        (["--remember-layers", "0", "--remember-feature-layers", "9"], "remember_feature_layers"),
        (["--vision-tower", "/nowhere/clip"], "--vision-tower"),
    ],
    ids=str,
)
def test_options_that_are_refused(options, words, llava, capsys):
    assert words in refused(llava(), capsys, *options)


def test_tower_that_is_not_needed_is_refused(tmp_path, capsys, clip_folder, save_tokenizer):
    randomize(theirs("llava")).save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    assert "has its own" in refused(tmp_path / "source", capsys, "--vision-tower", str(clip_folder))


def test_projector_in_the_place_of_the_source_s(llava, tmp_path):
    """avg_pool keeps the two layers of LLaVA's, another is new."""
    folder = llava()
    theirs = load_file(folder / "model.safetensors")
    for name, kept in (("avg_pool", True), ("ldpv2", False)):
        result = convert(folder, tmp_path / name, projector=name)
        assert result.plan.config.projector_type == name and result.plan.config.projector_downsample == 2
        weights = load(tmp_path / name).state_dict()
        found = weights["model.multi_modal_projector.linear_1.weight"]
        assert torch.equal(found, theirs["model.mm_projector.0.weight"]) == kept
    assert {reason for _, reason in result.plan.dropped} == {"replaced by --projector"}
