"""bitsandbytes: what is quantized, that it answers, is saved and comes back, and that LoRA learns on top of it."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from llava_vr import LlavaVrForConditionalGeneration, LlavaVrModel


bnb = pytest.importorskip("bitsandbytes")
ROWS = [[5, 6, 7, 8], [9, (40, 90), 10, 11]]
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def config(tiny_config):
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    return tiny_config(projector_kwargs={}, projector_type="avg_pool", text=sizes)


@pytest.fixture(scope="module")
def folder(config, make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(config).save_pretrained(folder)
    return folder


def load(folder, **options):
    options = {"trust_remote_code": True, **options}
    return AutoModelForImageTextToText.from_pretrained(folder, **options).eval()


def quantized(model) -> set[str]:
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def decoder_linears(model) -> set[str]:
    return {name for name, m in model.named_modules() if "language_model" in name and isinstance(m, torch.nn.Linear)}


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_decoder_is_quantized(config, folder, make_inputs, tmp_path, kind):
    plain, options = load(folder), BitsAndBytesConfig(**KINDS[kind])
    model = load(folder, quantization_config=options)
    assert quantized(model) == decoder_linears(plain) and len(quantized(model)) == 21
    assert options.llm_int8_skip_modules is None, "the user's own object is left alone"
    weights = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in quantized(model):
            assert torch.equal(parameter, weights[name]), name

    inputs = make_inputs(config, ROWS)
    with torch.no_grad():
        logits, exact = model(**inputs).logits, plain(**inputs).logits
    error = (logits - exact).abs().mean() / exact.abs().mean()
    assert 0 < error < (0.05 if kind == "int8" else 0.4)
    answers = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert answers.shape[1] > inputs["input_ids"].shape[1]

    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert quantized(again) == quantized(model)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, logits)
        assert torch.equal(model(**inputs).logits, logits), "saving leaves the model as it was"


def test_without_the_head_and_with_names_of_ones_own(folder):
    options = BitsAndBytesConfig(load_in_4bit=True)
    bare = LlavaVrModel.from_pretrained(folder, quantization_config=options)
    assert quantized(bare) == decoder_linears(bare)
    named = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["model.language_model"])
    model = LlavaVrForConditionalGeneration.from_pretrained(folder, quantization_config=named)
    assert "model.vision_remember.0.query" in quantized(model) and not decoder_linears(model) & quantized(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dictionary_means_the_same(folder, kind):
    options = {"quant_method": "bitsandbytes", **KINDS[kind]}
    model = load(folder, quantization_config=options)
    assert quantized(model) == decoder_linears(model) and len(quantized(model)) == 21
    assert options == {"quant_method": "bitsandbytes", **KINDS[kind]}, "the user's own object is left alone"


@pytest.mark.parametrize("kind", KINDS)
def test_lora_learns_on_top(config, folder, make_inputs, kind):
    peft = pytest.importorskip("peft")
    model = load(folder, quantization_config=BitsAndBytesConfig(**KINDS[kind]))
    modules = ["multi_modal_projector", *(f"vision_remember.{i}" for i in config.remember_layers)]
    lora = peft.LoraConfig(target_modules=r".*language_model.*_proj", modules_to_save=modules, init_lora_weights=True)
    model = peft.get_peft_model(model, lora).train()
    inputs = make_inputs(config, ROWS)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in learned.items()}
    optimizer = torch.optim.AdamW(learned.values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for part in ("lora_A", "lora_B", "multi_modal_projector", *modules[1:]):
        assert any(part in name and not torch.equal(learned[name], before[name]) for name in learned), part
