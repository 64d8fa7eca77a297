"""TokenPacker, MobileVLM and Honeybee against their arithmetic, written out here."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPVisionModel

from builders import (
    IMAGE_ID,
    PATCH,
    TEXT,
    TILE,
    VISION,
    Research,
    check,
    gelu_mlp,
    linear,
    make_clip,
    make_decoder,
    mlp_shapes,
    random_tensors,
    randomize,
    refused,
    write_weights,
)
from llava_vr.conversion import sources
from llava_vr.convert_weights import convert


def make_tokenpacker(clip_folder, scale=2, kind=Research, **config):
    """Its levels are hidden states 12, 16, 22 and 23 of the tower that is saved in `clip_folder`."""
    width, heads = 256, 2
    tower, decoder = make_clip(hidden_size=width, num_hidden_layers=24, intermediate_size=32), make_decoder()
    tower.save_pretrained(clip_folder)
    shapes = {
        "q_proj_1.weight": (width, width),
        "clip_attn.in_proj_weight": (3 * width, width),
        "clip_attn.in_proj_bias": (3 * width,),
        "clip_attn.out_proj.weight": (width, width),
        "clip_attn.out_proj.bias": (width,),
        **mlp_shapes("k_proj_1.0", "k_proj_1.2", 4 * width, width, width),
        **mlp_shapes("v_proj_1.0", "v_proj_1.2", 4 * width, width, width),
        **mlp_shapes("mlp.0", "mlp.2", width, TEXT["hidden_size"], TEXT["hidden_size"]),
        **{f"ln_{k}_1.{name}": (width,) for k in "qkv" for name in ("weight", "bias")},
    }
    projector = {name: tensor / 4 if tensor.ndim == 2 else tensor for name, tensor in random_tensors(shapes).items()}

    def norm(x, weights, name):
        return torch.nn.functional.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def project(states, weights):
        grid, tokens = TILE // PATCH, TILE // PATCH // scale
        levels = torch.cat([states[level] for level in (12, 16, 22, 23)], dim=-1)
        key = norm(gelu_mlp(levels, weights, "k_proj_1.0", "k_proj_1.2"), weights, "ln_k_1")
        value = norm(gelu_mlp(levels, weights, "v_proj_1.0", "v_proj_1.2"), weights, "ln_v_1")
        centre = states[-2].transpose(1, 2).unflatten(2, (grid, grid))
        centre = torch.nn.functional.interpolate(centre, (tokens, tokens), mode="bilinear").flatten(2).transpose(1, 2)
        query = norm(linear(centre, weights, "q_proj_1"), weights, "ln_q_1")
        attention = torch.nn.MultiheadAttention(width, heads)
        attention.load_state_dict({k[10:]: v for k, v in weights.items() if k.startswith("clip_attn.")})
        found = []
        for token in range(tokens**2):
            top, left = (scale * i for i in divmod(token, tokens))
            region = [(top + i) * grid + left + j for i in range(scale) for j in range(scale)]
            q, k, v = (x.transpose(0, 1) for x in (query[:, [token]], key[:, region], value[:, region]))
            found.append(attention(q, k, v)[0].transpose(0, 1))
        return gelu_mlp(torch.cat(found, dim=1), weights, "mlp.0", "mlp.2")

    values = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_select_layer": -2}
    values |= {"scale_factor": scale, "image_aspect_ratio": "pad", "mm_vision_tower": str(clip_folder)}
    return kind(tower, decoder, projector, project, **{**values, **config})


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
    assert {reason for _, reason in result.plan.dropped} == {
        "the source loads the named tower instead of its own",
        "a layer of the vision tower after the last that is read",
    }


SLICES = {  # (height, width) of an image: its rows and columns of tiles
    (20, 20): (1, 1),
    (60, 30): (2, 1),
    (30, 95): (1, 3),
    (46, 45): (2, 2),
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
                sequence.append(tiles[(rows * columns > 1) + row * columns + column])
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


@pytest.mark.parametrize("old", [False, True], ids=["new layout", "old layout"])
def test_honeybee(old, tmp_path, capsys, save_tokenizer):
    """C-Abstractor of two RegNet stages; older checkpoints have a position embedding for the CLS token, too."""
    tower, decoder = make_clip(), make_decoder()
    inner, width, outer, depth = VISION["hidden_size"], 40, TEXT["hidden_size"], 2
    shapes = {
        "pos_emb": (1, 17 if old else 16, inner),
    }
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
        x = torch.nn.functional.avg_pool2d(x, 2)
        for i in (1, 2):
            x = block(x, w, f"net.2.b{i}")
        return linear(silu(linear(x.flatten(2).transpose(1, 2), w, "readout.0")), w, "readout.2")

    source = Research(tower, decoder, projector, project)
    abstractor = {"projector_type": "c-abs", "depth": depth, "mlp_depth": 2, "hidden_size": width, "num_eos_tokens": 0}
    abstractor |= {"pos_emb": True, "prenorm": True, "feature_layer_index": -1}
    config = {
        "model_type": "mllm",
        "vision_config": tower.config.to_dict()
        | {"encoder_type": "openai.clip", "pretrained_vision_name_or_path": "x"},
        "lm_config": {"pretrained_lm_name_or_path": "vicuna"},
        "text_config": decoder.config.to_dict(),
    }
    tokens = config if old else abstractor
    tokens["num_query_tokens"] = 4
    config["visual_projector_config" if old else "projector_config"] = abstractor
    folder = tmp_path / "source"
    folder.mkdir()
    tensors = {f"abstractor.{name}": tensor for name, tensor in projector.items()}
    tensors |= {f"vision_model.vision_model.{name}": tensor for name, tensor in tower.state_dict().items()}
    tensors |= {f"language_model.{name}": tensor for name, tensor in decoder.state_dict().items()}
    write_weights(tensors, folder, 2, "bin")
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)
    result = check(source, folder, tmp_path / "out", verify=True, remember_layers=[0])
    assert result.plan.config.projector_downsample == 2

    for number in (10, 9, 25):
        tokens["num_query_tokens"] = number
        (folder / "config.json").write_text(json.dumps(config))
        assert f"num_query_tokens {number}: only the square" in refused(folder, capsys, output=tmp_path / "other")
    tokens["num_query_tokens"] = 4
    abstractor["num_eos_tokens"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    assert "num_eos_tokens 3" in refused(folder, capsys, output=tmp_path / "other")
    del abstractor["num_eos_tokens"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "num_eos_tokens 1" in refused(folder, capsys, output=tmp_path / "other")  # Honeybee's default
