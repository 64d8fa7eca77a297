"""The Vision Remember module alone, at the shapes of the 2B model, beside other ways to do the same.

    python -m benchmarks.module                                  # on a CPU: 1, 2 and 5 tiles
    python -m benchmarks.module --device cuda --scale full       # 1 to 10 tiles

A tile is 144 vision tokens at s = 2, 36 at s = 4. All modules get the same hidden states and the same normalised memory
on the grid; each projects it, cuts its windows and attends, and no gradient is spared: hidden states, memory and
parameters have one. Weights are random. Beside ours, whose windows have twice the side of their regions:

- ours, ratio 1: windows of the regions alone, as in the paper.
- SVA: the attention of Cambrian-1's aggregator on the same windows; SVA, ratio 1: on the regions, as published.
- SVA layer: Cambrian's whole layer on the same windows: context, positions, a norm for each of keys and values, an MLP.
- global: gated cross attention of all vision tokens to all patches of the image.
- DeepStack: an MLP on every patch of the region, mean-pooled. DeepStack addition: the bare sum of ready features.
- decoder layer: one of Qwen2-1.5B at the prefill of these vision tokens and 64 of text.

The baselines are those of `lab/baselines.py`, with as many heads of keys and values as of the query; ours shares two.
`bytes` are inputs, parameters and results (and their gradients), each once: what must move at least. `of_ceiling` is
the least time by FLOPs or by bytes, at the rates of the matrix product and the copy of the same rounds, over the time
it took.
"""

import copy
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
from lab.baselines import DeepStack, GlobalCrossAttention, Sva, SvaLayer
from llava_vr import LlavaVrConfig
from llava_vr.layout_llava_vr import cut_windows, tokens_per_side
from llava_vr.modeling_llava_vr import VisionRemember


PROMPT = 64
TRAINED = ("ours", "SVA", "SVA, ratio 1", "SVA layer")  # those measured backward, too


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


class OnGrid(nn.Module):
    """A module on the whole way: from the memory on the grid to the update of the hidden states."""

    def __init__(self, module: nn.Module, config: LlavaVrConfig):
        super().__init__()
        self.module, self.downsample = module, config.projector_downsample
        self.window = config.window_size(self.downsample)

    def forward(self, hidden_states, memory):
        # hidden_states (tokens, hidden), memory (tiles, g, g, memory_size)
        projected = F.pad(self.module(memory), (0, 1), value=1)  # the last channel: present
        rows = cut_windows(projected, self.downsample, self.window).flatten(0, 1)  # (tokens, window, 2 * K + 1)
        return self.module(hidden_states, rows[..., :-1], rows[..., -1] > 0.5)[0]


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
    def forward(self) -> torch.Tensor:
        return self.module(*self.inputs)

    def backward(self) -> None:
        """Forward and backward."""
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in self.inputs]
        output = self.module(*inputs)
        output.backward(torch.ones_like(output))
        self.module.zero_grad()

    @property
    def least_bytes(self) -> dict[str, int]:
        """Bytes of inputs, parameters and result; backward, those that can have a gradient count once more."""
        tensors = [*self.module.parameters(), *self.inputs, self.forward()]
        forward = sum(tensor.nbytes for tensor in tensors)
        gradients = sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
        return {"forward": forward, "backward": forward + gradients}


def make_cases(config: LlavaVrConfig, tiles: int, device: torch.device, dtype: torch.dtype) -> dict[str, Case]:
    """All that are compared, on an image of so many tiles."""
    hidden_size, grid = config.text_config.hidden_size, config.feature_grid
    tokens = tiles * tokens_per_side(grid, config.projector_downsample) ** 2
    regions = copy.deepcopy(config)
    regions.remember_window_ratio = 1.0
    hidden_states = torch.randn(tokens, hidden_size)
    inputs = (hidden_states, torch.randn(tiles, grid, grid, config.memory_size))
    made = {
        "ours": (OnGrid(VisionRemember(config), config), inputs),
        "ours, ratio 1": (OnGrid(VisionRemember(regions), regions), inputs),
        "SVA": (OnGrid(Sva(config), config), inputs),
        "SVA, ratio 1": (OnGrid(Sva(regions), regions), inputs),
        "SVA layer": (OnGrid(SvaLayer(config), config), inputs),
        "global": (OnGrid(GlobalCrossAttention(regions, tiles), regions), inputs),
        "DeepStack": (OnGrid(DeepStack(regions), regions), inputs),
        "DeepStack addition": (Addition(), (hidden_states, torch.randn(tokens, hidden_size))),
        "decoder layer": (DecoderLayer(config, tokens + PROMPT), (torch.randn(1, tokens + PROMPT, hidden_size),)),
    }
    return {name: Case(*to_device(module, tensors, device, dtype)) for name, (module, tensors) in made.items()}


