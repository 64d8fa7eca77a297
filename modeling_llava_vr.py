"""LLaVA-VR: a vision-language model that compresses its vision tokens and lets them look again.

Read in this order: `VisionRemember`, the paper's module; `RememberHook`, which calls it between decoder layers;
`LlavaVrModel.get_image_features`, which makes the vision tokens and, row by row beside them, their memory.
Paper: Vision Remember, arXiv 2506.03928.
"""

import copy
import dataclasses
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from packaging import version
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import logging, torch_compilable_check
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .configuration_llava_vr import ImageLayout, LlavaVrConfig, region_bounds, tokens_per_side


logger = logging.get_logger(__name__)


@dataclass
class LlavaVrImageFeatures(BaseModelOutputWithPooling):
    """What the decoder needs of the images.

    Args:
        pooler_output: the vision tokens, one tensor `(tokens, hidden_size)` an image.
        deepstack_features: the memory rows, `[[(tokens, window * window * memory_size + 1), ...]]`, one tensor an
            image: the token's window of the memory, flat, and its validity flag. None without Vision Remember modules.
    """

    pooler_output: list[torch.Tensor] | None = None
    deepstack_features: list[list[torch.Tensor]] | None = None


@dataclass
class LlavaVrModelOutputWithPast(BaseModelOutputWithPast):
    """
    Args:
        image_hidden_states: the vision tokens, `(tokens of all images, hidden_size)`.
        remember_attentions: for each of `remember_layers`, `(tokens of all images, heads, window * window)`.
    """

    image_hidden_states: torch.Tensor | None = None
    remember_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class LlavaVrCausalLMOutputWithPast(CausalLMOutputWithPast):
    """As `LlavaVrModelOutputWithPast`, with `loss` and `logits` `(batch, sequence, vocabulary)`."""

    image_hidden_states: torch.Tensor | None = None
    remember_attentions: tuple[torch.Tensor, ...] | None = None


def cut_windows(grid: torch.Tensor, stride: int | float, window: int) -> torch.Tensor:
    """
    Cuts a grid of features into one window for each region (see `region_bounds`), regions and entries row by row.

    A grid that a whole `stride` does not divide is padded at the bottom and right. A window larger than its region is
    centred on it (an odd surplus goes to the bottom and right) and overlaps its neighbours. Padding is exactly zero.

    Args:
        grid: `(tiles, rows, columns, features)`.
        stride: patches from one region to the next; a fraction where regions overlap.
        window: patches per side of a window, at least those of the largest region.

    Returns:
        `(tiles, regions, window * window, features)`, with `ceil(rows / stride) * ceil(columns / stride)` regions.
    """
    padding, patches = [], []
    for size in grid.shape[1:3]:
        tokens = tokens_per_side(size, stride)
        start, end = region_bounds(torch.arange(tokens, device=grid.device), size, stride)
        before = (window - region_bounds(0, size, stride)[1]) // 2
        after = region_bounds(tokens - 1, size, stride)[0] + window - before - size
        first = start - (window - end + start) // 2 + before  # counted from the padding
        padding = [before, after, *padding]
        patches.append(first[:, None] + torch.arange(window, device=grid.device))  # (t, window)
    if any(padding):
        grid = F.pad(grid, (0, 0, *padding))
    row, column = patches
    positions = row[:, None, :, None] * grid.shape[2] + column[:, None, :]  # (t, t, window, window), of the flat grid
    # Not Tensor.unfold: its compiled backward pass corrupts memory on CPU (torch 2.13), and index_select is faster.
    windows = grid.flatten(1, 2).index_select(1, positions.flatten())
    return windows.unflatten(1, (-1, window * window))


def window_mask(grid_size: int, stride: int, window: int, device=None) -> torch.Tensor:
    """Which entries of each window hold a feature, not padding: bool `(regions, window * window)`."""
    return cut_windows(torch.ones(1, grid_size, grid_size, 1, device=device), stride, window)[0, :, :, 0] > 0


def to_grid(features: torch.Tensor, grid_size: int) -> torch.Tensor:
    """`(tiles, grid_size * grid_size, features)` to `(tiles, grid_size, grid_size, features)`."""
    return features.unflatten(1, (grid_size, grid_size))


def normalize_memory(memory: torch.Tensor, level_size: int) -> torch.Tensor:
    """Each level of each entry of a memory `(..., levels * level_size)` by itself to mean 0 and variance 1.

    A layer norm without weights: those would be one with the weights of the keys and values that follow.
    """
    return F.layer_norm(memory.unflatten(-1, (-1, level_size)), (level_size,), eps=1e-6).flatten(-2)


def average_regions(grid: torch.Tensor, stride: int | float) -> torch.Tensor:
    """
    Averages each region of a grid `(tiles, features, g, g)` to `(tiles, features, t, t)`. With `ceil_mode`, a region at
    the edge is divided by the number of features that it really has.
    """
    if isinstance(stride, float):
        return F.adaptive_avg_pool2d(grid, tokens_per_side(grid.shape[-1], stride))
    return F.avg_pool2d(grid, stride, ceil_mode=True)


