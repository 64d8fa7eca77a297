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

from lab import distill
from lab.data.dense_labels import LABEL_TYPES
from lab.experiments import (
    ABLATION,
    ALL_EXPERIMENTS,
    BASELINES,
    EXPERIMENTS,
    LONG_SCHEDULE,
    PAIRS,
    PROJECTORS,
    REFERENCE,
    UNCOMPRESSED,
    UNCOMPRESSED_RETRAINED,
    Experiment,
)
from lab.run_experiments import FASTV_TOKENS, RESULTS
from lab.training import FROM_NANO, SCALES, read_config


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


READING = ("ocr", "table", "chart")  # "mean" below is theirs
DOMAINS = (*READING, "receipt", "shapes")
STYLES = {"seen": "Fonts and layouts of training", "held out": "Fonts and layouts held out of training"}
DRAWS = 2000
REFERENCES = {"uncompressed": UNCOMPRESSED.name, "uncompressed, retrained": UNCOMPRESSED_RETRAINED.name}  # end the gap
FOLLOWED = [e.name for e in (UNCOMPRESSED, *EXPERIMENTS["cpu"], *BASELINES)]  # whose curves are drawn
EARLIER_TERMS = {  # in names of results that were stored up to commit 6c1209d
    "mlp-1-none-longer1": UNCOMPRESSED_RETRAINED.name,
    "mlp-1-none": UNCOMPRESSED.name,
    "longer3": "long_schedule",
    "window6": "ratio1.5",
    "window8": "ratio2",
    "shared": "key_value_heads",
}


INTRODUCTION = """\
Written by `python -m lab.report` from the files in `results/`. Exact match in percent, mean over seeds and their
standard deviation. Parameters and FLOPs are those of projector and modules, for one image.

Intervals are over the pictures of the test: with one seed they leave out what another order of the data or other first
weights would change. A seed changes the first weights alone, and choices were made on these test pictures. Pictures
held out of training have no slanted text and no clutter, and two of their five fonts are slanted twins of training's.

Files that name an "arm" were stored up to commit 6c1209d, whose modules had a learned bias for each place in the
window. Their experiments stand here under the names of today: windows of 6 and 8 patches at 16:1 are ratios of 1.5
and 2. FLOPs are those of that commit, which projected each window; keys and values are now made once per patch."""


@dataclass
class Score:
    """The results of one experiment over its seeds."""

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


def read_result(path: Path) -> dict:
    """A stored result, in the terms of today."""
    result = json.loads(path.read_text())
    if "arm" in result:
        name = result.pop("arm")
        for term, now in EARLIER_TERMS.items():
            name = name.replace(term, now)
        result |= {"experiment": name, "flops": result.pop("operations")}
    return result


def load(scale: str) -> dict[str, Score]:
    """The results of a scale, by the name of the experiment."""
    runs = defaultdict(list)
    for result in map(read_result, sorted((RESULTS / scale).glob("*-*.json"))):
        runs[result["experiment"]].append(result)
    return {name: Score(found) for name, found in runs.items()}


def score_table(scores: dict[str, Score], names: list[str], style: str) -> list[str]:
    lines = [
        "| experiment | tokens | parameters | FLOPs | "
        + " | ".join(DOMAINS)
        + " | mean of ocr, table, chart | seeds |",
        "|---|---|---|---|" + "---|" * (len(DOMAINS) + 2),
    ]
    for name in names:
        if name not in scores:
            continue
        score, first = scores[name], scores[name].runs[0]
        cells = [score.cell((domain,), style) for domain in DOMAINS] + [score.cell(READING, style)]
        costs = f"{first['tokens']} | {first['parameters'] / 1e6:.3f} M | {first['flops'] / 1e6:.1f} M"
        lines.append(f"| {name} | {costs} | " + " | ".join(cells) + f" | {len(score.runs)} |")
    return lines


@dataclass
class Gain:
    """Of ours over none: on `READING`, on price lists, on the control; and the percentage of the gaps closed."""

    pair: str
    reading: tuple[float, float, float]
    receipts: tuple[float, float, float]
    control: tuple[float, float, float]
    closed: dict[str, float]  # by the reference that the gap is to


def reference_scores(scores: dict[str, Score], style: str) -> dict[str, float]:
    """Exact match of those of `REFERENCES` that are there, in percent."""
    return {title: mean(scores[name].by_seed(READING, style)) for title, name in REFERENCES.items() if name in scores}


