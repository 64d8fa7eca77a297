"""The projectors: a tile's vision features to its vision tokens. One class each, found by its name in `PROJECTORS`.

All are called alike: `projector(features, downsample, levels)` with the features of tiles `(tiles, g * g, features)`,
the side of a region in patches and, where `uses_levels` says so, the features of several layers `(tiles, g * g,
levels * features)`. They return `(tiles, t * t, hidden_size)`, regions row by row.
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .layout_llava_vr import cut_windows, to_grid, tokens_per_side


def average_regions(grid: torch.Tensor, downsample: int) -> torch.Tensor:
    """
    Averages each region of a grid `(tiles, features, g, g)` to `(tiles, features, t, t)`. With `ceil_mode`, a region at
    the edge is divided by the number of features that it really has.
    """
    return F.avg_pool2d(grid, downsample, ceil_mode=True)


def centre_regions(grid: torch.Tensor, downsample: int) -> torch.Tensor:
    """
    Samples a grid `(tiles, g, g, features)` at the centre of each region's own features, between patches bilinearly:
    `(tiles, t, t, features)`. Where `downsample` divides the grid, it is `F.interpolate(mode="bilinear")`.
    """
    first = torch.arange(0, grid.shape[1], downsample, device=grid.device)
    last = (first + downsample).clamp(max=grid.shape[1]) - 1
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


class MlpProjector(Mlp):
    """LLaVA-NeXT: every patch becomes a token. Also the base of the projectors that begin or end with its layers."""

    options: dict[str, Any] = {}  # `projector_kwargs` and their defaults; None is derived from the tower's sizes
    uses_levels = False
    any_downsample = False  # whether no weight depends on `downsample`

    def __init__(self, config, patches_joined: int = 1):
        text_size = config.text_config.hidden_size
        super().__init__(config.feature_size * patches_joined, text_size, text_size, config.projector_hidden_act)

    def forward(self, features, downsample, levels=None):
        return super().forward(features)


class AvgPoolProjector(MlpProjector):
    """DeCo: the mean of each region, then the MLP. With `pooled_mlp` means have an MLP of their own, so that training
    it leaves s = 1 as it was."""

    options = {"pooled_mlp": False}
    any_downsample = True

    def __init__(self, config):
        super().__init__(config)
        self.pooled_mlp = MlpProjector(config) if config.projector_kwargs["pooled_mlp"] else None

    def forward(self, features, downsample, levels=None):
        if downsample == 1:
            return super().forward(features, downsample)
        means = average_regions(to_grid(features).permute(0, 3, 1, 2), downsample).flatten(2).transpose(1, 2)
        return super().forward(means, downsample) if self.pooled_mlp is None else self.pooled_mlp(means, downsample)


class PixelShuffleProjector(MlpProjector):
    """InternVL: the patches of each region joined along features, then a norm and the MLP. Padding joins as zeros."""

    def __init__(self, config):
        super().__init__(config, patches_joined=config.projector_downsample**2)
        self.layer_norm = nn.LayerNorm(self.linear_1.in_features)

    def forward(self, features, downsample, levels=None):
        regions = cut_windows(to_grid(features), downsample, downsample)  # (tiles, t * t, s * s, C)
        return super().forward(self.layer_norm(regions.flatten(2)), downsample)


class LdpV2Projector(MlpProjector):
    """MobileVLM V2: the MLP, the mean of each region, then a depth-wise convolution with a skip for positions."""

    any_downsample = True

    def __init__(self, config):
        super().__init__(config)
        text_size = config.text_config.hidden_size
        self.position_conv = nn.Conv2d(text_size, text_size, kernel_size=3, padding=1, groups=text_size)

    def forward(self, features, downsample, levels=None):
        grid = to_grid(super().forward(features, downsample)).permute(0, 3, 1, 2)
        tokens = average_regions(grid, downsample)  # (tiles, D, t, t)
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

    options = {"hidden_size": None, "depth": 3, "mlp_depth": 2, "position_embedding": True, "pre_norm": False}
    uses_levels = False
    any_downsample = True

    def __init__(self, config):
        super().__init__()
        options, text_size = config.projector_kwargs, config.text_config.hidden_size

        def stage(in_channels):
            sizes = [in_channels] + [options["hidden_size"]] * options["depth"]
            blocks = (RegNetBlock(*sizes[i : i + 2]) for i in range(options["depth"]))
            return nn.Sequential(OrderedDict((f"block_{i}", block) for i, block in enumerate(blocks, start=1)))

        self.pre_norm = nn.LayerNorm(config.feature_size, eps=1e-6) if options["pre_norm"] else nn.Identity()
        self.position_embedding = None
        if options["position_embedding"]:
            self.position_embedding = nn.Parameter(torch.randn(1, config.feature_grid**2, config.feature_size) * 0.02)
        self.stage_1 = stage(config.feature_size)
        self.stage_2 = stage(options["hidden_size"])
        self.readout = nn.Sequential(
            nn.Linear(options["hidden_size"] if options["depth"] else config.feature_size, text_size),
            *(m for _ in range(options["mlp_depth"] - 1) for m in (nn.SiLU(), nn.Linear(text_size, text_size))),
        )

    def forward(self, features, downsample, levels=None):
        features = self.pre_norm(features)
        if self.position_embedding is not None:
            features = features + self.position_embedding
        grid = self.stage_1(to_grid(features).permute(0, 3, 1, 2))  # (tiles, channels, g, g)
        grid = self.stage_2(average_regions(grid, downsample))  # (tiles, channels, t, t)
        return self.readout(grid.flatten(2).transpose(1, 2))


class TokenPackerProjector(nn.Module):
    """TokenPacker: the centre of each region attends to the region's own features of several encoder layers."""

    options = {"feature_layers": None, "num_heads": None}
    uses_levels = True
    any_downsample = True

    def __init__(self, config):
        super().__init__()
        options, width, text_size = config.projector_kwargs, config.feature_size, config.text_config.hidden_size
        levels_size = config.vision_config.hidden_size * len(options["feature_layers"])
        hidden_act = config.projector_hidden_act

        self.query = nn.Linear(width, width, bias=False)
        self.key = Mlp(levels_size, width, width, hidden_act)
        self.value = Mlp(levels_size, width, width, hidden_act)
        self.norm_query = nn.LayerNorm(width, eps=1e-6)
        self.norm_key = nn.LayerNorm(width, eps=1e-6)
        self.norm_value = nn.LayerNorm(width, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, options["num_heads"], batch_first=True)
        self.output = Mlp(width, text_size, text_size, hidden_act)

    def forward(self, features, downsample, levels):
        def regions(grid):
            return cut_windows(grid, downsample, downsample).flatten(0, 1)  # (tiles * t * t, s * s, C)

        grid = to_grid(features)
        query = centre_regions(grid, downsample).flatten(0, 2)  # (tiles * t * t, C)
        query = self.norm_query(self.query(query)).unsqueeze(1)  # (tiles * t * t, 1, C)
        key, value = self.norm_key(self.key(levels)), self.norm_value(self.value(levels))  # (tiles, g * g, C)
        is_padding = None
        if grid.shape[1] % downsample:
            is_padding = regions(torch.ones_like(grid[..., :1])).squeeze(-1) == 0  # (tiles * t * t, s * s)
        attended = self.attention(
            query, regions(to_grid(key)), regions(to_grid(value)), key_padding_mask=is_padding, need_weights=False
        )[0]
        return self.output(attended.squeeze(1).unflatten(0, (len(features), -1)))


