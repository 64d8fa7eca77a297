"""Fills the tables of benchmarks/README.md from the files of results; no figure in them is typed by hand.

python -m benchmarks.report
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, markdown_table, show
from benchmarks.serving import LOADS as SERVING_LOADS


README = Path(__file__).with_name("README.md")
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
TILES = {1: "1 tile", 5: "5 tiles"}
GPU_OPTIONS = "--device cuda --scale full"
COMMANDS = {
    "module": (
        "python -m benchmarks.module",
        "the module alone beside other ways to do the same: time, memory, FLOPs, distance from the ceiling",
    ),
    "prefill": (
        "python -m benchmarks.prefill",
        "whole models: encoding, prefill, first token, decode step, memory, cache; with, without, and the peers",
    ),
    "prefill-2b": (
        "python -m benchmarks.prefill --scale 2b",
        "the same on a CPU at the 2B model's dimensions, beside DeepSeek-VL-7B; 13.4 GB of weights",
    ),
    "prefill-compiled": (
        "python -m benchmarks.prefill --compile",
        "with the modules and without, on compiled decoders",
    ),
    "loading": (
        "python -m benchmarks.loading --scale full",
        "`from_pretrained` beside reading the file; processing of images beside transformers'",
    ),
    "training": ("python -m benchmarks.training", "a training step of each stage, with the modules and without"),
    "quantization": ("python -m benchmarks.quantization", "answers and memory in NF4 and int8 beside full precision"),
    "conversion": ("python -m benchmarks.conversion", "`convert_weights.py` on a 2B checkpoint beside a plain copy"),
    "serving": (
        "python -m benchmarks.serving",
        "64 requests to vLLM beside `generate` in one batch, two models; in vLLM's environment",
    ),
    "report": ("python -m benchmarks.report", "the tables of this file"),
}


@dataclass
class Figure:
    """A figure with its target.

    Args:
        name: what it is; a ratio is always ours over the other.
        limit: the target: at most this; None where there is none.
        files: of results, without their ending, for each device that it is measured on.
        value: from a file's content, the median and its quartiles or one number; None if it was not measured.
    """

    name: str
    limit: float | None
    files: dict[str, str]
    value: Callable[[dict[str, Any]], list[float] | float | None]


def of_module(
    direction: str, name: str, downsample: int, ratio: Callable[[dict, dict], Any]
) -> Callable[[dict[str, Any]], Any]:
    """A figure of two rows of the module's table at 5 tiles: ours and that of this name."""

    def value(result: dict[str, Any]) -> Any:
        for group in result["groups"]:
            if (group["tiles"], group["downsample"]) == (5, downsample):
                return ratio(group[direction]["ours"], group[direction][name])

    return value


def time_ratio(ours: dict[str, Any], other: dict[str, Any]) -> list[float]:
    return other["ours_over"]


def memory_ratio(ours: dict[str, Any], other: dict[str, Any]) -> float:
    return ours["extra_bytes"] / other["extra_bytes"]


def line(downsample: int) -> Callable[[dict[str, Any]], float | None]:
    def value(result: dict[str, Any]) -> float | None:
        for found in result["lines"]:
            if found["downsample"] == downsample and {1, 10} <= set(found["tiles"]):
                return found["deviation"]

    return value


def worst(
    name: str, ratio: Callable[[dict, dict], Any], tiles: int | None = None
) -> Callable[[dict[str, Any]], list[float] | float | None]:
    """The highest ratio of ours to the model of this name, over all cases (of so many tiles)."""

    def value(result: dict[str, Any]) -> list[float] | float | None:
        found = [
            ratio(case["models"]["ours"], case["models"][name])
            for case in result["cases"]
            if tiles in (None, case["tiles"]) and case["models"].get(name, {}).get("fits", name in case["models"])
        ]
        return max(found, default=None)

    return value


def stage_ratio(stage: str) -> Callable[[dict, dict], list[float]]:
    return lambda ours, other: other[stage]["ours_over"]


def cache_ratio(ours: dict[str, Any], other: dict[str, Any]) -> float:
    return ours["image_cache_bytes"] / other["image_cache_bytes"]


