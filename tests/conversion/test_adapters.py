"""LoRA adapters, merged by the converter, against PEFT's own merge."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from builders import SIZES, TEXT, load, logits, make_decoder, make_inputs, randomize, refused, theirs
from llava_vr.conversion.readers import ConversionError
from llava_vr.convert_weights import convert


DECODER = r".*language_model\.layers\..*_proj"
SCRIPT = Path(__file__).parents[2] / "examples" / "finetune.py"


@pytest.fixture(scope="module")
def finetune():
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bases(tmp_path_factory, save_tokenizer, clip_folder):
    """Folders of each kind of base, by name."""
    folder = tmp_path_factory.mktemp("bases")
    randomize(theirs("llava_next")).save_pretrained(folder / "llava_next")
    save_tokenizer(folder / "llava_next")
    convert(folder / "llava_next", folder / "fresh", remember_layers=[0])
    model = randomize(load(folder / "fresh"))  # modules that have an effect
    convert(folder / "fresh", folder / "llava_vr")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "llava_vr" / "model.safetensors", metadata={"format": "pt"})
    for name, kind, tied in (("llama", "llama", False), ("qwen2", "qwen2", True)):
        make_decoder(kind, tie_word_embeddings=tied).save_pretrained(folder / name)
        save_tokenizer(folder / name)
    return folder


def read(folder):
    """A base as training code loads it."""
    is_decoder = json.loads((folder / "config.json").read_text())["model_type"] in ("llama", "qwen2")
    return AutoModelForCausalLM.from_pretrained(folder) if is_decoder else load(folder)


def train(adapted, folder):
    """Saves an adapter whose weights are as if they had been trained."""
    generator = torch.Generator().manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    adapted.save_pretrained(folder)
    return folder


def check_merged(base, adapter, out, **options):
    """Converts an adapter and compares logits with those of PEFT's merge."""
    result = convert(adapter, out, verify=True, **options)
    plain, model = read(base), load(out)
    is_decoder = "vision_tower" in options
    inputs = {"input_ids": torch.arange(5, 40)[None]} if is_decoder else make_inputs(model.config, SIZES)
    before = logits(plain, inputs)
    expected = logits(PeftModel.from_pretrained(plain, adapter).merge_and_unload(), inputs)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(logits(model, inputs)[..., : expected.shape[-1]], expected, rtol=0, atol=1e-5)
    return result


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_adapters_of_the_fine_tuning_script(quantize, bases, tmp_path, finetune):
    """Those of quantized training go onto the weights that were quantized."""
    options = {}
    if quantize:
        pytest.importorskip("bitsandbytes")
        options["quantization_config"] = finetune.QUANTIZATIONS[quantize]
    base = bases / "llava_vr"
    model = AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=True, dtype=torch.float32, **options)
    adapter = train(finetune.set_stage(model, "lora", rank=4), tmp_path / "adapter")
    result = check_merged(base, adapter, tmp_path / "out")
    assert sum(step.low_rank is not None for step in result.plan.steps) == 7 * TEXT["num_hidden_layers"]
    assert "logits as LlavaVrForConditionalGeneration's of the source" in result.verified
    assert result.summary().startswith("LoRA adapter of LLaVA-VR: ")


VARIANTS = {
    "modules": {"target_modules": DECODER, "modules_to_save": ["multi_modal_projector", "lm_head"]},
    "patterns": {
        "target_modules": ["q_proj", "down_proj", "fc1"],
        "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
        "alpha_pattern": {r"encoder\.layers\.0\..*": 1, "q_proj": 3},
    },
    "square root of the rank": {"target_modules": ["v_proj"], "use_rslora": True, "alpha_pattern": {"v_proj": 5}},
    "all linear layers": {"target_modules": "all-linear", "bias": "all"},
    "embeddings and convolution": {"target_modules": ["embed_tokens", "patch_embedding", "lm_head"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["llava_vr", "llava_next"])
def test_variants_of_lora(kind, variant, bases, tmp_path):
    settings = LoraConfig(r=4, lora_alpha=10, **VARIANTS[variant])
    adapter = train(get_peft_model(read(bases / kind), settings), tmp_path / "adapter")
    check_merged(bases / kind, adapter, tmp_path / "out")


def test_modules_of_vision_remember(bases, tmp_path):
    """Trained whole or by LoRA; new ones may stand beside them."""
    for name, settings in (
        ("whole", {"target_modules": DECODER, "modules_to_save": ["vision_remember.0"]}),
        ("low rank", {"target_modules": r".*vision_remember\.0\.(query|key|value|out)"}),
    ):
        model = get_peft_model(read(bases / "llava_vr"), LoraConfig(r=4, **settings))
        adapter = train(model, tmp_path / name)
        check_merged(bases / "llava_vr", adapter, tmp_path / f"{name} out", remember_layers=[0, 1])
        without = convert(adapter, tmp_path / f"{name} without", remember_layers=[], verify=True)
        assert without.plan.config.remember_layers == [] and "not compared: projector" in without.verified


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_adapter_of_a_plain_decoder(kind, bases, tmp_path, clip_folder):
    settings = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    adapter = train(get_peft_model(read(bases / kind), settings), tmp_path / "adapter")
    result = check_merged(bases / kind, adapter, tmp_path / "out", vision_tower=clip_folder, remember_layers=[0])
    assert "text-only logits as" in result.verified and "not compared" not in result.verified


@pytest.fixture
def adapter(bases, tmp_path):
    """A small adapter of the language model of transformers' llava_next."""
    settings = LoraConfig(r=2, target_modules=DECODER)
    return train(get_peft_model(read(bases / "llava_next"), settings), tmp_path / "adapter")


def edit(folder, **changes):
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | changes))


