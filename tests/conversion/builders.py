"""Tiny checkpoints of other projects, written out here, and what the converter's tests do with them."""

import json

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)

from llava_vr.convert_weights import convert, main


TILE, PATCH, IMAGE_ID, VOCABULARY = 32, 8, 3, 262
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": TILE,
    "patch_size": PATCH,
}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
}
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32]]  # (height, width)
TOLERANCE = 3e-5


def randomize(module, seed=0):
    """No weight is zero or one, and none equals another, so that one that is dropped or swapped shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1.1
    return module.eval()


def theirs(kind, **overrides):
    """A tiny model of one of transformers' classes."""
    clip, llama = CLIPVisionConfig(**VISION, projection_dim=16), LlamaConfig(**TEXT, rope_theta=5e5)
    siglip = SiglipVisionConfig(**VISION, vision_use_head=False)
    qwen = Qwen2Config(**TEXT, rope_theta=1e6)
    options = {"image_token_index": IMAGE_ID, **overrides}
    if kind == "llava":
        return LlavaForConditionalGeneration(LlavaConfig(vision_config=clip, text_config=llama, **options))
    options["image_grid_pinpoints"] = PINPOINTS
    if kind == "llava_next":
        text = options.pop("text_config", llama)
        return LlavaNextForConditionalGeneration(LlavaNextConfig(vision_config=clip, text_config=text, **options))
    options |= {"vision_aspect_ratio": "anyres_max_2"}
    qwen.tie_word_embeddings = True
    config = LlavaOnevisionConfig(vision_config=siglip, text_config=qwen, tie_word_embeddings=True, **options)
    return LlavaOnevisionForConditionalGeneration(config)


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def make_inputs(config, sizes, seed=0):
    """Rows of text with one image of each size."""
    layout, generator = config.image_layout, torch.Generator().manual_seed(seed)
    rows = [
        [1, 20, 30] + [config.image_token_id] * layout.num_tokens(size, config.projector_downsample) + [40, 50, 60]
        for size in sizes
    ]
    length = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    tiles = max(layout.num_tiles(size) for size in sizes)
    tile = config.vision_config.image_size
    pixels = torch.randn(len(sizes), tiles, 3, tile, tile, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if not layout.pinpoints:
        return inputs | {"pixel_values": pixels[:, 0]}
    return inputs | {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


SIZES = [(40, 70), (100, 30), (64, 64), (30, 200)]


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def unpad(grid, width, height):
    """Research code's rule on a grid (rows, columns, features) of an image of width x height."""
    rows, columns = grid.shape[:2]
    if width / height > columns / rows:
        padding = (rows - int(height * columns / width)) // 2
        return grid[padding : rows - padding]
    padding = (columns - int(width * rows / height)) // 2
    return grid[:, padding : columns - padding]


def best_tiling(width, height, pinpoints):
    """Research code's choice among (width, height) pairs; ties go to the first."""
    best, most, least = None, 0, float("inf")
    for w, h in pinpoints:
        scale = min(w / width, h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        if effective > most or (effective == most and w * h - effective < least):
            best, most, least = (w, h), effective, w * h - effective
    return best


class Research:
    """A model of the research code: `tower` and `decoder` of transformers, a projector by the names of its checkpoint.

    `project` maps the tower's hidden states, CLS dropped, and the projector's tensors to tokens.
    """

    def __init__(self, tower, decoder, projector, project, newline=None, **config):
        self.tower, self.decoder, self.projector, self.project, self.newline = (
            tower,
            decoder,
            projector,
            project,
            newline,
        )
        flat = decoder.config.to_dict()
        for name in ("rope_parameters", "layer_types", "dtype", "architectures", "transformers_version"):
            flat.pop(name, None)
        flat |= {
            "rope_theta": decoder.config.rope_parameters["rope_theta"],
            "torch_dtype": "float32",
            "use_cache": False,
        }
        self.config = flat | {"mm_hidden_size": VISION["hidden_size"], "mm_projector_type": "mlp2x_gelu", **config}

    def tensors(self, with_tower: bool):
        found = {f"model.mm_projector.{name}": tensor for name, tensor in self.projector.items()}
        for name, tensor in self.decoder.state_dict().items():
            if name != "lm_head.weight" or not self.decoder.config.tie_word_embeddings:
                found[name] = tensor
        if self.newline is not None:
            found["model.image_newline"] = self.newline
        if with_tower:
            for name, tensor in self.tower.state_dict().items():
                found[f"model.vision_tower.vision_tower.vision_model.{name}"] = tensor
        return {name: tensor.clone() for name, tensor in found.items()}

    def save(self, folder, with_tower=False, shards=1, suffix="safetensors", **extra):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        write_weights(self.tensors(with_tower) | extra, folder, shards, suffix)
        return folder

    @property
    def patches(self):
        return (self.tower.config.image_size // self.tower.config.patch_size) ** 2

    @torch.no_grad()
    def logits(self, inputs):
        ids, marks = inputs["input_ids"], inputs["input_ids"] == self.image_token_id
        states = self.tower(inputs["pixel_values"].flatten(0, -4), output_hidden_states=True).hidden_states
        tiles = self.project([state[:, -self.patches :] for state in states], self.projector)
        images = tiles.unflatten(0, inputs["pixel_values"].shape[:-3])
        rows = self.decoder.get_input_embeddings()(ids.masked_fill(marks, 0))
        for row, image, mask, place in zip(rows, images, marks, range(len(ids))):
            if "image_sizes" in inputs:
                image = self.pack(image, *inputs["image_sizes"][place].tolist()[::-1])
            row[mask] = image.flatten(0, -2)
        return self.decoder(inputs_embeds=rows, attention_mask=inputs["attention_mask"]).logits

    def pack(self, tiles, width, height):
        pinpoints, merge = self.pinpoints, self.config["mm_patch_merge_type"]
        across, down = (side // TILE for side in best_tiling(width, height, pinpoints))
        tiles, side = tiles[: 1 + across * down], int(tiles.shape[1] ** 0.5)
        if merge == "flat":
            return tiles.flatten(0, 1)
        grid = torch.cat(
            [torch.cat([tiles[1 + r * across + c].view(side, side, -1) for c in range(across)], 1) for r in range(down)]
        )
        if merge == "spatial":
            return torch.cat([tiles[0], grid.flatten(0, 1)])
        grid = unpad(grid, width, height)
        if "max" in self.config["image_aspect_ratio"]:
            limit = int(self.config["image_aspect_ratio"].split("_")[-1])
            ratio = (grid.shape[0] * grid.shape[1] / (limit * side**2)) ** 0.5
            if ratio > 1.1:
                size = (int(grid.shape[0] // ratio), int(grid.shape[1] // ratio))
                grid = torch.nn.functional.interpolate(
                    grid.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=False, antialias=False
                )[0].permute(1, 2, 0)
        return torch.cat([tiles[0], *(torch.cat([row, self.newline[None]]) for row in grid)])

    @property
    def pinpoints(self):
        value = self.config["image_grid_pinpoints"]
        if isinstance(value, str) and "x" in value:
            return [[w * TILE, h * TILE] for w in range(1, 4) for h in range(1, 4)]
        return json.loads(value) if isinstance(value, str) else value


def write_weights(tensors, folder, shards, suffix):
    stem, names = "model" if suffix == "safetensors" else "pytorch_model", sorted(tensors)
    files = (
        [f"{stem}.{suffix}"] if shards == 1 else [f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}" for i in range(shards)]
    )
    for i, file in enumerate(files):
        part = {name: tensors[name].contiguous() for name in names[i::shards]}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    if shards > 1:
        weight_map = {name: files[i % shards] for i, name in enumerate(names)}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def random_tensors(shapes, seed=7):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * 0.15 for name, shape in shapes.items()}
    return {name: t + 1.1 if name.endswith("weight") and t.ndim == 1 else t for name, t in tensors.items()}


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def gelu_mlp(x, weights, first, second):
    x = linear(x, weights, first)
    return linear(x * 0.5 * (1 + torch.erf(x / 2**0.5)), weights, second)


def mlp_shapes(first, second, inner, hidden, outer):
    return {
        f"{first}.weight": (hidden, inner),
        f"{first}.bias": (hidden,),
        f"{second}.weight": (outer, hidden),
        f"{second}.bias": (outer,),
    }


def make_clip(**overrides):
    return randomize(CLIPVisionModel(CLIPVisionConfig(**{**VISION, **overrides}, projection_dim=16)), 1)


def make_decoder(kind="llama", **overrides):
    values = {**TEXT, **overrides}
    if kind == "llama":
        return randomize(LlamaForCausalLM(LlamaConfig(**values, rope_theta=5e5)), 2)
    if kind == "mistral":
        return randomize(MistralForCausalLM(MistralConfig(**values, rope_theta=1e6, sliding_window=None)), 2)
    return randomize(Qwen2ForCausalLM(Qwen2Config(**values, rope_theta=1e6)), 2)


def make_llava(tower=None, decoder=None, layer=-2, **config):
    """LLaVA-1.5's projector; `layer` is the hidden state that it reads."""
    tower, decoder = tower or make_clip(), decoder or make_decoder()
    inner, outer = tower.config.hidden_size, decoder.config.hidden_size
    projector = random_tensors(mlp_shapes("0", "2", inner, outer, outer))
    newline = random_tensors({"n": (outer,)})["n"] if config.get("mm_patch_merge_type") == "spatial_unpad" else None
    values = {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_select_layer": layer}
    return Research(
        tower, decoder, projector, lambda s, w: gelu_mlp(s[layer], w, "0", "2"), newline, **{**values, **config}
    )


def check(source, folder, out, sizes=SIZES, tolerance=TOLERANCE, **options):
    """Converts a research model and compares logits with its own."""
    result = convert(folder, out, **options)
    model = load(out)
    inputs, source.image_token_id = make_inputs(model.config, sizes), model.config.image_token_id
    expected, found = source.logits(inputs), logits(model, inputs)[..., : source.config["vocab_size"]]
    real = inputs["attention_mask"].bool()
    assert expected[real].abs().max() > 1
    assert (found - expected)[real].abs().max() < tolerance
    AutoProcessor.from_pretrained(out, trust_remote_code=True)
    return result


ANYRES = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [pair[::-1] for pair in PINPOINTS],
}


def refused(folder, capsys, *options, output=None):
    """The one line with which the command line refuses."""
    output = output or folder.parent / "out"
    before = sorted(output.parent.rglob("*"))
    capsys.readouterr()
    assert main([str(folder), str(output), *options]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("convert_weights.py: error: ")
    assert sorted(output.parent.rglob("*")) == before
    return line


GATE = "model.layers.1.mlp.gate_proj.weight"
NAN = torch.full((64, 48), 0.5).index_fill(0, torch.tensor([3]), float("nan"))
