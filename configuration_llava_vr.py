"""Configuration of LLaVA-VR, and the layout that says how many vision tokens an image becomes."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.image_processing_utils import select_best_resolution


# Each projector's own options (`projector_kwargs`) and their defaults; None is derived from the vision tower's sizes
PROJECTOR_OPTIONS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "avg_pool": {},
    "pixel_shuffle": {},
    "ldpv2": {},
    "c_abstractor": {
        "hidden_size": None,
        "depth": 3,
        "mlp_depth": 2,
        "position_embedding": True,
        "pre_norm": False,
        "end_tokens": 0,
    },
    "tokenpacker": {"feature_layers": None, "num_heads": None},
    "resampler": {"depth": 2, "num_heads": None},
}
LOWEST_OPTIONS = {"hidden_size": 1, "depth": 0, "mlp_depth": 1, "end_tokens": 0, "num_heads": 1}
MERGE_TYPES = ("spatial_unpad", "spatial", "flat", "slices")
SELECT_STRATEGIES = ("default", "full")


def tokens_per_side(grid_size: int, downsample: int | float) -> int:
    """Vision tokens per side of a tile with `grid_size` patches a side; rounding keeps 7 / (7 / 3) at 3."""
    return math.ceil(round(grid_size / downsample, 4))


def region_bounds(index: Any, grid_size: int, downsample: int | float) -> tuple[Any, Any]:
    """The first patch of a token's region along a side of the grid, and the one after its last.

    Where `downsample` is a fraction, regions overlap and are those of `nn.AdaptiveAvgPool2d`. Where it is whole and
    does not divide the grid, the last one reaches beyond it.

    Args:
        index: of the token along the side, an `int` or a tensor of them.
    """
    tokens = tokens_per_side(grid_size, downsample)
    covered = round(tokens * downsample)  # patches, with the padding
    return index * covered // tokens, ((index + 1) * covered + tokens - 1) // tokens


@dataclass(frozen=True)
class ImageLayout:
    """How the vision tokens of an image are arranged, and so how many there are.

    The model packs by it and the processor writes placeholders by it. Tokens of the base tile come first; those of the
    other tiles follow, merged into one grid, row by row. With "slices" no grid is made: the tiles follow each other
    whole, the base tile last, a separator after each.

    Args:
        tile_size: pixels per side of a tile, the vision tower's input.
        tokens_per_side: vision tokens per side of a tile, after the projector.
        pinpoints: the tilings to choose from, as (height, width) in pixels; empty for one tile an image.
        merge_type: "spatial_unpad" (padding removed, a newline token after each row), "spatial", "flat" or "slices".
        max_tiles: past this many tiles' worth of tokens the grid is resampled (LLaVA-OneVision); None for never.
        end_tokens: tokens without a region that the projector adds to each tile.
    """

    tile_size: int
    tokens_per_side: int
    pinpoints: Sequence[Sequence[int]] = ()
    merge_type: str = "spatial_unpad"
    max_tiles: int | None = None
    end_tokens: int = 0

    @classmethod
    def create(
        cls,
        image_aspect_ratio: str,
        tile_size: int,
        patch_size: int,
        downsample: int | float,
        pinpoints: Sequence[Sequence[int]] | None,
        merge_type: str,
        end_tokens: int,
    ) -> "ImageLayout":
        """The layout of a configuration's or a processor's fields of the same names."""
        anyres = image_aspect_ratio.startswith("anyres")
        return cls(
            tile_size=tile_size,
            tokens_per_side=tokens_per_side(tile_size // patch_size, downsample),
            pinpoints=[list(pair) for pair in pinpoints] if anyres else [],
            merge_type=merge_type,
            max_tiles=int(image_aspect_ratio.removeprefix("anyres_max_")) if "_max_" in image_aspect_ratio else None,
            end_tokens=end_tokens,
        )

    @property
    def tokens_per_tile(self) -> int:
        return self.tokens_per_side**2 + self.end_tokens

    def tiling(self, image_size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of tiles beside the base tile, for an image of (height, width) pixels."""
        height, width = select_best_resolution(tuple(image_size), self.pinpoints)
        return height // self.tile_size, width // self.tile_size

    def num_tiles(self, image_size: Sequence[int]) -> int:
        """Tiles of an image, the base tile included."""
        return 1 + math.prod(self.tiling(image_size)) if self.pinpoints else 1

    def unpad(self, image_size: Sequence[int]) -> tuple[slice, slice]:
        """The rows and columns of the merged token grid that show the image and not its padding (LLaVA-NeXT's rule)."""
        rows, columns = (n * self.tokens_per_side for n in self.tiling(image_size))
        height, width = image_size
        if width / height > columns / rows:
            padding = (rows - int(round(height * (columns / width), 7))) // 2
            return slice(padding, rows - padding), slice(0, columns)
        padding = (columns - int(round(width * (rows / height), 7))) // 2
        return slice(0, rows), slice(padding, columns - padding)

    def resample(self, rows: int, columns: int) -> tuple[int, int]:
        """The grid to which a grid of tokens is resampled (LLaVA-OneVision's rule: only past 1.1 times the limit)."""
        if self.max_tiles is not None:
            ratio = math.sqrt(rows * columns / (self.max_tiles * self.tokens_per_side**2))
            if ratio > 1.1:
                return max(1, int(rows // ratio)), max(1, int(columns // ratio))
        return rows, columns

    def separators(self, image_size: Sequence[int]) -> list[int]:
        """What follows each slice: 0 between two of a row, 1 after a row and after the base tile.

        An image of one slice has no base tile.
        """
        rows, columns = self.tiling(image_size)
        found = ([0] * (columns - 1) + [1]) * rows
        return found if len(found) == 1 else [*found, 1]

    def num_tokens(self, image_size: Sequence[int]) -> int:
        """Vision tokens of an image of (height, width) pixels, newlines, separators and end tokens included."""
        if self.pinpoints and self.merge_type == "slices":
            return len(self.separators(image_size)) * (self.tokens_per_tile + 1)
        if not self.pinpoints or self.merge_type != "spatial_unpad":
            return self.num_tiles(image_size) * self.tokens_per_tile
        rows, columns = self.resample(*(part.stop - part.start for part in self.unpad(image_size)))
        return self.tokens_per_tile + rows * (columns + 1)


@strict
class LlavaVrConfig(PreTrainedConfig):
    r"""Configuration of a LLaVA-VR model. `LlavaVrConfig()` is a 2B model: CLIP-ViT-L/14-336 and Qwen2-1.5B.

    Every field that depends on a size has a derived default, written out when the configuration is made. An impossible
    combination raises a `ValueError` that names the field and the values it may have.

    Args:
        vision_config (`dict` or `PreTrainedConfig`):
            The vision tower: CLIP, SigLIP, or any other of the Auto classes with `output_hidden_states`.
        text_config (`dict` or `PreTrainedConfig`):
            The decoder: any of the Auto classes whose decoder layers receive the model's keyword arguments.
        image_token_id (`int`, defaults to 151646):
            Id of the placeholder that a vision token replaces. `image_token_index` is an alias.
        projector_type (`str`, defaults to `"avg_pool"`):
            One of mlp, avg_pool, pixel_shuffle, ldpv2, c_abstractor, tokenpacker, resampler.
        projector_downsample (`int` or `float`, defaults to 2):
            s: each region of s x s patches becomes one vision token. 1 goes with mlp, and only with it. c_abstractor
            takes fractions that divide the grid, too, such as 1.5: regions then overlap, as `nn.AdaptiveAvgPool2d`'s.
        projector_hidden_act (`str`, defaults to `"gelu"`)
        projector_kwargs (`dict`, *optional*):
            The projector's own options; see `PROJECTOR_OPTIONS`.
        vision_feature_layer (`int`, defaults to -2):
            Index into the tower's hidden states (0 is the embeddings) of what the projector reads.
        vision_feature_select_strategy (`str`, defaults to `"default"`):
            "default" drops the CLS token where the tower has one, "full" keeps all.
        remember_feature_layers (`list[int]`, defaults to [13, 18, 23] at 24 layers, in proportion otherwise):
            Indices into the tower's hidden states whose features, joined, are the memory.
        remember_layers (`list[int]`, defaults to four, evenly spaced from 0):
            Decoder layers after which a Vision Remember module stands; [] for none.
        remember_hidden_size (`int`, defaults to 1024), remember_num_heads (`int`, defaults to 16):
            Width and heads of the module's attention.
        remember_num_key_value_heads (`int`, defaults to 2):
            Heads of its keys and values, each shared by as many heads of the query; null for as many as of the query.
        remember_window (`int`, *optional*):
            Features per side that a vision token sees; null for those of its region. Larger windows overlap.
        image_aspect_ratio (`str`, defaults to `"anyres"`):
            "anyres", "anyres_max_N" (at most N tiles' worth of tokens), "pad" or "square" (one tile).
        image_merge_type (`str`, defaults to `"spatial_unpad"`):
            How tiles join: "spatial_unpad", "spatial", "flat" or "slices" (see `ImageLayout`).
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
    projector_type: str = "avg_pool"
    projector_downsample: int | float = 2
    projector_hidden_act: str = "gelu"
    projector_kwargs: dict | None = None
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"
    remember_feature_layers: list[int] | None = None
    remember_layers: list[int] | None = None
    remember_hidden_size: int = 1024
    remember_num_heads: int = 16
    remember_num_key_value_heads: int | None = 2
    remember_window: int | None = None
    image_aspect_ratio: str = "anyres"
    image_merge_type: str = "spatial_unpad"
    image_separator_ids: list[int] | None = None
    image_grid_pinpoints: list | None = None
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
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
        _check_choice("projector_type", self.projector_type, tuple(PROJECTOR_OPTIONS))
        depth, tile = self.vision_config.num_hidden_layers, self.vision_config.image_size
        derived = {
            "feature_layers": [round(depth * level / 24) for level in (12, 16, 22, 23)],
            "hidden_size": self.vision_config.hidden_size,
            "num_heads": max(1, self.vision_config.hidden_size // 128),
        }
        options = {**PROJECTOR_OPTIONS[self.projector_type], **(self.projector_kwargs or {})}
        self.projector_kwargs = {k: derived.get(k) if v is None else v for k, v in options.items()}
        if self.remember_feature_layers is None:
            self.remember_feature_layers = sorted({round(depth * level / 24) for level in (13, 18, 23)})
        if self.remember_layers is None:
            self.remember_layers = sorted({self.text_config.num_hidden_layers * i // 4 for i in range(4)})
        if self.remember_num_key_value_heads is None:
            self.remember_num_key_value_heads = self.remember_num_heads
        if self.image_grid_pinpoints is None:
            tilings = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
            self.image_grid_pinpoints = [[rows * tile, columns * tile] for rows, columns in tilings]
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)
        super().__post_init__(**kwargs)
        self._check_vision()
        self._check_projector()
        self._check_remember()
        self._check_images()

    @property
    def feature_grid(self) -> int:
        """Patches per side of a tile."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def window_size(self) -> int:
        """Features per side of a vision token's window of the memory."""
        return self.region_size if self.remember_window is None else self.remember_window

    @property
    def region_size(self) -> int:
        """Patches per side of a vision token's region, of the largest if they differ."""
        grid, s = self.feature_grid, self.projector_downsample
        bounds = (region_bounds(i, grid, s) for i in range(tokens_per_side(grid, s)))
        return max(end - start for start, end in bounds)

    @property
    def windows_are_padded(self) -> bool:
        """Whether windows at the edges may reach beyond the grid."""
        grid, s = self.feature_grid, self.projector_downsample
        start, end = region_bounds(tokens_per_side(grid, s) - 1, grid, s)
        return end > grid or self.window_size > min(end - start, region_bounds(0, grid, s)[1])

    @property
    def memory_size(self) -> int:
        """M: width of one entry of the memory, all levels joined."""
        return len(self.remember_feature_layers) * self.vision_config.hidden_size

    @property
    def image_layout(self) -> ImageLayout:
        return ImageLayout.create(
            self.image_aspect_ratio,
            self.vision_config.image_size,
            self.vision_config.patch_size,
            self.projector_downsample,
            self.image_grid_pinpoints,
            self.image_merge_type,
            self.projector_kwargs.get("end_tokens", 0),
        )

    def _check_vision(self):
        if self.feature_grid < 1:
            raise ValueError(
                f"vision_config.patch_size ({self.vision_config.patch_size}) must not exceed "
                f"vision_config.image_size ({self.vision_config.image_size})."
            )
        states = self.vision_config.num_hidden_layers + 1
        layers = {
            "vision_feature_layer": [self.vision_feature_layer],
            "remember_feature_layers": self.remember_feature_layers,
            "projector_kwargs['feature_layers']": self.projector_kwargs.get("feature_layers", []),
        }
        for field, indices in layers.items():
            if not isinstance(indices, (list, tuple)):
                raise ValueError(f"{field} must be a list of hidden states, found {indices!r}.")
            for index in indices:
                if not isinstance(index, int) or not -states <= index < states:
                    raise ValueError(
                        f"{field} has {index!r}, but the vision tower has {states} hidden states: "
                        f"use {-states} to {states - 1}."
                    )
        _check_choice("vision_feature_select_strategy", self.vision_feature_select_strategy, SELECT_STRATEGIES)

    def _check_projector(self):
        unknown = set(self.projector_kwargs) - set(PROJECTOR_OPTIONS[self.projector_type])
        if unknown:
            raise ValueError(
                f"projector_kwargs has {sorted(unknown)}, but {self.projector_type} has the options "
                f"{sorted(PROJECTOR_OPTIONS[self.projector_type])}."
            )
        for option, lowest in LOWEST_OPTIONS.items():
            value = self.projector_kwargs.get(option, lowest)
            if not isinstance(value, int) or value < lowest:
                raise ValueError(
                    f"projector_kwargs[{option!r}] must be an integer of at least {lowest}, found {value!r}."
                )
        if not self.projector_kwargs.get("feature_layers", True):
            raise ValueError("projector_kwargs['feature_layers'] must name a hidden state.")
        _check_choice("projector_hidden_act", self.projector_hidden_act, tuple(ACT2FN))
        s, grid = self.projector_downsample, self.feature_grid
        if isinstance(s, float):
            if self.projector_type != "c_abstractor":
                raise ValueError(
                    f"projector_downsample must be a whole number with projector_type {self.projector_type}, found "
                    f"{s}; fractions go with c_abstractor."
                )
            if not 1 < s <= grid or abs(tokens_per_side(grid, s) * s - grid) > 1e-2:
                raise ValueError(
                    f"projector_downsample must be whole, or {grid} (the grid's side) divided by a smaller whole "
                    f"number, found {s}."
                )
        elif self.projector_type == "mlp" and s != 1:
            raise ValueError(
                f"projector_downsample must be 1 with projector_type mlp, which keeps all tokens; found {s}."
            )
        elif self.projector_type != "mlp" and not 2 <= s <= grid:
            raise ValueError(
                f"projector_downsample must be from 2 to {grid} (the grid's side) with "
                f"projector_type {self.projector_type}, found {s}; 1 goes with mlp."
            )
        width, heads = self.vision_config.hidden_size, self.projector_kwargs.get("num_heads", 1)
        if width % heads:
            raise ValueError(
                f"projector_kwargs['num_heads'] must divide vision_config.hidden_size {width}, found {heads}."
            )

    def _check_remember(self):
        layers, depth = self.remember_layers, self.text_config.num_hidden_layers
        if len(set(layers)) != len(layers) or any(not 0 <= layer < depth for layer in layers):
            raise ValueError(
                f"remember_layers must be different decoder layers from 0 to {depth - 1}, or [] for none; "
                f"found {layers}."
            )
        if layers and not self.remember_feature_layers:
            raise ValueError("remember_feature_layers must name a hidden state, or remember_layers be [].")
        width, heads = self.remember_hidden_size, self.remember_num_heads
        if heads < 1 or width < 1 or width % heads:
            raise ValueError(f"remember_num_heads must divide remember_hidden_size {width}, found {heads}.")
        shared = self.remember_num_key_value_heads
        if shared < 1 or heads % shared:
            raise ValueError(f"remember_num_key_value_heads must divide remember_num_heads {heads}, found {shared}.")
        region, window = self.region_size, self.window_size
        if window < region:
            raise ValueError(
                f"remember_window must be null or at least {region}, a region's side with projector_downsample "
                f"{self.projector_downsample}; found {window}."
            )

    def _check_images(self):
        if self.image_token_id < 0:
            raise ValueError(f"image_token_id must be a token's id, 0 or more, found {self.image_token_id}.")
        ratio = self.image_aspect_ratio
        check_tiling(ratio, self.image_merge_type)
        if ratio.startswith("anyres"):
            tile = self.vision_config.image_size
            for pair in self.image_grid_pinpoints:
                if (
                    not isinstance(pair, (list, tuple))
                    or len(pair) != 2
                    or any(not isinstance(side, int) or side < tile or side % tile for side in pair)
                ):
                    raise ValueError(
                        f"image_grid_pinpoints must be (height, width) pairs of multiples of the tile, {tile} pixels; "
                        f"found {pair}."
                    )
            if not self.image_grid_pinpoints:
                raise ValueError(f"image_grid_pinpoints must not be empty with image_aspect_ratio {ratio!r}.")
            if self.projector_kwargs.get("end_tokens") and self.image_merge_type not in ("flat", "slices"):
                raise ValueError("projector_kwargs['end_tokens'] needs one tile, or image_merge_type flat or slices.")
        ids, vocabulary = self.image_separator_ids, self.text_config.vocab_size
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


def check_tiling(image_aspect_ratio: str, image_merge_type: str):
    """Refuses values of these fields, of a configuration or a processor, that do not exist or do not go together."""
    number = re.fullmatch("anyres_max_([1-9][0-9]*)", image_aspect_ratio)
    if image_aspect_ratio not in ("anyres", "pad", "square") and not number:
        raise ValueError(
            f"image_aspect_ratio must be anyres, anyres_max_N (N > 0), pad or square, found {image_aspect_ratio!r}."
        )
    _check_choice("image_merge_type", image_merge_type, MERGE_TYPES)
    if number and image_merge_type != "spatial_unpad":
        raise ValueError(
            f"image_merge_type must be spatial_unpad with {image_aspect_ratio}, found {image_merge_type!r}."
        )
    if image_merge_type == "slices" and image_aspect_ratio != "anyres":
        raise ValueError(
            f"image_aspect_ratio must be anyres with image_merge_type slices, found {image_aspect_ratio!r}."
        )


def _sub_config(field: str, config: dict | PreTrainedConfig | None, default_type: str, **defaults) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    if config is None:
        return CONFIG_MAPPING[default_type](**defaults)
    values = {key: value for key, value in config.items() if key != "model_type"}
    model_type = config.get("model_type", default_type)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{field}.model_type must be one that transformers knows, found {model_type!r}.")
    return CONFIG_MAPPING[model_type](**values)


def _check_sizes(field: str, config: PreTrainedConfig, *names: str):
    for name in names:
        size = getattr(config, name, None)
        if not isinstance(size, int) or size < 1:
            raise ValueError(
                f"{field}.{name} must be a positive integer, found {size!r} (model_type {config.model_type!r})."
            )


def _check_choice(field: str, value: str, choices: tuple[str, ...]):
    if value not in choices:
        raise ValueError(f"{field} must be one of {', '.join(choices)}, found {value!r}.")


__all__ = ["ImageLayout", "LlavaVrConfig"]
