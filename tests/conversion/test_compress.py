"""`--compress`, `--set`, and sources whose projector reads several layers of the tower, as Granite Vision's does."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    GraniteConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    SiglipVisionConfig,
)

from builders import (
    ANYRES,
    IMAGE_ID,
    PINPOINTS,
    SIZES,
    TEXT,
    TOLERANCE,
    VISION,
    load,
    logits,
    make_inputs,
    make_llava,
    randomize,
    refused,
    theirs,
)
from llava_vr.conversion.readers import ConversionError
from llava_vr.conversion.verify import verify
from llava_vr.convert_weights import convert, main


def granite():
    """Granite Vision in small: SigLIP, four of its layers joined, and a Granite decoder with all of its multipliers."""
    multipliers = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
    config = LlavaNextConfig(
        vision_config=SiglipVisionConfig(**{**VISION, "num_hidden_layers": 6}, vision_use_head=False),
        text_config=GraniteConfig(**TEXT, logits_scaling=4.0, **multipliers),
        vision_feature_layer=[-6, -4, -3, -1],
        vision_feature_select_strategy="full",
        image_grid_pinpoints=PINPOINTS,
        image_token_index=IMAGE_ID,
    )
    return LlavaNextForConditionalGeneration(config)


@pytest.fixture
def saved(tmp_path, save_tokenizer):
    def save(source, **options):
        randomize(source).save_pretrained(tmp_path / "source", **options)
        save_tokenizer(tmp_path / "source")
        return source, tmp_path / "source"

    return save


def at(model, downsample):
    """The logits with images of this s."""
    config, inputs = model.config, None
    config.projector_downsample, default = downsample, config.projector_downsample
    try:
        inputs = make_inputs(config, SIZES)
    finally:
        config.projector_downsample = default
    return inputs, logits(model, inputs | {"image_downsamples": torch.tensor([downsample] * len(SIZES))})


@pytest.mark.parametrize("original", [True, False], ids=["today's layout", "older layout"])
def test_granite_vision(original, saved, tmp_path):
    source, folder = saved(granite(), save_original_format=original)
    names = load_file(folder / "model.safetensors")
    assert ("language_model.lm_head.weight" in names) == original == ("model.language_model.norm.weight" not in names)
    result = convert(folder, tmp_path / "out", verify=True)
    assert "logits as LlavaNextForConditionalGeneration's" in result.verified
    model = load(tmp_path / "out")
    inputs = make_inputs(model.config, SIZES)
    expected = logits(source, inputs)
    assert expected.abs().max() > 1 and (logits(model, inputs) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("make", [granite, lambda: theirs("llava_next"), lambda: theirs("llava_onevision")])
def test_compressed_model_is_its_source_at_1(make, saved, tmp_path):
    source, folder = saved(make())
    result = convert(folder, tmp_path / "out", compress=[2, 4], verify=True)
    assert f"logits at s = 1 as {type(source).__name__}'s of the source (largest difference 0)" in result.verified
    assert "1, 2, 4; by default 2" in result.summary() and "decoder layers: 0, 1" in result.summary()
    model = load(tmp_path / "out")
    config = model.config
    assert config.projector_downsample_choices == [1, 2, 4] and config.projector_downsample == 2
    assert config.projector_type == "avg_pool" and config.remember_layers == [0, 1]
    inputs, found = at(model, 1)
    assert torch.equal(found, logits(source, inputs))
    shorter = [at(model, s)[0]["input_ids"].shape[1] for s in (1, 2, 4)]
    assert shorter == sorted(shorter, reverse=True) and len(set(shorter)) == 3


def test_compressed_research_checkpoint_is_its_source_at_1(tmp_path, clip_folder, save_tokenizer):
    folder = make_llava(**ANYRES).save(tmp_path / "source")
    save_tokenizer(folder)
    result = convert(folder, tmp_path / "out", vision_tower=clip_folder, compress=[4], verify=True)
    assert "logits at s = 1 as LlavaNextForConditionalGeneration's of the source" in result.verified
    assert result.plan.config.projector_downsample_choices == [1, 4]


def test_layers_of_the_tower_that_nothing_reads_are_cut(saved, tmp_path):
    source, folder = saved(theirs("llava_next"))
    options = {"remember_feature_layers": [1, 2], "remember_layers": [0]}
    result = convert(folder, tmp_path / "out", compress=[2], verify=True, **options)
    assert result.plan.config.vision_config.num_hidden_layers == VISION["num_hidden_layers"] - 1
    assert "(largest difference 0)" in result.verified
    inputs, found = at(load(tmp_path / "out"), 1)
    assert torch.equal(found, logits(source, inputs))


def test_two_tensors_in_each_other_s_place(saved, tmp_path):
    _, folder = saved(granite())
    result = convert(folder, tmp_path / "out", compress=[2], verify=True)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    first, second = (f"model.multi_modal_projector.linear_{i}.bias" for i in (1, 2))
    weights[first], weights[second] = weights[second], weights[first]
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match="logits at s = 1 differ"):
        verify(tmp_path / "out", result.source, result.plan)


def test_our_own_uncompressed_model_and_again(saved, tmp_path):
    _, folder = saved(theirs("llava_next"))
    convert(folder, tmp_path / "plain")
    result = convert(tmp_path / "plain", tmp_path / "out", compress=[2], verify=True)
    assert "logits at s = 1 as LlavaVrForConditionalGeneration's of the source" in result.verified
    again = convert(tmp_path / "out", tmp_path / "again", compress=[4, 2], verify=True)
    assert again.plan.config.projector_downsample_choices == [1, 4, 2]
    assert "logits at s = 2 as LlavaVrForConditionalGeneration's of the source" in again.verified


def test_a_distilled_model_keeps_the_mlp_of_its_means(saved, tmp_path):
    _, folder = saved(theirs("llava_next"))
    convert(folder, tmp_path / "compressed", compress=[2])
    model = load(tmp_path / "compressed")
    model.config.projector_kwargs["pooled_mlp"] = True
    distilled = randomize(type(model)(model.config))
    distilled.save_pretrained(tmp_path / "distilled")
    AutoProcessor.from_pretrained(tmp_path / "compressed", trust_remote_code=True).save_pretrained(
        tmp_path / "distilled"
    )
    convert(tmp_path / "distilled", tmp_path / "again", compress=[4, 2], verify=True)
    again = load(tmp_path / "again")
    assert again.config.projector_kwargs == {"pooled_mlp": True} and again.config.projector_downsample == 4
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in distilled.state_dict().items())


def test_layers_and_fields_of_the_command_line(saved, tmp_path):
    _, folder = saved(theirs("llava_next"))
    options = ["--compress", "2", "--remember-layers", "1", "--set", "remember_window_ratio=1.0"]
    options += ["--set", "remember_hidden_size=32", "--set", "remember_num_heads=4", "--set", "image_aspect_ratio=pad"]
    assert main([str(folder), str(tmp_path / "out"), *options]) == 0
    config = load(tmp_path / "out").config
    assert (config.remember_layers, config.remember_window_ratio, config.remember_hidden_size) == ([1], 1.0, 32)
    assert (config.remember_num_heads, config.image_aspect_ratio) == (4, "pad")
    convert(folder, tmp_path / "without", compress=[2], remember_layers=[])
    assert load(tmp_path / "without").config.remember_layers == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--compress", "2", "--projector", "ldpv2"], "--compress decides the projector"),
        (["--compress", "9"], "projector_downsample_choices must be different integers from 1 to 4"),
        (["--set", "remember_window_ratio"], "FIELD=VALUE"),
        (["--set", "colour=red"], "a field of LlavaVrConfig"),
        (["--set", "projector_type=mlp"], "use --projector"),
        (["--set", "vision_config={}"], "SOURCE decides it"),
        (["--compress", "2", "--set", "remember_num_heads=5"], "remember_num_heads must divide"),
        (["--set", "remember_window_ratio=wide"], "remember_window_ratio"),
    ],
    ids=str,
)
def test_what_is_refused(options, words, saved, capsys):
    assert words in refused(saved(theirs("llava_next"))[1], capsys, *options)
