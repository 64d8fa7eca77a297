"""What the benchmarks share: calls that take turns, memory, FLOPs, ceilings, and the files of results."""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

from lab.training import describe_machine


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402


RESULTS = Path(__file__).parent / "results"
SHARD = 10**9  # bytes of a checkpoint's shard
CPU_ATTENTION = {  # what torch's own counter leaves out
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *args, **kwargs: sdpa_flop_count(*args[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *args, **kwargs: (
        sdpa_backward_flop_count(*args[:4])
    ),
}


# ------------------------------------------------------------------------------------------------------- measuring


def interleave(
    calls: dict[str, Callable[[], Any]], repetitions: int, warmup: int = 2, title: str = "", each: int = 1
) -> dict[str, list[float]]:
    """
    Seconds of every call, round by round. In a round the calls take turns, so that a busy moment of the machine meets
    all of them; every other round goes backwards.

    Args:
        warmup: rounds that are not counted, before the others.
        each: how often a call runs in one measurement, where one run is too short for the clock.
    """
    seconds = {name: [] for name in calls}
    for number in tqdm(range(warmup + repetitions), desc=title):
        for name in calls if number % 2 == 0 else reversed(calls):
            synchronize()
            start = time.perf_counter()
            for _ in range(each):
                calls[name]()
            synchronize()
            if number >= warmup:
                seconds[name].append((time.perf_counter() - start) / each)
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: list[float]) -> list[float]:
    """Median, lower and upper quartile, to five digits."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return [float(f"{value:.5g}") for value in (median, low, high)]


def compare(seconds: dict[str, list[float]], reference: str = "ours") -> dict[str, dict[str, list[float]]]:
    """`spread` of each one's milliseconds, and of the reference's time over its own, round by round."""
    return {
        name: {
            "ms": spread([1000 * value for value in values]),
            "ours_over": spread([ours / value for ours, value in zip(seconds[reference], values)]),
        }
        for name, values in seconds.items()
    }


def extra_memory(call: Callable[[], Any], device: torch.device) -> int:
    """
    Bytes that a call has allocated at its peak, beyond what was there before it; what it returns counts.

    On a CPU torch's profiler notes every allocation, those inside kernels too. Run the call once before: libraries
    take a workspace when they are first used.
    """
    if device.type == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), default=0)


def count_flops(call: Callable[[], Any]) -> int:
    """FLOPs of matrix products, convolutions and attention; a multiply-add counts two, and causal attention in full."""
    with (
        torch.compiler.set_stance("force_eager"),
        FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter,
    ):
        call()
    return counter.get_total_flops()


class Ceiling:
    """What the machine can do at best: a large matrix product and a large copy, to be timed beside the others."""

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int | None = None):
        """`size`: of the square matrix; 8192 on a GPU, 2048 on a CPU."""
        size = size or (8192 if device.type == "cuda" else 2048)
        self.matrix = torch.randn(size, size, device=device).to(dtype)
        self.source = torch.ones(64 * size * size, dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)
        self.flops, self.bytes = 2 * size**3, 2 * self.source.nbytes  # read and written

    @property
    def calls(self) -> dict[str, Callable[[], Any]]:
        return {"matrix product": lambda: self.matrix @ self.matrix, "copy": lambda: self.target.copy_(self.source)}

    def rates(self, times: dict[str, dict[str, list[float]]]) -> tuple[float, float]:
        """FLOPs and bytes a millisecond, of `compare`'s figures."""
        return self.flops / times["matrix product"]["ms"][0], self.bytes / times["copy"]["ms"][0]


# ----------------------------------------------------------------------------------------------- commands and files


def new_parser(doc: str, scales: tuple[str, ...] = ("small", "full")) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=scales, default="small", help="small is for two cores (default)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results (default benchmarks/results)")
    return parser


def add_device_option(parser: argparse.ArgumentParser) -> None:
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=found, help=f"cpu or cuda (default here: {found})")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    add_device_option(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    return getattr(torch, args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32"))


def head(scale: str, device: torch.device, **settings: Any) -> dict[str, Any]:
    """The first lines of every file of results: on what and how it was measured."""
    threads = torch.get_num_threads()
    return {"machine": {**describe_machine(device.type), "threads": threads}, "scale": scale, **settings}


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)


def begin(path: Path, settings: dict[str, Any], **empty: Any) -> dict[str, Any]:
    """The results that lie there already, to go on with, or new ones: the settings, and `empty`."""
    if not path.is_file():
        return {**settings, **empty}
    result = json.loads(path.read_text())
    found = {key: value for key, value in result.items() if key not in empty}
    if found != settings:
        raise SystemExit(
            f"{path} was measured with other settings: move it away or pass --results.\n{found}\n{settings}"
        )
    return result


def markdown_table(header: list[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_table(path: Path, title: str, result: dict[str, Any], *tables: str) -> None:
    """Prints the tables of a result and writes them to a Markdown file, under the machine they were measured on."""
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    settings = ", ".join(f"{key} {value}" for key, value in result.items() if isinstance(value, (str, bool)))
    text = f"# {title}\n\nMachine: {machine}. Settings: {settings}.\n\n" + "\n".join(tables)
    path.write_text(text)
    print(text)


def show(figures: list[float], unit: str = "") -> str:
    """Median and quartiles for a table."""
    median, low, high = (f"{figure:.3g}" if figure < 1000 else f"{figure:.0f}" for figure in figures)
    return f"{median}{unit} ({low} to {high})"


def plot(path: Path, panels: dict[str, tuple[str, str, dict[str, tuple[list[float], list[float]]]]]) -> None:
    """
    Curves side by side on logarithmic axes, as a PNG.

    Args:
        panels: by title: label of x, label of y, and `{name: (xs, ys)}`.
    """
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 4 * rows), layout="constrained", squeeze=False)
    for axis, (title, (x, y, curves)) in zip(axes.flat, panels.items()):
        for name, points in curves.items():
            axis.plot(*points, "o-", label=name)
        axis.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
        ticks = sorted({value for xs, _ in curves.values() for value in xs})
        axis.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks], rotation=45 if len(ticks) > 5 else 0)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_shards(shapes: dict[str, torch.Size], folder: Path, suffix: str = "safetensors") -> None:
    """Writes random bfloat16 tensors of these names and shapes as a checkpoint's shards and their index."""
    generator, shards, size = torch.Generator().manual_seed(0), [], SHARD
    for name, shape in shapes.items():
        if size + 2 * shape.numel() > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * shape.numel()
    stem, weight_map = {"safetensors": "model", "bin": "pytorch_model"}[suffix], {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        tensors = {
            name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name in names
        }
        if suffix == "safetensors":
            save_file(tensors, folder / file, metadata={"format": "pt"})
        else:
            torch.save(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 2 * sum(map(torch.Size.numel, shapes.values()))}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
