"""Writes lab/RESULTS.md and its plots from the stored results; nothing in it is typed by hand.

python -m lab.report                    # of every scale that has results
"""

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import numpy as np

from lab.arms import ABLATION, AGAIN, ARMS, BASELINES, CENTRE, LONGER, PAIRS, ROWS, UPPER, Arm
from lab.labels import KINDS
from lab.table import FASTV_TOKENS, RESULTS
from lab.training import FROM_NANO, SCALES, read_config


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


READING = ("ocr", "table", "chart")  # "mean" below is theirs
DOMAINS = (*READING, "receipt", "shapes")
STYLES = {"seen": "Fonts and layouts of training", "held out": "Fonts and layouts held out of training"}
DRAWS = 2000
BOUNDS = {"the upper bound": UPPER.name, "the bound trained again": AGAIN.name}  # they end the gap
FOLLOWED = [UPPER.name, *(arm.name for arm in (*ARMS["cpu"], *BASELINES))]  # whose curves are drawn


@dataclass
class Score:
    """The results of one arm over its seeds."""

    runs: list[dict]

    def pictures(self, domains: tuple[str, ...], style: str) -> np.ndarray:
        """Share of right answers by domain and picture, averaged over seeds: `(domains, pictures)`."""
        hits = [
            [[[int(hit) for hit in text] for text in run["right"][style][domain].values()] for run in self.runs]
            for domain in domains
        ]
        return np.stack([np.mean(domain, axis=(0, 1)) for domain in hits])

    def by_seed(self, domains: tuple[str, ...], style: str) -> list[float]:
        return [100 * float(Score([run]).pictures(domains, style).mean()) for run in self.runs]

    def cell(self, domains: tuple[str, ...], style: str) -> str:
        values = self.by_seed(domains, style)
        return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def difference(ours: Score, other: Score, domains: tuple[str, ...], style: str) -> tuple[float, float, float]:
    """Ours minus other in points, and the 95% bootstrap interval over the test's pictures, which both answered."""
    per_picture = 100 * (ours.pictures(domains, style) - other.pictures(domains, style))  # (domains, pictures)
    rng = np.random.default_rng(0)
    drawn = rng.integers(per_picture.shape[1], size=(DRAWS, *per_picture.shape))
    means = np.take_along_axis(np.broadcast_to(per_picture, drawn.shape), drawn, axis=2).mean((1, 2))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(per_picture.mean()), float(low), float(high)


def show(values: tuple[float, float, float]) -> str:
    return f"{values[0]:+.1f} [{values[1]:+.1f}, {values[2]:+.1f}]"


def load(scale: str) -> dict[str, Score]:
    """The results of a scale, by the name of the arm."""
    runs = defaultdict(list)
    for path in sorted((RESULTS / scale).glob("*-*.json")):
        result = json.loads(path.read_text())
        runs[result["arm"]].append(result)
    return {name: Score(found) for name, found in runs.items()}


def score_table(scores: dict[str, Score], names: list[str], style: str) -> list[str]:
    lines = [
        "| model | tokens | parameters | operations | "
        + " | ".join(DOMAINS)
        + " | mean of ocr, table, chart | seeds |",
        "|---|---|---|---|" + "---|" * (len(DOMAINS) + 2),
    ]
    for name in names:
        if name not in scores:
            continue
        score, first = scores[name], scores[name].runs[0]
        cells = [score.cell((domain,), style) for domain in DOMAINS] + [score.cell(READING, style)]
        costs = f"{first['tokens']} | {first['parameters'] / 1e6:.3f} M | {first['operations'] / 1e6:.1f} M"
        lines.append(f"| {name} | {costs} | " + " | ".join(cells) + f" | {len(score.runs)} |")
    return lines


@dataclass
class Gain:
    """Of ours over none: on `READING`, on price lists, on the control; and how many percent of the gaps it closes."""

    pair: str
    reading: tuple[float, float, float]
    receipts: tuple[float, float, float]
    control: tuple[float, float, float]
    closed: dict[str, float]  # by the bound that the gap is to


def bounds(scores: dict[str, Score], style: str) -> dict[str, float]:
    """Exact match of those of `BOUNDS` that are there, in percent."""
    return {bound: mean(scores[name].by_seed(READING, style)) for bound, name in BOUNDS.items() if name in scores}


def gains(scores: dict[str, Score], style: str) -> dict[Arm, Gain]:
    """By the arm with the module, for every one whose pair is there."""
    found, tops = {}, bounds(scores, style)
    for arm in (*PAIRS, *LONGER):
        ours, none = scores.get(arm.name), scores.get(replace(arm, module="none").name)
        if arm.module == "ours" and ours and none:
            reading, receipts, control = (
                difference(ours, none, domains, style) for domains in (READING, ("receipt",), ("shapes",))
            )
            level = mean(none.by_seed(READING, style))
            closed = {bound: 100 * reading[0] / (top - level) for bound, top in tops.items() if top > level}
            pair = f"{arm.projector}, {arm.downsample**2} to 1" + (f", {arm.longer} x steps" if arm.longer else "")
            found[arm] = Gain(pair, reading, receipts, control, closed)
    return found