def centre_regions(grid: torch.Tensor, stride: int) -> torch.Tensor:
    """
    Samples a grid `(tiles, g, g, features)` at the centre of each region's own features, between patches bilinearly:
    `(tiles, t, t, features)`. Where `stride` divides the grid, it is `F.interpolate(mode="bilinear")`.
    """
    first = torch.arange(0, grid.shape[1], stride, device=grid.device)
    last = (first + stride).clamp(max=grid.shape[1]) - 1
    middle = torch.stack([(first + last) // 2, (first + last + 1) // 2], dim=1)  # (t, 2), twice the same if odd
    return grid[:, middle[:, None, :, None], middle[None, :, None, :]].mean((3, 4))  # of (tiles, t, t, 2, 2, features)


class Mlp(nn.Module):
    def __init__(self, in_features: int, hidden_features: int, out_features: int, hidden_act: str):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden_features)
        self.act = ACT2FN[hidden_act]
        self.linear_2 = nn.Linear(hidden_features, out_features)

    def forward(self, features):
        return self.linear_2(self.act(self.linear_1(features)))


class CrossAttention(nn.Module):
    """Multi-head attention with the parameters of `nn.MultiheadAttention`, under the same names."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.head_shape = (num_heads, hidden_size // num_heads)
        self.in_proj_weight = nn.Parameter(torch.randn(3 * hidden_size, hidden_size) * 0.02)  # query, key, value
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, query, key, value, mask=None):
        # query (..., queries, hidden), key and value (..., keys, hidden), mask: bool, fits (..., heads, queries, keys)
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (
            F.linear(states, weight, bias).unflatten(-1, self.head_shape).transpose(-3, -2)
            for states, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )  # (..., heads, queries or keys, head_dim)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(attended.transpose(-3, -2).flatten(-2))


class MlpProjector(Mlp):
    """LLaVA-NeXT: every patch becomes a token. Also the base of the projectors that begin or end with its layers."""

    uses_levels = False

    def __init__(self, config, patches_joined: int = 1):
        text_size = config.text_config.hidden_size
        super().__init__(
            config.vision_config.hidden_size * patches_joined, text_size, text_size, config.projector_hidden_act
        )
        self.grid_size, self.stride = config.feature_grid, config.projector_downsample

    def forward(self, features, levels=None):
        return super().forward(features)


class AvgPoolProjector(MlpProjector):
    """DeCo: the mean of each region, then the MLP."""

    def forward(self, features, levels=None):
        grid = to_grid(features, self.grid_size).permute(0, 3, 1, 2)
        return super().forward(average_regions(grid, self.stride).flatten(2).transpose(1, 2))


class PixelShuffleProjector(MlpProjector):
    """InternVL: the patches of each region joined along features, then a norm and the MLP. Padding joins as zeros."""

    def __init__(self, config):
        super().__init__(config, patches_joined=config.projector_downsample**2)
        self.layer_norm = nn.LayerNorm(self.linear_1.in_features)

    def forward(self, features, levels=None):
        regions = cut_windows(to_grid(features, self.grid_size), self.stride, self.stride)  # (tiles, t*t, s*s, C)
        return super().forward(self.layer_norm(regions.flatten(2)))


class LdpV2Projector(MlpProjector):
    """MobileVLM V2: the MLP, the mean of each region, then a depth-wise convolution with a skip for positions."""

    def __init__(self, config):
        super().__init__(config)
        text_size = config.text_config.hidden_size
        self.position_conv = nn.Conv2d(text_size, text_size, kernel_size=3, padding=1, groups=text_size)

    def forward(self, features, levels=None):
        grid = to_grid(super().forward(features), self.grid_size).permute(0, 3, 1, 2)
        tokens = average_regions(grid, self.stride)  # (tiles, D, t, t)
        return (tokens + self.position_conv(tokens)).flatten(2).transpose(1, 2)


class ConvNorm(nn.Module):
    """Convolution without bias, then a layer norm over the channels."""

    def __init__(self, in_channels: int, out_channels: int, **conv_options):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, bias=False, **conv_options)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, grid):  # (tiles, in_channels, rows, columns)
        return self.norm(self.conv(grid).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RegNetBlock(nn.Module):
    """RegNet's residual bottleneck with a depth-wise convolution and a squeeze-and-excitation gate."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        squeezed = max(1, round(in_channels / 4))
        self.conv_1 = ConvNorm(in_channels, channels, kernel_size=1)
        self.conv_2 = ConvNorm(channels, channels, kernel_size=3, padding=1, groups=channels)
        self.squeeze = nn.Conv2d(channels, squeezed, kernel_size=1)
        self.excite = nn.Conv2d(squeezed, channels, kernel_size=1)
        self.conv_3 = ConvNorm(channels, channels, kernel_size=1)
        self.shortcut = ConvNorm(in_channels, channels, kernel_size=1) if in_channels != channels else nn.Identity()

    def forward(self, grid):  # (tiles, in_channels, rows, columns) -> (tiles, channels, rows, columns)
        hidden = F.silu(self.conv_2(F.silu(self.conv_1(grid))))
        gate = self.excite(F.silu(self.squeeze(hidden.mean((2, 3), keepdim=True)))).sigmoid()  # (tiles, channels, 1, 1)
        return F.silu(self.conv_3(hidden * gate) + self.shortcut(grid))


class CAbstractorProjector(nn.Module):
    """Honeybee: RegNet blocks, the mean of each region, RegNet blocks, then an MLP, all with SiLU."""

    uses_levels = False

    def __init__(self, config):
        super().__init__()
        options = config.projector_kwargs
        vision_size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
        self.grid_size, self.stride = config.feature_grid, config.projector_downsample

        def stage(in_channels):
            sizes = [in_channels] + [options["hidden_size"]] * options["depth"]
            blocks = (RegNetBlock(*sizes[i : i + 2]) for i in range(options["depth"]))
            return nn.Sequential(OrderedDict((f"block_{i}", block) for i, block in enumerate(blocks, start=1)))

        self.pre_norm = nn.LayerNorm(vision_size, eps=1e-6) if options["pre_norm"] else nn.Identity()
        self.position_embedding = self.end_tokens = None
        if options["position_embedding"]:
            self.position_embedding = nn.Parameter(torch.randn(1, self.grid_size**2, vision_size) * 0.02)
        self.stage_1 = stage(vision_size)
        self.stage_2 = stage(options["hidden_size"])
        self.readout = nn.Sequential(
            nn.Linear(options["hidden_size"] if options["depth"] else vision_size, text_size),
            *(m for _ in range(options["mlp_depth"] - 1) for m in (nn.SiLU(), nn.Linear(text_size, text_size))),
        )
        if options["end_tokens"]:
            self.end_tokens = nn.Parameter(torch.randn(1, options["end_tokens"], text_size) * 0.02)

    def forward(self, features, levels=None):
        features = self.pre_norm(features)
        if self.position_embedding is not None:
            features = features + self.position_embedding
        grid = self.stage_1(to_grid(features, self.grid_size).permute(0, 3, 1, 2))  # (tiles, channels, g, g)
        grid = self.stage_2(average_regions(grid, self.stride))  # (tiles, channels, t, t)
        tokens = self.readout(grid.flatten(2).transpose(1, 2))
        if self.end_tokens is not None:
            tokens = torch.cat([tokens, self.end_tokens.expand(tokens.shape[0], -1, -1)], dim=1)
        return tokens


class TokenPackerProjector(nn.Module):
    """TokenPacker: the centre of each region asks the region's own features of several encoder layers."""

    uses_levels = True

    def __init__(self, config):
        super().__init__()
        options = config.projector_kwargs
        vision_size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
        levels_size, hidden_act = vision_size * len(options["feature_layers"]), config.projector_hidden_act
        self.grid_size, self.stride = config.feature_grid, config.projector_downsample

        self.query = nn.Linear(vision_size, vision_size, bias=False)
        self.key = Mlp(levels_size, vision_size, vision_size, hidden_act)
        self.value = Mlp(levels_size, vision_size, vision_size, hidden_act)
        self.norm_query = nn.LayerNorm(vision_size, eps=1e-6)
        self.norm_key = nn.LayerNorm(vision_size, eps=1e-6)
        self.norm_value = nn.LayerNorm(vision_size, eps=1e-6)
        self.attention = CrossAttention(vision_size, options["num_heads"])
        self.output = Mlp(vision_size, text_size, text_size, hidden_act)

    def forward(self, features, levels):
        grid_size, stride = self.grid_size, self.stride
        query = centre_regions(to_grid(features, grid_size), stride).flatten(1, 2)  # (tiles, t*t, C)
        query = self.norm_query(self.query(query)).unsqueeze(2)  # (tiles, t*t, 1, C)
        key, value = self.norm_key(self.key(levels)), self.norm_value(self.value(levels))  # (tiles, g*g, C)
        key = cut_windows(to_grid(key, grid_size), stride, stride)  # (tiles, t*t, s*s, C)
        value = cut_windows(to_grid(value, grid_size), stride, stride)
        mask = None
        if grid_size % stride:
            mask = window_mask(grid_size, stride, stride, features.device)[:, None, None]  # (t*t, 1, 1, s*s)
        return self.output(self.attention(query, key, value, mask).squeeze(2))


class ResamplerLayer(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, hidden_act: str):
        super().__init__()
        self.norm_query = nn.LayerNorm(hidden_size)
        self.norm_key = nn.LayerNorm(hidden_size)
        self.attention = CrossAttention(hidden_size, num_heads)
        self.norm_mlp = nn.LayerNorm(hidden_size)
        self.mlp = Mlp(hidden_size, 4 * hidden_size, hidden_size, hidden_act)

    def forward(self, queries, features):  # (tiles, t*t, C), (tiles, g*g, C) -> (tiles, t*t, C)
        query = self.norm_query(queries)
        key = torch.cat([self.norm_key(features), query], dim=1)  # (tiles, g*g + t*t, C)
        queries = queries + self.attention(query, key, key)
        return queries + self.mlp(self.norm_mlp(queries))


class ResamplerProjector(nn.Module):
    """Perceiver resampler: one learned query for each region attends to all features and to the other queries."""

    uses_levels = False

    def __init__(self, config):
        super().__init__()
        options, vision_size = config.projector_kwargs, config.vision_config.hidden_size
        tokens = tokens_per_side(config.feature_grid, config.projector_downsample) ** 2
        self.queries = nn.Parameter(torch.randn(1, tokens, vision_size) * 0.02)
        self.layers = nn.ModuleList(
            ResamplerLayer(vision_size, options["num_heads"], config.projector_hidden_act)
            for _ in range(options["depth"])
        )
        self.norm = nn.LayerNorm(vision_size)
        self.output = nn.Linear(vision_size, config.text_config.hidden_size)

    def forward(self, features, levels=None):
        queries = self.queries.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, features)
        return self.output(self.norm(queries))


