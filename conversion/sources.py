"""What a folder holds, told by its content, and the configuration and the tensors of the model that it means."""

import ast
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from llava_vr import LlavaVrConfig
from llava_vr.projectors_llava_vr import PROJECTORS

from . import mapping
from .adapters import WRAPPER, Adapter, is_adapter, read_adapter
from .mapping import Rules
from .readers import ConversionError, Handle, has_weights, open_file, read_config, read_json, read_weights, reading


TRANSFORMERS_TYPES = ("llava", "llava_next", "llava_onevision")
TOWERS = ("clip_vision_model", "siglip_vision_model")
# What these do between their last layer and their logits is not `scale_logits`
OTHER_HEADS = ("falcon_h1", "inkling_text", "inkling2_text", "recurrent_gemma", "xlstm")
DECODERS = ((r"qwen(?!3|.*moe)", "qwen2"), (r"mistral", "mistral"), (r"llama|mobilevlm|^llava$", "llama"))
MAX_TILINGS = 10_000
# Towers that checkpoints of LLaVA name, for a source that has the tower's weights but not its configuration
CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
KNOWN_TOWERS = {
    "clip-vit-large-patch14-336": {**CLIP_L, "image_size": 336},
    "clip-vit-large-patch14": {**CLIP_L, "image_size": 224},
    "siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}


@dataclass
class Options:
    """The options of a conversion that change the model; see `convert`."""

    vision_tower: str | None = None
    base_model: str | None = None
    remember_layers: list[int] | None = None
    remember_feature_layers: list[int] | None = None
    projector: str | None = None
    compress: list[int] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)
    maps: list[tuple[re.Pattern, str]] = field(default_factory=list)


@dataclass
class Part:
    """Tensors of one origin. What an earlier part gives, a later one does not."""

    handles: list[Handle]
    rules: Rules
    wrapper: str = ""  # a pattern that is taken out of each name

    def names(self, maps: list[tuple[re.Pattern, str]]) -> list[tuple[str, Handle]]:
        """The tensors, each with its name without the wrapper and after the maps of the command line."""
        return [(mapping.apply_maps(re.sub(self.wrapper, "", h.name), maps), h) for h in self.handles]


@dataclass
class Source:
    """A source. `config` holds the arguments of `LlavaVrConfig`, without what the tokenizer decides.

    The names in `adapter` and those in the first of `parts` have the same rules.
    """

    kind: str
    layout: Literal["ours", "transformers", "research", "honeybee", "parts"]
    folder: Path
    config: dict[str, Any]
    parts: list[Part]
    adapter: Adapter | None = None
    conversation: str | None = None
    tokenizer_folders: list[Path] = field(default_factory=list)
    image_folders: list[Path] = field(default_factory=list)
    image_token_id: int | None = None
    new: tuple[str, ...] = ()  # beginnings of names that the source need not have
    takes_tower: bool = False  # whether --vision-tower says something of it
    base: Path | None = None  # folder of the model that an artefact was trained on
    tower: Path | None = None  # folder of the vision tower's weights, where they are not beside the others

    @property
    def model_folder(self) -> Path:
        """The folder of the language model's weights."""
        return self.base or self.folder

    @property
    def companion_folders(self) -> list[Path]:
        """Where the tokenizer, the chat template and the generation defaults are looked for, in turn."""
        return [self.folder, *self.tokenizer_folders]

    @property
    def text_config(self) -> PreTrainedConfig:
        return self.config["text_config"]

    @property
    def folders(self) -> set[Path]:
        """All folders that are read."""
        files = {handle.file.path.parent for part in self.parts for handle in part.handles}
        return {self.folder, *self.tokenizer_folders, *self.image_folders, *files}


