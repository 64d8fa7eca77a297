"""Configuration of LLaVA-VR: fields, derived defaults, checks."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils.versions import require_version

from .layout_llava_vr import LAYOUTS, ImageLayout, make_layout, window_size
from .projectors_llava_vr import PROJECTORS


require_version("transformers>=5.18", "LLaVA-VR needs transformers 5.18 or newer: pip install -U transformers")

AUTO_MAP = {
    "AutoConfig": "configuration_llava_vr.LlavaVrConfig",
    "AutoModel": "modeling_llava_vr.LlavaVrModel",
    "AutoModelForImageTextToText": "modeling_llava_vr.LlavaVrForConditionalGeneration",
}
LOWEST_OPTIONS = {"hidden_size": 1, "depth": 0, "mlp_depth": 1, "num_heads": 1}


@strict
class LlavaVrConfig(PreTrainedConfig):
    r"""Configuration of a LLaVA-VR model. `LlavaVrConfig()` is a 2B model: CLIP-ViT-L/14-336 and Qwen2-1.5B.

    Every field that depends on a size has a derived default, written out when the configuration is made. An impossible
    combination raises a `ValueError` or a `StrictDataclassError` that names the field and the values it may have.

    Args:
        vision_config (`dict` or `PreTrainedConfig`):
            The vision tower: CLIP, SigLIP, or any other of the Auto classes with `output_hidden_states`.
        text_config (`dict` or `PreTrainedConfig`):
            The decoder: any of the Auto classes whose decoder layers receive the model's keyword arguments.
        image_token_id (`int`, defaults to 151646):
            Id of the placeholder that a vision token replaces. `image_token_index` is an alias.
        projector_type (`str`, defaults to `"avg_pool"`):
            One of mlp, avg_pool, pixel_shuffle, ldpv2, c_abstractor, tokenpacker, resampler.
        projector_downsample (`int`, defaults to 2):
            s: each region of s x s patches becomes one vision token. 1 goes with mlp, and as one of the choices below.
        projector_downsample_choices (`list[int]`, *optional*):
            The values of s that a caller may ask for, such as [1, 2, 4]; null for `projector_downsample` alone. For
            projectors whose weights do not depend on s: avg_pool, ldpv2, c_abstractor, tokenpacker. At 1 no Vision
            Remember module runs.
        projector_hidden_act (`str`, defaults to `"gelu"`)
        projector_kwargs (`dict`, *optional*):
            The projector's own options; see `options` of its class.
        vision_feature_layer (`int` or `list[int]`, defaults to -2):
            Index into the tower's hidden states (0 is the embeddings) of what the projector reads; several are joined.
        vision_feature_select_strategy (`str`, defaults to `"default"`):
            "default" drops the CLS token where the tower has one, "full" keeps all.
        remember_feature_layers (`list[int]`, defaults to [13, 18, 23] at 24 layers, in proportion otherwise):
            Indices into the tower's hidden states whose features, joined, are the memory.
        remember_layers (`list[int]`, defaults to four, evenly spaced from 0):
            Decoder layers after which a Vision Remember module stands; [] for none. Never the last, after which no text
            token could see the update.
        remember_hidden_size (`int`, defaults to 1024), remember_num_heads (`int`, defaults to 16):
            Width and heads of the module's attention.
        remember_num_key_value_heads (`int`, defaults to 2):
            Heads of its keys and values (GQA); null for as many as of the query.
        remember_window_ratio (`float`, defaults to 2.0):
            Side of a token's window of the memory over that of its region; 1.0 is the paper's. See `window_size`.
        image_aspect_ratio (`str`, defaults to `"anyres"`):
            "anyres", "anyres_max_N" (at most N tiles' worth of tokens), "pad" or "square" (one tile).
        image_merge_type (`str`, defaults to `"spatial_unpad"`):
            How tiles join: "spatial_unpad", "spatial", "flat" or "slices" (see `layout_llava_vr.py`).
        image_separator_ids (`list[int]`, *optional*):
            With "slices", and only then: the tokens whose embeddings stand between tiles of a row and after a row.
        image_grid_pinpoints (`list[list[int]]`, *optional*):
            Tilings as (height, width) in pixels; defaults to LLaVA-NeXT's. Unused with one tile.
        tie_word_embeddings (`bool`, *optional*):
            Whether the head shares the embeddings' weights; defaults to `text_config`'s.
    """

    model_type = "llava_vr"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    attribute_map = {"image_token_index": "image_token_id"}
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states", "remember_attentions"]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151646
    projector_type: Literal[*PROJECTORS] = "avg_pool"
    projector_downsample: int = 2
    projector_downsample_choices: list[int] | None = None
    projector_hidden_act: Literal[*ACT2FN] = "gelu"
    projector_kwargs: dict | None = None
    vision_feature_layer: int | list[int] = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    remember_feature_layers: list[int] | None = None
    remember_layers: list[int] | None = None
    remember_hidden_size: int = 1024
    remember_num_heads: int = 16
    remember_num_key_value_heads: int | None = 2
    remember_window_ratio: float | int = 2.0
    image_aspect_ratio: str = "anyres"
    image_merge_type: Literal[*LAYOUTS] = "spatial_unpad"
    image_separator_ids: list[int] | None = None
    image_grid_pinpoints: list | None = None
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        if gone := {"remember_window", "window_bias", "end_tokens"} & kwargs.keys():
            raise ValueError(f"{min(gone)} is gone: convert the folder, of an earlier design, with convert_weights.py.")
        self.vision_config = _sub_config(
            "vision_config",
            self.vision_config,
            default_type="clip_vision_model",
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        )
        self.text_config = _sub_config(
            "text_config",
            self.text_config,
            default_type="qwen2",
            vocab_size=151936,
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            max_window_layers=28,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
            tie_word_embeddings=True,
        )
        _check_sizes(
            "vision_config", self.vision_config, "image_size", "patch_size", "hidden_size", "num_hidden_layers"
        )
        _check_sizes("text_config", self.text_config, "vocab_size", "hidden_size", "num_hidden_layers")
        if self.feature_grid < 1:
            raise ValueError(
                f"vision_config.patch_size ({self.vision_config.patch_size}) must not exceed "
                f"vision_config.image_size ({self.vision_config.image_size})."
            )
        depth, tile = self.vision_config.num_hidden_layers, self.vision_config.image_size
        derived = {
            "feature_layers": [round(depth * level / 24) for level in (12, 16, 22, 23)],
            "hidden_size": self.vision_config.hidden_size,
            "num_heads": max(1, self.vision_config.hidden_size // 128),
        }
        options = {**PROJECTORS[self.projector_type].options, **(self.projector_kwargs or {})}
        self.projector_kwargs = {k: derived.get(k) if v is None else v for k, v in options.items()}
        if self.remember_feature_layers is None:
            self.remember_feature_layers = sorted({round(depth * level / 24) for level in (13, 18, 23)})
        if self.remember_layers is None:
            layers = self.text_config.num_hidden_layers
            self.remember_layers = sorted({layers * i // 4 for i in range(4)} - {layers - 1})
        if self.remember_num_key_value_heads is None:
            self.remember_num_key_value_heads = self.remember_num_heads
        if self.image_grid_pinpoints is None:
            tilings = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
            self.image_grid_pinpoints = [[rows * tile, columns * tile] for rows, columns in tilings]
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)
        super().__post_init__(**{**kwargs, "auto_map": {**AUTO_MAP, **kwargs.get("auto_map", {})}})

    @property
    def feature_grid(self) -> int:
        """Patches per side of a tile."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def feature_layers(self) -> list[int]:
        """`vision_feature_layer` as a list."""
        layers = self.vision_feature_layer
        return [layers] if isinstance(layers, int) else layers

    @property
    def feature_size(self) -> int:
        """Width of what the projector reads of a patch, all of `vision_feature_layer` joined."""
        return len(self.feature_layers) * self.vision_config.hidden_size

    @property
    def memory_size(self) -> int:
        """M: width of one entry of the memory, all levels joined."""
        return len(self.remember_feature_layers) * self.vision_config.hidden_size

    @property
    def key_value_size(self) -> int:
        """K: width of a module's keys, and of its values."""
        return self.remember_hidden_size // self.remember_num_heads * self.remember_num_key_value_heads

    @property
    def downsamples(self) -> list[int]:
        """The values of s that a caller may ask for."""
        return self.projector_downsample_choices or [self.projector_downsample]

    @property
    def image_layout(self) -> ImageLayout:
        vision = self.vision_config
        return make_layout(
            self.image_aspect_ratio,
            self.image_merge_type,
            vision.image_size,
            vision.patch_size,
            self.image_grid_pinpoints,
        )

    def window_size(self, downsample: int) -> int:
        """W: patches per side of a token's window; 0 at s = 1 of a projector that downsamples: no module runs."""
        if downsample == 1 and self.projector_type != "mlp":
            return 0
        return window_size(downsample, self.remember_window_ratio)

    def validate_vision(self):
        states = self.vision_config.num_hidden_layers + 1
        layers = {
            "vision_feature_layer": self.feature_layers,
            "remember_feature_layers": self.remember_feature_layers,
            "projector_kwargs['feature_layers']": self.projector_kwargs.get("feature_layers", [0]),
        }
        for field, indices in layers.items():
            if not isinstance(indices, list) or not (indices or field.startswith("remember")):
                raise ValueError(f"{field} must be a list of hidden states, at least one of them; found {indices!r}.")
            for index in indices:
                if not isinstance(index, int) or not -states <= index < states:
                    raise ValueError(
                        f"{field} has {index!r}, but the vision tower has {states} hidden states: "
                        f"use {-states} to {states - 1}."
                    )

    def validate_projector(self):
        projector = PROJECTORS[self.projector_type]
        unknown = set(self.projector_kwargs) - set(projector.options)
        if unknown:
            raise ValueError(
                f"projector_kwargs has {sorted(unknown)}, but {self.projector_type} has the options "
                f"{sorted(projector.options)}."
            )
        for option, lowest in LOWEST_OPTIONS.items():
            value = self.projector_kwargs.get(option, lowest)
            if not isinstance(value, int) or value < lowest:
                raise ValueError(
                    f"projector_kwargs[{option!r}] must be an integer of at least {lowest}, found {value!r}."
                )
        width, heads = self.feature_size, self.projector_kwargs.get("num_heads", 1)
        if width % heads:
            raise ValueError(f"projector_kwargs['num_heads'] must divide the features' width {width}, found {heads}.")

    def validate_downsample(self):
        s, choices, grid = self.projector_downsample, self.projector_downsample_choices, self.feature_grid
        if choices is not None:
            if not PROJECTORS[self.projector_type].any_downsample:
                able = ", ".join(name for name, projector in PROJECTORS.items() if projector.any_downsample)
                raise ValueError(
                    f"projector_downsample_choices must be null with projector_type {self.projector_type}, whose "
                    f"weights depend on the downsampling; choices go with {able}."
                )
            if s not in choices or len(set(choices)) < len(choices) or any(not 1 <= n <= grid for n in choices):
                raise ValueError(
                    f"projector_downsample_choices must be different integers from 1 to {grid} (the grid's side), "
                    f"among them projector_downsample {s}; found {choices}."
                )
        elif self.projector_type == "mlp" and s != 1:
            raise ValueError(
                f"projector_downsample must be 1 with projector_type mlp, which keeps all tokens; found {s}."
            )
        elif self.projector_type != "mlp" and not 2 <= s <= grid:
            raise ValueError(
                f"projector_downsample must be from 2 to {grid} (the grid's side) with projector_type "
                f"{self.projector_type}, found {s}; 1 goes with mlp, and as one of projector_downsample_choices."
            )

    def validate_remember(self):
        layers, last = self.remember_layers, self.text_config.num_hidden_layers - 1
        if len(set(layers)) != len(layers) or any(not 0 <= layer < last for layer in layers):
            raise ValueError(
                f"remember_layers must be different decoder layers from 0 to {last - 1}, or [] for none; after the "
                f"last, {last}, no text token could see the update. Found {layers}."
            )
        if layers and not self.remember_feature_layers:
            raise ValueError("remember_feature_layers must name a hidden state, or remember_layers be [].")
        width, heads = self.remember_hidden_size, self.remember_num_heads
        if heads < 1 or width < 1 or width % heads:
            raise ValueError(f"remember_num_heads must divide remember_hidden_size {width}, found {heads}.")
        shared = self.remember_num_key_value_heads
        if shared < 1 or heads % shared:
            raise ValueError(f"remember_num_key_value_heads must divide remember_num_heads {heads}, found {shared}.")
        if not 1 <= self.remember_window_ratio < float("inf"):
            raise ValueError(f"remember_window_ratio must be 1.0 or more, found {self.remember_window_ratio}.")

    def validate_tokens(self):
        vocabulary, ids = self.text_config.vocab_size, self.image_separator_ids
        if not 0 <= self.image_token_id < vocabulary:
            raise ValueError(
                f"image_token_id must be a token's id, from 0 to {vocabulary - 1} (text_config.vocab_size - 1), found "
                f"{self.image_token_id}."
            )
        if (ids is None) == (self.image_merge_type == "slices"):
            raise ValueError(
                "image_separator_ids must be two token ids with image_merge_type slices and null otherwise; found "
                f"{ids} with {self.image_merge_type}."
            )
        if ids is not None and (len(ids) != 2 or any(not 0 <= i < vocabulary for i in ids)):
            raise ValueError(
                f"image_separator_ids must be two token ids from 0 to {vocabulary - 1}: between tiles of a row, and "
                f"after a row; found {ids}."
            )

    def validate_layout(self):
        self.image_layout  # noqa: B018  # refuses fields that do not go together


def _sub_config(field: str, config: dict | PreTrainedConfig | None, default_type: str, **defaults) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    if config is None:
        return CONFIG_MAPPING[default_type](**defaults)
    model_type = config.get("model_type", default_type)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{field}.model_type must be one that transformers knows, found {model_type!r}.")
    return CONFIG_MAPPING[model_type].from_dict(config)


def _check_sizes(field: str, config: PreTrainedConfig, *names: str):
    for name in names:
        size = getattr(config, name, None)
        if not isinstance(size, int) or size < 1:
            raise ValueError(
                f"{field}.{name} must be a positive integer, found {size!r} (model_type {config.model_type!r})."
            )


__all__ = ["LlavaVrConfig"]
