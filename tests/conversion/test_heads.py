"""What decoders do between their head and their logits is kept in a model that is made of parts."""

import dataclasses
import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GraniteConfig

from builders import SIZES, TEXT, load, logits, make_inputs, randomize, refused, theirs
from llava_vr.conversion.readers import ConversionError
from llava_vr.conversion.verify import verify
from llava_vr.convert_weights import convert


FAMILIES = {  # with settings under which their logits differ from those of the head alone
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 16, "final_logit_softcapping": 2.0},
    "smollm3": {},
    "phi3": {},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "hyperclovax": {"logits_scaling": 0.25},
    "vaultgemma": {"head_dim": 16, "final_logit_softcapping": 2.0},
    "olmo2": {},
    "glm4": {"head_dim": 16},
}


def save_decoder(kind, folder, save_tokenizer, **settings):
    config_class = CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in {**TEXT, **FAMILIES.get(kind, {}), **settings}.items() if name in known}
    decoder = randomize(AutoModelForCausalLM.from_config(config_class(**values)))
    decoder.save_pretrained(folder)
    save_tokenizer(folder)
    return decoder


@pytest.mark.parametrize("kind", FAMILIES)
def test_text_only_logits_are_the_decoder_s_own(kind, tmp_path, clip_folder, save_tokenizer):
    decoder = save_decoder(kind, tmp_path / "text", save_tokenizer)
    result = convert(tmp_path / "text", tmp_path / "out", vision_tower=clip_folder, verify=True)
    inputs = {"input_ids": torch.arange(5, 40)[None]}
    expected, model = logits(decoder, inputs), load(tmp_path / "out")
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-5)
    assert f"text-only logits as {type(decoder).__name__}'s of the source" in result.verified
    alone = model.lm_head(model.model(**inputs).last_hidden_state)
    fields = {"final_logit_softcapping", "logits_scaling", "logit_scale"} & FAMILIES[kind].keys()
    assert torch.allclose(alone, expected, atol=1e-3) == (not fields)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    torch.testing.assert_close(loss, decoder(**inputs, labels=inputs["input_ids"]).loss, rtol=0, atol=1e-5)


def test_verify_finds_a_lost_scale(tmp_path, clip_folder, save_tokenizer):
    save_decoder("granite", tmp_path / "text", save_tokenizer)
    result = convert(tmp_path / "text", tmp_path / "out", vision_tower=clip_folder)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["text_config"]["logits_scaling"] = 1.0
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match="text-only logits differ from those of GraniteForCausalLM"):
        verify(tmp_path / "out", result.source, result.plan)


def test_models_of_transformers_that_leave_the_scale_out_stay_as_they_are(tmp_path, save_tokenizer):
    """transformers' LLaVA-NeXT takes the head's logits as they are, whatever the decoder does alone."""
    text = GraniteConfig(**TEXT, logits_scaling=4.0, tie_word_embeddings=False)
    source = randomize(theirs("llava_next", text_config=text))
    source.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", verify=True)
    model = load(tmp_path / "out")
    inputs = make_inputs(model.config, SIZES)
    assert torch.equal(logits(model, inputs), logits(source, inputs))


@pytest.mark.parametrize("kind", ["falcon_h1", "recurrent_gemma", "xlstm", "inkling_text", "inkling2_text"])
def test_heads_that_are_not_known_are_refused_by_name(kind, tmp_path, clip_folder, capsys):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps({"model_type": kind}))
    line = refused(tmp_path / "text", capsys, "--vision-tower", str(clip_folder))
    assert f"decoder '{kind}' changes its logits after its head" in line


def test_fields_that_a_class_does_not_declare_are_kept(tmp_path, clip_folder, save_tokenizer):
    """Qwen2 has no `head_dim` of its own, but its layers take one."""
    decoder = save_decoder("qwen2", tmp_path / "text", save_tokenizer)
    config = type(decoder.config).from_dict({**decoder.config.to_dict(), "head_dim": 16})
    decoder = randomize(AutoModelForCausalLM.from_config(config))
    decoder.save_pretrained(tmp_path / "text")
    assert decoder.model.layers[0].self_attn.q_proj.out_features == 4 * 16
    convert(tmp_path / "text", tmp_path / "out", vision_tower=clip_folder, verify=True)
    inputs = {"input_ids": torch.arange(5, 40)[None]}
    torch.testing.assert_close(logits(load(tmp_path / "out"), inputs), logits(decoder, inputs), rtol=0, atol=1e-5)
