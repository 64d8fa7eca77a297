"""Loads a result, runs fixed inputs, and compares it with what transformers itself makes of the source's own files.

No tensor of the result and no name of `mapping` goes into a reference, so a tensor in a wrong place shows.
"""

import copy
import functools
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from llava_vr import LlavaVrConfig, LlavaVrForConditionalGeneration

from .plan import EMBEDDINGS, Plan
from .readers import ConversionError
from .sources import Source


TOLERANCE = 3e-5  # of the largest value, in float32
PROJECTOR_NAMES = [f"linear_{i}.{name}" for i in (1, 2) for name in ("weight", "bias")]
MODULES = "model.vision_remember."
UNCOMPARED = {  # without a reference that does all that the result does
    "model.multi_modal_projector.": "projector",
    "model.image_newline": "newline token",
    MODULES: "Vision Remember modules",
}
WEIGHT_FILE = re.compile(r"((pytorch_)?model\b.*|mm_projector|non_lora_trainables)\.(bin|safetensors)")


@torch.no_grad()
def verify(folder: Path, source: Source, plan: Plan) -> str:
    """What was compared, and what not, in one line.

    Raises:
        ConversionError: the result does not load, gives no finite logits, or others than a reference.
    """
    model, references = _load(folder), References(source, plan)
    downsample = references.downsample
    inputs = fixed_inputs(plan.config, downsample)
    logits = model(**inputs, image_downsamples=torch.tensor([downsample])).logits
    if not logits.isfinite().all():
        raise ConversionError("--verify: the result's logits are not all finite.")
    if whole := references.whole():
        what = "logits" if downsample == plan.config.projector_downsample else f"logits at s = {downsample}"
        return "loads; " + _compare(what, logits, whole(**inputs).logits[..., : references.rows], whole)
    seen, left = ["loads"], []
    if decoder := references.decoder():
        text = inputs["input_ids"][inputs["input_ids"] != plan.config.image_token_id][None]
        seen.append(_compare("text-only logits", model(text).logits, decoder(text).logits, decoder))
    else:
        left.append("language model")
    if tower := references.tower():
        pixels = inputs["pixel_values"].flatten(0, -4)
        ours, theirs = (t(pixels, output_hidden_states=True).hidden_states for t in (model.model.vision_tower, tower))
        seen.append(_compare("image features", torch.stack(ours), torch.stack(theirs[: len(ours)]), tower))
    else:
        left.append("vision tower")
    read = [step.target for step in plan.steps if step.handle]
    left += [words for part, words in UNCOMPARED.items() if any(target.startswith(part) for target in read)]
    return "; ".join(seen + ([f"not compared: {', '.join(left)}"] if left else []))


