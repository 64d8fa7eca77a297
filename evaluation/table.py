"""The table of benchmarks: published figures, and ours from the result files of lm-eval and lmms-eval.

    python -m evaluation.table results/
    python -m evaluation.table results/s1 results/s2 results/s4       # a column for each folder

Of several results for a benchmark in one folder the newest counts.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


BENCHMARKS = json.loads((Path(__file__).parent / "benchmarks.json").read_text(encoding="utf-8"))
HARNESSES = ("lmms_eval", "lm_eval")


def read_results(folder: Path) -> dict[tuple[str, str], float]:
    """The scores in all result files below a folder, by task and metric; newer files take precedence."""
    files = sorted(folder.rglob("*results*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError(f"{folder} holds no result file (*results*.json) of lm-eval or lmms-eval.")
    scores = {}
    for path in files:
        for task, values in json.loads(path.read_text(encoding="utf-8")).get("results", {}).items():
            for key, value in values.items():
                metric = key.split(",")[0]  # a filter's name follows
                if isinstance(value, (int, float)) and not metric.endswith("_stderr"):
                    scores[task, metric] = float(value)
    return scores


def score(benchmark: Mapping[str, Any], scores: Mapping[tuple[str, str], float]) -> float | None:
    """A benchmark's score on the scale of its published figures; None if it was not measured."""
    for harness in HARNESSES:
        if tuple(benchmark.get(harness, ())) in scores:
            return scores[tuple(benchmark[harness])] * benchmark.get("scale", 100)
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
        columns = {folder.name: read_results(folder) for folder in args.results} or {"ours": {}}
    except ValueError as error:
        parser.error(str(error))
    print(table(columns))


if __name__ == "__main__":
    main()
