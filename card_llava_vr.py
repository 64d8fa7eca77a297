"""The card, README.md, of a folder that is saved, tuned or converted."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from .configuration_llava_vr import LlavaVrConfig


PARTS = {
    "vision_tower": "vision tower",
    "multi_modal_projector": "projector",
    "image_newline": "newline token",
    "vision_remember": "Vision Remember modules",
    "language_model": "decoder",
    "lm_head": "head",
}
LOAD_MODEL = 'model = AutoModelForImageTextToText.from_pretrained({model!r}, trust_remote_code=True, dtype="auto")'
LOAD_ADAPTER = 'model = PeftModel.from_pretrained(model, "FOLDER")'
CARD = """---
{metadata}
---

# {name}

{origin}

| | |
|---|---|
{rows}

```python
{imports}from transformers import AutoModelForImageTextToText, AutoProcessor

{load}
processor = AutoProcessor.from_pretrained({processor!r}, trust_remote_code=True)
content = [{{"type": "image", "image": "picture.png"}}, {{"type": "text", "text": "What is it?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(model.dtype)
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=100), skip_special_tokens=True)[0])
```
"""


def make_card(
    config: LlavaVrConfig,
    name: str,
    origin: str,
    rows: Mapping[str, str],
    base_model: str | None = None,
    license: str | None = None,
    is_adapter: bool = False,
) -> str:
    """
    Args:
        origin: a sentence on where the weights come from.
        rows: more rows of the table, by their names.
        base_model: name on the Hub of the model that was tuned, for the metadata.
        license: as the Hub writes it; without it, the card says that those of the parts apply.
        is_adapter: whether the folder holds a PEFT adapter of `base_model`.
    """
    metadata = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": license,
        "base_model": base_model,
    }
    lines = [f"{key}: {value}" for key, value in metadata.items() if value]
    lines += ["tags:", "- llava-vr", "- vision-remember", "- custom_code"]
    vision, text, choices = config.vision_config, config.text_config, config.downsamples
    tokens = {s: config.image_layout.num_tokens([vision.image_size] * 2, s) for s in choices}
    others = [f"{count} at s = {s}" for s, count in tokens.items() if s != config.projector_downsample]
    table = {
        **rows,
        "vision tower": f"{vision.model_type}, {vision.image_size} pixels, patches of {vision.patch_size}",
        "decoder": f"{text.model_type}, {text.num_hidden_layers} layers of width {text.hidden_size}",
        "projector": f"{config.projector_type}, s = {config.projector_downsample} patches a side to a token",
        "image tokens": f"{tokens[config.projector_downsample]} for a picture of {vision.image_size} x "
        f"{vision.image_size} pixels" + "".join(f", {other}" for other in others),
        "Vision Remember modules": f"after decoder layers {', '.join(map(str, config.remember_layers)) or 'none'}",
        "images": f"{config.image_aspect_ratio}, {config.image_merge_type}",
        "licence": license or "those of its parts apply",
    }
    model = (base_model or "BASE_MODEL") if is_adapter else "FOLDER"
    load = LOAD_MODEL.format(model=model)
    return CARD.format(
        metadata="\n".join(lines),
        name=name,
        origin=origin,
        rows="\n".join(f"| {key} | {value} |" for key, value in table.items()),
        imports="from peft import PeftModel\n" if is_adapter else "",
        load=f"{load}\n{LOAD_ADAPTER}" if is_adapter else load,
        processor=model,
    )


def write_card(folder: str | os.PathLike, model: PreTrainedModel, trained: Sequence[str] = ()):
    """Writes the card of a saved model, or of PEFT's adapter of one, unless the folder has one.

    Args:
        trained: what has just been trained, as of `trained_parts`: the card says so, and takes the place of one that
            is there, such as PEFT's template. Without it, a model that was loaded and has been in training mode
            since is one whose parts that require gradients have been trained.
    """
    path = Path(folder) / "README.md"
    if not path.parent.is_dir() or (path.exists() and not trained):
        return
    adapter = getattr(model, "peft_config", {}).get("default")
    source = (adapter.base_model_name_or_path if adapter else model.name_or_path) or ""
    local, base_model = bool(source) and Path(source).is_dir(), None
    if not local and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        base_model = source
    base = base_model or (Path(source).resolve().name if source else "")
    rows = {"base model": f"`{base}`"} if base else {}
    if base and getattr(model, "was_in_training", False):
        trained = trained or trained_parts(model)
    if trained:
        rows["trained"] = ", ".join(trained)
    origin = f"A LLaVA-VR model, {'fine-tuned' if trained else 'saved'} from `{base}`." if base else "A LLaVA-VR model."
    name = Path(folder).resolve().name
    license = _license(Path(source) / "README.md") if local else None
    path.write_text(
        make_card(model.config, name, origin, rows, base_model, license, adapter is not None), encoding="utf-8"
    )


class CardMixin:
    """A model that writes a card into the folder that it is saved to.

    Attributes:
        was_in_training: whether it has been in training mode since it was made or loaded.
    """

    was_in_training = False

    def train(self, mode: bool = True):
        self.was_in_training |= mode
        return super().train(mode)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        super().save_pretrained(save_directory, *args, **kwargs)
        write_card(save_directory, self)


def trained_parts(model: PreTrainedModel) -> list[str]:
    """The parts of a model that require gradients, in words; those of LoRA alone are marked."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = []
    for part, title in PARTS.items():
        if own := [name for name in names if part in name.split(".")]:
            parts.append(f"{title} (LoRA)" if all("lora_" in name for name in own) else title)
    return parts


def _license(card: Path) -> str | None:
    """The licence in the metadata of a card on disk."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found = re.search(r"^license: *(\S+) *$", text.split("\n---", 1)[0], re.MULTILINE)
    return found and found[1]


__all__ = ["CardMixin", "make_card", "trained_parts", "write_card"]