def _load(folder: Path) -> PreTrainedModel:
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
        )
        AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    except Exception as error:  # whatever it is, the result is not to be kept
        raise ConversionError(f"--verify: the result does not load: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ConversionError(f"--verify: {kind} on loading: {sorted(map(str, info[kind]))[:5]}.")
    return model.eval()


def fixed_inputs(config: LlavaVrConfig, downsample: int) -> dict[str, torch.Tensor]:
    """A text with an image that is half as wide again as high, the same each time."""
    generator, tile = torch.Generator().manual_seed(0), config.vision_config.image_size
    size, layout = (tile, tile + tile // 2), config.image_layout
    tokens = [config.image_token_id] * layout.num_tokens(size, downsample)
    text = [i for i in range(5, 15) if i != config.image_token_id]
    pixels = torch.randn(1, layout.num_tiles(size), 3, tile, tile, generator=generator)
    inputs = {"input_ids": torch.tensor([text[:5] + tokens + text[5:]])}
    if not layout.pinpoints:
        return inputs | {"pixel_values": pixels[:, 0]}
    return inputs | {"pixel_values": pixels, "image_sizes": torch.tensor([size])}


def _compare(what: str, found: torch.Tensor, expected: torch.Tensor, reference: PreTrainedModel) -> str:
    """In words, that they agree."""
    name, difference = type(reference).__name__, (found[..., : expected.shape[-1]] - expected).abs().max().item()
    if not difference <= TOLERANCE * max(1, expected.abs().max().item()):
        raise ConversionError(f"--verify: {what} differ from those of {name} by {difference:.2g}.")
    return f"{what} as {name}'s of the source (largest difference {difference:.2g})"


class References:
    """Models of the source's own files, in float32 and rounded as the result is; None where there is none."""

    def __init__(self, source: Source, plan: Plan):
        self.source, self.plan, self.config, self.folder = source, plan, plan.config, source.model_folder
        self.rows = next(step.handle.shape[0] for step in plan.steps if step.target == EMBEDDINGS)
        dtypes = {step.dtype for step in plan.steps if step.handle}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32

    @property
    def downsample(self) -> int:
        """The s at which the result is compared: the source's, where the result can do that."""
        theirs = 1
        if self.source.layout == "ours" and self._own:
            theirs = self._own.config.projector_downsample
        return theirs if theirs in self.config.downsamples else self.config.projector_downsample

    @property
    def _keeps_all_tokens(self) -> bool:
        return self.downsample == 1 and self.config.projector_type in ("mlp", "avg_pool")

    def whole(self) -> PreTrainedModel | None:
        """A model that does all that the result does."""
        if self.source.layout == "research":
            return self._assembled()
        return self._own if self._own and self._does_the_same(self._own.config) else None

    def decoder(self) -> PreTrainedModel | None:
        """A model with the language model's logits."""
        if self.source.layout == "parts":
            return self._adapted(_read(AutoModelForCausalLM, self.folder))
        if self.source.layout == "research":
            return self._adapted(_read(AutoModelForCausalLM, self.folder, config=self._text_config()))
        if self.source.layout == "honeybee":
            decoder = AutoModelForCausalLM.from_config(self._text_config())
            return self._filled(decoder, _tensors(self.folder, r"language_model\."))
        return self._own

    def tower(self) -> PreTrainedModel | None:
        """The vision tower."""
        if self.source.layout in ("ours", "transformers"):
            return self._own and self._own.model.vision_tower
        if self.source.adapter and any("vision_tower." in name for name in self.source.adapter.updates):
            return None
        config = self.config.vision_config
        if self.source.tower:
            theirs = AutoConfig.from_pretrained(self.source.tower)
            theirs = getattr(theirs, "vision_config", theirs)
            theirs.num_hidden_layers, config = config.num_hidden_layers, theirs
        tower, prefix = AutoModel.from_config(config), r"(model\.vision_tower\.vision_tower\.)?(vision_model\.)*"
        return self._filled(tower, _tensors(self.source.tower or self.folder, prefix))

    @functools.cached_property
    def _own(self) -> PreTrainedModel | None:
        """The model as the class reads it that saved it."""
        classes = {"ours": LlavaVrForConditionalGeneration, "transformers": AutoModelForImageTextToText}
        own = classes.get(self.source.layout)
        return own and self._adapted(_read(own, self.folder))

    def _does_the_same(self, theirs: PreTrainedConfig) -> bool:
        if self.source.layout == "transformers":
            return self._keeps_all_tokens
        if self._keeps_all_tokens and theirs.projector_type == "mlp" and not theirs.remember_layers:
            return True
        fields = ["projector_type", "projector_kwargs"]
        fields += ["remember_feature_layers", "remember_window_ratio"] if theirs.remember_layers else []
        same = all(getattr(self.config, field) == getattr(theirs, field) for field in fields)
        same = same and self.downsample == theirs.projector_downsample
        return same and set(theirs.remember_layers) <= set(self.config.remember_layers)

    def _assembled(self) -> PreTrainedModel | None:
        """One of transformers' classes, of the parts of a checkpoint of research code."""
        kind = _class_of(self.config) if self._keeps_all_tokens else None
        if kind is None or any(step.handle and step.target.startswith(MODULES) for step in self.plan.steps):
            return None
        decoder, tower = self.decoder(), self.tower()
        if decoder is None or tower is None:
            return None
        own = r".*\b(?:mm_projector\.|(?=image_newline$))"
        weights = _tensors(self.folder, own) | _tensors(self.source.folder, own)
        if "2.weight" not in weights:
            return None
        with torch.device("meta"):
            reference = kind[0](kind[1])
        model = reference.model
        reference.lm_head, model.language_model, model.vision_tower = decoder.lm_head, decoder.model, tower
        projector = {name: weights[name.replace("linear_1", "0").replace("linear_2", "2")] for name in PROJECTOR_NAMES}
        model.multi_modal_projector.load_state_dict(projector, assign=True)
        if "image_newline" in weights:
            model.image_newline = torch.nn.Parameter(weights["image_newline"])
        if self.rows < self.config.text_config.vocab_size:
            reference.resize_token_embeddings(self.config.text_config.vocab_size, mean_resizing=False)
        return self._rounded(reference)

    def _text_config(self) -> PreTrainedConfig:
        config = copy.deepcopy(self.config.text_config)
        config.vocab_size = self.rows
        return config

    def _adapted(self, model: PreTrainedModel | None) -> PreTrainedModel | None:
        """With the source's adapter, merged by PEFT, if PEFT is there and finds a place for all of it."""
        adapter = self.source.adapter
        if adapter is None or model is None:
            return model and self._rounded(model)
        if importlib.util.find_spec("peft") is None:
            return None
        from peft import PeftConfig, get_peft_model

        adapted = get_peft_model(model, PeftConfig.from_pretrained(adapter.folder))
        unused = adapted.load_adapter(adapter.folder, "default").unexpected_keys
        if any("vision_tower." not in name or self.source.layout != "research" for name in unused):
            return None
        return self._rounded(adapted.merge_and_unload())

    def _filled(self, model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> PreTrainedModel | None:
        return self._rounded(model) if _is_complete(model.load_state_dict(tensors, strict=False).missing_keys) else None

    def _rounded(self, model: PreTrainedModel) -> PreTrainedModel:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.dtype).float()
        return model.eval()


def _class_of(config: LlavaVrConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig] | None:
    """transformers' class that does what this configuration of research code says, and its own configuration."""
    names = ("vision_config", "text_config", "vision_feature_layer", "tie_word_embeddings")
    options = {name: getattr(config, name) for name in names} | {"image_token_index": config.image_token_id}
    has_cls = config.vision_config.model_type == "clip_vision_model"
    options["vision_feature_select_strategy"] = "default" if has_cls else "full"
    if config.image_aspect_ratio in ("pad", "square"):
        return LlavaForConditionalGeneration, LlavaConfig(**options)
    options["image_grid_pinpoints"] = config.image_grid_pinpoints
    if config.image_merge_type != "spatial_unpad":
        return None
    if config.image_aspect_ratio == "anyres":
        return LlavaNextForConditionalGeneration, LlavaNextConfig(**options)
    options["vision_aspect_ratio"] = config.image_aspect_ratio
    return LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig(**options)


def _read(model_class: type, folder: Path, **options) -> PreTrainedModel | None:
    """A model as transformers reads it; None where the folder has not all of its weights, under these names."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # tensors of other parts of the model are no news
    try:
        model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    except Exception as error:  # each class raises its own
        raise ConversionError(f"--verify: transformers does not read {folder}: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    return model if _is_complete(info["missing_keys"]) else None


def _is_complete(missing: Iterable[str]) -> bool:
    return all(re.search(r"(^|\.)head\.", name) for name in missing)  # of a tower: no token comes from it


def _tensors(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors in a folder whose names begin with a pattern, by the rest of their names."""
    found = {}
    for path in sorted(path for path in folder.iterdir() if WEIGHT_FILE.fullmatch(path.name)):
        is_pickle = path.suffix == ".bin"
        tensors = torch.load(path, map_location="cpu", weights_only=True) if is_pickle else load_file(path)
        matches = ((re.match(prefix, name), tensor) for name, tensor in tensors.items())
        found |= {match.string[match.end() :]: tensor.float() for match, tensor in matches if match}
    return found