def locate(name: str, option: str, weights: bool = True) -> Path:
    """A folder on disk, or a repository of the Hub, from its cache where it is there."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    try:
        patterns = ["*.json", "*.jinja", "*.model", "*.txt"] + (["*.safetensors", "*.bin"] if weights else [])
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        raise ConversionError(f"{option} {name}: no such folder.") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConversionError(f"{option} {name!r}: no folder here, and not to be had from the Hub: {reason}") from None


def detect_source(name: str, options: Options) -> Source:
    """What a folder holds, and what model it means.

    Raises:
        ConversionError: it is none of the layouts that are read, or has a part that LLaVA-VR has not.
    """
    folder = locate(name, "SOURCE")
    if not folder.is_dir():
        raise ConversionError(f"SOURCE {folder}: a folder is needed, with config.json beside the weights.")
    config = read_config(folder)
    if is_adapter(folder):
        source = _lora(folder, config, options)
    elif (folder / "mm_projector.bin").is_file() and not has_weights(folder):
        source = _stage_1(folder, config, options)
    elif not config:
        raise ConversionError(f"SOURCE {folder}: no config.json, so what it is cannot be told.")
    else:
        source = _model(folder, config, options)
        if options.base_model:
            source.tokenizer_folders.append(locate(options.base_model, "--base-model", weights=False))
    if options.vision_tower and not source.takes_tower:
        raise ConversionError(f"--vision-tower {options.vision_tower}: SOURCE ({source.kind}) has its own.")
    _apply_options(source, options)
    return source


def _model(folder: Path, config: dict[str, Any], options: Options, artefact: Part | None = None) -> Source:
    """A model from a folder of its own; the tensors of `artefact` take the place of the folder's."""
    model_type = config.get("model_type", "")
    if _is_research(config):
        return _research(folder, config, options, artefact)
    if model_type == "llava_vr":
        source = _ours(folder, config)
    elif model_type in TRANSFORMERS_TYPES and isinstance(config.get("vision_config"), dict):
        source = _transformers(folder, config)
    elif "lm_config" in config and _honeybee_projector(config):
        source = _honeybee(folder, config)
    elif model_type in CONFIG_MAPPING and options.vision_tower:
        source = _parts(folder, config, options)
    else:
        raise ConversionError(
            f"SOURCE {folder}: model_type {model_type!r} is none of the sources that are read: LLaVA's research code "
            "and its descendants, transformers' llava, llava_next and llava_onevision, LLaVA-VR, or a language model "
            "with --vision-tower."
        )
    if artefact:
        source.parts.insert(0, dataclasses.replace(artefact, rules=source.parts[0].rules))
    return source


def _is_research(config: dict[str, Any]) -> bool:
    return "mm_vision_tower" in config or "mm_projector_type" in config


def _tensors(folder: Path) -> list[Handle]:
    """All tensors of a model's folder.

    Raises:
        ConversionError: there are none, or they are quantised.
    """
    config, old = read_json(folder / "config.json"), read_json(folder / "quantize_config.json")  # of AutoGPTQ
    sides = [
        side for side in (config, config.get("text_config"), config.get("vision_config")) if isinstance(side, dict)
    ]
    for quantization in (*(side.get("quantization_config") for side in sides), old):
        if quantization:
            method = dict(quantization).get("quant_method", "of an unnamed method")
            raise ConversionError(
                f"{folder}: quantization_config ({method}): quantised weights are not read: convert the model that "
                "they were made from."
            )
    return list(read_weights(folder).values())


def _apply_options(source: Source, options: Options):
    config = source.config
    if config["vision_config"].model_type == "siglip_vision_model":
        config["vision_config"].vision_use_head = False
    names = [(name, handle) for part in source.parts for name, handle in part.names(options.maps)]
    matches = (re.match(r"model\.vision_remember\.(\d+)\.", name) for name, _ in names)
    held = sorted({int(match[1]) for match in matches if match})
    layers = held if options.remember_layers is None else options.remember_layers
    config["remember_layers"] = layers
    for layer in set(held) - set(layers):
        for part in source.parts:
            part.rules = [(rf"model\.vision_remember\.{layer}\..+", mapping.NO_MODULE), *part.rules]
    source.new += tuple(f"model.vision_remember.{layer}." for layer in layers if layer not in held)
    if held:
        config |= _remember_sizes(source, held, dict(names))
    if options.remember_feature_layers is not None:
        config["remember_feature_layers"] = options.remember_feature_layers
    if options.compress:
        _compress(source, options)
    elif options.projector and options.projector != config["projector_type"]:
        if options.projector not in PROJECTORS:
            raise ConversionError(f"--projector {options.projector!r}: one of {', '.join(PROJECTORS)}.")
        if (config["projector_type"], options.projector) != ("mlp", "avg_pool"):  # which has the same two layers
            source.new += ("model.multi_modal_projector.",)
            source.parts = [_without_projector(part) for part in source.parts]
        downsample = 1 if options.projector == "mlp" else max(2, config["projector_downsample"])
        config |= {"projector_type": options.projector, "projector_downsample": downsample, "projector_kwargs": None}
    config |= options.fields