def gain_table(found: dict[Arm, Gain]) -> list[str]:
    """Ours against none on each projector, and how much of the gap to each bound is closed."""
    told = [bound for bound in BOUNDS if any(bound in gain.closed for gain in found.values())]
    lines = [
        "| projector and ratio | gain on ocr, table, chart | gain on receipt | gain on shapes |"
        + "".join(f" of the gap to {bound} |" for bound in told),
        "|---|---|---|---|" + "---|" * len(told),
    ]
    for gain in found.values():
        closed = "".join(f" {gain.closed[bound]:.0f}% |" if bound in gain.closed else " no gap |" for bound in told)
        lines.append(f"| {gain.pair} | {show(gain.reading)} | {show(gain.receipts)} | {show(gain.control)} |{closed}")
    return lines


def against_table(scores: dict[str, Score], arms: list[Arm], style: str) -> list[str]:
    lines = ["| instead of ours | ours is ahead by |", "|---|---|"]
    for arm in arms:
        if arm.name in scores and CENTRE.name in scores:
            lines.append(f"| {arm.name} | {show(difference(scores[CENTRE.name], scores[arm.name], READING, style))} |")
    return lines if len(lines) > 2 else []


def bars_table(scores: dict[str, Score], gained: dict[Arm, Gain], style: str) -> list[str]:
    """What the paper's claim demands of these results, and whether it holds."""
    found = [(f"exact match of {bound}", top, 95) for bound, top in bounds(scores, style).items()]
    for arm, gain in gained.items():
        if arm.downsample == CENTRE.downsample:
            found += [
                (f"{gain.pair}: gain", gain.reading[0], 5),
                (f"{gain.pair}: lower end of the gain's interval", gain.reading[1], 0),
                (f"{gain.pair}: gain beyond that on shapes", gain.reading[0] - gain.control[0], 0),
            ]
            found += [(f"{gain.pair}: of the gap to {bound}", closed, 50) for bound, closed in gain.closed.items()]
    for arm in BASELINES:
        if arm.module in ("deepstack", "sva") and {arm.name, CENTRE.name} <= scores.keys():
            found.append(
                (f"ahead of {arm.name}", difference(scores[CENTRE.name], scores[arm.name], READING, style)[0], 2)
            )
    lines = ["| what | more than | found | |", "|---|---|---|---|"]
    return lines + [
        f"| {what} | {bar} | {value:.1f} | {'holds' if value > bar else 'missed'} |" for what, value, bar in found
    ]


def new_axes(x: str, y: str):
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_tokens(scores: dict[str, Score], folder: Path):
    """Accuracy against tokens per image, with the module and without."""
    figure, axes = new_axes("vision tokens an image", "exact match, mean of ocr, table, chart (%)")
    for module, style in (("none", "o--"), ("ours", "s-")):
        for colour, projector in enumerate(dict.fromkeys(arm.projector for arm in ARMS["gpu"])):
            arms = [Arm(projector, s, module) for s in (4, 2) if Arm(projector, s, module).name in scores]
            points = [
                (scores[a.name].runs[0]["tokens"], mean(scores[a.name].by_seed(READING, "held out"))) for a in arms
            ]
            if points:
                axes.plot(*zip(*points), style, color=f"C{colour}", label=f"{projector}, {module}")
    others = {"FastV": ("k^:", [f"fastv-{tokens}" for tokens in FASTV_TOKENS]), "upper bound": ("k*", [UPPER.name])}
    for label, (style, names) in others.items():
        points = [(scores[n].runs[0]["tokens"], mean(scores[n].by_seed(READING, "held out"))) for n in names]
        axes.plot(*zip(*points), style, label=label)
    axes.set_xscale("log")
    ticks = sorted({score.runs[0]["tokens"] for score in scores.values()})
    axes.set_xticks(ticks, labels=ticks)
    axes.minorticks_off()
    axes.legend(fontsize=7)
    figure.savefig(folder / "tokens.png", dpi=120)


