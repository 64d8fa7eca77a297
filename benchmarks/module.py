"""The Vision Remember module alone, at the shapes of the 2B model, beside other ways to do the same.

    python -m benchmarks.module                                  # on a CPU: 1, 2 and 5 tiles
    python -m benchmarks.module --device cuda --scale full       # 1 to 10 tiles

A tile is 144 vision tokens with 4 entries a window, or 36 with 16. All get the same hidden states and windows, and no
gradient is spared: hidden states, memory and parameters have one. Weights are random. Beside ours:

- global (fused), global (eager): cross attention of all vision tokens to all entries under a mask that leaves each its
  own window: ours by another way, with a head of keys and values for each of the query. Memory normed and mask made
  beforehand, neither is counted. Fused is scaled_dot_product_attention, eager two matrix products and a softmax.
- SVA: Cambrian's aggregation with the norms of the lab's baseline, each level with its own keys and values.
- SVA layer: Cambrian's whole layer around it: context, positions, a norm for each of keys and values, an MLP.
- DeepStack: the lab's baseline, an MLP on every entry, averaged. DeepStack addition: the bare sum of ready features.
- decoder layer: one of Qwen2-1.5B at the prefill of these vision tokens and 64 of text.

`bytes` are inputs, parameters and results (and their gradients), each once: what must move at least. `of_ceiling` is
the least time by operations or by bytes, at the rates of the matrix product and the copy of the same rounds, over the
time it took.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from benchmarks.common import (
    Ceiling,
    add_device_options,
    compare,
    count_flops,
    dtype_of,
    extra_memory,
    head,
    interleave,
    markdown_table,
    new_parser,
    plot,
    show,
    spread,
    write_json,
    write_table,
)
from lab.baselines import DeepStack, Sva
from llava_vr import LlavaVrConfig
from llava_vr.modeling_llava_vr import VisionRemember


PROMPT = 64
TRAINED = ("ours", "SVA", "SVA layer")  # those measured backward, too


@dataclass(frozen=True)
class Scale:
    """
    Args:
        tiles: at which all are compared.
        line: tiles at which ours is measured for its linearity.
        config: fields of the configuration, where they are not the 2B model's.
        ceiling: size of the ceiling's matrix, where it is not the device's default.
    """

    tiles: tuple[int, ...]
    line: tuple[int, ...]
    repetitions: int
    config: dict[str, Any] = field(default_factory=dict)
    ceiling: int | None = None


SCALES = {
    "small": Scale((1, 2, 5), (1, 2, 5, 10), 20),
    "full": Scale(tuple(range(1, 11)), tuple(range(1, 11)), 50),
}


class GlobalAttention(nn.Module):
    """Every vision token to every entry of the memory, under a mask: `VisionRemember` without norm of the memory and
    without bias, under the same names."""

    def __init__(self, config: LlavaVrConfig, fused: bool):
        super().__init__()
        hidden_size, width = config.text_config.hidden_size, config.remember_hidden_size
        self.heads, self.fused = (config.remember_num_heads, -1), fused
        self.query_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.query = nn.Linear(hidden_size, width, bias=False)
        self.key = nn.Linear(config.memory_size, width, bias=False)
        self.value = nn.Linear(config.memory_size, width, bias=False)
        self.out = nn.Linear(width, hidden_size)

    def forward(self, hidden_states, memory, mask):
        # memory (tokens, window, memory_size), mask: bool (tokens, tokens * window)
        entries = memory.flatten(0, 1)
        states = self.query(self.query_norm(hidden_states)), self.key(entries), self.value(entries)
        query, key, value = (
            s.unflatten(-1, self.heads).transpose(0, 1)[None] for s in states
        )  # (1, heads, n, head_dim)
        if self.fused:
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
            attended = scores.softmax(-1) @ value
        return self.out(attended[0].transpose(0, 1).flatten(1))


class SvaLayer(nn.Module):
    """Cambrian-1's spatial vision aggregator as one layer of its decoder (arXiv 2406.16860)."""

    def __init__(self, config: LlavaVrConfig):
        super().__init__()
        hidden_size, width = config.text_config.hidden_size, config.remember_hidden_size
        features, levels = config.vision_config.hidden_size, len(config.remember_feature_layers)
        self.heads = (config.remember_num_heads, -1)

        def normed(in_features: int) -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(in_features), nn.Linear(in_features, width, bias=False))

        self.context = nn.Linear(features, width, bias=False)
        self.merge = nn.Linear(hidden_size + width, width, bias=False)
        self.positions = nn.Parameter(torch.randn(config.window_size**2, levels, features))
        self.query = normed(width)
        self.key = nn.ModuleList(normed(features) for _ in range(levels))
        self.value = nn.ModuleList(normed(features) for _ in range(levels))
        self.out = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.GELU(), nn.Linear(width, hidden_size, bias=False)
        )

    def forward(self, hidden_states, memory, context):
        # hidden_states (tokens, hidden), memory (tokens, window, levels * features), context (tokens, features)
        levels = (memory.unflatten(-1, self.positions.shape[1:]) + self.positions).unbind(2)
        query = self.merge(torch.cat([hidden_states, self.context(context)], dim=-1))[:, None]  # (tokens, 1, width)
        key = torch.cat([layer(level) for layer, level in zip(self.key, levels)], dim=1)
        value = torch.cat([layer(level) for layer, level in zip(self.value, levels)], dim=1)
        states = (s.unflatten(-1, self.heads).transpose(1, 2) for s in (self.query(query), key, value))
        attended = F.scaled_dot_product_attention(*states).transpose(1, 2).flatten(2)
        return hidden_states + self.mlp(self.norm(query + self.out(attended)))[:, 0]


