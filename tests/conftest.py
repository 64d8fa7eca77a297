"""Tiny configurations, models, processors and a saved package, built once and shared by the tests."""

import copy
import os
import tempfile
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # two processes must not write the same module at once
    modules = tempfile.TemporaryDirectory(prefix="llava_vr_modules.")
    os.environ["HF_MODULES_CACHE"] = modules.name

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, SiglipVisionConfig
from variants import VARIANTS

from llava_vr import LlavaVrConfig, LlavaVrForConditionalGeneration, LlavaVrProcessor


collect_ignore = ["common_suite", "compat"]
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = """{%- macro text(content) -%}
{%- if content is string %}{{ content }}
{%- else %}{% for part in content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
<|{{ message.role }}|>
{%- if message.role == 'assistant' %}{% generation %}{{ text(message.content) }}</s>{% endgeneration %}
{%- else %}{{ text(message.content) }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}"""


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte, after the special tokens: its ids are those of `SPECIAL_TOKENS`, `<image>` is 3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
    )


@pytest.fixture(scope="session", params=VARIANTS)
def variant_config(request, tiny_config):
    """Images merged to one grid and, tiles apart, "slices" with regions that do not fill the grid."""
    return tiny_config(**VARIANTS[request.param])


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config(family="clip", **overrides)`: CLIP and Llama or, as "siglip", SigLIP and Qwen2; tiles of 32 x 32
    pixels and 4 x 4 patches. `vision` and `text` hold overrides of the two sub-configurations."""

    def make(family: str = "clip", vision: dict | None = None, text: dict | None = None, **overrides) -> LlavaVrConfig:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        vision = {**sizes, "image_size": 32, "patch_size": 8, **(vision or {})}
        text = {
            **sizes,
            "num_key_value_heads": 2,
            "vocab_size": 256 + len(SPECIAL_TOKENS),
            "max_position_embeddings": 2048,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **(text or {}),
        }
        if family == "clip":
            vision, text = CLIPVisionConfig(**vision, projection_dim=32), LlamaConfig(**text)
        else:
            vision, text = SiglipVisionConfig(**vision), Qwen2Config(**text, max_window_layers=3)
        values = {"image_token_id": 3, "remember_hidden_size": 16, "remember_num_heads": 2, **overrides}
        return LlavaVrConfig(vision_config=vision, text_config=text, **values)

    return make


def image_processor_for(config: LlavaVrConfig, backend: str = "pil"):
    """transformers' own image processor for a configuration's `image_aspect_ratio`, on the backend of this name."""
    tile, siglip = config.vision_config.image_size, config.vision_config.model_type.startswith("siglip")
    square, shortest = {"height": tile, "width": tile}, {"shortest_edge": tile}
    if config.image_aspect_ratio.startswith("anyres"):
        name, options = "LlavaNext", {"size": shortest, "image_grid_pinpoints": config.image_grid_pinpoints}
    elif config.image_aspect_ratio == "pad":
        name, options = "Llava", {"size": shortest, "do_pad": True}
    else:
        name, options = ("Siglip", {"size": square}) if siglip else ("CLIP", {"size": shortest})
    if name != "Siglip":
        options["crop_size"] = square
    return getattr(transformers, f"{name}ImageProcessor{'Pil' if backend == 'pil' else ''}")(**options)


@pytest.fixture(scope="session")
def processor_for(tokenizer):
    """`processor_for(config, backend="pil")`: a processor with a tokenizer of its own."""

    def make(config: LlavaVrConfig, backend: str = "pil") -> LlavaVrProcessor:
        return LlavaVrProcessor(
            image_processor_for(config, backend),
            copy.deepcopy(tokenizer),
            chat_template=CHAT_TEMPLATE,
            patch_size=config.vision_config.patch_size,
            projector_downsample=config.projector_downsample,
            projector_downsample_choices=config.projector_downsample_choices,
            image_aspect_ratio=config.image_aspect_ratio,
            image_merge_type=config.image_merge_type,
        )

    return make


@pytest.fixture(scope="session")
def package(tmp_path_factory, tiny_config, processor_for):
    """A folder as on the Hub: a tiny model, its processor and the code."""
    folder = tmp_path_factory.mktemp("package")
    config = tiny_config()
    torch.manual_seed(0)
    LlavaVrForConditionalGeneration(config).save_pretrained(folder)
    processor_for(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_inputs():
    """`make_inputs(config, rows, padding_side)`: a batch of random pixels; a row holds token ids and image sizes.

    A size is (height, width), or (height, width, s) where the image asks for its number of tokens.
    """

    def make(config: LlavaVrConfig, rows: list, padding_side: str = "right", seed: int = 0) -> dict[str, torch.Tensor]:
        layout, side = config.image_layout, config.vision_config.image_size
        generator = torch.Generator().manual_seed(seed)
        images = [part for row in rows for part in row if isinstance(part, tuple)]
        sizes, asked = [image[:2] for image in images], any(len(image) == 3 for image in images)

        def spell(part):
            if not isinstance(part, tuple):
                return [part]
            downsample = part[2] if len(part) == 3 else config.projector_downsample
            return [config.image_token_id] * layout.num_tokens(part[:2], downsample)

        spelled = [[token for part in row for token in spell(part)] for row in rows]
        length = max(map(len, spelled))
        input_ids, attention_mask = torch.zeros(2, len(rows), length, dtype=torch.long)
        for i, row in enumerate(spelled):
            place = slice(length - len(row), length) if padding_side == "left" else slice(0, len(row))
            input_ids[i, place], attention_mask[i, place] = torch.tensor(row), 1
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if sizes:
            tiles = [layout.num_tiles(size) for size in sizes]
            pixels = torch.zeros(len(sizes), max(tiles), 3, side, side)
            for image, count in zip(pixels, tiles):
                image[:count] = torch.randn(count, 3, side, side, generator=generator)
            inputs["pixel_values"] = pixels if layout.pinpoints else pixels[:, 0]
            inputs["image_sizes"] = torch.tensor(sizes)
            if asked:
                inputs["image_downsamples"] = torch.tensor(
                    [(*image, config.projector_downsample)[2] for image in images]
                )
        return inputs

    return make


@pytest.fixture(scope="session")
def make_model():
    """`make_model(config)`: a model of random weights, none of them zero or one, so that every part has an effect."""

    def make(config: LlavaVrConfig, seed: int = 0) -> LlavaVrForConditionalGeneration:
        torch.manual_seed(seed)
        model = LlavaVrForConditionalGeneration(config).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.1)
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.data.add_(1)
        return model

    return make