def row_sizes(config: LlavaVrConfig) -> dict[str, Any]:
    """Bytes of a vision token's memory row in bfloat16: keys and values of all modules and presence; raw features."""
    entries, modules = config.window_size(config.projector_downsample) ** 2, len(config.remember_layers)
    return {
        "downsample": config.projector_downsample,
        "ratio": config.remember_window_ratio,
        "entries": entries,
        "bytes": 2 * entries * (2 * config.key_value_size * modules + 1),
        "raw_bytes": 2 * entries * config.memory_size,
    }


def to_device(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Both there, in that type, with no weight zero: a GPU multiplies zeros faster."""
    for parameter in module.parameters():
        if parameter.ndim != 1:
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
    seconds = interleave(calls, repetitions, title=f"linearity, s = {config.projector_downsample}", each=each)
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
    groups, lines, rows = [], [], []
    for downsample in (2, 4):
        config = LlavaVrConfig(**scale.config, projector_downsample=downsample)
        for tiles in scale.tiles:
            cases = make_cases(config, tiles, device, dtype)
            group = {"downsample": downsample, "tiles": tiles, "tokens": len(cases["ours"].inputs[0])}
            for direction, names in (("forward", tuple(cases)), ("backward", TRAINED)):
                calls = {name: getattr(cases[name], direction) for name in names}
                least = {name: cases[name].least_bytes[direction] for name in names}
                title = f"{direction}, s = {downsample}, {tiles} tiles"
                group[direction] = measure(calls, least, ceiling, scale.repetitions, title)
            groups.append(group)
        lines.append({"downsample": downsample, **measure_line(config, scale.line, scale.repetitions, device, dtype)})
        for ratio in (1.0, 2.0):
            sizes = LlavaVrConfig(**scale.config, projector_downsample=downsample, remember_window_ratio=ratio)
            rows.append(row_sizes(sizes))
    return {"groups": groups, "lines": lines, "rows": rows}


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
            title = f"s = {group['downsample']}, {group['tiles']} tiles, {group['tokens']} vision tokens, {way}"
            parts.append(f"{title}:\n\n{markdown_table(header, rows)}")
    rows = [
        [str(line["downsample"]), ", ".join(map(str, line["tiles"])), f"{line['deviation']:.1%}"]
        for line in result["lines"]
    ]
    parts.append("Ours, linear in vision tokens:\n\n" + markdown_table(["s", "tiles", "off the line at most"], rows))
    rows = [
        [
            *(f"{row[key]:g}" for key in ("downsample", "ratio", "entries")),
            *(f"{row[key] / 2**10:.1f}" for key in ("bytes", "raw_bytes")),
        ]
        for row in result["rows"]
    ]
    header = ["s", "ratio", "entries a window", "row (KiB)", "windows of raw features (KiB)"]
    parts.append("Memory row of a vision token, four modules, bfloat16:\n\n" + markdown_table(header, rows))
    return parts


def plots(result: dict[str, Any]) -> dict[str, tuple]:
    """Panels of time and extra memory against vision tokens, for each s."""
    panels = {}
    for downsample in sorted({group["downsample"] for group in result["groups"]}):
        groups = [group for group in result["groups"] if group["downsample"] == downsample]
        tokens = [group["tokens"] for group in groups]
        names = [name for name, row in groups[0]["forward"].items() if "flops" in row]
        for label, figure in (
            ("time (ms)", lambda row: row["ms"][0]),
            ("extra memory (MB)", lambda row: row["extra_bytes"] / 1e6),
        ):
            curves = {name: (tokens, [figure(group["forward"][name]) for group in groups]) for name in names}
            panels[f"forward, s = {downsample}: {label}"] = ("vision tokens", label, curves)
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