class Addition(nn.Module):
    def forward(self, hidden_states, features):
        return hidden_states + features


class DecoderLayer(nn.Module):
    """A decoder layer at the prefill of one row."""

    def __init__(self, config: LlavaVrConfig, length: int):
        super().__init__()
        config.text_config._attn_implementation = "sdpa"
        self.layer = Qwen2DecoderLayer(config.text_config, layer_idx=0)
        cos, sin = Qwen2RotaryEmbedding(config.text_config)(torch.empty(1), torch.arange(length)[None])
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, hidden_states):  # (1, length, hidden)
        return self.layer(hidden_states, position_embeddings=(self.cos, self.sin))


@dataclass
class Case:
    """A module with its inputs."""

    module: nn.Module
    inputs: tuple[torch.Tensor, ...]

    @torch.no_grad()
    def forward(self) -> Any:
        return self.module(*self.inputs)

    def backward(self) -> None:
        """Forward and backward."""
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in self.inputs]
        output = update(self.module(*inputs))
        output.backward(torch.ones_like(output))
        self.module.zero_grad()

    @property
    def least_bytes(self) -> dict[str, int]:
        """Bytes of inputs, parameters and result; backward, those that can have a gradient count once more."""
        tensors = [*self.module.parameters(), *self.inputs, update(self.forward())]
        forward = sum(tensor.nbytes for tensor in tensors)
        gradients = sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
        return {"forward": forward, "backward": forward + gradients}


def update(output: torch.Tensor | tuple[torch.Tensor, Any]) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def make_cases(config: LlavaVrConfig, tiles: int, device: torch.device, dtype: torch.dtype) -> dict[str, Case]:
    """All that are compared, on an image of so many tiles."""
    hidden_size, window = config.text_config.hidden_size, config.window_size**2
    tokens = tiles * config.image_layout.tokens_per_tile
    hidden_states = torch.randn(tokens, hidden_size)
    memory = torch.randn(tokens, window, config.memory_size)
    valid = torch.ones(tokens, dtype=torch.bool)
    mask = torch.arange(tokens * window) // window == torch.arange(tokens)[:, None]  # (tokens, tokens * window)
    inputs = (hidden_states, memory, valid)
    made = {
        "ours": (VisionRemember(config), inputs),
        "global (fused)": (GlobalAttention(config, fused=True), (hidden_states, memory, mask)),
        "global (eager)": (GlobalAttention(config, fused=False), (hidden_states, memory, mask)),
        "SVA": (Sva(config), inputs),
        "SVA layer": (SvaLayer(config), (*inputs[:2], torch.randn(tokens, config.vision_config.hidden_size))),
        "DeepStack": (DeepStack(config), inputs),
        "DeepStack addition": (Addition(), (hidden_states, torch.randn(tokens, hidden_size))),
        "decoder layer": (DecoderLayer(config, tokens + PROMPT), (torch.randn(1, tokens + PROMPT, hidden_size),)),
    }
    return {name: Case(*to_device(module, tensors, device, dtype)) for name, (module, tensors) in made.items()}