def test_base_is_found_beside_the_adapter_or_named(adapter, bases, tmp_path, capsys):
    edit(adapter, base_model_name_or_path="../base")
    line = refused(adapter, capsys)
    assert "base_model_name_or_path '../base'" in line and "--base-model" in line
    convert(adapter, tmp_path / "named", base_model=bases / "llava_next")
    (tmp_path / "base").symlink_to(bases / "llava_next")
    convert(adapter, tmp_path / "relative")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("named", "relative")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    for name in (None, "somebody/a-model-of-the-hub"):  # nothing is downloaded
        edit(adapter, base_model_name_or_path=name)
        assert "--base-model" in refused(adapter, capsys)


def test_names_of_older_transformers(adapter, tmp_path):
    """Where PEFT itself finds no place for an adapter, `--verify` says so."""
    convert(adapter, tmp_path / "new")
    path = adapter / "adapter_model.safetensors"
    old = {
        k.replace("model.model.language_model.", "model.language_model.model."): v for k, v in load_file(path).items()
    }
    save_file(old, path)
    verified = convert(adapter, tmp_path / "old", verify=True).verified
    assert "logits as LlavaNext" in verified or "not compared: language model, vision tower, projector" in verified
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("new", "old")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_base_that_is_an_adapter_is_refused(adapter, tmp_path, capsys):
    (adapter / "config.json").write_text("{}")
    (tmp_path / "second").mkdir()
    for path in adapter.iterdir():
        (tmp_path / "second" / path.name).write_bytes(path.read_bytes())
    edit(tmp_path / "second", base_model_name_or_path=str(adapter))
    assert "is an adapter, too" in refused(tmp_path / "second", capsys)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"layer_replication": [[0, 1]]},
        {"target_parameters": ["experts.down_proj"]},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"a_setting_of_the_future": 3},
        {"peft_type": "IA3"},
    ],
    ids=str,
)
def test_adapters_that_are_refused_by_name(changes, adapter, capsys):
    edit(adapter, **changes)
    assert f"adapter_config.json: {next(iter(changes))}" in refused(adapter, capsys)


def test_other_methods_of_peft_are_refused_by_name(bases, tmp_path, capsys):
    settings = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(read(bases / "llama"), settings).save_pretrained(tmp_path / "adapter")
    assert "peft_type 'IA3'" in refused(tmp_path / "adapter", capsys)


def test_tensors_without_a_place_are_refused_by_name(adapter, capsys):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    assert "has no A beside it" in refused(adapter, capsys)
    save_file({k.replace("layers.1.", "layers.7."): v for k, v in tensors.items()}, path)
    assert "layers.7." in refused(adapter, capsys)
    save_file({**tensors, name: torch.ones(2, 5)}, path)
    assert "do not fit" in refused(adapter, capsys)


@pytest.mark.parametrize("settings", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_tied_weights_that_an_adapter_unties_are_refused(settings, bases, tmp_path, capsys, clip_folder):
    model = get_peft_model(read(bases / "qwen2"), LoraConfig(r=2, **{"target_modules": ["q_proj"], **settings}))
    adapter = train(model, tmp_path / "adapter")
    assert "tie_word_embeddings" in refused(adapter, capsys, "--vision-tower", str(clip_folder))


def test_verify_finds_a_wrong_merge(adapter, tmp_path, monkeypatch):
    from llava_vr.conversion.adapters import LowRank

    delta = LowRank.delta
    monkeypatch.setattr(LowRank, "delta", lambda self, a, b: 1.5 * delta(self, a, b))
    with pytest.raises(ConversionError, match="--verify: logits differ from those of LlavaNext"):
        convert(adapter, tmp_path / "out", verify=True)