def _compress(source: Source, options: Options):
    """Choices of s, 1 among them, for a source whose projector keeps its weights whatever s is."""
    config = source.config
    if options.projector:
        raise ConversionError(f"--projector {options.projector}: --compress decides the projector, avg_pool.")
    if config["projector_type"] not in ("mlp", "avg_pool"):
        raise ConversionError(
            f"--compress: SOURCE's projector is {config['projector_type']}; only mlp and avg_pool keep their weights "
            "and give the source's tokens at s = 1."
        )
    choices = list(dict.fromkeys([1, *options.compress]))
    config["projector_type"] = "avg_pool"
    config |= {"projector_downsample": options.compress[0], "projector_downsample_choices": choices}
    if not config["remember_layers"] and options.remember_layers is None:
        config["remember_layers"] = None  # evenly spaced
        source.new += ("model.vision_remember.",)


def _without_projector(part: Part) -> Part:
    rules = [
        (pattern, mapping.NEW_PROJECTOR if new.startswith("model.multi_modal_projector.") else new)
        for pattern, new in part.rules
    ]
    rules.insert(0, (r"(?:model\.)?(?:mm_projector|multi_modal_projector|abstractor)\..+", mapping.NEW_PROJECTOR))
    return dataclasses.replace(part, rules=rules)


def _remember_sizes(source: Source, layers: list[int], handles: dict[str, Handle]) -> dict[str, Any]:
    """Width, heads and window of the modules after these layers, from their tensors and the source's configuration."""
    prefix, downsample = f"{source.folder}: model.vision_remember", source.config["projector_downsample"]
    found = {name: source.config.get(name) for name in ("remember_num_heads", "remember_window_ratio")}
    for layer in layers:
        bias = handles.get(f"model.vision_remember.{layer}.window_bias")
        if bias is None:
            continue
        side = math.isqrt(bias.shape[-1]) if bias.shape else 0
        if len(bias.shape) != 2 or side**2 != bias.shape[1] or side < downsample or (side - downsample) % 2:
            raise ConversionError(
                f"{prefix}.{layer}.window_bias has shape {list(bias.shape)}: needed are (heads, window * window), with "
                f"windows of {downsample} (projector_downsample) patches a side or an even number more."
            )
        if bias.load().any():
            raise ConversionError(f"{prefix}.{layer}.window_bias is not zero: LLaVA-VR has no bias of the window.")
        found = {"remember_num_heads": bias.shape[0], "remember_window_ratio": side / downsample}
    for name, value in found.items():
        if value is None:
            raise ConversionError(f"{source.folder}: config.json needs {name}, which the modules' tensors do not tell.")
    try:
        query, key = (handles[f"model.vision_remember.{layers[0]}.{name}.weight"].shape for name in ("query", "key"))
        (width, _), (key_width, _) = query, key
    except (KeyError, ValueError):
        raise ConversionError(
            f"{prefix}.{layers[0]} needs query.weight (width, hidden_size) and key.weight (width of keys, width of the "
            "memory): name the source's own with --map."
        ) from None
    key_value_heads = key_width * found["remember_num_heads"] // width
    return found | {"remember_hidden_size": width, "remember_num_key_value_heads": key_value_heads}


# ---- configurations


# Of every configuration: they say nothing of the numbers
COMMON_FIELDS = {f.name for f in dataclasses.fields(PreTrainedConfig)} - {"tie_word_embeddings"}
COMMON_FIELDS |= {"_name_or_path", "auto_map", "torch_dtype", "transformers_version", "use_cache"}


