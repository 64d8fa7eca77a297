"""The converter against independent paths: transformers' own classes, and research models written out here."""

import copy
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from builders import (
    ANYRES,
    GATE,
    IMAGE_ID,
    NAN,
    PINPOINTS,
    SIZES,
    TEXT,
    TILE,
    VISION,
    VOCABULARY,
    Research,
    check,
    gelu_mlp,
    linear,
    load,
    logits,
    make_clip,
    make_decoder,
    make_inputs,
    make_llava,
    make_tokenpacker,
    mlp_shapes,
    random_tensors,
    randomize,
    refused,
    theirs,
    write_weights,
)
from llava_vr import LlavaVrForConditionalGeneration
from llava_vr.conversion import companions, plan, sources, templates
from llava_vr.conversion.readers import ConversionError
from llava_vr.convert_weights import convert, main


ROOT = Path(__file__).parents[2]


# ---- transformers' own classes


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


# ---- LLaVA's research code, written out: names, configuration and arithmetic of its checkpoints


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


# ---- TokenPacker, MobileVLM, Honeybee


@pytest.mark.parametrize("scale", [2, 4])
def test_tokenpacker(scale, tmp_path, save_tokenizer):
    """Its own tower in the checkpoint is not the one it loads."""
    source = make_tokenpacker(tmp_path / "clip", scale)
    tower = source.tower
    source.tower = randomize(CLIPVisionModel(tower.config), 77)
    folder = source.save(tmp_path / "source", with_tower=True)
    source.tower = tower
    save_tokenizer(folder)
    result = check(source, folder, tmp_path / "out")
    assert result.plan.config.projector_downsample == scale
    assert {reason for _, reason in result.plan.dropped} == {"the source loads the named tower instead of its own"}


SLICES = {  # (height, width) of an image: its rows and columns of tiles
    (20, 30): (1, 1),
    (60, 30): (2, 1),
    (30, 95): (1, 3),
    (64, 60): (2, 2),
    (60, 95): (2, 3),
    (30, 250): (1, 8),
    (300, 300): (3, 3),
}
COMMA, UNKNOWN = 17, 0  # of the tests' tokenizer, in which no token is a line feed


class Slices(Research):
    """TokenPacker's HD mode: the tiles one by one, "," and the line feed between them, the whole image last."""

    def pack(self, tiles, width, height):
        (rows, columns), embeddings = SLICES[height, width], self.decoder.get_input_embeddings().weight
        sequence = []
        for row in range(rows):
            for column in range(columns):
                sequence.append(tiles[1 + row * columns + column])
                if column < columns - 1:
                    sequence.append(embeddings[[COMMA]])
            sequence.append(embeddings[[UNKNOWN]])
        if rows * columns > 1:
            sequence += [tiles[0], embeddings[[UNKNOWN]]]
        return torch.cat(sequence)


@pytest.fixture
def hd(tmp_path, save_tokenizer):
    """A checkpoint of TokenPacker's HD mode, with a tokenizer that has an unknown token, and its folder."""
    source = make_tokenpacker(tmp_path / "clip", kind=Slices, image_aspect_ratio="slice")
    folder = source.save(tmp_path / "source")
    save_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"unk_token": "<pad>"}))
    return source, folder


def test_tokenpacker_hd(hd, tmp_path):
    source, folder = hd
    config = check(source, folder, tmp_path / "out", list(SLICES), verify=True, remember_layers=[0]).plan.config
    assert {size: config.image_layout.tiling(size) for size in SLICES} == SLICES
    assert config.image_separator_ids == [COMMA, UNKNOWN]
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert processor.tokenizer.convert_ids_to_tokens(COMMA) == ","
    inputs = processor(images=Image.new("RGB", (95, 30)), text="<image>", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[IMAGE_ID] * (4 * 4 + 2 + 1 + 1)]
    assert convert(tmp_path / "out", tmp_path / "again").plan.config.image_separator_ids == [COMMA, UNKNOWN]