PROJECTORS = {
    "mlp": MlpProjector,
    "avg_pool": AvgPoolProjector,
    "pixel_shuffle": PixelShuffleProjector,
    "ldpv2": LdpV2Projector,
    "c_abstractor": CAbstractorProjector,
    "tokenpacker": TokenPackerProjector,
    "resampler": ResamplerProjector,
}


# What bitsandbytes leaves in full precision by default; the names of both classes, as `LlavaVrModel`'s lack "model."
VISION_PARTS = ("vision_tower", "multi_modal_projector", "vision_remember")
UNQUANTIZED = [*VISION_PARTS, *(f"model.{part}" for part in VISION_PARTS), "lm_head"]


class VisionRemember(nn.Module):
    """Saliency-enhancing local attention: a vision token's hidden state attends to its own window of the memory.

        q = query(norm(h)),  k, v = key(norm(m)), value(norm(m))
        update = out(softmax(q k^T / sqrt(d) + b) v)        b: one learned bias per head and window position

    The idea is the paper's (arXiv 2506.03928); norms, widths, bias and the zero-initialised `out`, by which a new
    module changes nothing, are ours. norm(m) has no weights of its own and is the same for all modules, which receive
    it ready: see `normalize_memory`. An entry of exact zeros is padding and is never attended to.
    """

    def __init__(self, config: LlavaVrConfig):
        super().__init__()
        hidden_size, width = config.text_config.hidden_size, config.remember_hidden_size
        self.num_heads, self.has_padding = config.remember_num_heads, config.windows_are_padded
        self.num_key_value_heads = config.remember_num_key_value_heads
        key_value_width = width // self.num_heads * self.num_key_value_heads
        self.query_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.query = nn.Linear(hidden_size, width, bias=False)
        self.key = nn.Linear(config.memory_size, key_value_width, bias=False)
        self.value = nn.Linear(config.memory_size, key_value_width, bias=False)
        self.out = nn.Linear(width, hidden_size)
        self.window_bias = nn.Parameter(torch.zeros(config.remember_num_heads, config.window_size**2))

    def forward(
        self, hidden_states: torch.Tensor, memory: torch.Tensor, valid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: `(tokens, hidden_size)`, of the vision tokens.
            memory: `(tokens, window * window, memory_size)`, each token's window, normalised.
            valid: `(tokens,)`, False for a token without a region (newline, separator, end token, padding).

        Returns:
            The update of the hidden states `(tokens, hidden_size)`, zero where not valid, and the attention weights
            `(tokens, heads, window * window)`.
        """
        groups = (self.num_key_value_heads, -1)  # g heads share a head k of keys and values
        query = self.query(self.query_norm(hidden_states)).unflatten(-1, (self.num_heads, -1)).unflatten(1, groups)
        key = self.key(memory).unflatten(-1, groups)  # (tokens, window, k, head_dim)
        value = self.value(memory).unflatten(-1, groups)  # (tokens, window, k, head_dim)
        scores = torch.einsum("nkgd,nwkd->nkgw", query, key).flatten(1, 2) / math.sqrt(query.shape[-1])
        scores = (scores + self.window_bias).float()  # (tokens, heads, window)
        if self.has_padding:
            is_padding = memory.eq(0).all(-1)  # (tokens, window)
            scores = scores.masked_fill(is_padding[:, None], torch.finfo(torch.float32).min)
        weights = scores.softmax(-1).to(memory.dtype)
        read = torch.einsum("nkgw,nwkd->nkgd", weights.unflatten(1, groups), value)
        return self.out(read.flatten(1)).masked_fill(~valid[:, None], 0), weights


class RememberTrace:
    """Collects the attention weights of one forward pass, by decoder layer. Not a dict: those are copied on the way."""

    def __init__(self):
        self.weights: dict[int, torch.Tensor] = {}


class RememberHook:
    """Forward hook of a decoder layer: lets its vision tokens look again.

    It holds the ModuleDict and a key, not the module: PEFT's `modules_to_save` replaces the module by a trainable copy.
    """

    def __init__(self, modules: nn.ModuleDict, key: str):
        self.modules, self.key = modules, key

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs.get("vision_memory") is None:
            return None
        hidden_states = output[0] if isinstance(output, tuple) else output  # (batch, sequence, hidden_size)
        index, memory, valid = (kwargs[f"vision_{k}"].to(hidden_states.device) for k in ("index", "memory", "valid"))
        flat = hidden_states.flatten(0, 1)
        update, weights = self.modules[self.key](flat.index_select(0, index), memory, valid)
        hidden_states = flat.index_add(0, index, update.to(flat)).view_as(hidden_states)
        if (trace := kwargs.get("vision_trace")) is not None:
            trace.weights[int(self.key)] = weights
        return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states


class LlavaVrPreTrainedModel(PreTrainedModel):
    config_class = LlavaVrConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisionRemember"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def post_init(self):
        super().post_init()
        classes = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = classes.intersection(self._no_split_modules)  # accelerate's FSDP2 wants each to exist

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = getattr(self.config.text_config, "initializer_range", 0.02)
        if isinstance(module, VisionRemember):
            for parameter in (module.window_bias, module.out.weight, module.out.bias):
                init.zeros_(parameter)
        elif isinstance(module, CrossAttention):
            init.normal_(module.in_proj_weight, std=std)
            init.zeros_(module.in_proj_bias)
        elif isinstance(module, (CAbstractorProjector, ResamplerProjector)):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=std)
        elif isinstance(module, LlavaVrModel) and module.image_newline is not None:
            init.normal_(module.image_newline, std=1 / math.sqrt(self.config.text_config.hidden_size))

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        reentrant = getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant")
        if enable and reentrant and version.parse(transformers.__version__) < version.parse("5.23"):
            raise ValueError(
                'gradient_checkpointing_kwargs={"use_reentrant": True} loses the memory\'s gradients below '
                'transformers 5.23: pass {"use_reentrant": False}, the default.'
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        quantization = kwargs.get("quantization_config")
        if isinstance(quantization, dict):
            kwargs["quantization_config"] = quantization = AutoQuantizationConfig.from_dict(dict(quantization))
        if getattr(quantization, "llm_int8_skip_modules", ()) is None:  # bitsandbytes, and no names are given
            kwargs["quantization_config"] = quantization = copy.deepcopy(quantization)
            quantization.llm_int8_skip_modules = UNQUANTIZED
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # its 4-bit weights, once packed, are saved wrong
                module.support_avx512bf16_for_cpu = False
        missing = [name.split("vision_remember.")[1] for name in info["missing_keys"] if "vision_remember." in name]
        if missing:
            layers = sorted({int(name.split(".")[0]) for name in missing})
            logger.warning(
                f"The checkpoint lacks weights of the Vision Remember modules after decoder layers {layers}. Those are "
                "new: a new module adds nothing until it is trained. Set remember_layers=[] to leave them out."
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args, **kwargs):
        current = type(self)  # under FSDP2 a class of torch's, whose code would be saved instead of this file
        self.__class__ = next(cls for cls in current.__mro__ if not cls.__module__.startswith("torch."))
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = current


class LlavaVrModel(LlavaVrPreTrainedModel):
    """Vision tower, projector, decoder, and the Vision Remember modules between the decoder's layers; no head."""

    def __init__(self, config: LlavaVrConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = PROJECTORS[config.projector_type](config)
        self.image_newline = None
        if config.image_merge_type == "spatial_unpad":
            self.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        self.language_model = AutoModel.from_config(config.text_config)
        self.vision_remember = nn.ModuleDict({str(i): VisionRemember(config) for i in config.remember_layers})
        self._insert_vision_remember()
        self._insertion_seen = False
        self.post_init()

    def _insert_vision_remember(self):
        layers = getattr(self.language_model, "layers", None)
        if len(self.vision_remember) and not isinstance(layers, nn.ModuleList):
            raise ValueError(self._refusal("has no list `layers` to insert it in"))
        for key in self.vision_remember:
            layers[int(key)].register_forward_hook(RememberHook(self.vision_remember, key), with_kwargs=True)

    def _refusal(self, reason: str) -> str:
        return (
            f"text_config.model_type {self.config.text_config.model_type!r}: this decoder {reason}. Vision Remember "
            "works with llama, qwen2, qwen3, mistral, gemma3_text, smollm3, phi3 and their like; or set "
            "remember_layers=[]."
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> LlavaVrImageFeatures:
        """Vision tokens of the images and, row by row beside them, their memory.

        Args:
            pixel_values: `(images, tiles, 3, height, width)`, base tile first, or `(images, 3, height, width)`.
            image_sizes: `(images, 2)`, (height, width) in pixels before processing; needed with tiles.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.vision_config.output_hidden_states
        layout, num_tiles = self._check_images(pixel_values, image_sizes)
        if pixel_values.ndim == 5:
            pixel_values = torch.cat([image[:n] for image, n in zip(pixel_values, num_tiles)])  # (all tiles, 3, H, W)
        outputs = self.vision_tower(
            pixel_values.to(self.vision_tower.dtype), output_hidden_states=True, return_dict=True, **kwargs
        )
        features = [self._patch_features(outputs.hidden_states, [self.config.vision_feature_layer])]
        if self.multi_modal_projector.uses_levels:
            features.append(self._patch_features(outputs.hidden_states, self.config.projector_kwargs["feature_layers"]))
        tokens = self.multi_modal_projector(*features)  # (all tiles, tokens of a tile, hidden_size)
        width, separators = tokens.shape[-1], self._separators(tokens.device)
        if len(self.vision_remember):
            tokens = torch.cat([tokens, self._memory_rows(outputs.hidden_states, tokens.shape[1])], dim=-1)
            separators = separators if separators is None else F.pad(separators, (0, tokens.shape[-1] - width))
        sizes = [None] * len(num_tiles) if image_sizes is None else image_sizes.tolist()
        images = [pack_tiles(t, layout, size, separators) for t, size in zip(tokens.split(num_tiles), sizes)]
        return LlavaVrImageFeatures(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=[image[:, :width] for image in images],
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
            deepstack_features=[[image[:, width:] for image in images]] if len(self.vision_remember) else None,
        )

    def _separators(self, device: torch.device) -> torch.Tensor | None:
        """What stands between vision tokens: the newline `(hidden_size,)` or, of slices, both `(2, hidden_size)`."""
        if self.config.image_separator_ids is None:
            return self.image_newline
        return self.get_input_embeddings()(torch.tensor(self.config.image_separator_ids, device=device))

    def _check_images(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None
    ) -> tuple[ImageLayout, list[int]]:
        """The layout of the images, and how many tiles each has: 5 dimensions are tiles, 4 are one tile an image."""
        if pixel_values.ndim not in (4, 5):
            raise ValueError(
                "pixel_values must be (images, tiles, 3, height, width) or (images, 3, height, width), "
                f"found {tuple(pixel_values.shape)}."
            )
        side = self.config.vision_config.image_size
        if tuple(pixel_values.shape[-2:]) != (side, side):
            raise ValueError(
                f"pixel_values must be tiles of {side} x {side} pixels (vision_config.image_size), "
                f"found {tuple(pixel_values.shape[-2:])}."
            )
        if not torch.compiler.is_compiling() and not pixel_values.isfinite().all():
            raise ValueError("pixel_values has NaN or infinite values: check the images and their normalisation.")
        tiled = pixel_values.ndim == 5
        pinpoints = self.config.image_grid_pinpoints if tiled else []
        layout = dataclasses.replace(self.config.image_layout, pinpoints=pinpoints)
        if not tiled:
            return layout, [1] * len(pixel_values)
        if image_sizes is None or len(image_sizes) != len(pixel_values):
            found = "none" if image_sizes is None else len(image_sizes)
            raise ValueError(f"image_sizes must have a row for each of the {len(pixel_values)} images, found {found}.")
        num_tiles = [layout.num_tiles(size) for size in image_sizes.tolist()]
        if max(num_tiles) > pixel_values.shape[1]:
            raise ValueError(
                f"pixel_values has {pixel_values.shape[1]} tiles an image, but image_sizes asks for {max(num_tiles)}: "
                "the processor's image_grid_pinpoints must be the configuration's."
            )
        return layout, num_tiles

    def _patch_features(self, hidden_states: Sequence[torch.Tensor], layers: Sequence[int]) -> torch.Tensor:
        """The features of these layers, joined: `(tiles, grid * grid, len(layers) * vision hidden_size)`."""
        features, patches = torch.cat([hidden_states[i] for i in layers], dim=-1), self.config.feature_grid**2
        if self.config.vision_feature_select_strategy == "default" and features.shape[1] == patches + 1:
            features = features[:, 1:]
        if features.shape[1] != patches:
            raise ValueError(
                f"vision_feature_select_strategy {self.config.vision_feature_select_strategy!r} leaves "
                f"{features.shape[1]} features a tile where the grid has {patches} patches: use 'default' for a tower "
                "with a CLS token."
            )
        return features

    def _memory_rows(self, hidden_states: Sequence[torch.Tensor], num_tokens: int) -> torch.Tensor:
        """Each vision token's window of the memory, flat, and its validity flag: `(tiles, tokens, W * W * M + 1)`."""
        grid = to_grid(
            self._patch_features(hidden_states, self.config.remember_feature_layers), self.config.feature_grid
        )
        rows = cut_windows(grid, self.config.projector_downsample, self.config.window_size).flatten(2)
        rows = F.pad(rows, (0, 1), value=1)
        return F.pad(rows, (0, 0, 0, num_tokens - rows.shape[1]))  # end tokens have no region

    def placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Where the image placeholders are: bool `(batch, sequence)`, from the ids or else from the embeddings."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, LlavaVrImageFeatures] | None = None,
        output_remember_attentions: bool = False,
        **kwargs,
    ) -> LlavaVrModelOutputWithPast:
        """
        Args:
            input_ids: `(batch, sequence)`, with `image_token_id` wherever a vision token goes.
            pixel_values, image_sizes: see `get_image_features`; images in the order of their placeholders, row by row.
            inputs_embeds: `(batch, sequence, hidden_size)`, instead of `input_ids`.
            mm_encoder_outputs: `{"image": get_image_features(...)}`, instead of `pixel_values`.
            output_remember_attentions: whether to return the attention weights of the Vision Remember modules.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        images = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and images is not None:
            raise ValueError("Pass pixel_values or mm_encoder_outputs, not both.")
        if pixel_values is not None and len(pixel_values):
            self._check_length((input_ids if inputs_embeds is None else inputs_embeds).shape[1])
            images = self.get_image_features(pixel_values, image_sizes, return_dict=True)
        blank = images is None and self._needs_blank_image(past_key_values)
        if blank:
            images = self._blank_image_features()
        mask = None if images is None or blank else self.placeholder_mask(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        tokens, trace = None, None
        if images is not None:
            tokens = torch.cat(list(images.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            flat = inputs_embeds.flatten(0, 1)
            if blank:
                index = torch.zeros(len(tokens), dtype=torch.long, device=flat.device)
                flat = flat.index_add(0, index, 0 * tokens)
            else:
                index = self._placeholder_index(mask, len(tokens))
                flat = flat.index_copy(0, index, tokens)
            inputs_embeds = flat.view_as(inputs_embeds)
            if len(self.vision_remember):
                trace = self._new_trace(output_remember_attentions)
                kwargs |= self._vision_arguments(images, index, inputs_embeds, trace)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        if trace is not None:
            self._check_insertion(trace)
        return LlavaVrModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=None if blank else tokens,
            remember_attentions=tuple(trace.weights[i] for i in self.config.remember_layers)
            if trace is not None and output_remember_attentions and not blank
            else None,
        )

    def _check_length(self, length: int):
        limit = getattr(self.config.text_config, "max_position_embeddings", None) or length
        if length > limit:
            raise ValueError(
                f"The input has {length} tokens, vision tokens included, but the decoder's context "
                f"(text_config.max_position_embeddings) is {limit}: shorten the text or pass fewer images."
            )

    def _needs_blank_image(self, past_key_values: Cache | None) -> bool:
        """Whether the vision side runs even without an image: in training, so that every process at every step has the
        same gradients; under FSDP and ZeRO-3 always, as processes wait for each other to gather its weights."""
        decoding = past_key_values is not None and past_key_values.get_seq_length() > 0
        return not decoding and (self.training or is_fsdp_managed_module(self) or is_deepspeed_zero3_enabled())

    def _blank_image_features(self) -> LlavaVrImageFeatures:
        """One blank image, whose tokens are nowhere in the input: none of them is valid, so no module adds anything."""
        layout, side = self.config.image_layout, self.config.vision_config.image_size
        tiles = [layout.num_tiles((side, side))] if layout.pinpoints else []
        pixels = torch.zeros(1, *tiles, 3, side, side, device=self.get_input_embeddings().weight.device)
        images = self.get_image_features(pixels, torch.tensor([[side, side]]), return_dict=True)
        if images.deepstack_features is not None:
            images.deepstack_features = [[F.pad(rows[:, :-1], (0, 1)) for rows in images.deepstack_features[0]]]
        return images

    def _placeholder_index(self, mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Flat positions of the placeholders, `(num_tokens,)`."""
        torch_compilable_check(
            mask.sum() == num_tokens,
            lambda: (
                f"Found {int(mask.sum())} image placeholders (image_token_id {self.config.image_token_id}) but "
                f"{num_tokens} vision tokens of the images: pass each image once, in the order of its placeholders, "
                "and write them with the processor."
            ),
        )
        return torch.nonzero_static(mask.flatten(), size=num_tokens).squeeze(-1)

    def _vision_arguments(
        self,
        images: LlavaVrImageFeatures,
        index: torch.Tensor,
        inputs_embeds: torch.Tensor,
        trace: RememberTrace | None,
    ) -> dict[str, Any]:
        """What the decoder's layers hand to their hooks: flat vision tokens' positions and their memory."""
        rows = torch.cat(list(images.deepstack_features[0])).to(inputs_embeds.device, inputs_embeds.dtype)
        memory = rows[:, :-1].unflatten(1, (-1, self.config.memory_size))  # (tokens, window * window, memory_size)
        return {
            "vision_memory": normalize_memory(memory, self.config.vision_config.hidden_size),
            "vision_index": index,
            "vision_valid": rows[:, -1] > 0.5,
            "vision_trace": trace,
        }

    def _new_trace(self, wanted: bool) -> RememberTrace | None:
        return RememberTrace() if wanted or not (self._insertion_seen or torch.compiler.is_compiling()) else None

    def _check_insertion(self, trace: RememberTrace):
        """Refuses a decoder that does not hand its keyword arguments to every layer: its modules would never run."""
        if set(trace.weights) != set(self.config.remember_layers):
            raise ValueError(self._refusal("does not hand its keyword arguments to its layers, so no module would run"))
        self._insertion_seen = True


def pack_tiles(
    tokens: torch.Tensor, layout: ImageLayout, image_size: Sequence[int] | None, separators: torch.Tensor | None
) -> torch.Tensor:
    """One image's tiles `(tiles, tokens, features)` as one sequence `(tokens, features)`: see `ImageLayout`.

    `separators` is the newline `(features,)` or, with "slices", what follows a tile in a row and at its end
    `(2, features)`.
    """
    if len(tokens) == 1 or layout.merge_type == "flat":
        return tokens.flatten(0, 1)
    if layout.merge_type == "slices":
        after = layout.separators(image_size)  # the base tile goes last, or is left out
        slices = tokens.roll(-1, 0)[: len(after)]  # (slices, tokens, features)
        return torch.cat([slices, separators.to(slices)[after].unsqueeze(1)], dim=1).flatten(0, 1)
    side = layout.tokens_per_side
    grid = (
        tokens[1:].unflatten(0, layout.tiling(image_size)).unflatten(2, (side, side))
    )  # (rows, columns, t, t, features)
    grid = grid.transpose(1, 2).flatten(0, 1).flatten(1, 2)  # (rows * t, columns * t, features)
    if layout.merge_type == "spatial_unpad":
        grid = grid[layout.unpad(image_size)]
        size = layout.resample(*grid.shape[:2])
        if size != tuple(grid.shape[:2]):
            grid = F.interpolate(grid.permute(2, 0, 1)[None], size, mode="bilinear")[0].permute(1, 2, 0)
        grid = torch.cat([grid, separators.to(grid).expand(len(grid), 1, -1)], dim=1)
    return torch.cat([tokens[0], grid.flatten(0, 1)])


class LlavaVrForConditionalGeneration(LlavaVrPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LlavaVrConfig):
        super().__init__(config)
        self.model = LlavaVrModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **kwargs
    ) -> LlavaVrImageFeatures:
        """See `LlavaVrModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_sizes, **kwargs)

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, LlavaVrImageFeatures] | None = None,
        output_remember_attentions: bool = False,
        **kwargs,
    ) -> LlavaVrCausalLMOutputWithPast:
        """
        Args:
            labels: `(batch, sequence)`, token ids, -100 where no loss is taken.
            logits_to_keep: how many of the last positions to compute logits for (0 for all), or their indices.
            Others as `LlavaVrModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            output_remember_attentions=output_remember_attentions,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return LlavaVrCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            remember_attentions=outputs.remember_attentions,
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Encodes the images once, keeps the vision tokens that the cache lacks, repeats each row's for its beams."""
        images = (model_kwargs.pop("mm_encoder_outputs", None) or {}).get("image")
        pixel_values, image_sizes = model_kwargs.pop("pixel_values", None), model_kwargs.pop("image_sizes", None)
        if pixel_values is not None:  # transformers below 5.18 does not encode them itself
            images = self.get_image_features(pixel_values, image_sizes, return_dict=True)
        if images is not None:
            embeds = model_kwargs.get("inputs_embeds")
            mask = self.model.placeholder_mask(input_ids if embeds is None else None, embeds)
            cache, attended = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
            cached = 0 if cache is None else cache.get_seq_length()
            if mask.shape[1] <= cached or (attended is not None and attended.shape[1] != mask.shape[1]):
                cached = 0  # the input is what follows the cache, without what is in it
            images = self._rows_for_generation(images, mask, cached, expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if images is not None:
            model_kwargs["mm_encoder_outputs"] = {"image": images}
        return input_ids, model_kwargs

    def _rows_for_generation(
        self, images: LlavaVrImageFeatures, mask: torch.Tensor, cached: int, expand_size: int
    ) -> LlavaVrImageFeatures:
        """The images' features with one tensor a row of the batch, each repeated `expand_size` times.

        `mask` `(batch, sequence)` marks the placeholders; the first `cached` positions are in the cache already, and
        the images may be all of the conversation's or only those after it.
        """
        num_tokens, new = sum(map(len, images.pooler_output)), mask.clone()
        new[:, :cached] = False
        if num_tokens not in (mask.sum(), new.sum()):
            raise ValueError(
                f"Found {int(mask.sum())} image placeholders, {int(new.sum())} of them not in the cache, but "
                f"{num_tokens} vision tokens of the images: pass each image once, in the order of its placeholders."
            )
        kept = new[mask] if num_tokens == mask.sum() else new[new]  # (num_tokens,)
        counts = new.sum(1).tolist()

        def by_row(features: list[torch.Tensor]) -> list[torch.Tensor]:
            features = torch.cat(features)
            rows = features[kept.to(features.device)].split(counts)
            return [row for row in rows for _ in range(expand_size)]

        return LlavaVrImageFeatures(
            pooler_output=by_row(images.pooler_output),
            deepstack_features=images.deepstack_features and [by_row(level) for level in images.deepstack_features],
        )

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        chunked = generation_config.prefill_chunk_size is not None and "mm_encoder_outputs" in model_kwargs
        if chunked and version.parse(transformers.__version__) < version.parse("5.23"):
            raise ValueError("prefill_chunk_size with images needs transformers 5.23 or newer.")
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,  # named, as it tells `generate` that embeddings are taken
        is_first_iteration: bool = False,
        **kwargs,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("mm_encoder_outputs", None)
        return inputs


__all__ = ["LlavaVrForConditionalGeneration", "LlavaVrModel", "LlavaVrPreTrainedModel"]