FIXED_FIELDS = {
    "vision_config": "SOURCE decides it",
    "text_config": "SOURCE decides it",
    "image_token_id": "the tokenizer decides it",
    "projector_type": "use --projector",
    "remember_layers": "use --remember-layers",
    "remember_feature_layers": "use --remember-feature-layers",
}


def parse_fields(texts: Iterable[str]) -> dict[str, Any]:
    """`FIELD=VALUE` texts of the command line, each value as JSON or else as it stands.

    Raises:
        ConversionError: no "=", or no field that may be set.
    """
    fields = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or name not in _own_fields(LlavaVrConfig) | set(FIXED_FIELDS):
            raise ConversionError(f"--set {text!r}: write it as FIELD=VALUE, with a field of LlavaVrConfig.")
        if name in FIXED_FIELDS:
            raise ConversionError(f"--set {text!r}: {FIXED_FIELDS[name]}.")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def _own_fields(known: type[PreTrainedConfig]) -> set[str]:
    return {f.name for f in dataclasses.fields(known)} - COMMON_FIELDS


def _sub_config(values: dict[str, Any], model_type: str, side: str) -> PreTrainedConfig:
    """The configuration of one side of the model, from its own or from that of a whole model of research code."""
    if model_type not in CONFIG_MAPPING:
        raise ConversionError(f"the {side}'s model_type {model_type!r} is unknown to transformers.")
    known = CONFIG_MAPPING[model_type]
    if values.get("model_type") == model_type:  # its own: fields that the class does not declare have a meaning, too
        values = {name: value for name, value in values.items() if name not in COMMON_FIELDS}
    else:
        names = _own_fields(known)
        names |= {"rope_theta", "rope_scaling", "partial_rotary_factor", "head_dim"}
        names |= {"bos_token_id", "eos_token_id", "pad_token_id"}
        values = {name: value for name, value in values.items() if name in names}
    pad = values.get("pad_token_id")
    if pad is not None and not 0 <= pad < values.get("vocab_size", pad + 1):
        values["pad_token_id"] = None
    for name in ("rope_scaling", "rope_parameters"):
        if values.get(name) is None:
            values.pop(name, None)
    return known.from_dict(values)


def _vision_config(config: dict[str, Any]) -> PreTrainedConfig:
    """The tower's configuration, from its own or from that of a model of images and text."""
    model_type = config.get("model_type", "")
    if isinstance(config.get("vision_config"), dict) and model_type in CONFIG_MAPPING:
        return _check_tower(CONFIG_MAPPING[model_type].from_dict(config).vision_config)
    return _check_tower(_sub_config(config, model_type, "vision tower"))


def _check_tower(config: PreTrainedConfig) -> PreTrainedConfig:
    """Refuses towers whose tensors or images differ from those of CLIP and SigLIP."""
    if config.model_type == "siglip2_vision_model":
        raise ConversionError(
            "vision tower 'siglip2_vision_model' is SigLIP 2's NaFlex variant, whose images have no fixed size: use a "
            "checkpoint of SigLIP 2 with a fixed size, of type 'siglip_vision_model'."
        )
    if config.model_type not in TOWERS:
        raise ConversionError(f"vision tower {config.model_type!r}: the towers that are read are {', '.join(TOWERS)}.")
    return config


@dataclass
class _Tower:
    """The tower that a source names; `folder` is None where only its configuration is known."""

    config: PreTrainedConfig
    folder: Path | None

    def part(self, cut: int | None) -> Part:
        """Its weights, without layer `cut` and those after it."""
        if self.folder is None:
            raise ConversionError("the source has no weights of the vision tower: pass --vision-tower.")
        return Part(_tensors(self.folder), _cut(r"(?:vision_model\.)?", cut) + mapping.TOWER_ALONE)


def _cut(prefix: str, layer: int | None) -> list[tuple[str, str]]:
    return [] if layer is None else [(rf"{prefix}encoder\.layers\.{layer}\..+", mapping.LAST_LAYER)]