def test_sentencepiece_tokenizer(tmp_path):
    """A source with Llama's tokenizer.model: the same ids as sentencepiece gives; no piece is a line feed."""
    sentencepiece = pytest.importorskip("sentencepiece")
    vocabulary = 300
    source = make_tokenpacker(tmp_path / "clip", kind=Slices, image_aspect_ratio="slice")
    source = Slices(
        source.tower, make_decoder(vocab_size=vocabulary), source.projector, source.project, **source.config
    )
    source.config["vocab_size"] = vocabulary
    folder = source.save(tmp_path / "source")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat, the hat, and a picture of that"] * 9),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocabulary,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, "model_max_length": 2048}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    config = convert(folder, tmp_path / "out").plan.config
    assert config.image_token_id == len(pieces) == vocabulary and config.text_config.vocab_size == 320
    assert config.image_separator_ids == [pieces.piece_to_id(","), pieces.unk_id()]
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True).tokenizer
    text = "the picture, that cat\nand a zebra"
    assert tokenizer(text)["input_ids"] == [pieces.bos_id(), *pieces.encode(text)]
    assert tokenizer("a<image>")["input_ids"] == [pieces.bos_id(), *pieces.encode("a"), config.image_token_id]


def test_tilings_of_tokenpacker_hd():
    """Those of its `patch_num`, counted by hand: all of so many tiles at most, of which a single line has nine."""
    counts = {9: 23, "16": 23 + 2 * 6 + 1, 25: 36 + 2 * 9 + 1}
    for patch_num, count in counts.items():
        tilings = [(height // 336, width // 336) for height, width in sources.slice_tilings(patch_num, 336)]
        assert len(set(tilings)) == len(tilings) == count
        assert {(1, 1), (1, 9), (9, 1), (4, 2), (3, 3)} <= set(tilings) and (1, 10) not in tilings
        assert max(rows * columns for rows, columns in tilings) == int(patch_num)


def test_tokenpacker_hd_without_its_tokens_is_refused(hd, capsys, save_tokenizer):
    source, folder = hd
    (folder / "config.json").write_text(json.dumps(source.config | {"patch_num": "12"}))
    assert "patch_num '12'" in refused(folder, capsys)
    (folder / "config.json").write_text(json.dumps(source.config | {"patch_num": "16"}))
    save_tokenizer(folder)  # without an unknown token
    assert "the tokenizer lacks ',' or" in refused(folder, capsys)


def test_mobilevlm(tmp_path, save_tokenizer):
    """ldpv2: 24 x 24 patches become 12 x 12 tokens; the tower of the checkpoint is the one that is used."""
    tower, decoder = make_clip(image_size=96, patch_size=4), make_decoder()
    tower.config.save_pretrained(tmp_path / "clip")
    inner, outer = VISION["hidden_size"], TEXT["hidden_size"]
    shapes = mlp_shapes("mlp.mlp.0", "mlp.mlp.2", inner, outer, outer)
    projector = random_tensors(shapes | {"peg.peg.0.weight": (outer, 1, 3, 3), "peg.peg.0.bias": (outer,)})

    def project(states, weights):
        grid = gelu_mlp(states[-2], weights, "mlp.mlp.0", "mlp.mlp.2").transpose(1, 2).unflatten(2, (24, 24))
        tokens = torch.nn.functional.adaptive_avg_pool2d(grid, (12, 12))
        kernel, bias = weights["peg.peg.0.weight"], weights["peg.peg.0.bias"]
        tokens = tokens + torch.nn.functional.conv2d(tokens, kernel, bias, padding=1, groups=outer)
        return tokens.flatten(2).transpose(1, 2)

    config = {"model_type": "mobilevlm", "architectures": ["MobileLlamaForCausalLM"], "mm_vision_select_layer": -2}
    config |= {"mm_projector_type": "ldpnetv2", "image_aspect_ratio": "pad", "vision_tower_type": "clip"}
    source = Research(tower, decoder, projector, project, **config, mm_vision_tower=str(tmp_path / "clip"))
    folder = source.save(tmp_path / "source", with_tower=True, suffix="bin")
    save_tokenizer(folder)
    check(source, folder, tmp_path / "out", [(50, 60)])


@pytest.mark.parametrize(
    ("tokens", "old"), [(4, False), (4, True), (9, False)], ids=["new layout", "old layout", "overlapping regions"]
)
def test_honeybee(tokens, old, tmp_path, save_tokenizer):
    """C-Abstractor of two RegNet stages; older checkpoints have a position embedding for the CLS token, too."""
    tower, decoder = make_clip(), make_decoder()
    inner, width, outer, depth = VISION["hidden_size"], 40, TEXT["hidden_size"], 2
    shapes = {"pos_emb": (1, 17 if old else 16, inner), "eos_tokens": (1, 3, outer)}
    shapes |= {f"prenorm.{name}": (inner,) for name in ("weight", "bias")}
    shapes |= mlp_shapes("readout.0", "readout.2", width, outer, outer)
    for stage in (0, 2):
        for block in range(1, depth + 1):
            entry = inner if (stage, block) == (0, 1) else width
            squeezed = round(entry / 4)
            convs = {"conv1": (width, entry, 1, 1), "conv2": (width, 1, 3, 3), "conv3": (width, width, 1, 1)}
            convs |= {"downsample": (width, entry, 1, 1)} if entry != width else {}
            for name, shape in convs.items():
                shapes[f"net.{stage}.b{block}.{name}.conv.weight"] = shape
                shapes |= {f"net.{stage}.b{block}.{name}.bn.{k}": (width,) for k in ("weight", "bias")}
            shapes |= {f"net.{stage}.b{block}.se.fc1.weight": (squeezed, width, 1, 1)}
            shapes |= {f"net.{stage}.b{block}.se.fc1.bias": (squeezed,)}
            shapes |= {f"net.{stage}.b{block}.se.fc2.weight": (width, squeezed, 1, 1)}
            shapes |= {f"net.{stage}.b{block}.se.fc2.bias": (width,)}
    projector = random_tensors(shapes)
    silu, conv2d = torch.nn.functional.silu, torch.nn.functional.conv2d

    def block(x, w, name):
        def conv(x, part, **options):
            x = conv2d(x, w[f"{name}.{part}.conv.weight"], **options).movedim(1, -1)
            weight, bias = w[f"{name}.{part}.bn.weight"], w[f"{name}.{part}.bn.bias"]
            return torch.nn.functional.layer_norm(x, (width,), weight, bias, 1e-5).movedim(-1, 1)

        hidden = silu(conv(silu(conv(x, "conv1")), "conv2", padding=1, groups=width))
        gate = silu(conv2d(hidden.mean((2, 3), keepdim=True), *(w[f"{name}.se.fc1.{k}"] for k in ("weight", "bias"))))
        hidden = hidden * conv2d(gate, *(w[f"{name}.se.fc2.{k}"] for k in ("weight", "bias"))).sigmoid()
        shortcut = conv(x, "downsample") if f"{name}.downsample.conv.weight" in w else x
        return silu(conv(hidden, "conv3") + shortcut)

    def project(states, w):
        x = torch.nn.functional.layer_norm(states[-1], (inner,), w["prenorm.weight"], w["prenorm.bias"], 1e-6)
        x = (x + w["pos_emb"][:, -16:]).transpose(1, 2).unflatten(2, (4, 4))
        for i in (1, 2):
            x = block(x, w, f"net.0.b{i}")
        x = torch.nn.AdaptiveAvgPool2d((math.isqrt(tokens), math.isqrt(tokens)))(x)
        for i in (1, 2):
            x = block(x, w, f"net.2.b{i}")
        x = linear(silu(linear(x.flatten(2).transpose(1, 2), w, "readout.0")), w, "readout.2")
        return torch.cat([x, w["eos_tokens"].expand(len(x), -1, -1)], dim=1)

    source = Research(tower, decoder, projector, project)
    abstractor = {"projector_type": "c-abs", "depth": depth, "mlp_depth": 2, "hidden_size": width, "num_eos_tokens": 3}
    abstractor |= {"pos_emb": True, "prenorm": True, "feature_layer_index": -1}
    config = {
        "model_type": "mllm",
        "vision_config": tower.config.to_dict()
        | {"encoder_type": "openai.clip", "pretrained_vision_name_or_path": "x"},
        "lm_config": {"pretrained_lm_name_or_path": "vicuna"},
        "text_config": decoder.config.to_dict(),
    }
    if old:
        config |= {"visual_projector_config": abstractor, "num_query_tokens": tokens}
    else:
        config |= {"projector_config": abstractor}
        abstractor["num_query_tokens"] = tokens
    folder = tmp_path / "source"
    folder.mkdir()
    tensors = {f"abstractor.{name}": tensor for name, tensor in projector.items()}
    tensors |= {f"vision_model.vision_model.{name}": tensor for name, tensor in tower.state_dict().items()}
    tensors |= {f"language_model.{name}": tensor for name, tensor in decoder.state_dict().items()}
    write_weights(tensors, folder, 2, "bin")
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)
    result = check(source, folder, tmp_path / "out", verify=True, remember_layers=[0])
    assert result.plan.config.projector_downsample == 4 / math.isqrt(tokens)

    for number, words in ((10, "num_query_tokens 10"), (25, "projector_downsample must be")):
        (config if old else abstractor)["num_query_tokens"] = number
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConversionError, match=words):
            convert(folder, tmp_path / "other")


