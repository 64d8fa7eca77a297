"""Other ways to bring vision features back, each a drop-in for `VisionRemember`, and FastV's pruning.

All stand after the same decoder layers and read the same memory, so a comparison changes the module alone. Parameters
and FLOPs of those in the lab's table match ours within 10% (`tests/test_lab.py`). All start as identity.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llava_vr import LlavaVrConfig
from llava_vr.layout_llava_vr import to_grid, tokens_per_side
from llava_vr.modeling_llava_vr import VisionRemember
from llava_vr.projectors_llava_vr import MlpProjector, average_regions


class Baseline(nn.Module):
    """A module whose memory rows hold the windows of the normalised memory itself: it projects window by window."""

    def __init__(self, config: LlavaVrConfig, width: int):
        super().__init__()
        self.entry_size = config.memory_size
        self.out = nn.Linear(width, config.text_config.hidden_size)
        self.out.starts_at_zero = True

    def forward(self, states: torch.Tensor, rows: torch.Tensor | None = None, present: torch.Tensor | None = None):
        """The memory as it is, or, with rows, the update of the hidden states; see `VisionRemember`."""
        if rows is None:
            return states
        return self.attend(states, rows, present).masked_fill(~present.any(-1, keepdim=True), 0), None

    def attend(self, hidden_states: torch.Tensor, rows: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def mean_present(entries: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """The mean over the entries of a window that are present: `(tokens, window, width)` to `(tokens, width)`."""
    weights = present / present.sum(-1, keepdim=True).clamp(min=1)
    return torch.einsum("nw,nwc->nc", weights.to(entries), entries)


class DeepStack(Baseline):
    """DeepStack (arXiv 2406.04334) with an MLP on every patch of the window, mean-pooled and added; nothing attends.

    Each insertion gets all levels.
    """

    def __init__(self, config: LlavaVrConfig):
        width = 2 * config.remember_hidden_size
        super().__init__(config, width)
        self.norm = nn.LayerNorm(config.memory_size, eps=1e-6)
        self.linear_1 = nn.Linear(config.memory_size, width)

    def attend(self, hidden_states, rows, present):
        return self.out(mean_present(F.gelu(self.linear_1(self.norm(rows))), present))


def cross_attention(query, key, value, heads, present):
    """Scaled dot products of `(groups, queries, width)` with `(groups, keys, width)`; present: `(groups, keys)`."""
    query, key, value = (states.unflatten(-1, (heads, -1)).transpose(1, 2) for states in (query, key, value))
    read = F.scaled_dot_product_attention(query, key, value, attn_mask=present[:, None, None])
    return read.transpose(1, 2).flatten(2)  # (groups, queries, width)


class AttentionBaseline(Baseline):
    """What the baselines that attend share: norms, query and output."""

    def __init__(self, config: LlavaVrConfig, feature_size: int):
        hidden_size, width = config.text_config.hidden_size, config.remember_hidden_size
        super().__init__(config, width)
        self.num_heads = config.remember_num_heads
        self.query_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.memory_norm = nn.LayerNorm(feature_size, eps=1e-6)
        self.query = nn.Linear(hidden_size, width, bias=False)

    def read(self, hidden_states, key, value, present):
        query = self.query(self.query_norm(hidden_states))
        return self.out(cross_attention(query, key, value, self.num_heads, present))


class Sva(AttentionBaseline):
    """The attention of Cambrian-1's spatial vision aggregator (arXiv 2406.16860): a token attends to its window of
    every level, each level with its own keys and values, one softmax over all of them."""

    def __init__(self, config: LlavaVrConfig):
        levels, width = len(config.remember_feature_layers), config.remember_hidden_size
        feature_size = config.vision_config.hidden_size
        super().__init__(config, feature_size)
        self.key = nn.ModuleList(nn.Linear(feature_size, width, bias=False) for _ in range(levels))
        self.value = nn.ModuleList(nn.Linear(feature_size, width, bias=False) for _ in range(levels))

    def attend(self, hidden_states, rows, present):
        levels = self.memory_norm(rows.unflatten(-1, (len(self.key), -1))).unbind(2)  # (tokens, window, features)
        key = torch.cat([layer(level) for layer, level in zip(self.key, levels)], dim=1)
        value = torch.cat([layer(level) for layer, level in zip(self.value, levels)], dim=1)
        return self.read(hidden_states[:, None], key, value, present.repeat(1, len(levels)))[:, 0]


class SvaLayer(Baseline):
    """Cambrian-1's aggregator as a whole layer of its decoder: position embeddings and a context of the window, a norm
    for each of queries, keys and values, and an MLP after the attention."""

    def __init__(self, config: LlavaVrConfig):
        hidden_size, width = config.text_config.hidden_size, config.remember_hidden_size
        features, levels = config.vision_config.hidden_size, len(config.remember_feature_layers)
        super().__init__(config, width)
        self.num_heads = config.remember_num_heads

        def normed(in_features: int) -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(in_features), nn.Linear(in_features, width, bias=False))

        self.context = nn.Linear(features, width, bias=False)
        self.merge = nn.Linear(hidden_size + width, width, bias=False)
        self.positions = nn.Parameter(
            torch.randn(config.window_size(config.projector_downsample) ** 2, levels, features)
        )
        self.query = normed(width)
        self.key = nn.ModuleList(normed(features) for _ in range(levels))
        self.value = nn.ModuleList(normed(features) for _ in range(levels))
        self.read = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False), nn.GELU())

    def attend(self, hidden_states, rows, present):
        levels = rows.unflatten(-1, self.positions.shape[1:])  # (tokens, window, levels, features)
        context = mean_present(levels[:, :, -1], present)
        query = self.merge(torch.cat([hidden_states, self.context(context)], dim=-1))[:, None]  # (tokens, 1, width)
        levels = (levels + self.positions).unbind(2)
        key = torch.cat([layer(level) for layer, level in zip(self.key, levels)], dim=1)
        value = torch.cat([layer(level) for layer, level in zip(self.value, levels)], dim=1)
        read = cross_attention(self.query(query), key, value, self.num_heads, present.repeat(1, len(levels)))
        return self.out(self.mlp(query + self.read(read)))[:, 0]


class GlobalCrossAttention(AttentionBaseline):
    """Flamingo's gated cross attention (arXiv 2204.14198): a token attends to the whole image; a tanh gate opens it.

    The image is put together from its tokens' windows, which therefore must not overlap. `tiles`: those of an image.
    """

    def __init__(self, config: LlavaVrConfig, tiles: int = 1):
        if config.remember_window_ratio != 1:
            raise ValueError(f"remember_window_ratio must be 1.0 here, found {config.remember_window_ratio}.")
        super().__init__(config, config.memory_size)
        self.image_tokens = tiles * tokens_per_side(config.feature_grid, config.projector_downsample) ** 2
        self.key = nn.Linear(config.memory_size, config.remember_hidden_size, bias=False)
        self.value = nn.Linear(config.memory_size, config.remember_hidden_size, bias=False)
        self.gate = nn.Parameter(torch.zeros(()))
        self.out.starts_at_zero = False  # the gate does

    def attend(self, hidden_states, rows, present):
        images = (-1, self.image_tokens)
        memory = self.memory_norm(rows).unflatten(0, images).flatten(1, 2)  # (images, tokens * window, features)
        present = present.unflatten(0, images).flatten(1, 2)
        update = self.read(hidden_states.unflatten(0, images), self.key(memory), self.value(memory), present)
        return (self.gate.tanh() * update).flatten(0, 1)


class WindowMean(VisionRemember):
    """Ours without attention: the values of the window are mean-pooled. Query and key are parameters alone."""

    def attend(self, hidden_states, rows, present):
        update = self.out(mean_present(rows.chunk(2, dim=-1)[1], present))
        return update.masked_fill(~present.any(-1, keepdim=True), 0), None


class WideAvgPool(MlpProjector):
    """Average pooling with the parameters and FLOPs of the modules spent on the projector: one more layer, wide, on
    every patch before the mean."""

    def __init__(self, config: LlavaVrConfig, hidden_size: int = 368, width: int = 736):
        super().__init__(config)
        self.linear_1 = nn.Linear(config.feature_size, hidden_size)
        self.middle = nn.Linear(hidden_size, width)
        self.linear_2 = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, features, downsample, levels=None):
        grid = to_grid(self.act(self.middle(self.act(self.linear_1(features))))).permute(0, 3, 1, 2)
        return self.linear_2(average_regions(grid, downsample).flatten(2).transpose(1, 2))


MODULES = {
    "ours": VisionRemember,
    "deepstack": DeepStack,
    "sva": Sva,
    "global": GlobalCrossAttention,
    "mean": WindowMean,
}


class FastV:
    """FastV (arXiv 2403.06764): after decoder layer `after`, only the vision tokens that the last token of the prompt
    attends to most are kept. The others are masked in all later layers, which gives the numbers of removing them.

    A context manager around `generate`. The decoder must attend eagerly.

    Args:
        layers: the decoder's.
        is_vision: `(batch, prompt)`, where the vision tokens are.
        keep: how many stay in each row.
    """

    def __init__(self, layers: nn.ModuleList, is_vision: torch.Tensor, keep: int, after: int = 1):
        self.layers, self.is_vision, self.keep, self.after = layers, is_vision, keep, after
        self.dropped: torch.Tensor | None = None

    def __enter__(self):
        self.hooks = [self.layers[self.after].self_attn.register_forward_hook(self._choose)]
        for layer in self.layers[self.after + 1 :]:
            self.hooks.append(layer.register_forward_pre_hook(self._mask, with_kwargs=True))
        return self

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()

    def _choose(self, attention: nn.Module, args: tuple, output: tuple):
        if self.dropped is None:
            received = output[1][:, :, -1].float().mean(1)  # (batch, prompt), averaged over heads
            received = received.masked_fill(~self.is_vision, -math.inf)
            kept = torch.zeros_like(self.is_vision).scatter_(1, received.topk(self.keep).indices, True)
            self.dropped = self.is_vision & ~kept

    def _mask(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]):
        mask, prompt = kwargs["attention_mask"], self.dropped.shape[1]  # mask: added, (batch, 1, queries, keys)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if mask is None:
            keys = prompt + max(0, int(kwargs["past_key_values"].get_seq_length()) + 1 - prompt)
            mask = hidden_states.new_zeros(len(self.dropped), 1, hidden_states.shape[1], keys)
        dropped = F.pad(self.dropped, (0, mask.shape[-1] - prompt))[:, None, None]
        kwargs["attention_mask"] = mask.masked_fill(dropped, torch.finfo(mask.dtype).min)
        return args, kwargs