def _tower(folder: Path, config: dict[str, Any], options: Options, weights: bool) -> _Tower:
    """The tower of `--vision-tower` or else the one that the source's configuration names."""
    name, option = options.vision_tower, "--vision-tower"
    if name is None:
        name, option = config.get("mm_vision_tower") or config.get("vision_tower"), "mm_vision_tower"
        if not name or not isinstance(name, str):
            raise ConversionError(f"{folder}: mm_vision_tower {name!r} names no vision tower: pass --vision-tower.")
        if (folder / name).is_dir():
            name = os.fspath(folder / name)
    try:
        place = locate(name, option, weights)
    except ConversionError as error:
        known = KNOWN_TOWERS.get(Path(name).name)
        if known and not weights:
            return _Tower(_vision_config(known), None)
        raise ConversionError(f"{error} Pass --vision-tower with its folder.") from None
    if not (place / "config.json").is_file():
        raise ConversionError(f"{option} {place}: no config.json.")
    with reading(f"{option} {place}: config.json"):
        return _Tower(_vision_config(read_config(place)), place)


def parse_pinpoints(value: Any, tile: int) -> list[list[int]]:
    """Research code's tilings, (width, height), as (height, width) in the same order.

    Args:
        value: a list of pairs in pixels, such a list as a text, or "(1x1),...,(6x6)" in tiles.
        tile: pixels per side of a tile.
    """
    pairs = value
    if isinstance(value, str) and (found := re.findall(r"\((\d+)x(\d+)\)", value)):
        (first_width, first_height), (last_width, last_height) = ((int(w), int(h)) for w, h in (found[0], found[-1]))
        widths, heights = range(first_width, last_width + 1), range(first_height, last_height + 1)
        if len(widths) * len(heights) > MAX_TILINGS:
            raise ConversionError(f"image_grid_pinpoints {value!r} are more than {MAX_TILINGS} tilings.")
        pairs = [(width * tile, height * tile) for width in widths for height in heights]
    elif isinstance(value, str):
        try:
            pairs = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pairs = None
    if not isinstance(pairs, (list, tuple)) or any(not isinstance(p, (list, tuple)) or len(p) != 2 for p in pairs):
        raise ConversionError(f"image_grid_pinpoints {value!r} is no list of (width, height) pairs.")
    return [[height, width] for width, height in pairs]


def slice_tilings(patch_num: Any, tile: int) -> list[list[int]]:
    """The tilings of TokenPacker's HD mode as (height, width) in pixels: at most `patch_num` tiles, 9 in a line."""
    if str(patch_num) not in ("9", "16", "25"):
        raise ConversionError(f"patch_num {patch_num!r}: 9, 16 or 25 are read.")
    sides = range(1, int(patch_num) + 1)
    shapes = ((rows, columns) for rows in sides for columns in sides if rows * columns <= int(patch_num))
    return [[rows * tile, columns * tile] for rows, columns in shapes if min(rows, columns) > 1 or rows + columns <= 10]


def _images(config: dict[str, Any], tile: int) -> dict[str, Any]:
    """How research code cuts and joins tiles."""
    ratio, merge = config.get("image_aspect_ratio") or "square", config.get("mm_patch_merge_type") or "flat"
    if ratio == "slice":  # TokenPacker's HD mode
        tilings = slice_tilings(config.get("patch_num") or 9, tile)
        return {"image_aspect_ratio": "anyres", "image_merge_type": "slices", "image_grid_pinpoints": tilings}
    if not re.fullmatch(r"square|pad|anyres(_max_\d+)?", str(ratio)):
        raise ConversionError(f"image_aspect_ratio {ratio!r}: only square, pad, anyres, anyres_max_N, slice are read.")
    if merge not in ("flat", "spatial", "spatial_unpad"):
        raise ConversionError(f"mm_patch_merge_type {merge!r}: only flat, spatial and spatial_unpad are read.")
    images: dict[str, Any] = {"image_aspect_ratio": ratio, "image_merge_type": merge}
    if ratio.startswith("anyres"):
        images["image_grid_pinpoints"] = parse_pinpoints(config.get("image_grid_pinpoints"), tile)
    return images