# ---- artefacts


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
    assert sum(step.low_rank is not None for step in result.plan.steps) == 2 * 2 + 3


# ---- LLaVA-VR


@pytest.mark.parametrize("foreign", [False, True], ids=["own names", "names through --map"])
def test_llava_vr_research(foreign, tmp_path, clip_folder, save_tokenizer):
    """A checkpoint with the module's weights, the rest in LLaVA's names; the reference has our own names."""
    source = make_llava(image_aspect_ratio="pad", mm_projector_type="avg_pool", remember_feature_layers=[1, 3])
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
    convert(llava(), tmp_path / "one", remember_layers=[1])
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


# ---- the other files


STYLES = {
    "vicuna_v1": "SYSTEM USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:",
    "llava_llama_2": "[INST] <<SYS>>\nSYSTEM\n<</SYS>>\n\n<image>\nWhat? [/INST] A cat. </s><s>[INST] Sure? [/INST]",
    "mistral_instruct": "[INST] <<SYS>>\nSYSTEM\n<</SYS>>\n\n<image>\nWhat? [/INST] A cat. </s>[INST] Sure? [/INST]",
    "chatml_direct": "<|im_start|>system\nSYSTEM<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>"
    "<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n",
    "qwen": "<|im_start|>system\nSYSTEM<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
    "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
    "llama_3": "<|start_header_id|>system<|end_header_id|>\n\nSYSTEM<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "honeybee": "SYSTEM\nHuman: <image>\nHuman: What?\nAI: A cat.</s>\nHuman: Sure?\nAI: ",
    "plain": "<image>What?A cat.\nSure?",
}
ANSWERS = {"vicuna_v1": " A cat.</s>", "llava_llama_2": " A cat. </s>", "mistral_instruct": " A cat. </s>"}
ANSWERS |= {"chatml_direct": "A cat.<|im_end|>", "qwen": "A cat.<|im_end|>", "llama_3": "A cat.<|eot_id|>"}
ANSWERS |= {"honeybee": "A cat.</s>", "plain": "A cat.\n"}


