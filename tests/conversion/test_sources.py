"""Checkpoints of transformers, LLaVA's research code and LLaVA-VR, against independent paths."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from builders import (
    ANYRES,
    SIZES,
    TEXT,
    VISION,
    VOCABULARY,
    check,
    gelu_mlp,
    load,
    logits,
    make_clip,
    make_decoder,
    make_inputs,
    make_llava,
    random_tensors,
    randomize,
    refused,
    theirs,
    write_weights,
)
from llava_vr import LlavaVrForConditionalGeneration
from llava_vr.conversion.readers import ConversionError
from llava_vr.convert_weights import convert


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
@pytest.mark.parametrize("layers", [None, [0, 1]], ids=["as it is", "with modules"])
def test_retrofit_is_bit_identical(kind, layers, tmp_path, save_tokenizer):
    source = randomize(theirs(kind))
    source.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", remember_layers=layers, verify=True)
    model = load(tmp_path / "out")
    assert model.config.remember_layers == (layers or [])
    inputs = make_inputs(model.config, SIZES)
    assert torch.equal(logits(model, inputs), logits(source, inputs))
    AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)


@pytest.mark.parametrize("with_tower", [False, True], ids=["named tower", "own tower"])
@pytest.mark.parametrize(("shards", "suffix"), [(1, "bin"), (3, "safetensors"), (2, "bin")])
def test_llava_1_5(shards, suffix, with_tower, tmp_path, clip_folder, save_tokenizer):
    source = make_llava(image_aspect_ratio="pad", mm_vision_tower=str(clip_folder))
    if with_tower:
        source.tower = randomize(CLIPVisionModel(source.tower.config), 99)  # not the named one's weights
    stale = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(6)}
    if with_tower:
        stale["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    folder = source.save(tmp_path / "llava-v1.5", with_tower, shards, suffix, **stale)
    save_tokenizer(folder)
    result = check(source, folder, tmp_path / "out", verify=True)
    assert len(result.plan.dropped) == len(stale)
    assert "LlavaForConditionalGeneration" in result.verified


@pytest.mark.parametrize(
    ("merge", "ratio", "pinpoints"),
    [
        ("spatial_unpad", "anyres", [[64, 32], [32, 64], [64, 64], [32, 96]]),
        ("spatial_unpad", "anyres", "[[64, 32], [32, 64], [64, 64], [32, 96]]"),
        ("spatial_unpad", "anyres_max_2", "(1x1),(1x2),(3x3)"),
        ("spatial", "anyres", [[64, 32], [32, 96]]),
        ("flat", "anyres", [[64, 32], [32, 96]]),
    ],
)
def test_llava_next(merge, ratio, pinpoints, tmp_path, clip_folder, save_tokenizer):
    images = {"mm_patch_merge_type": merge, "image_aspect_ratio": ratio, "image_grid_pinpoints": pinpoints}
    source = make_llava(
        decoder=make_decoder("mistral"), **images, model_type="llava_mistral", architectures=["LlavaMistralForCausalLM"]
    )
    folder = source.save(tmp_path / "source")
    save_tokenizer(folder)
    sizes = [*SIZES, (33, 65), (65, 33), (24, 96)]  # the last is past anyres_max_2, but not past 1.1 times that
    check(source, folder, tmp_path / "out", sizes, vision_tower=clip_folder)
    tilings = json.loads((tmp_path / "out" / "config.json").read_text())["image_grid_pinpoints"]
    assert tilings == [pair[::-1] for pair in source.pinpoints]


def test_settings_of_decoder_and_tower_are_kept(tmp_path, save_tokenizer):
    """Rotary scaling as old configurations spell it, activations, epsilons: each has its effect on the logits."""
    decoder = LlamaConfig(
        **{**TEXT, "rms_norm_eps": 1e-3, "hidden_act": "gelu_pytorch_tanh"},
        attention_bias=True,
        head_dim=16,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
    )
    tower = make_clip(hidden_act="gelu", layer_norm_eps=1e-3)
    tower.save_pretrained(tmp_path / "clip")
    source = make_llava(tower, randomize(LlamaForCausalLM(decoder), 2), image_aspect_ratio="pad")
    source.config["rope_scaling"] = {"type": "linear", "factor": 2.0}
    folder = source.save(tmp_path / "source")
    save_tokenizer(folder)
    check(source, folder, tmp_path / "out", vision_tower=tmp_path / "clip")
    for changes in ({"rope_scaling": None}, {"rms_norm_eps": 1e-5}, {"hidden_act": "silu"}, {"rope_theta": 1e4}):
        (folder / "config.json").write_text(json.dumps(source.config | changes))
        with pytest.raises(AssertionError):
            check(source, folder, tmp_path / "wrong", vision_tower=tmp_path / "clip", overwrite=True)


@pytest.mark.parametrize("tied", [False, True])
def test_image_token_is_added_at_the_end_of_the_vocabulary(tied, tmp_path, clip_folder, save_tokenizer):
    source = make_llava(decoder=make_decoder(tie_word_embeddings=tied), image_aspect_ratio="pad")
    folder = source.save(tmp_path / "source")
    save_tokenizer(folder, without_image=True)
    config = check(source, folder, tmp_path / "out", vision_tower=clip_folder).plan.config
    assert config.image_token_id == VOCABULARY and config.text_config.vocab_size == 320
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == VOCABULARY
    embeddings = load(tmp_path / "out").get_input_embeddings().weight
    mean = source.decoder.get_input_embeddings().weight.mean(0)
    torch.testing.assert_close(embeddings[VOCABULARY:], mean.expand(320 - VOCABULARY, -1))


@pytest.mark.parametrize("with_tower", [False, True], ids=["named tower", "own tower"])
def test_llava_onevision_research(with_tower, tmp_path, save_tokenizer):
    """SigLIP without its last layer, whatever select layer the configuration has; tied embeddings; model_type llava."""
    tower = randomize(SiglipVisionModel(SiglipVisionConfig(**VISION)), 5)
    tower.save_pretrained(tmp_path / "siglip")
    source = make_llava(
        tower,
        make_decoder("qwen2", tie_word_embeddings=True),
        **{**ANYRES, "image_aspect_ratio": "anyres_max_2", "image_grid_pinpoints": "(1x1),...,(3x3)"},
        model_type="llava",
        architectures=["LlavaQwenForCausalLM"],
        mm_vision_select_layer=-2,
    )
    source.project = lambda states, weights: gelu_mlp(states[VISION["num_hidden_layers"] - 1], weights, "0", "2")
    folder = source.save(tmp_path / "source", shards=2)
    if with_tower:
        tensors = source.tensors(True)
        kept = {
            k: v for k, v in tensors.items() if "layers.2." not in k.split("vision_model")[-1] and ".head." not in k
        }
        kept |= {k: v for k, v in tensors.items() if "vision_tower" not in k}
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(source.config))
        write_weights(kept, folder, 1, "safetensors")
        for file in (tmp_path / "siglip").glob("*.safetensors"):
            file.unlink()
    save_tokenizer(folder)
    sizes = [(40, 70), (100, 30), (64, 64), (200, 210)]
    result = check(source, folder, tmp_path / "out", sizes, vision_tower=tmp_path / "siglip", verify=True)
    config = result.plan.config
    assert config.vision_config.num_hidden_layers == 2 and config.vision_feature_layer == -1
    assert "LlavaOnevisionForConditionalGeneration" in result.verified


def test_stage_1(tmp_path, clip_folder, save_tokenizer):
    source = make_llava(**ANYRES)
    source.decoder.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    folder = tmp_path / "stage-1"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(source.config))
    tensors = {k: v for k, v in source.tensors(False).items() if "mm_projector" in k or "newline" in k}
    torch.save(tensors, folder / "mm_projector.bin")
    check(source, folder, tmp_path / "out", base_model=tmp_path / "base", vision_tower=clip_folder)
    with pytest.raises(ConversionError, match="--base-model"):
        convert(folder, tmp_path / "none", vision_tower=clip_folder)


@pytest.mark.parametrize(("root_of_r", "ending"), [(False, "bin"), (True, "safetensors")])
def test_lora(root_of_r, ending, tmp_path, clip_folder, save_tokenizer):
    """Decoder adapted by PEFT itself, the tower by hand; the projector was trained in full."""
    source = make_llava(image_aspect_ratio="pad")
    source.decoder.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    settings = LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"], use_rslora=root_of_r)
    adapted = get_peft_model(source.decoder, settings)
    randomize_lora = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=randomize_lora) * 0.2
    folder = tmp_path / "llava-lora"
    adapted.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = 10 / (4**0.5 if root_of_r else 4)
    for layer in range(VISION["num_hidden_layers"]):
        a, b = random_tensors({"a": (4, 32), "b": (32, 4)}, seed=layer).values()
        place = f"encoder.layers.{layer}.self_attn.v_proj"
        name = f"base_model.model.model.vision_tower.vision_tower.vision_model.{place}"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        source.tower.get_submodule(place).weight.data += scale * (b @ a)
    if ending == "bin":
        (folder / "adapter_model.safetensors").unlink()
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    full = {f"base_model.model.model.mm_projector.{name}": tensor for name, tensor in source.projector.items()}
    torch.save(full, folder / "non_lora_trainables.bin")
    flat = {k: v for k, v in source.config.items() if k != "peft_type"}
    (folder / "config.json").write_text(json.dumps(flat))
    adapted.merge_and_unload()
    result = check(source, folder, tmp_path / "out", base_model=tmp_path / "base", vision_tower=clip_folder)
    assert sum(step.low_rank is not None for step in result.plan.steps) == 2 * TEXT["num_hidden_layers"] + 3


@pytest.mark.parametrize("foreign", [False, True], ids=["own names", "names through --map"])
def test_llava_vr_research(foreign, tmp_path, clip_folder, save_tokenizer):
    """A checkpoint with the module's weights, the rest in LLaVA's names; the reference has our own names."""
    source = make_llava(image_aspect_ratio="pad", mm_projector_type="avg_pool", remember_feature_layers=[1, 3])
    source.config |= {"remember_num_heads": 16, "remember_window_ratio": 1.0}
    folder = source.save(tmp_path / "source")
    save_tokenizer(folder)
    convert(folder, tmp_path / "without", vision_tower=clip_folder, remember_layers=[1])
    config = load(tmp_path / "without").config
    config.remember_num_key_value_heads = 4
    model = randomize(LlavaVrForConditionalGeneration(config), 8).eval()
    tensors, maps = {}, []
    for name, tensor in model.state_dict().items():
        name = name.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
        name = name.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")
        name = name.replace("model.language_model.", "model.")
        name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        if foreign:
            name = name.replace("model.vision_remember.1.", "model.sela.after_1.").replace(".query.", ".wq.")
        tensors[name] = tensor
    if foreign:
        maps = [r"model\.sela\.after_(\d+)=model.vision_remember.\1", r"\.wq\.=.query."]
    write_weights(tensors, folder, 1, "safetensors")
    if foreign:
        with pytest.raises(ConversionError, match="unexpected tensor.* model.sela.after_1"):
            convert(folder, tmp_path / "unmapped", vision_tower=clip_folder)
    convert(folder, tmp_path / "out", vision_tower=clip_folder, maps=maps)
    found = load(tmp_path / "out")
    assert found.config.remember_layers == [1] and found.config.remember_hidden_size == 1024
    assert found.config.remember_num_key_value_heads == 4
    inputs = make_inputs(found.config, SIZES)
    assert torch.equal(logits(found, inputs), logits(model, inputs))
    inputs_without = logits(load(tmp_path / "without"), inputs)
    assert not torch.allclose(logits(found, inputs), inputs_without)


@pytest.mark.parametrize("research", [False, True], ids=["LLaVA-VR", "research code"])
def test_bias_of_the_window(research, llava, tmp_path, capsys):
    """It tells heads and window; one that is zero is left out."""
    convert(llava(), tmp_path / "first", remember_layers=[0, 1], projector="avg_pool")
    weights = load_file(tmp_path / "first/model.safetensors")
    expected = logits(load(tmp_path / "first"), make_inputs(load(tmp_path / "first").config, SIZES))
    if research:
        folder = llava({name: tensor for name, tensor in weights.items() if "remember" in name})
        changes = {"mm_projector_type": "avg_pool"}
    else:
        folder, changes = tmp_path / "first", {"remember_num_heads": None, "remember_window_ratio": None}
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    held = load_file(folder / "model.safetensors")
    assert "config.json needs remember_num_heads" in refused(folder, capsys)

    def save(**biases):
        added = {f"model.vision_remember.{layer[-1]}.window_bias": bias for layer, bias in biases.items()}
        save_file(held | added, folder / "model.safetensors")

    for side, ratio in ((4, 2.0), (2, 1.0)):
        save(layer_0=torch.zeros(16, side**2), layer_1=torch.zeros(16, side**2))
        result = convert(folder, tmp_path / f"out {side}", dtype="float32")
        config = result.plan.config
        assert (config.remember_num_heads, config.remember_window_ratio) == (16, ratio)
        assert [reason for _, reason in result.plan.dropped] == [
            "a bias of the window that is zero, so without effect"
        ] * 2
    found = load(tmp_path / "out 4")
    assert torch.equal(logits(found, make_inputs(found.config, SIZES)), expected)
    save(layer_0=torch.zeros(16, 16), layer_1=torch.eye(16))
    assert "vision_remember.1.window_bias is not zero" in refused(folder, capsys)
    for shape in ((16, 9), (16, 1), (16, 15), (16,), ()):
        save(layer_0=torch.zeros(shape))
        assert f"vision_remember.0.window_bias has shape {list(shape)}" in refused(folder, capsys)


def test_conversion_of_a_conversion_is_the_identity(tmp_path, clip_folder, save_tokenizer):
    source = make_llava(**ANYRES)
    folder = source.save(tmp_path / "source")
    save_tokenizer(folder, without_image=True)
    convert(folder, tmp_path / "once", vision_tower=clip_folder, remember_layers=[0], max_shard_size="100KB")
    convert(tmp_path / "once", tmp_path / "twice", max_shard_size="100KB")
    names = sorted(path.name for path in (tmp_path / "once").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "twice").iterdir())
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    for name in set(names) - {"README.md"}:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), name


def test_modules_are_added_and_left_out_by_layer(tmp_path, llava):
    config = convert(llava(), tmp_path / "one", remember_layers=[1]).plan.config
    assert config.remember_window_ratio == 2.0
    convert(tmp_path / "one", tmp_path / "two", remember_layers=[0, 1])
    result = convert(tmp_path / "two", tmp_path / "other", remember_layers=[0])
    assert {reason for _, reason in result.plan.dropped} == {"its layer is not among --remember-layers"}
    found = {name: load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "other")}
    names = {which: {int(n.split(".")[2]) for n in tensors if "remember" in n} for which, tensors in found.items()}
    assert names == {"one": {1}, "two": {0, 1}, "other": {0}}
    assert convert(tmp_path / "two", tmp_path / "none", remember_layers=[]).plan.config.remember_layers == []


def test_tower_within_a_model_of_images_and_text(tmp_path, llava):
    config = CLIPConfig(vision_config={**VISION, "hidden_act": "gelu"}, text_config={"num_hidden_layers": 1})
    clip = randomize(CLIPModel(config), 4)
    clip.save_pretrained(tmp_path / "clip")
    result = convert(llava(), tmp_path / "out", vision_tower=tmp_path / "clip")
    assert result.plan.config.vision_config.hidden_act == "gelu"
    weights = load(tmp_path / "out").model.vision_tower.state_dict()
    expected = clip.vision_model.state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    assert {reason for _, reason in result.plan.dropped} == {"the text side of a model of images and text"}


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_parts(tower, tmp_path, save_tokenizer):
    decoder = make_decoder("qwen2", tie_word_embeddings=True)
    decoder.save_pretrained(tmp_path / "text")
    save_tokenizer(tmp_path / "text")
    vision = make_clip() if tower == "clip" else randomize(SiglipVisionModel(SiglipVisionConfig(**VISION)))
    vision.save_pretrained(tmp_path / "vision")
    options = {"vision_tower": tmp_path / "vision", "projector": "pixel_shuffle", "remember_layers": [0, 1]}
    result = convert(tmp_path / "text", tmp_path / "out", **options, verify=True)
    assert result.plan.config.tie_word_embeddings and result.plan.config.projector_type == "pixel_shuffle"
    model = load(tmp_path / "out")
    weights = model.state_dict()
    for name, tensor in decoder.model.state_dict().items():
        assert torch.equal(weights[f"model.language_model.{name}"], tensor)
    for name, tensor in vision.state_dict().items():
        assert name.startswith("head.") or torch.equal(weights[f"model.vision_tower.{name}"], tensor)
    for layer in "01":
        assert weights[f"model.vision_remember.{layer}.out.weight"].abs().max() == 0
        assert 0.01 < weights[f"model.vision_remember.{layer}.query.weight"].std() < 0.03
    assert not torch.equal(*(weights[f"model.vision_remember.{layer}.query.weight"] for layer in "01"))
    convert(tmp_path / "text", tmp_path / "again", **options)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


def test_decoder_whose_activation_has_another_name(tmp_path, clip_folder, save_tokenizer):
    """Gemma 2 calls it hidden_activation."""
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = Gemma2Config(**{**TEXT, "hidden_activation": "silu"}, head_dim=12, **caps)
    randomize(Gemma2ForCausalLM(config)).save_pretrained(tmp_path / "text")
    save_tokenizer(tmp_path / "text")
    convert(tmp_path / "text", tmp_path / "out", vision_tower=clip_folder, remember_layers=[])
    assert load(tmp_path / "out").config.text_config.hidden_activation == "silu"
