"""All files of the result besides the weights: tokenizer, processor, chat template, configurations, code, card."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from transformers import AddedToken, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

import llava_vr
from llava_vr import LlavaVrConfig, LlavaVrProcessor
from llava_vr.card_llava_vr import make_card

from .plan import Plan
from .readers import ConversionError, read_json, reading
from .sources import Source, read_image_processor
from .templates import STYLES, choose_style, end_of_turn


CODE = sorted(Path(llava_vr.__file__).parent.glob("*_llava_vr.py"))
IMAGE_TOKEN = "<image>"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
PIXEL_FIELDS = ("image_mean", "image_std", "resample", "rescale_factor")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer beside the source, or the base model's; no code of theirs is run.

    Raises:
        ConversionError: there is none, or it cannot be read.
    """
    folder = next((f for f in source.companion_folders if any((f / name).is_file() for name in VOCABULARIES)), None)
    if folder is None:
        raise ConversionError(f"{source.folder}: no tokenizer beside the weights: pass --base-model with one.")
    if folder == source.folder and source.tokenizer_folders and source.base is None:
        raise ConversionError(
            f"--base-model {source.tokenizer_folders[0]}: SOURCE ({source.kind}) is complete, with a tokenizer of its "
            "own: leave it out."
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        raise ConversionError(
            f"{folder}: tokenizer.model needs tokenizer_config.json beside it, which names its class."
        )
    with tempfile.TemporaryDirectory() as copy:  # apart from config.json, whose model_type transformers may not know
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copy(folder / name, copy)
        (Path(copy) / "config.json").write_text(json.dumps({"model_type": source.text_config.model_type}))
        try:
            # padded on the left, as `generate` goes on at the right end of a batch's rows
            options = {"padding_side": "left", "trust_remote_code": False, "local_files_only": True}
            tokenizer = AutoTokenizer.from_pretrained(copy, **options)
        except Exception as error:  # each class of tokenizer raises its own
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConversionError(f"{folder}: the tokenizer cannot be read: {reason}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def add_image_token(tokenizer: PreTrainedTokenizerBase, image_token_id: int | None) -> tuple[str, int]:
    """The placeholder and its id: the source's, or one that is added at the end of the vocabulary."""
    if image_token_id is not None and (type(image_token_id) is not int or image_token_id < 0):
        raise ConversionError(f"image_token_id must be a token's id, found {image_token_id!r}.")
    if image_token_id is not None and image_token_id < len(tokenizer):
        return tokenizer.convert_ids_to_tokens(image_token_id), image_token_id
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    found = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_token_id is not None and found != image_token_id:
        raise ConversionError(
            f"image_token_id is {image_token_id}, but the tokenizer would give {IMAGE_TOKEN} {found}."
        )
    return IMAGE_TOKEN, found


def separator_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What TokenPacker's HD mode puts between tiles of a row and after a row.

    A Llama tokenizer has no token of a line feed, so there it is the unknown one, as in the source.
    """
    ids = tokenizer.convert_tokens_to_ids([",", "\n"])
    if None in ids:
        raise ConversionError("image_aspect_ratio 'slice': the tokenizer lacks ',' or '\\n', and an unknown token.")
    return ids


def make_image_processor(config: LlavaVrConfig, saved: dict[str, Any]):
    """transformers' own image processor that fits the configuration; it is on PIL, and loads on torchvision too.

    Args:
        saved: the source's image processor, for the pixels' mean and deviation.
    """
    tile, siglip = config.vision_config.image_size, config.vision_config.model_type.startswith("siglip")
    square = {"height": tile, "width": tile}
    options: dict[str, Any] = {"size": {"shortest_edge": tile}, "crop_size": square}
    if config.image_aspect_ratio.startswith("anyres"):
        name, options["image_grid_pinpoints"] = "LlavaNext", config.image_grid_pinpoints
    elif config.image_aspect_ratio == "pad":
        name, options["do_pad"] = "Llava", True
    elif siglip:
        name, options = "Siglip", {"size": square}
    else:
        name = "CLIP"
        if saved.get("do_center_crop") is False:
            options |= {"size": square, "do_center_crop": False}
    if siglip:
        options |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    options |= {field: saved[field] for field in PIXEL_FIELDS if saved.get(field) is not None}
    processor = getattr(transformers, f"{name}ImageProcessorPil")(**options)
    processor(Image.new("RGB", (2 * tile, tile)))  # fails on values that it cannot compute with
    return processor


def chat_template(source: Source, tokenizer: PreTrainedTokenizerBase, image_token: str, hint: str) -> tuple[str, str]:
    """The template and the style's name; a template of the source's own stays if it knows images."""
    if source.conversation is None:
        for folder in source.companion_folders:
            own = folder / "chat_template.jinja"
            with reading(f"{own}: no text"):
                text = own.read_text(encoding="utf-8") if own.is_file() else None
            for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
                text = text or read_json(folder / name).get("chat_template")
            if isinstance(text, str) and "image" in text:
                return text, "the source's"
    style = source.conversation or choose_style(source.text_config.model_type, hint, tokenizer)
    if style not in STYLES:
        raise ConversionError(f"--conversation {style!r}: one of {', '.join(STYLES)}.")
    return STYLES[style].replace(IMAGE_TOKEN, image_token), style


def make_processor(
    source: Source, config: LlavaVrConfig, tokenizer: PreTrainedTokenizerBase, image_token: str, template: str
) -> LlavaVrProcessor:
    """The processor of the result."""
    folders = [*source.companion_folders, *source.image_folders]
    saved = next((found for folder in folders if (found := read_image_processor(folder))), {})
    if source.conversation == "honeybee":
        saved = {**saved, "do_center_crop": False}  # its pictures are stretched to the square
    tokenizer.chat_template = template
    return LlavaVrProcessor(
        make_image_processor(config, saved),
        tokenizer,
        chat_template=template,
        image_token=image_token,
        patch_size=config.vision_config.patch_size,
        projector_downsample=config.projector_downsample,
        projector_downsample_choices=config.projector_downsample_choices,
        image_aspect_ratio=config.image_aspect_ratio,
        image_merge_type=config.image_merge_type,
    )


def generation_config(source: Source, tokenizer: PreTrainedTokenizerBase, image_token_id: int) -> GenerationConfig:
    """The source's generation defaults, valid, which end at its own ends and at those of a turn, without placeholders.

    Args:
        tokenizer: with the chat template of the result.
    """
    values = next(
        (found for folder in source.companion_folders if (found := read_json(folder / "generation_config.json"))), {}
    )
    values = {
        name: value for name, value in values.items() if name not in ("transformers_version", "_from_model_config")
    }
    if not values.get("do_sample"):
        values = {name: value for name, value in values.items() if name not in SAMPLING}
    own = values.get("eos_token_id")
    own = tokenizer.eos_token_id if own is None else own
    ends = [*(own if isinstance(own, list) else [own]), end_of_turn(tokenizer)]
    ends = [end for end in dict.fromkeys(ends) if end is not None]
    values["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    for name in ("bos_token_id", "pad_token_id"):
        if values.get(name) is None:
            values[name] = getattr(tokenizer, name)
    values["suppress_tokens"] = sorted({*(values.get("suppress_tokens") or ()), image_token_id})
    generation = GenerationConfig(**values)
    generation.validate(strict=True)
    return generation


def write_companions(
    folder: Path, source: Source, plan: Plan, processor: LlavaVrProcessor, generation: GenerationConfig, style: str
):
    """Writes all files of the result but the weights and their index."""
    plan.config.architectures = ["LlavaVrForConditionalGeneration"]
    plan.config.save_pretrained(folder)
    try:
        processor.save_pretrained(folder)
    except Exception as error:
        if type(error) is Exception:  # tokenizers' own, where the disk is full
            raise OSError(str(error)) from error
        raise
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    if tokenizer_config.pop("auto_map", None):
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")
    generation.save_pretrained(folder)
    for path in CODE:
        shutil.copyfile(path, folder / path.name)
    (folder / "README.md").write_text(_card(source, plan, style), encoding="utf-8")


def _card(source: Source, plan: Plan, style: str) -> str:
    new = [step.target for step in plan.steps if step.handle is None]
    untrained = sorted({".".join(name.split(".")[1:3]) if "remember" in name else name.split(".")[1] for name in new})
    rows = {"not trained yet": ", ".join(untrained)} if untrained else {}
    origin = f"Converted from {source.kind} by `convert_weights.py`: {plan.summary().splitlines()[0]}."
    name = f"{source.folder.resolve().name}, as LLaVA-VR"
    return make_card(plan.config, name, origin, {**rows, "conversation": style})