@pytest.mark.parametrize("style", STYLES)
def test_chat_template_of_each_style(style, tokenizer):
    assert set(STYLES) == set(templates.STYLES)
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    template = templates.STYLES[style]
    asked = [{"role": "system", "content": "SYSTEM"}, *turns]
    prompt = tokenizer.apply_chat_template(asked, chat_template=template, add_generation_prompt=True, tokenize=False)
    assert prompt == STYLES[style]
    unasked = tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=True, tokenize=False)
    assert len(unasked) > len(prompt) or style in ("mistral_instruct", "plain", "qwen")
    encoded = tokenizer.apply_chat_template(
        asked, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    answer = [i for i, own in zip(encoded["input_ids"], encoded["assistant_masks"]) if own]
    assert tokenizer.decode(answer) == ANSWERS[style]


def test_style_follows_the_source(tokenizer):
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens(["<|im_start|>"])
    llama_3 = copy.deepcopy(tokenizer)
    llama_3.add_tokens(["<|start_header_id|>"])
    choose = templates.choose_style
    assert choose("llama", "llava-v1.5-7b", tokenizer) == "vicuna_v1"
    assert choose("llama", "llava-llama-2-13b-chat", tokenizer) == "llava_llama_2"
    assert choose("llama", "llava-v1.6-34b", extended) == "chatml_direct"
    assert choose("llama", "llama3-llava-next-8b", llama_3) == "llama_3"
    assert choose("mistral", "llava-v1.6-mistral-7b", tokenizer) == "mistral_instruct"
    assert choose("qwen2", "llava-onevision-qwen2-0.5b-ov", extended) == "qwen"


def test_folder_is_complete_and_loads_in_a_fresh_process(tmp_path, clip_folder, save_tokenizer):
    """A prompt with a picture goes through the processor to an answer, all from the folder alone."""
    folder = make_llava(**ANYRES).save(tmp_path / "source")
    save_tokenizer(folder)
    sampling = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6, "_from_model_config": True}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    (clip_folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4, 0.5, 0.6]}))
    convert(folder, tmp_path / "out", vision_tower=clip_folder, max_shard_size="200KB", remember_layers=[0])
    (clip_folder / "preprocessor_config.json").unlink()
    names = {path.name for path in (tmp_path / "out").iterdir() if "model-0" not in path.name}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "configuration_llava_vr.py",
        "generation_config.json",
        "model.safetensors.index.json",
        "modeling_llava_vr.py",
        "processing_llava_vr.py",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [IMAGE_ID] and "temperature" not in generation
    processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert processor["image_processor"]["image_mean"] == [0.4, 0.5, 0.6]
    assert processor["image_processor"]["image_grid_pinpoints"] == PINPOINTS
    for name in ("configuration", "modeling", "processing"):
        code = (tmp_path / "out" / f"{name}_llava_vr.py").read_bytes()
        assert code == (ROOT / f"{name}_llava_vr.py").read_bytes()
    script = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
