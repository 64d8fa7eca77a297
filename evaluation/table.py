"""The table of benchmarks: published figures, and ours from the result files of lmms-eval, lm-eval and VLMEvalKit.

    python -m evaluation.table results/
    python -m evaluation.table results/s1 results/s2 results/s4       # a column for each folder

Of several results for a benchmark in one folder the newest counts.
"""

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


BENCHMARKS = json.loads((Path(__file__).parent / "benchmarks.json").read_text(encoding="utf-8"))
HARNESSES = ("lmms_eval", "lm_eval", "vlmevalkit")
DATASETS = {benchmark["vlmevalkit"][0] for benchmark in BENCHMARKS["benchmarks"] if "vlmevalkit" in benchmark}
Scores = dict[tuple[str, str], float]  # by task and metric


def read_results(folder: Path) -> Scores:
    """The scores in all result files below a folder, by task and metric; newer files take precedence."""
    files = [(path, read) for pattern, read in READERS.items() for path in folder.rglob(pattern)]
    if not files:
        raise ValueError(f"{folder} holds no result file of a harness: {', '.join(READERS)}.")
    scores: Scores = {}
    for path, read in sorted(files, key=lambda file: file[0].stat().st_mtime):
        scores |= read(path)
    return scores


def _read_lm_eval(path: Path) -> Scores:
    """Of lm-eval or lmms-eval."""
    found = json.loads(path.read_text(encoding="utf-8"))
    scores = {}
    for task, values in (found.get("results", {}) if isinstance(found, dict) else {}).items():
        for key, value in values.items():
            metric = key.split(",")[0]  # a filter's name follows
            if isinstance(value, (int, float)) and not metric.endswith("_stderr"):
                scores[task, metric] = float(value)
    return scores


def _read_vlmevalkit(path: Path) -> Scores:
    """Of MODEL_DATASET_acc.csv and the like: a row, or one for each split, which then precedes the metric's name."""
    dataset = next((name for name in DATASETS if path.stem.endswith((f"_{name}_acc", f"_{name}_score"))), None)
    if dataset is None:
        return {}
    text, scores = path.read_text(encoding="utf-8"), {}
    rows = [json.loads(text)] if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
    for row in rows:
        split = row.pop("split", "Overall")
        prefix = "" if len(rows) == 1 or split == "Overall" else f"{split} "
        scores |= {(dataset, prefix + metric): float(value) for metric, value in row.items() if value not in ("", None)}
    return scores


READERS = {
    "*results*.json": _read_lm_eval,
    "*_acc.csv": _read_vlmevalkit,
    "*_score.csv": _read_vlmevalkit,
    "*_score.json": _read_vlmevalkit,
}


def score(benchmark: Mapping[str, Any], scores: Mapping[tuple[str, str], float]) -> float | None:
    """A benchmark's score on the scale of its published figures; None if it was not measured."""
    for task, metric, *scale in (benchmark[harness] for harness in HARNESSES if harness in benchmark):
        if (task, metric) in scores:
            return scores[task, metric] * (scale[0] if scale else 100)
    return None


def table(columns: Mapping[str, Mapping[tuple[str, str], float]]) -> str:
    """Benchmarks by published models and by our columns, as Markdown."""
    header = ["benchmark", *BENCHMARKS["models"], *columns]
    rows = []
    for benchmark in BENCHMARKS["benchmarks"]:
        figures = [*benchmark["published"], *(score(benchmark, scores) for scores in columns.values())]
        rows.append([benchmark["name"], *("" if figure is None else f"{figure:.4g}" for figure in figures)])
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="folders with result files; none for an empty column")
    args = parser.parse_args(arguments)
    try:
        columns = {str(folder): read_results(folder) for folder in args.results} or {"ours": {}}
    except ValueError as error:
        parser.error(str(error))
    print(table(columns))


if __name__ == "__main__":
    main()