def gains(scores: dict[str, Score], style: str) -> dict[Experiment, Gain]:
    """By the experiment with the module, for every one whose pair is there."""
    found, tops = {}, reference_scores(scores, style)
    for experiment in (*PAIRS, *LONG_SCHEDULE):
        ours, none = scores.get(experiment.name), scores.get(replace(experiment, module="none").name)
        if experiment.module == "ours" and ours and none:
            reading, receipts, control = (
                difference(ours, none, domains, style) for domains in (READING, ("receipt",), ("shapes",))
            )
            level = mean(none.by_seed(READING, style))
            closed = {title: 100 * reading[0] / (top - level) for title, top in tops.items() if top > level}
            pair = f"{experiment.projector}, {experiment.downsample**2}:1"
            if experiment.schedule != "default":
                pair += f", {experiment.schedule}"
            found[experiment] = Gain(pair, reading, receipts, control, closed)
    return found


def gain_table(found: dict[Experiment, Gain]) -> list[str]:
    """Ours against none on each projector, and how much of the gap to each reference is closed."""
    told = [title for title in REFERENCES if any(title in gain.closed for gain in found.values())]
    lines = [
        "| projector and ratio | gain on ocr, table, chart | gain on receipt | gain on shapes |"
        + "".join(f" of the gap to {title} |" for title in told),
        "|---|---|---|---|" + "---|" * len(told),
    ]
    for gain in found.values():
        closed = "".join(f" {gain.closed[title]:.0f}% |" if title in gain.closed else " no gap |" for title in told)
        lines.append(f"| {gain.pair} | {show(gain.reading)} | {show(gain.receipts)} | {show(gain.control)} |{closed}")
    return lines


def against_table(scores: dict[str, Score], names: list[str], style: str) -> list[str]:
    lines = ["| instead of ours | ours is ahead by |", "|---|---|"]
    for name in names:
        if name in scores and REFERENCE.name in scores and name != REFERENCE.name:
            lines.append(f"| {name} | {show(difference(scores[REFERENCE.name], scores[name], READING, style))} |")
    return lines if len(lines) > 2 else []