def training(stage: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda result: next((run["time_ratio"] for run in result["stages"] if run["stage"] == stage), None)


def serving(load: str, result: dict[str, Any]) -> list[float] | None:
    found = result["loads"].get(load)
    return found and found["times"]["generate"]["ours_over"]


MODULE, TRAINING = (dict.fromkeys(DEVICES, file) for file in ("module", "training"))
OF_2B = {"cpu": "prefill-2b", "cuda": "prefill"}
FIGURES = [
    Figure(
        "module, windows of ratio 2 over those of ratio 1, 5 tiles, s = 4",
        1.35,
        MODULE,
        of_module("forward", "ours, ratio 1", 4, time_ratio),
    ),
    *(
        Figure(
            f"module over a decoder layer of Qwen2-1.5B, 5 tiles, s = {s}",
            limit,
            MODULE,
            of_module("forward", "decoder layer", s, time_ratio),
        )
        for s, limit in ((2, 0.16), (4, 0.26))
    ),
    *(
        Figure(f"module over {title}, 5 tiles, s = {s}: {way}", limit, MODULE, of_module(key, name, s, time_ratio))
        for name, title, limit in (
            ("SVA", "SVA's attention on the same windows", 0.15),
            ("SVA, ratio 1", "SVA's attention on the regions alone", 0.5),
            ("SVA layer", "SVA's whole layer on the same windows", 0.5),
        )
        for key, way in (("forward", "forward"), ("backward", "forward and backward"))
        for s in (2, 4)
    ),
    *(
        Figure(
            f"module over global cross attention, 5 tiles, s = {s}: {what}",
            limit,
            MODULE,
            of_module("forward", "global", s, ratio),
        )
        for what, limit, ratio in (("time", 0.2, time_ratio), ("extra memory", 0.1, memory_ratio))
        for s in (2, 4)
    ),
    *(Figure(f"linearity, 1 to 10 tiles, s = {s}: off the line", 0.05, MODULE, line(s)) for s in (2, 4)),
    *(
        Figure(
            f"2B, prefill with four modules over none, {tiles}",
            1.05,
            OF_2B,
            worst("off", stage_ratio("prefill"), count),
        )
        for count, tiles in TILES.items()
    ),
    Figure(
        "2B, prefill with four modules over none, compiled",
        1.05,
        {"cuda": "prefill-compiled"},
        worst("off", stage_ratio("prefill")),
    ),
    Figure(
        "decode step with modules over without",
        1.01,
        dict.fromkeys(DEVICES, "prefill"),
        worst("off", stage_ratio("decode step")),
    ),
    *(
        Figure(
            f"2B, first token over {title}, {tiles}",
            limits.get(count),
            OF_2B,
            worst(name, stage_ratio("first token"), count),
        )
        for name, title, limits in (
            ("DeepSeek-VL-7B", "DeepSeek-VL-7B", {1: 1 / 3}),
            ("uncompressed", "the same backbones uncompressed", {5: 0.5}),
        )
        for count, tiles in TILES.items()
    ),
    Figure(
        "2B, prefill over the same backbones uncompressed, 5 tiles",
        0.5,
        OF_2B,
        worst("uncompressed", stage_ratio("prefill"), 5),
    ),
    Figure(
        "2B, image's part of the cache over the same uncompressed, 5 tiles",
        0.25,
        OF_2B,
        worst("uncompressed", cache_ratio, 5),
    ),
    *(
        Figure(f"training step with four modules over none, stage {stage}", 1.15, TRAINING, training(stage))
        for stage in ("projector", "projector+remember", "lora", "full")
    ),
    Figure("training: share of time that waits for data", 0.05, TRAINING, lambda r: r["waiting_share"]),
    Figure("loading: peak memory over the weights", 1.1, {"cpu": "loading"}, lambda r: r["loading"]["peak_over_file"]),
    *(
        Figure(
            f"64 requests, {load}: vLLM, compiled, over `generate` in one batch",
            1 / 1.3,
            dict.fromkeys(DEVICES, "serving"),
            partial(serving, load),
        )
        for loads in SERVING_LOADS.values()
        for load in loads
    ),
]


def load(device: str, file: str, results: Path) -> dict[str, Any] | None:
    path = results / device / f"{file}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def cell(figure: Figure, device: str, results: Path) -> str:
    if device not in figure.files:
        return ""
    result = load(device, figure.files[device], results)
    value = None if result is None else figure.value(result)
    if value is None:
        return "open"
    median, text = (value[0], show(value)) if isinstance(value, list) else (value, f"{value:.3g}")
    sibling = figure.files[device] in ("prefill", "loading") and result["scale"] == "small"
    verdict = "" if figure.limit is None else ", met" if median <= figure.limit else ", not met"
    return text + verdict + ", 0.5B sibling" * sibling


def command(file: str, device: str) -> str:
    on_gpu = device == "cuda" and file != "loading"
    pieces = " --minutes 8" if on_gpu and file.startswith("prefill") else ""
    return f"`{COMMANDS[file][0]}{f' {GPU_OPTIONS}{pieces}' if on_gpu else ''}`"


def targets(results: Path) -> str:
    header = ["figure", "at most", *DEVICES.values(), "command where open"]
    rows = []
    for figure in FIGURES:
        cells = {device: cell(figure, device, results) for device in DEVICES}
        missing = [command(figure.files[device], device) for device, text in cells.items() if text == "open"]
        limit = "" if figure.limit is None else f"{figure.limit:.3g}"
        rows.append([figure.name, limit, *cells.values(), ", ".join(missing)])
    return markdown_table(header, rows)


def commands(results: Path) -> str:
    rows = []
    for file, (text, what) in COMMANDS.items():
        found = {name: load(device, file, results) for device, name in DEVICES.items()}
        times = [
            f"{result['seconds'] / 60:.0f} min ({name}, {result['scale']})" for name, result in found.items() if result
        ]
        rows.append([f"`{text}`", what, ", ".join(times)])
    return markdown_table(["command", "what it measures", "time it took"], rows)


def machines(results: Path) -> str:
    lines = []
    for device, name in DEVICES.items():
        for file in COMMANDS:
            if result := load(device, file, results):
                facts = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
                lines.append(f"- {name}, {file}: {facts}; scale {result['scale']}.\n")
    return "".join(lines)


def fill(text: str, results: Path) -> str:
    """The text with what stands between the marks of each part written anew."""
    for part in (commands, targets, machines):
        mark = part.__name__
        pattern = rf"(<!-- {mark} -->\n).*?(<!-- end of {mark} -->)"
        text, count = re.subn(pattern, lambda m, part=part: m[1] + part(results) + m[2], text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{README} must hold the marks of {mark!r} once, found {count}")
    return text


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    README.write_text(fill(README.read_text(), RESULTS))


if __name__ == "__main__":
    main()