def plot_attention(scores: dict[str, Score], folder: Path):
    """Attention of the question's last token on vision tokens, by layer: the paper's figure of forgetting."""
    figure, axes = new_axes("decoder layer", "attention on vision tokens (share)")
    for name in FOLLOWED:
        if name in scores:
            axes.plot(np.mean([run["attention"] for run in scores[name].runs], axis=0), "o-", label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(0)
    axes.legend(fontsize=7)
    figure.savefig(folder / "attention.png", dpi=120)


def plot_losses(scores: dict[str, Score], folder: Path):
    figure, axes = new_axes("step", "training loss")
    for name in FOLLOWED:
        if name in scores:
            axes.plot(*zip(*scores[name].runs[0]["losses"]), label=name)
    axes.set_yscale("log")
    axes.legend(fontsize=7)
    figure.savefig(folder / "losses.png", dpi=120)


def tower_table(named: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Shares named right, by style and domain, in columns for the kinds of labels."""
    lines = ["| fonts and layouts | domain | " + " | ".join(KINDS) + " |", "|---|---|" + "---|" * len(KINDS)]
    for style, domains in named.items():
        for domain, shares in domains.items():
            cells = (f"{100 * shares[kind]:.1f}" if kind in shares else "" for kind in KINDS)
            lines.append(f"| {style} | {domain} | " + " | ".join(cells) + " |")
    return lines


def machine_and_cost(scores: dict[str, Score]) -> str:
    runs = [run for score in scores.values() for run in score.runs if "train_seconds" in run]
    machine = ", ".join(f"{key} {runs[0][key]}" for key in ("device", "python", "torch", "transformers"))
    minutes = sum(run["train_seconds"] + run["test_seconds"] for run in runs) / 60
    return f"Machine: {machine}. Cost: {minutes:.0f} minutes for {len(runs)} models"


def section(scale: str) -> list[str]:
    """All about one scale."""
    scores = load(scale)
    folder = RESULTS / scale
    for plot in (plot_tokens, plot_attention, plot_losses):
        plot(scores, folder)
    tower = json.loads((folder / "tower.json").read_text())
    steps = {stage: read_config(stage)[scale]["max_steps"] for stage in ("tower", "upper", "compressed")}
    lines = [f"## Scale {scale}", ""]
    lines += [
        f"`python -m lab.table --scale {scale}`, then `python -m lab.report`. {machine_and_cost(scores)}, after the "
        f"tower; steps: {', '.join(f'{stage} {count}' for stage, count in steps.items())}."
    ]
    lines += ["", "What the frozen tower names right of what lies under the patches of fresh pictures, in percent:", ""]
    lines += tower_table(tower["named"])
    pairs = [arm.name for arm in (UPPER, AGAIN, *PAIRS, *LONGER)]
    pairs += [f"fastv-{tokens}" for tokens in FASTV_TOKENS]
    for style, title in STYLES.items():
        lines += ["", f"### {title}", "", *score_table(scores, pairs, style)]
        gained = gains(scores, style)
        lines += ["", "Gain of the module, with 95% bootstrap intervals over pictures:", "", *gain_table(gained)]
        lines += ["", "What the paper's claim would have here, in points and percent:", ""]
        lines += bars_table(scores, gained, style)
        for kind, arms in (("Other ways", BASELINES), ("Ablation", ABLATION)):
            names = [CENTRE.name, *(arm.name for arm in arms)]
            if table := against_table(scores, arms, style):
                lines += ["", f"{kind}:", "", *score_table(scores, names, style), "", *table]
    for name, caption in (
        ("tokens", "Accuracy against tokens an image, held-out fonts and layouts."),
        ("attention", "Attention of the question's last token on vision tokens, by decoder layer."),
        ("losses", "Training loss."),
    ):
        lines += ["", f"![{caption}](results/{scale}/{name}.png)", "", caption]
    missing = [
        f"{arm.name} (seed {seed})"
        for seed in read_config("compressed")["seeds"][scale]
        for arm in ARMS["gpu"]
        if not any(run["seed"] == seed for run in scores.get(arm.name, Score([])).runs)
    ]
    if missing:
        lines += ["", f"Rows of the whole table that are missing here: {', '.join(missing)}."]
    return lines


def section_from_nano(scale: str) -> list[str]:
    """The models that start from the checkpoint at the root: compared with each other, as they have no upper bound."""
    scores = load(scale + FROM_NANO)
    starts = sorted({run["start_sha256"][:12] for score in scores.values() for run in score.runs})
    lines = [f"## Scale {scale}, from the nano checkpoint", ""]
    lines += [
        f"`python -m lab.table --scale {scale} --from-nano --arms NAME`: tower and decoder are those of the checkpoint "
        f"whose model.safetensors has sha256 {', '.join(starts)}. {machine_and_cost(scores)}; "
        f"steps: {read_config('compressed')[scale]['max_steps']}."
    ]
    for style, title in STYLES.items():
        lines += ["", f"### {title}", "", *score_table(scores, [arm.name for arm in ROWS], style)]
        lines += ["", *against_table(scores, [arm for arm in ROWS if arm != CENTRE], style)]
    return lines


def main() -> None:
    """Write lab/RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS.parent / "RESULTS.md")
    args = parser.parse_args()
    lines = ["# Results of the lab", "", "Written by `python -m lab.report` from the files in `results/`."]
    lines += [
        "Exact match in percent, mean over seeds and their standard deviation. Parameters and operations are those"
    ]
    lines += ["of projector and modules, for one image."]
    for scale in SCALES:
        if (RESULTS / scale).is_dir():
            lines += ["", *section(scale)]
        else:
            lines += ["", f"## Scale {scale}", "", f"Not run. `python -m lab.table --scale {scale}` runs it."]
        if (RESULTS / f"{scale}{FROM_NANO}").is_dir():
            lines += ["", *section_from_nano(scale)]
    lines += ["", "[NOTES.md](NOTES.md) says what was tried."]
    args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