content = [{"type": "image", "image": Image.new("RGB", (70, 40), "red")}, {"type": "text", "text": "What?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt",
)
assert inputs["input_ids"][0, 0] != model.config.image_token_id
print(model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] - inputs["input_ids"].shape[1])
"""
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.stdout.strip() in ("1", "2", "3"), done.stderr


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
def test_pixels_are_those_of_the_source_s_own_processor(kind, tmp_path, save_tokenizer):
    source = randomize(theirs(kind))
    source.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    square, tilings = {"height": TILE, "width": TILE}, {"image_grid_pinpoints": PINPOINTS}
    options = {"size": {"shortest_edge": TILE}, "crop_size": square}
    if kind == "llava":
        own = transformers.CLIPImageProcessorPil(**options)
    elif kind == "llava_next":
        own = transformers.LlavaNextImageProcessorPil(**options, **tilings)
    else:
        own = transformers.LlavaOnevisionImageProcessorPil(size=square, **tilings)
    own.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    noise = torch.rand(50, 90, 3, generator=torch.Generator().manual_seed(0)).mul(255).byte().numpy()
    picture = Image.fromarray(noise)
    found = processor(images=picture, text="<image>", return_tensors="pt")["pixel_values"]
    expected = own(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(found, expected)


# ---- errors: one line that names the file and the tensor, exit code 2, nothing written


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({GATE: None}, ["nothing for tensor", "model.language_model.layers.1.mlp.gate_proj.weight"]),
        ({"lm_head.weight": None}, ["nothing for tensor lm_head.weight", "tie_word_embeddings"]),
        ({"model.layers.1.mlp.extra.weight": torch.ones(2)}, ["model.safetensors", "model.layers.1.mlp.extra.weight"]),
        ({"model.layers.2.mlp.gate_proj.weight": NAN}, ["model.safetensors", "model.layers.2", "unexpected"]),
        ({"optimizer.step": torch.ones(2)}, ["unexpected tensor optimizer.step"]),
        ({GATE: torch.ones(64, 47)}, [f"model.safetensors: tensor {GATE}", "[64, 47]", "[64, 48]"]),
        ({GATE: torch.ones(64, 48, dtype=torch.int8)}, [f"model.safetensors: tensor {GATE}", "int8"]),
        ({GATE: NAN}, [f"model.safetensors: tensor {GATE}", "NaN or infinite", "--allow-nonfinite"]),
        ({GATE: NAN.nan_to_num(float("inf"))}, [f"model.safetensors: tensor {GATE}", "NaN or infinite"]),
        (
            {"model.multi_modal_projector.linear_1.weight": torch.ones(48, 32)},
            ["model.multi_modal_projector.linear_1.weight", "model.mm_projector.0.weight", "both"],
        ),
    ],
    ids=["missing", "no head", "unexpected", "layer", "other", "shape", "dtype", "NaN", "infinite", "two for one"],
)
def test_wrong_tensors(changes, words, llava, capsys):
    line = refused(llava(changes), capsys)
    for word in words:
        assert word in line


def test_nonfinite_weights_may_be_kept(llava, tmp_path):
    convert(llava({GATE: NAN}), tmp_path / "out", allow_nonfinite=True)
    kept = load_file(tmp_path / "out" / "model.safetensors")[GATE.replace("model.", "model.language_model.", 1)]
    assert torch.equal(kept.isnan(), NAN.isnan())


def test_large_finite_weights_are_kept(llava, tmp_path):
    convert(llava({GATE: torch.full((64, 48), 3e38)}), tmp_path / "out")


def test_overflow_of_float16(llava, capsys):
    line = refused(llava({GATE: torch.full((64, 48), 1e6)}), capsys, "--dtype", "float16")
    assert GATE in line and "float16" in line


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_truncated_shard(suffix, llava, capsys):
    folder = llava(shards=3, suffix=suffix)
    shard = next(path for path in sorted(folder.iterdir()) if "00002-of" in path.name)
    shard.write_bytes(shard.read_bytes()[:-100])
    line = refused(folder, capsys)
    assert shard.name in line and "truncated" in line
    shard.write_bytes(b"\x10")
    assert shard.name in refused(folder, capsys)


def test_header_that_is_no_header(llava, capsys):
    folder = llava()
    (folder / "model.safetensors").write_bytes((5).to_bytes(8, "little") + b"hello" * 20)
    assert "model.safetensors" in refused(folder, capsys)


def test_shards_and_index_disagree(llava, capsys):
    folder = llava(shards=3)
    index = folder / "model.safetensors.index.json"
    good, names = (
        json.loads(index.read_text())["weight_map"],
        [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)],
    )

    def write(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))

    write({name: shard for name, shard in good.items() if shard != names[2]})
    assert f"shard {names[2]} is missing from the index" in refused(folder, capsys)
    name = next(name for name, shard in good.items() if shard == names[1])
    write({k: v for k, v in good.items() if k != name})
    line = refused(folder, capsys)
    assert f"{names[1]}: tensor {name} is missing from model.safetensors.index.json" in line
    write(good | {"model.layers.7.weight": names[0]})
    assert f"{names[0]}: tensor model.layers.7.weight" in refused(folder, capsys)
    write(good)
    contents = load_file(folder / names[0])
    save_file(contents | {name: torch.ones(2)}, folder / names[0])
    line = refused(folder, capsys)
    assert name in line and names[0] in line and names[1] in line
    (folder / names[0]).unlink()
    line = refused(folder, capsys)
    assert f"shard {names[0]}" in line and "missing" in line
    index.unlink()
    assert "2 of 3 shards" in refused(folder, capsys)


def test_tensor_twice_in_a_header(llava, capsys):
    folder = llava()
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].decode()
    entry = json.dumps(json.loads(header)[GATE])
    header = header.replace("{", f'{{"{GATE}":{entry},', 1).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert f"model.safetensors: tensor {GATE} stands in it twice" in refused(folder, capsys)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("new_format", [True, False])
def test_nothing_of_a_pickle_is_executed(new_format, llava, tmp_path, capsys):
    folder, trace = llava(), tmp_path / "executed"
    (folder / "model.safetensors").unlink()
    content = {"model.norm.weight": torch.ones(3), "evil": Payload(trace)}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    line = refused(folder, capsys)
    assert "pytorch_model.bin" in line and "mkdir" in line and "safetensors" in line
    assert not trace.exists()


def test_old_format_of_torch_is_read(llava, tmp_path):
    folder = llava()
    convert(folder, tmp_path / "new")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": tensors}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(folder, tmp_path / "old")
    assert (tmp_path / "new/model.safetensors").read_bytes() == (tmp_path / "old/model.safetensors").read_bytes()


def test_shared_and_transposed_tensors_of_a_pickle(llava, tmp_path):
    """A head that is the embeddings themselves, matrices that are parts of one, columns before rows."""
    folder = llava()
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_weights(tensors, folder, 1, "safetensors")
    convert(folder, tmp_path / "plain")
    (folder / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    gate, up = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
    tensors[gate], tensors[up] = torch.cat([tensors[gate], tensors[up]]).split(64)
    tensors["model.norm.weight"] = torch.nn.Parameter(tensors["model.norm.weight"])
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].T.contiguous().T
    torch.save(tensors, folder / "pytorch_model.bin")
    convert(folder, tmp_path / "shared", max_shard_size="1GB")
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (tmp_path / "shared/model.safetensors").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux only")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_no_file_stays_mapped(suffix, llava, tmp_path, capsys):
    convert(llava(suffix=suffix, shards=2), tmp_path / "out", max_shard_size="100KB")
    assert GATE in refused(llava({GATE: NAN}, suffix=suffix), capsys, output=tmp_path / "other")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


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
        (["--remember-layers", "0", "--remember-feature-layers", "9"], "remember_feature_layers"),
        (["--vision-tower", "/nowhere/clip"], "--vision-tower"),
    ],
    ids=str,
)
def test_options_that_are_refused(options, words, llava, capsys):
    assert words in refused(llava(), capsys, *options)


# ---- all or nothing


def test_existing_output(llava, tmp_path, capsys):
    folder, out = llava(), tmp_path / "out"
    convert(folder, out)
    (out / "mine.txt").write_text("kept")
    assert "--overwrite" in refused(folder, capsys)
    assert "unexpected" in refused(llava({"x": torch.ones(1)}), capsys, "--overwrite")
    assert GATE in refused(llava({GATE: NAN}), capsys, "--overwrite")  # found while writing
    assert (out / "mine.txt").read_text() == "kept"
    assert main([str(llava()), str(out), "--overwrite"]) == 0
    assert not (out / "mine.txt").exists() and (out / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_output_that_cannot_be_written(llava, tmp_path, capsys, monkeypatch):
    folder = llava()
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(folder, capsys, output=tmp_path / "file")
    line = refused(folder, capsys, output=tmp_path / "file" / "below")
    assert "cannot be written" in line or "Not a directory" in line
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        assert "cannot be written: [Errno 13] Permission denied" in refused(folder, capsys)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        assert "no space left" in refused(folder, capsys)
    with monkeypatch.context() as patch:
        error = Exception("No space left on device (os error 28)")  # as the tokenizers library raises it
        patch.setattr(companions.LlavaVrProcessor, "save_pretrained", lambda *_: (_ for _ in ()).throw(error))
        assert "cannot be written: No space left on device" in refused(folder, capsys)
    made, make = [], plan.Maker.make

    def full(self, step):
        made.append(step)
        if len(made) > 20:
            raise OSError(28, "No space left on device")
        return make(self, step)

    monkeypatch.setattr(plan.Maker, "make", full)
    assert "No space left on device" in refused(folder, capsys)


@pytest.mark.parametrize("point", ["weights", "files", "before the exchange", "within the exchange", "after it"])
@pytest.mark.parametrize("exists", [False, True], ids=["new", "overwrite"])
def test_killed_at_any_point(point, exists, llava, tmp_path, monkeypatch):
    folder, out = llava(), tmp_path / "out"
    if exists:
        convert(folder, out)
        (out / "mine.txt").write_text("kept")
    process = os.fork()
    if process == 0:
        calls, make, rename = [], plan.Maker.make, Path.rename

        def die(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)

        def counted(self, step):
            calls.append(step)
            return make(self, step) if len(calls) < 20 else die()

        def renamed(self, target):
            last = Path(target) == out
            if point == "before the exchange" or (point == "within the exchange" and last):
                die()
            rename(self, target)
            if last:
                die()

        if point == "weights":
            plan.Maker.make = counted
        elif point == "files":
            companions.shutil.copyfile = die
        else:
            Path.rename = renamed
        try:
            convert(folder, out, overwrite=True)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    if point == "after it":
        load(out)
    elif exists and point != "within the exchange":
        assert (out / "mine.txt").read_text() == "kept"
    else:
        assert not out.exists()
    convert(folder, out, overwrite=True)
    load(out)
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert left == []


# ---- command line


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


def test_verify_finds_other_logits(tmp_path, save_tokenizer, monkeypatch):
    source = randomize(theirs("llava_next"))
    source.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    make = plan.Maker.make

    def swapped(self, step):
        tensor = make(self, step)
        return tensor.flip(0) if step.target.endswith("layers.1.mlp.down_proj.weight") else tensor

    monkeypatch.setattr(plan.Maker, "make", swapped)
    with pytest.raises(ConversionError, match="logits differ from those of LlavaNextForConditionalGeneration"):
        convert(tmp_path / "source", tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


def test_tower_that_is_not_needed_is_refused(tmp_path, capsys, clip_folder, save_tokenizer):
    randomize(theirs("llava")).save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    assert "has its own" in refused(tmp_path / "source", capsys, "--vision-tower", str(clip_folder))


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


def test_dtypes_are_kept_and_wide_ones_come_first(llava, tmp_path):
    """Tensors of two bytes before those of four could leave these at odd places of the file."""
    result = convert(llava({GATE: torch.full((64, 48), 0.5, dtype=torch.bfloat16)}), tmp_path / "out")
    assert result.plan.config.dtype == torch.float32
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    last = max((entry["data_offsets"], entry["dtype"]) for name, entry in header.items() if name != "__metadata__")
    assert last[1] == "BF16" and header["lm_head.weight"]["dtype"] == "F32"