def targets_table(scores: dict[str, Score], gained: dict[Experiment, Gain], style: str) -> list[str]:
    """What the paper's claim demands of these results, and whether it is met."""
    found = [(f"exact match of {title}", top, 95) for title, top in reference_scores(scores, style).items()]
    for experiment, gain in gained.items():
        if experiment.downsample == REFERENCE.downsample:
            found += [
                (f"{gain.pair}: gain", gain.reading[0], 5),
                (f"{gain.pair}: lower end of the gain's interval", gain.reading[1], 0),
                (f"{gain.pair}: gain beyond that on shapes", gain.reading[0] - gain.control[0], 0),
            ]
            found += [(f"{gain.pair}: of the gap to {title}", closed, 50) for title, closed in gain.closed.items()]
    for name in (experiment.name for experiment in BASELINES if experiment.module in ("deepstack", "sva")):
        if {name, REFERENCE.name} <= scores.keys():
            found.append((f"ahead of {name}", difference(scores[REFERENCE.name], scores[name], READING, style)[0], 2))
    lines = ["| what | more than | found | |", "|---|---|---|---|"]
    return lines + [
        f"| {what} | {target} | {value:.1f} | {'met' if value > target else 'not met'} |"
        for what, value, target in found
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
        for colour, projector in enumerate(PROJECTORS):
            names = [Experiment(projector, s, module).name for s in (4, 2)]
            points = [
                (scores[n].runs[0]["tokens"], mean(scores[n].by_seed(READING, "held out")))
                for n in names
                if n in scores
            ]
            if points:
                axes.plot(*zip(*points), style, color=f"C{colour}", label=f"{projector}, {module}")
    others = {
        "FastV": ("k^:", [f"fastv-{tokens}" for tokens in FASTV_TOKENS]),
        "uncompressed": ("k*", [UNCOMPRESSED.name]),
    }
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
    """Shares named right, by style and domain, in columns for the types of labels."""
    lines = [
        "| fonts and layouts | domain | " + " | ".join(LABEL_TYPES) + " |",
        "|---|---|" + "---|" * len(LABEL_TYPES),
    ]
    for style, domains in named.items():
        for domain, shares in domains.items():
            cells = (f"{100 * shares[kind]:.1f}" if kind in shares else "" for kind in LABEL_TYPES)
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
    steps = {stage: read_config(stage)[scale]["max_steps"] for stage in ("tower", "uncompressed", "compressed")}
    lines = [f"## Scale {scale}", ""]
    lines += [
        f"`python -m lab.run_experiments --scale {scale}`, then `python -m lab.report`. {machine_and_cost(scores)}, "
        f"after the tower; steps: {', '.join(f'{stage} {count}' for stage, count in steps.items())}."
    ]
    lines += ["", "What the frozen tower names right of what lies under the patches of fresh pictures, in percent:", ""]
    lines += tower_table(tower["named"])
    pairs = [experiment.name for experiment in (UNCOMPRESSED, UNCOMPRESSED_RETRAINED, *PAIRS, *LONG_SCHEDULE)]
    pairs += [f"fastv-{tokens}" for tokens in FASTV_TOKENS]
    for style, title in STYLES.items():
        lines += ["", f"### {title}", "", *score_table(scores, pairs, style)]
        gained = gains(scores, style)
        lines += ["", "Gain of the module, with 95% bootstrap intervals over pictures:", "", *gain_table(gained)]
        lines += ["", "What the paper's claim demands here, in points and percent:", ""]
        lines += targets_table(scores, gained, style)
        for title, experiments in (("Baselines", BASELINES), ("Ablation", ABLATION)):
            names = [REFERENCE.name, *(experiment.name for experiment in experiments)]
            if table := against_table(scores, names, style):
                lines += ["", f"{title}:", "", *score_table(scores, names, style), "", *table]
    for name, caption in (
        ("tokens", "Accuracy against tokens an image, held-out fonts and layouts."),
        ("attention", "Attention of the question's last token on vision tokens, by decoder layer."),
        ("losses", "Training loss."),
    ):
        lines += ["", f"![{caption}](results/{scale}/{name}.png)", "", caption]
    missing = [
        f"{experiment.name} (seed {seed})"
        for seed in read_config("compressed")["seeds"][scale]
        for experiment in EXPERIMENTS["gpu"]
        if not any(run["seed"] == seed for run in scores.get(experiment.name, Score([])).runs)
    ]
    if missing:
        lines += ["", f"Experiments of the whole table that are missing here: {', '.join(missing)}."]
    return lines


def section_from_nano(scale: str) -> list[str]:
    """The models that start from the checkpoint at the root: they are compared with each other alone."""
    scores = load(scale + FROM_NANO)
    names = [experiment.name for experiment in ALL_EXPERIMENTS]
    names += sorted(scores.keys() - set(names))  # of modules that the code has no more
    starts = sorted({run["start_sha256"][:12] for score in scores.values() for run in score.runs})
    lines = [f"## Scale {scale}, from the nano checkpoint", ""]
    lines += [
        f"`python -m lab.run_experiments --scale {scale} --from-nano --experiments NAME`: tower and decoder are those "
        f"of the checkpoint whose model.safetensors has sha256 {', '.join(starts)}. {machine_and_cost(scores)}; "
        f"steps: {read_config('compressed')[scale]['max_steps']}."
    ]
    for style, title in STYLES.items():
        lines += ["", f"### {title}", "", *score_table(scores, names, style)]
        lines += ["", *against_table(scores, names, style)]
    return lines


def kept_answers(right: dict, source: dict) -> np.ndarray:
    """For each picture of the test, how many of the answers that the source has right are right: `(pictures,)`.

    Args:
        right, source: as `evaluate.measure` has them, by style.
    """
    found = []
    for style, domains in source.items():
        for domain, by_type in domains.items():
            texts = zip(by_type.values(), right[style][domain].values())
            both = [[int(a) * int(b) for a, b in zip(theirs, ours)] for theirs, ours in texts]  # (types, pictures)
            found.append(np.sum(both, axis=0))
    return np.concatenate(found)


def share(kept: list[np.ndarray], of: np.ndarray) -> tuple[float, float, float]:
    """The percentage of answers kept, and its 95% bootstrap interval over seeds and pictures.

    Args:
        kept: for each seed `(pictures,)`, answers or differences of them.
        of: `(pictures,)`, the source's right answers.
    """
    kept, rng, drawn = np.stack(kept), np.random.default_rng(0), []
    for _ in range(DRAWS):
        seeds, pictures = (rng.integers(size, size=size) for size in kept.shape)
        drawn.append(kept[np.ix_(seeds, pictures)].mean(0).sum() / of[pictures].sum())
    low, high = np.quantile(drawn, (0.025, 0.975))
    return tuple(100 * float(value) for value in (kept.mean(0).sum() / of.sum(), low, high))


def section_distill() -> list[str]:
    """Compression without labels: all students beside the source and its controls, and what was hoped for."""
    runs = defaultdict(dict)
    for path in sorted(distill.RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        runs[result["row"]][result["seed"]] = result
    source = runs["source"][0]["right"]["1"]
    of, kept = kept_answers(source, source), {}  # kept: by model and s, for each seed, `(pictures,)`
    lines = ["| model | s | image tokens | seen | held out | kept of the source's right answers | lost | won | seeds |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for name in (*distill.CONTROLS, *distill.STUDENTS):
        for s in sorted({s for run in runs[name].values() for s in run["right"]}):
            found = {seed: run["right"][s] for seed, run in runs[name].items()}
            kept[name, s] = {seed: kept_answers(right, source) for seed, right in found.items()}
            rights = [kept_answers(right, right).sum() for right in found.values()]
            score = Score([{"right": right} for right in found.values()])
            cells = [name, s, distill.tokens_at(int(s)), *(score.cell(DOMAINS, style) for style in STYLES)]
            cells.append(show_share(share(list(kept[name, s].values()), of)))
            helds = [answers.sum() for answers in kept[name, s].values()]
            cells.append(", ".join(str(of.sum() - held) for held in helds))
            cells.append(", ".join(str(right - held) for right, held in zip(rights, helds)))
            cells.append(len(found))
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    trained = [run for name in distill.STUDENTS for run in runs[name].values()]
    steps, pictures = distill.CONFIG["student"]["max_steps"], distill.CONFIG["pictures"]["count"]
    return [
        "## Fewer tokens, without labels",
        "",
        f"`python -m lab.distill`: the uncompressed source answers questions about {pictures} new pictures. Each model "
        f"is trained on these answers for {steps} steps, its decoder frozen. "
        f"{machine_and_cost({'': Score(trained)})}. Exact match, mean of five domains, "
        f"{distill.CONFIG['test']['count']} pictures of each in either style. Intervals are over pictures and seeds; a "
        "seed varies data order and first weights. Lost are right answers of the source, won are its wrong ones, each "
        "seed for itself. `shifted` is the source on pictures moved by one pixel: how steady its own answers are. "
        "`untrained` pools without training; `shrunk` is the source on pictures whose sides are s times shorter, the "
        "positions of its tower interpolated.",
        "",
        *lines,
        "",
        *compression_targets(kept, of, [run["equal_at_1"] for run in trained]),
    ]


def show_share(values: tuple[float, float, float]) -> str:
    return f"{values[0]:.1f} [{values[1]:.1f}, {values[2]:.1f}]"


def compression_targets(
    kept: dict[tuple[str, str], dict[int, np.ndarray]], of: np.ndarray, equal_at_1: list[bool]
) -> list[str]:
    """What was hoped for, what was found, and whether that is enough; rows whose models are not there are left out."""

    def difference(ours: tuple[str, str], other: tuple[str, str]) -> list[np.ndarray]:
        seeds = sorted(kept.get(ours, {}).keys() & kept.get(other, {}).keys())
        return [kept[ours][seed] - kept[other][seed] for seed in seeds]

    lines = ["| figure, in percent of the source's right answers | should be | found | |", "|---|---|---|---|"]
    for figure, should, found, is_met in (
        (
            "kept at s = 2, with modules",
            "at least 97",
            kept.get(("modules-2", "2"), {}).values(),
            lambda v, *_: v >= 97,
        ),
        (
            "kept at s = 4, with modules",
            "at least 85",
            kept.get(("modules-4", "4"), {}).values(),
            lambda v, *_: v >= 85,
        ),
        (
            "with modules over without, s = 4",
            "at least 8, interval above 0",
            difference(("modules-4", "4"), ("pooling-4", "4")),
            lambda v, low, _: v >= 8 and low > 0,
        ),
        *(
            (
                f"one model with choices over one for s = {s}",
                "from -2 to 2",
                difference(("modules-2-4", s), (f"modules-{s}", s)),
                lambda v, *_: abs(v) <= 2,
            )
            for s in ("2", "4")
        ),
    ):
        if found := list(found):
            values = share(found, of)
            lines.append(f"| {figure} | {should} | {show_share(values)} | {'met' if is_met(*values) else 'not met'} |")
    is_met = "met" if all(equal_at_1) else "not met"
    figure = "models whose logits at s = 1 are the source's, bit for bit"
    return [*lines, f"| {figure} | all | {sum(equal_at_1)} of {len(equal_at_1)} | {is_met} |"]


def main() -> None:
    """Write lab/RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS.parent / "RESULTS.md")
    args = parser.parse_args()
    lines = ["# Results of the lab", "", INTRODUCTION]
    for scale in SCALES:
        if (RESULTS / scale).is_dir():
            lines += ["", *section(scale)]
        else:
            lines += ["", f"## Scale {scale}", "", f"Not run. `python -m lab.run_experiments --scale {scale}` runs it."]
        if (RESULTS / f"{scale}{FROM_NANO}").is_dir():
            lines += ["", *section_from_nano(scale)]
    if distill.RESULTS.is_dir():
        lines += ["", *section_distill()]
    lines += ["", "[NOTES.md](NOTES.md) says what was tried."]
    args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