# ---- the layouts


def _ours(folder: Path, config: dict[str, Any]) -> Source:
    values = {name: value for name, value in config.items() if name in _own_fields(LlavaVrConfig)}
    image_token_id = values.pop("image_token_id")
    for side in ("vision_config", "text_config"):
        values[side] = CONFIG_MAPPING[values[side]["model_type"]].from_dict(values[side])
    part = Part(_tensors(folder), mapping.OURS)
    return Source("LLaVA-VR", "ours", folder, values, [part], image_token_id=image_token_id)


def _transformers(folder: Path, config: dict[str, Any]) -> Source:
    theirs = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    if not theirs.multimodal_projector_bias:
        raise ConversionError("multimodal_projector_bias false: LLaVA-VR's projector has biases.")
    strategy = theirs.vision_feature_select_strategy
    has_cls = _check_tower(theirs.vision_config).model_type == "clip_vision_model"
    if strategy == "full" and has_cls:
        raise ConversionError("vision_feature_select_strategy 'full': LLaVA-VR does not keep the CLS token.")
    if strategy == "default" and not has_cls:
        raise ConversionError(
            "vision_feature_select_strategy 'default' drops the first patch of a tower without a CLS token in "
            "transformers; LLaVA-VR keeps all: if the model was trained with all, set it to 'full' in config.json."
        )
    for name, neutral in (("logits_scaling", 1.0), ("logit_scale", 1.0), ("final_logit_softcapping", None)):
        if hasattr(theirs.text_config, name):  # their class has no such step after its head
            setattr(theirs.text_config, name, neutral)
    if theirs.model_type == "llava":
        pads = read_image_processor(folder).get("do_pad", False)
        images = {"image_aspect_ratio": "pad" if pads else "square", "image_merge_type": "flat"}
    else:
        ratio = "anyres" if theirs.model_type == "llava_next" else theirs.vision_aspect_ratio
        images = {"image_aspect_ratio": ratio, "image_merge_type": "spatial_unpad"}
        images["image_grid_pinpoints"] = [list(pair) for pair in theirs.image_grid_pinpoints]
    values = {
        "vision_config": theirs.vision_config,
        "text_config": theirs.text_config,
        "projector_type": "mlp",
        "projector_downsample": 1,
        "projector_hidden_act": theirs.projector_hidden_act,
        "vision_feature_layer": theirs.vision_feature_layer,
        "vision_feature_select_strategy": theirs.vision_feature_select_strategy,
        "tie_word_embeddings": theirs.tie_word_embeddings,
        **images,
    }
    part = Part(_tensors(folder), mapping.TRANSFORMERS)
    source = Source(f"transformers' {theirs.model_type}", "transformers", folder, values, [part])
    source.image_token_id = theirs.image_token_index
    return source


def _honeybee_projector(config: dict[str, Any]) -> dict[str, Any] | None:
    return config.get("visual_projector_config") or config.get("projector_config")


def _honeybee(folder: Path, config: dict[str, Any]) -> Source:
    projector = _honeybee_projector(config)
    if projector.get("projector_type") != "c-abs":
        raise ConversionError(f"Honeybee's projector {projector.get('projector_type')!r}: only c-abs is read.")
    if not isinstance(config.get("text_config"), dict):
        raise ConversionError(f"{folder}: config.json of Honeybee lacks text_config.")
    vision = _sub_config(config["vision_config"], "clip_vision_model", "vision tower")
    tokens = projector.get("num_query_tokens") or config["num_query_tokens"]
    grid, side = vision.image_size // vision.patch_size, math.isqrt(tokens)
    if side**2 != tokens or grid % side:
        raise ConversionError(
            f"Honeybee's num_query_tokens {tokens}: only the square of a number that divides the grid's side, {grid}, "
            "is read; others make regions that overlap."
        )
    if end_tokens := projector.get("num_eos_tokens", 1):
        raise ConversionError(f"Honeybee's num_eos_tokens {end_tokens}: tokens after those of an image are not read.")
    values = {
        "vision_config": vision,
        "text_config": _sub_config(config["text_config"], config["text_config"]["model_type"], "language model"),
        "projector_type": "c_abstractor",
        "projector_downsample": grid // side,
        "projector_kwargs": {
            "hidden_size": projector.get("hidden_size", 1024),
            "depth": projector["depth"],
            "mlp_depth": projector["mlp_depth"],
            "position_embedding": projector.get("pos_emb", False),
            "pre_norm": projector.get("prenorm", False),
        },
        "vision_feature_layer": projector.get("feature_layer_index", -1),
        "image_aspect_ratio": "square",
        "image_merge_type": "flat",
    }
    part = Part(_tensors(folder), mapping.honeybee_rules())
    return Source("Honeybee", "honeybee", folder, values, [part], conversation="honeybee")


