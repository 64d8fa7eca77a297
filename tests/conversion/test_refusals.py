"""Sources that would be read wrongly are refused, by a line that names the reason; their neighbours are read."""

import json

import pytest
import torch
from transformers import (
    AutoProcessor,
    CLIPVisionModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Dinov2Config,
    Dinov2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
)

from builders import (
    SIZES,
    TEXT,
    VISION,
    Research,
    load,
    logits,
    make_clip,
    make_decoder,
    make_inputs,
    mlp_shapes,
    random_tensors,
    randomize,
    refused,
    theirs,
)
from llava_vr.conversion.sources import _sub_config
from llava_vr.convert_weights import convert


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def decoder(tmp_path, save_tokenizer):
    """The folder of a language model."""
    make_decoder().save_pretrained(tmp_path / "text")
    save_tokenizer(tmp_path / "text")
    return tmp_path / "text"


# ---- features


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
def test_siglip_whose_first_patch_is_dropped(kind, tmp_path, capsys, save_tokenizer):
    source = theirs(kind)
    source.config.vision_config = SiglipVisionConfig(**VISION, vision_use_head=False)
    source = type(source)(source.config)
    source.config.vision_feature_select_strategy = "default"
    source.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    assert "vision_feature_select_strategy 'default' drops the first patch" in refused(tmp_path / "source", capsys)


def test_siglip_with_all_patches_is_read(tmp_path, save_tokenizer):
    text, vision = make_decoder().config, SiglipVisionConfig(**VISION, vision_use_head=False)
    parts = {"vision_config": vision, "text_config": text}
    config = LlavaConfig(**parts, image_token_index=3, vision_feature_select_strategy="full")
    source = randomize(LlavaForConditionalGeneration(config))
    source.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", verify=True)
    model = load(tmp_path / "out")
    inputs = make_inputs(model.config, SIZES)
    assert torch.equal(logits(model, inputs), logits(source, inputs))


@pytest.mark.parametrize(("image_size", "is_read"), [(120, False), (96, True)], ids=["30 x 30", "24 x 24"])
def test_ldpv2_on_a_grid_that_its_tokens_do_not_divide(image_size, is_read, tmp_path, capsys, save_tokenizer):
    """MobileVLM pools to 12 x 12 tokens, whatever the grid."""
    tower, inner, outer = make_clip(image_size=image_size, patch_size=4), VISION["hidden_size"], TEXT["hidden_size"]
    tower.save_pretrained(tmp_path / "clip")
    shapes = mlp_shapes("mlp.mlp.0", "mlp.mlp.2", inner, outer, outer)
    projector = random_tensors(shapes | {"peg.peg.0.weight": (outer, 1, 3, 3), "peg.peg.0.bias": (outer,)})
    config = {"model_type": "mobilevlm", "architectures": ["MobileLlamaForCausalLM"], "image_aspect_ratio": "pad"}
    config |= {"mm_projector_type": "ldpnetv2", "mm_vision_tower": str(tmp_path / "clip")}
    folder = Research(tower, make_decoder(), projector, None, **config).save(tmp_path / "source")
    save_tokenizer(folder)
    if is_read:
        assert convert(folder, tmp_path / "out").plan.config.projector_downsample == 2
    else:
        assert "ldpv2 pools to 12 x 12 tokens: on a grid of 30 x 30" in refused(folder, capsys)


# ---- ends of generation


