"""The other ways to bring vision features back, each a drop-in for `VisionRemember`, and FastV's pruning.

A module takes the hidden states of the vision tokens, their windows of the memory and their validity, and returns an
update; so all stand at the same places and read the same features. Widths are such that parameters and floating-point
operations match ours within 10% (`tests/test_lab.py`). All begin at zero.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llava_vr import LlavaVrConfig
from llava_vr.modeling_llava_vr import MlpProjector, VisionRemember, average_regions, to_grid


class DeepStack(nn.Module):
    """DeepStack (arXiv 2406.04334), as Qwen3-VL has it: the features, through an MLP, are added; nothing attends.

    Every patch of the window goes through the first layer, then they are averaged. Each insertion gets all levels.
    """

    def __init__(self, config: LlavaVrConfig):
        super().__init__()
        width = 2 * config.remember_hidden_size
        self.norm = nn.LayerNorm(config.memory_size, eps=1e-6)
        self.linear_1 = nn.Linear(config.memory_size, width)
        self.out = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, hidden_states, memory, valid):
        features = F.gelu(self.linear_1(self.norm(memory))).mean(1)  # (tokens, width)
        return self.out(features).masked_fill(~valid[:, None], 0), None


class CrossAttention(nn.Module):
    """What the attending baselines share: query, keys and values, scaled dot products, output."""

    def __init__(self, config: LlavaVrConfig, feature_size: int):
        super().__init__()
        hidden_size, width = config.text_config.hidden_size, config.remember_hidden_size
        self.heads = (config.remember_num_heads, -1)
        self.query_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.memory_norm = nn.LayerNorm(feature_size, eps=1e-6)
        self.query = nn.Linear(hidden_size, width, bias=False)
        self.out = nn.Linear(width, hidden_size)

    def attend(self, hidden_states, key, value):
        # hidden_states (groups, queries, hidden), key and value (groups, keys, width) -> (groups, queries, hidden)
        query = self.query(self.query_norm(hidden_states))
        query, key, value = (s.unflatten(-1, self.heads).transpose(1, 2) for s in (query, key, value))
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Sva(CrossAttention):
    """Cambrian-1's spatial vision aggregator (arXiv 2406.16860): a token attends to its region of every level, each
    level with its own keys and values, one softmax over all of them."""

    def __init__(self, config: LlavaVrConfig):
        levels, width = len(config.remember_feature_layers), config.remember_hidden_size
        feature_size = config.vision_config.hidden_size
        super().__init__(config, feature_size)
        self.key = nn.ModuleList(nn.Linear(feature_size, width, bias=False) for _ in range(levels))
        self.value = nn.ModuleList(nn.Linear(feature_size, width, bias=False) for _ in range(levels))

    def forward(self, hidden_states, memory, valid):
        levels = self.memory_norm(memory.unflatten(-1, (len(self.key), -1))).unbind(2)  # (tokens, window, features)
        key = torch.cat([layer(level) for layer, level in zip(self.key, levels)], dim=1)
        value = torch.cat([layer(level) for layer, level in zip(self.value, levels)], dim=1)
        update = self.attend(hidden_states[:, None], key, value)[:, 0]
        return update.masked_fill(~valid[:, None], 0), None


class GlobalCrossAttention(CrossAttention):
    """Flamingo's gated cross attention (arXiv 2204.14198): a token attends to the whole image; a tanh gate opens it."""

    def __init__(self, config: LlavaVrConfig):
        width = config.remember_hidden_size
        super().__init__(config, config.memory_size)
        self.tokens_per_image = config.image_layout.tokens_per_tile
        self.key = nn.Linear(config.memory_size, width, bias=False)
        self.value = nn.Linear(config.memory_size, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, hidden_states, memory, valid):
        images = (-1, self.tokens_per_image)
        memory = self.memory_norm(memory).unflatten(0, images).flatten(1, 2)  # (images, tokens * window, features)
        update = self.attend(hidden_states.unflatten(0, images), self.key(memory), self.value(memory))
        return (self.gate.tanh() * update).flatten(0, 1).masked_fill(~valid[:, None], 0), None


class WindowMean(VisionRemember):
    """Ours without attention: every entry of the window weighs the same. Of the query only its parameters are left."""

    def forward(self, hidden_states, memory, valid):
        return self.out(self.value(memory).mean(1)).masked_fill(~valid[:, None], 0), None


class NoBias(VisionRemember):
    """Ours without the positional bias in the window."""

    def __init__(self, config: LlavaVrConfig):
        super().__init__(config)
        self.window_bias.requires_grad_(False)


class WideAvgPool(MlpProjector):
    """Average pooling with the parameters and operations of the modules spent on the projector: one more layer, wide,
    on every patch before the mean."""

    def __init__(self, config: LlavaVrConfig, hidden_size: int = 368, width: int = 736):
        super().__init__(config)
        features, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
        self.linear_1, self.linear_2 = nn.Linear(features, hidden_size), nn.Linear(width, text_size)
        self.middle = nn.Linear(hidden_size, width)

    def forward(self, features, levels=None):
        grid = to_grid(self.act(self.middle(self.act(self.linear_1(features)))), self.grid_size).permute(0, 3, 1, 2)
        return self.linear_2(average_regions(grid, self.stride).flatten(2).transpose(1, 2))


MODULES = {
    "ours": VisionRemember,
    "deepstack": DeepStack,
    "sva": Sva,
    "global": GlobalCrossAttention,
    "mean": WindowMean,
    "no bias": NoBias,
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