def _projector_layout(names: set[str], config: dict[str, Any], folder: Path) -> str:
    """Whose projector it is, by the names of its tensors."""
    names = {re.sub(r".*\bmm_projector\.", "", name) for name in names if "mm_projector." in name}
    marks = {"tokenpacker": "q_proj_1.weight", "ldpv2": "peg.peg.0.weight", "mlp": "2.weight"}
    for layout, mark in marks.items():
        if mark in names and "4.weight" not in names:
            return layout
    declared = config.get("projector_type") or config.get("mm_projector_type")
    if not names and declared in PROJECTORS:
        return declared
    raise ConversionError(
        f"{folder}: mm_projector_type {declared!r}: the projectors that are read are mlp2x_gelu, TokenPacker's, "
        "MobileVLM's ldpnetv2, Honeybee's c-abs and LLaVA-VR's own; others through --map."
    )


def _research(folder: Path, config: dict[str, Any], options: Options, artefact: Part | None) -> Source:
    """A model of LLaVA's research code from its (flat) configuration; the tower's part is added where one is needed."""
    if config.get("mm_use_im_start_end"):
        raise ConversionError("mm_use_im_start_end true: tokens around each image are not read.")
    if config.get("mm_resampler_type"):
        raise ConversionError(f"mm_resampler_type {config['mm_resampler_type']!r}: resamplers of LLaVA are not read.")
    select = config.get("mm_vision_select_feature") or "patch"
    if select != "patch":
        raise ConversionError(f"mm_vision_select_feature {select!r}: only 'patch' is read.")
    described = " ".join([config.get("model_type", ""), *(config.get("architectures") or [])]).lower()
    decoder = next((d for pattern, d in DECODERS if any(re.search(pattern, word) for word in described.split())), None)
    if decoder is None or re.search(r"mixtral|mpt|gemma|phi|moe", described):
        raise ConversionError(f"{folder}: {described!r}: the decoders that are read are Llama, Mistral and Qwen2.")

    parts = [*([artefact] if artefact else []), Part(_tensors(folder), ())]
    names = {name for part in parts for name, _ in part.names(options.maps)}
    layout = _projector_layout(names, config, folder)
    declared = config.get("projector_type") or config.get("mm_projector_type")
    projector = "avg_pool" if (layout, declared) == ("mlp", "avg_pool") else layout
    own_tower = any(name.startswith("model.vision_tower.") for name in names)
    other_tower = projector == "tokenpacker"
    tower = _tower(folder, config, options, weights=other_tower or not own_tower)
    layer, cut = config.get("mm_vision_select_layer", -2), None
    if tower.config.model_type == "siglip_vision_model":  # its last layer is deleted, whatever the configuration says
        cut = tower.config.num_hidden_layers = tower.config.num_hidden_layers - 1
        layer = -1
    for part in parts:
        part.rules = _cut(r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?", cut) + [
            *([(r"model\.vision_tower\..+", mapping.OTHER_TOWER)] if other_tower else []),
            *mapping.research_rules(layout),
        ]
    if other_tower or not own_tower:
        parts = [*parts, tower.part(cut)]

    grid = tower.config.image_size // tower.config.patch_size
    downsample = {
        "mlp": 1,
        "ldpv2": grid // 12,  # its pooling is to 12 x 12 tokens
        "tokenpacker": config.get("scale_factor") or config.get("down_rate") or 2,
    }.get(projector, config.get("projector_downsample") or 2)
    if projector == "ldpv2" and grid % 12:
        raise ConversionError(f"ldpv2 pools to 12 x 12 tokens: on a grid of {grid} x {grid} its regions overlap.")
    if projector == "tokenpacker" and grid % downsample:
        raise ConversionError(f"tokenpacker with regions of {downsample} on a grid of {grid} x {grid} is not read.")
    values = {
        "vision_config": tower.config,
        "text_config": _sub_config(config, decoder, "language model"),
        "projector_type": projector,
        "projector_downsample": downsample,
        "projector_kwargs": {"feature_layers": [12, 16, 22, 23]} if projector == "tokenpacker" else None,
        "vision_feature_layer": layer,
        **_images(config, tower.config.image_size),
        **{k: v for k, v in config.items() if k in _own_fields(LlavaVrConfig) and k.startswith("remember_")},
    }
    source = Source("LLaVA's research code", "research", folder, values, parts, takes_tower=True)
    if other_tower or not own_tower:
        source.tower = tower.folder
    source.image_folders = [tower.folder] if tower.folder else []
    return source