class ResamplerLayer(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, hidden_act: str):
        super().__init__()
        self.norm_query = nn.LayerNorm(hidden_size)
        self.norm_key = nn.LayerNorm(hidden_size)
        self.attention = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
        self.norm_mlp = nn.LayerNorm(hidden_size)
        self.mlp = Mlp(hidden_size, 4 * hidden_size, hidden_size, hidden_act)

    def forward(self, queries, features):  # (tiles, t * t, C), (tiles, g * g, C) -> (tiles, t * t, C)
        query = self.norm_query(queries)
        key = torch.cat([self.norm_key(features), query], dim=1)  # (tiles, g * g + t * t, C)
        queries = queries + self.attention(query, key, key, need_weights=False)[0]
        return queries + self.mlp(self.norm_mlp(queries))


class ResamplerProjector(nn.Module):
    """Perceiver resampler: one learned query for each region attends to all features and to the other queries."""

    options = {"depth": 2, "num_heads": None}
    uses_levels = False
    any_downsample = False

    def __init__(self, config):
        super().__init__()
        options, width = config.projector_kwargs, config.feature_size
        tokens = tokens_per_side(config.feature_grid, config.projector_downsample) ** 2
        self.queries = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.layers = nn.ModuleList(
            ResamplerLayer(width, options["num_heads"], config.projector_hidden_act) for _ in range(options["depth"])
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, features, downsample, levels=None):
        queries = self.queries.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, features)
        return self.output(self.norm(queries))


PROJECTORS: dict[str, type[nn.Module]] = {
    "mlp": MlpProjector,
    "avg_pool": AvgPoolProjector,
    "pixel_shuffle": PixelShuffleProjector,
    "ldpv2": LdpV2Projector,
    "c_abstractor": CAbstractorProjector,
    "tokenpacker": TokenPackerProjector,
    "resampler": ResamplerProjector,
}
