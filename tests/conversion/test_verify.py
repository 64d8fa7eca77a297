"""`--verify` sees a tensor in a wrong place, in results of every kind of source, and says what it did not compare."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from builders import ANYRES, check, load, make_decoder, make_llava, randomize, theirs
from llava_vr.conversion import plan
from llava_vr.conversion.readers import ConversionError
from llava_vr.conversion.verify import verify
from llava_vr.convert_weights import convert


LAYER = "model.language_model.layers.{}.input_layernorm.weight"
DECODER = (LAYER.format(0), LAYER.format(1))
TOWER = tuple(f"model.vision_tower.encoder.layers.0.layer_norm{i}.weight" for i in (1, 2))
PROJECTOR = tuple(f"model.multi_modal_projector.linear_{i}.bias" for i in (1, 2))


@pytest.fixture
def sources(tmp_path, clip_folder, save_tokenizer):
    """`sources(kind)`: a folder of this kind, and the options of its conversion."""

    def llava_next():
        randomize(theirs("llava_next")).save_pretrained(tmp_path / "source")
        return tmp_path / "source", {}

    def llava_vr():
        convert(llava_next()[0], tmp_path / "first", remember_layers=[0])
        weights = randomize(load(tmp_path / "first")).state_dict()
        save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "first" / "model.safetensors")
        return tmp_path / "first", {"remember_layers": [0, 1]}

    def research(suffix="safetensors", with_tower=False):
        source = make_llava(**ANYRES)
        return source.save(tmp_path / "source", with_tower, 2, suffix), {"vision_tower": clip_folder}

    def stage_1():
        folder, options = research()
        source = make_llava(**ANYRES)
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(source.config))
        tensors = {k: v for k, v in source.tensors(False).items() if "mm_projector" in k or "newline" in k}
        torch.save(tensors, folder / "mm_projector.bin")
        source.decoder.save_pretrained(tmp_path / "base")
        save_tokenizer(tmp_path / "base")
        return folder, options | {"base_model": tmp_path / "base"}

    def research_adapter():
        folder, options = stage_1()
        (folder / "mm_projector.bin").rename(folder / "non_lora_trainables.bin")
        adapted = randomize(get_peft_model(make_decoder(), LoraConfig(r=2, target_modules=["q_proj"])))
        adapted.save_pretrained(folder)
        return folder, options

    def parts():
        make_decoder().save_pretrained(tmp_path / "source")
        return tmp_path / "source", {"vision_tower": clip_folder, "remember_layers": [0]}

    def flat_tiles():
        source = make_llava(**{**ANYRES, "mm_patch_merge_type": "flat"})
        return source.save(tmp_path / "source"), {"vision_tower": clip_folder}

    kinds = {function.__name__: function for function in (llava_next, llava_vr, research, stage_1, research_adapter)}
    kinds |= {function.__name__: function for function in (parts, flat_tiles)}
    kinds["research in .bin, with a tower"] = lambda: research("bin", with_tower=True)

    def make(kind):
        (tmp_path / "source").mkdir()
        save_tokenizer(tmp_path / "source")
        folder, options = kinds[kind]()
        save_tokenizer(folder)
        return folder, options

    return make


def swap(folder, first, second):
    weights = load_file(folder / "model.safetensors")
    weights[first], weights[second] = weights[second], weights[first]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


WHOLE = {
    "llava_next": "logits as LlavaNextForConditionalGeneration's",
    "llava_vr": "logits as LlavaVrForConditionalGeneration's",
    "research": "logits as LlavaNextForConditionalGeneration's",
    "research in .bin, with a tower": "logits as LlavaNextForConditionalGeneration's",
    "stage_1": "logits as LlavaNextForConditionalGeneration's",
    "research_adapter": "logits as LlavaNextForConditionalGeneration's",
}


@pytest.mark.parametrize("kind", WHOLE)
def test_two_tensors_in_each_other_s_place(kind, sources, tmp_path):
    folder, options = sources(kind)
    result = convert(folder, tmp_path / "out", verify=True, **options)
    assert f"loads; {WHOLE[kind]} of the source" in result.verified and "not compared" not in result.verified
    modules = tuple(f"model.vision_remember.0.{name}.weight" for name in ("key", "value"))
    for pair in (DECODER, TOWER, PROJECTOR, *([modules] if kind == "llava_vr" else [])):
        swap(tmp_path / "out", *pair)
        with pytest.raises(ConversionError, match="--verify: logits differ from those of"):
            verify(tmp_path / "out", result.source, result.plan)
        swap(tmp_path / "out", *pair)
    assert verify(tmp_path / "out", result.source, result.plan) == result.verified


@pytest.mark.parametrize(("kind", "left"), [("parts", None), ("flat_tiles", "projector")])
def test_parts_are_compared_where_nothing_does_all_that_the_result_does(kind, left, sources, tmp_path):
    folder, options = sources(kind)
    result = convert(folder, tmp_path / "out", verify=True, **options)
    seen = result.verified.split("; ")
    assert seen[1].startswith("text-only logits as LlamaForCausalLM's of the source")
    assert seen[2].startswith("image features as CLIPVisionModel's of the source")
    assert seen[3:] == ([f"not compared: {left}"] if left else [])
    for pair, words in ((DECODER, "text-only logits differ"), (TOWER, "image features differ")):
        swap(tmp_path / "out", *pair)
        with pytest.raises(ConversionError, match=words):
            verify(tmp_path / "out", result.source, result.plan)
        swap(tmp_path / "out", *pair)


def test_what_options_change_is_not_compared(sources, tmp_path):
    folder, _ = sources("llava_vr")
    for name, options, left in (
        ("modules", {"remember_layers": []}, "projector, newline token"),
        ("memory", {"remember_feature_layers": [0, 3]}, "projector, newline token, Vision Remember modules"),
        ("pooled", {"remember_layers": [], "projector": "avg_pool"}, "projector, newline token"),
    ):
        verified = convert(folder, tmp_path / name, verify=True, **options).verified
        assert verified.startswith("loads; text-only logits as") and verified.endswith(f"; not compared: {left}")


def test_without_peft_an_adapted_model_is_not_compared(sources, tmp_path, monkeypatch):
    from llava_vr.conversion import verify as module

    folder, options = sources("research_adapter")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    verified = convert(folder, tmp_path / "out", verify=True, **options).verified
    assert "text-only logits" not in verified and "image features as CLIPVisionModel's" in verified
    assert verified.endswith("not compared: language model, projector, newline token")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_references_are_rounded_as_the_result(dtype, sources, tmp_path):
    folder, options = sources("research_adapter")
    assert "logits as" in convert(folder, tmp_path / "out", verify=True, dtype=dtype, **options).verified


def test_vocabulary_that_grows(tmp_path, clip_folder, save_tokenizer):
    source = make_llava(**ANYRES)
    folder = source.save(tmp_path / "source")
    save_tokenizer(folder, without_image=True)
    result = check(source, folder, tmp_path / "out", vision_tower=clip_folder, verify=True)
    assert result.plan.config.text_config.vocab_size == 320 and "logits as LlavaNext" in result.verified


def test_verify_finds_other_logits(tmp_path, save_tokenizer, monkeypatch):
    source = randomize(theirs("llava_next"))
    source.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    build = plan.TensorBuilder.build

    def swapped(self, step):
        tensor = build(self, step)
        return tensor.flip(0) if step.target.endswith("layers.1.mlp.down_proj.weight") else tensor

    monkeypatch.setattr(plan.TensorBuilder, "build", swapped)
    with pytest.raises(ConversionError, match="logits differ from those of LlavaNextForConditionalGeneration"):
        convert(tmp_path / "source", tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()