def test_generation_ends_at_the_source_s_ends_and_at_that_of_a_turn(tmp_path, clip_folder, tokenizer):
    """A base model's own end is that of a text, which no answer of the chat template has."""
    model = make_decoder("qwen2", vocab_size=320)
    model.generation_config.eos_token_id = 263  # <|endoftext|>
    model.save_pretrained(tmp_path / "text")
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|endoftext|>", "<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path / "text")
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def ends(name, **options):
        convert(tmp_path / "text", tmp_path / name, vision_tower=clip_folder, **options)
        return json.loads((tmp_path / name / "generation_config.json").read_text())["eos_token_id"]

    assert ends("qwen") == [263, turn]
    assert ends("vicuna", conversation="vicuna_v1") == [263, tokenizer.eos_token_id]
    assert ends("plain", conversation="plain") == 263
    template = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}<|im_start|>image{% endfor %}"
    (tmp_path / "text" / "chat_template.jinja").write_text(template)
    assert ends("own") == [263, tokenizer.convert_tokens_to_ids("<|im_start|>")]
    processor = AutoProcessor.from_pretrained(tmp_path / "own", trust_remote_code=True)
    assert processor.chat_template == template
    model.generation_config.eos_token_id = [turn, 7]
    model.generation_config.save_pretrained(tmp_path / "text")
    assert ends("both", conversation="qwen") == [turn, 7]

    def favour_the_end(module, inputs, output):
        output.logits[..., turn] = 99

    found = load(tmp_path / "qwen")
    found.register_forward_hook(favour_the_end)
    assert found.generate(torch.tensor([[5, 6]]), max_new_tokens=30, do_sample=False).tolist() == [[5, 6, turn]]


# ---- options and kinds of sources


def test_base_model_of_a_complete_source_is_refused(llava, decoder, capsys):
    line = refused(llava(), capsys, "--base-model", str(decoder))
    assert "--base-model" in line and "is complete, with a tokenizer of its own" in line


def test_mixtures_of_experts(tmp_path, capsys, clip_folder, save_tokenizer):
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8}
    experts |= {"qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8, "first_k_dense_replace": 0}
    experts |= {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    for kind, model in (
        ("mixtral", MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=4))),
        ("deepseek_v3", DeepseekV3ForCausalLM(DeepseekV3Config(**{**TEXT, **experts}))),
    ):
        model.save_pretrained(tmp_path / kind)
        save_tokenizer(tmp_path / kind)
        line = refused(tmp_path / kind, capsys, "--vision-tower", str(clip_folder))
        assert f"decoder '{kind}' is a mixture of experts" in line


def test_naflex_variant_of_siglip_2(decoder, tmp_path, capsys):
    sizes = {name: value for name, value in VISION.items() if name != "image_size"}
    Siglip2VisionModel(Siglip2VisionConfig(**sizes, num_patches=16)).save_pretrained(tmp_path / "tower")
    assert "SigLIP 2's NaFlex variant" in refused(decoder, capsys, "--vision-tower", str(tmp_path / "tower"))


def test_siglip_2_of_a_fixed_size_is_read(decoder, tmp_path):
    """Its checkpoints have the classes of SigLIP, with the text's side."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    siglip = randomize(SiglipModel(SiglipConfig(vision_config=VISION, text_config=text)))
    siglip.save_pretrained(tmp_path / "tower")
    result = convert(decoder, tmp_path / "out", vision_tower=tmp_path / "tower", verify=True)
    assert "image features as SiglipVisionModel's of the source" in result.verified


def test_other_towers(decoder, tmp_path, capsys):
    Dinov2Model(Dinov2Config(**VISION)).save_pretrained(tmp_path / "tower")
    line = refused(decoder, capsys, "--vision-tower", str(tmp_path / "tower"))
    assert "vision tower 'dinov2': the towers that are read are clip_vision_model, siglip_vision_model" in line


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_quantized_weights(method, decoder, llava, tmp_path, capsys):
    """Of a language model, of a model of images and text, of a tower."""
    CLIPVisionModel(make_clip().config).save_pretrained(tmp_path / "clip")
    quantized = {"quantization_config": {"quant_method": method, "bits": 4}}
    words = f"quantization_config ({method}): quantised weights are not read"
    for path, source in ((decoder, decoder), (llava(), llava()), (tmp_path / "clip", decoder)):
        before = (path / "config.json").read_text()
        edit(path / "config.json", **quantized)
        assert words in refused(source, capsys, "--vision-tower", str(tmp_path / "clip"))
        (path / "config.json").write_text(before)
    (decoder / "quantize_config.json").write_text('{"bits": 4}')  # as AutoGPTQ has it
    assert "quantised weights are not read" in refused(decoder, capsys, "--vision-tower", str(tmp_path / "clip"))


def test_aliases_of_fields_are_read():
    assert _sub_config({"model_type": "gpt_oss", "num_experts": 4}, "gpt_oss", "language model").num_local_experts == 4