def to_device(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Both there, in that type, with no weight zero: a GPU multiplies zeros faster."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    return module.to(device, dtype), tuple(x.to(device, dtype if x.is_floating_point() else x.dtype) for x in inputs)


def measure(
    calls: dict[str, Callable[[], Any]], least_bytes: dict[str, int], ceiling: Ceiling, repetitions: int, title: str
) -> dict[str, dict[str, Any]]:
    """All figures of each call, and the ceiling's times."""
    device = ceiling.matrix.device
    costs = {
        name: {"flops": count_flops(call), "extra_bytes": extra_memory(call, device), "bytes": least_bytes[name]}
        for name, call in calls.items()
    }
    each = 10 if device.type == "cuda" else 1
    times = compare(interleave({**calls, **ceiling.calls}, repetitions, title=title, each=each))
    flops_rate, bytes_rate = ceiling.rates(times)
    for name, cost in costs.items():
        least = max(cost["flops"] / flops_rate, cost["bytes"] / bytes_rate)  # milliseconds
        times[name] |= {**cost, "of_ceiling": least / times[name]["ms"][0]}
    return times


def measure_line(
    config: LlavaVrConfig, tiles: tuple[int, ...], repetitions: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Ours at several lengths in turns, and how far the medians are from the best straight line."""
    cases = {count: make_cases(config, count, device, dtype)["ours"] for count in tiles}
    each = 10 if device.type == "cuda" else 1
    calls = {count: case.forward for count, case in cases.items()}
    seconds = interleave(calls, repetitions, title=f"linearity, {config.window_size**2} entries", each=each)
    tokens = [len(case.inputs[0]) for case in cases.values()]
    ms = [spread([1000 * value for value in values]) for values in seconds.values()]
    return {"tiles": tiles, "tokens": tokens, "ms": ms, "deviation": deviation(tokens, [median for median, *_ in ms])}


def deviation(xs: list[float], ys: list[float]) -> float:
    """The largest relative distance from the line that fits best, distances taken relative, too."""
    ys = np.array(ys)
    return float(np.abs(np.polyval(np.polyfit(xs, ys, 1, w=1 / ys), xs) / ys - 1).max())


def run(scale: Scale, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    ceiling = Ceiling(device, dtype, scale.ceiling)
    groups, lines = [], []
    for downsample in (2, 4):
        config = LlavaVrConfig(**scale.config, projector_downsample=downsample)
        window = config.window_size**2
        for tiles in scale.tiles:
            cases = make_cases(config, tiles, device, dtype)
            title = f"{tiles} tiles, {window} entries"
            group = {"tiles": tiles, "window": window, "tokens": tiles * config.image_layout.tokens_per_tile}
            for direction, names in (("forward", tuple(cases)), ("backward", TRAINED)):
                calls = {name: getattr(cases[name], direction) for name in names}
                least = {name: cases[name].least_bytes[direction] for name in names}
                group[direction] = measure(calls, least, ceiling, scale.repetitions, f"{direction}, {title}")
            groups.append(group)
        lines.append({"window": window, **measure_line(config, scale.line, scale.repetitions, device, dtype)})
    return {"groups": groups, "lines": lines}


def tables(result: dict[str, Any]) -> list[str]:
    header = ["what", "time (ms)", "ours over it", "extra memory (MB)", "GFLOP", "MB that must move", "of the ceiling"]
    parts = []
    for group in result["groups"]:
        for direction in ("forward", "backward"):
            rows = [
                [
                    name,
                    show(row["ms"]),
                    show(row["ours_over"]),
                    *(f"{row[key] / unit:.1f}" for key, unit in (("extra_bytes", 1e6), ("flops", 1e9), ("bytes", 1e6))),
                    f"{row['of_ceiling']:.0%}",
                ]
                for name, row in group[direction].items()
                if "flops" in row
            ]
            way = "forward" if direction == "forward" else "forward and backward"
            title = (
                f"{group['tiles']} tiles, {group['tokens']} vision tokens, {group['window']} entries a window, {way}"
            )
            parts.append(f"{title}:\n\n{markdown_table(header, rows)}")
    rows = [
        [str(line["window"]), ", ".join(map(str, line["tiles"])), f"{line['deviation']:.1%}"]
        for line in result["lines"]
    ]
    parts.append(
        "Ours, linear in vision tokens:\n\n" + markdown_table(["entries", "tiles", "off the line at most"], rows)
    )
    return parts


def plots(result: dict[str, Any]) -> dict[str, tuple]:
    """Panels of time and extra memory against vision tokens, for each size of window."""
    panels = {}
    for window in sorted({group["window"] for group in result["groups"]}):
        groups = [group for group in result["groups"] if group["window"] == window]
        tokens = [group["tokens"] for group in groups]
        names = [name for name, row in groups[0]["forward"].items() if "flops" in row]
        for label, figure in (
            ("time (ms)", lambda row: row["ms"][0]),
            ("extra memory (MB)", lambda row: row["extra_bytes"] / 1e6),
        ):
            curves = {name: (tokens, [figure(group["forward"][name]) for group in groups]) for name in names}
            panels[f"forward, {window} entries a window: {label}"] = ("vision tokens", label, curves)
    return panels


def main() -> None:
    parser = new_parser(__doc__)
    add_device_options(parser)
    args = parser.parse_args()
    dtype, folder = dtype_of(args), args.results / args.device.type
    start, settings = time.monotonic(), head(args.scale, args.device, dtype=str(dtype).removeprefix("torch."))
    result = {**settings, **run(SCALES[args.scale], args.device, dtype)}
    result["seconds"] = round(time.monotonic() - start)
    write_json(folder / "module.json", result)
    write_table(folder / "module.md", "The module alone", result, *tables(result))
    plot(folder / "module.png", plots(result))


if __name__ == "__main__":
    main()