def _stage_1(folder: Path, config: dict[str, Any], options: Options) -> Source:
    if options.base_model is None:
        raise ConversionError(
            "SOURCE is a stage-1 projector (mm_projector.bin): pass the language model that it was trained on as "
            "--base-model."
        )
    base = locate(options.base_model, "--base-model")
    artefact = Part(list(open_file(folder / "mm_projector.bin").handles.values()), (), wrapper=WRAPPER)
    if "num_hidden_layers" not in config:
        config = {**read_config(base), **config}
    source = _research(base, config, options, artefact)
    source.kind, source.conversation = "stage-1 projector", "plain"
    return _on_base(source, folder)


def _lora(folder: Path, config: dict[str, Any], options: Options) -> Source:
    """Its base as if it stood alone, then the adapter; research code keeps its configuration beside the adapter."""
    adapter = read_adapter(folder)
    base = locate(options.base_model, "--base-model") if options.base_model else adapter.find_base()
    if is_adapter(base):
        raise ConversionError(f"SOURCE {folder}: its base {base} is an adapter, too: convert that first.")
    config = config if _is_research(config) else read_config(base)
    source = _model(base, config, options, Part(adapter.whole, (), wrapper=WRAPPER))
    source.kind, source.adapter = f"LoRA adapter of {source.kind}", adapter
    return _on_base(source, folder)


def _on_base(source: Source, folder: Path) -> Source:
    """The source of a base, as that of the artefact in `folder`."""
    source.folder, source.base = folder, source.folder
    source.tokenizer_folders.insert(0, source.base)
    return source


def _parts(folder: Path, config: dict[str, Any], options: Options) -> Source:
    if config["model_type"] in OTHER_HEADS:
        raise ConversionError(
            f"{folder}: decoder {config['model_type']!r} changes its logits after its head in a way that LLaVA-VR "
            "does not know."
        )
    tower = _tower(folder, {}, options, weights=True)
    projector = options.projector or "avg_pool"
    values = {
        "vision_config": tower.config,
        "text_config": _sub_config(config, config["model_type"], "language model"),
        "projector_type": projector,
        "projector_downsample": 1 if projector == "mlp" else 2,
    }
    parts = [Part(_tensors(folder), mapping.LANGUAGE_MODEL), tower.part(None)]
    source = Source("a language model and a vision tower", "parts", folder, values, parts, takes_tower=True)
    source.new, source.image_folders = ("model.multi_modal_projector.", "model.image_newline"), [tower.folder]
    source.tower = tower.folder
    return source


def read_image_processor(folder: Path) -> dict[str, Any]:
    """The saved image processor of a folder, whichever file it is in; empty where there is none."""
    inner = read_json(folder / "processor_config.json").get("image_processor") or {}
    if not isinstance(inner, dict):
        raise ConversionError(f"{folder / 'processor_config.json'}: image_processor {inner!r} is not an object.")
    return inner or read_json(folder / "preprocessor_config.json")
