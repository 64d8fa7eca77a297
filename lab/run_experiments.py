"""Trains and measures the experiments of a scale, one after the other; each result is a file in lab/results.

    python -m lab.run_experiments                               # two projectors at 16:1, with and without; hours
    python -m lab.run_experiments --experiments avg_pool-16-sva # another one at the same scale
    python -m lab.run_experiments --from-nano --experiments avg_pool-16-ours  # from tower and decoder of the root
    python -m lab.run_experiments --scale gpu --minutes 9       # a piece of all of them; the same command goes on
    python -m lab.run_experiments --scale gpu --list            # what there is to do

What is done is skipped. `python -m lab.report` writes lab/RESULTS.md from the files.
"""

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Collection
from pathlib import Path

import torch

from lab.baselines import FastV
from lab.evaluate import answer, attention_on_vision, draw_cases, measure
from lab.experiments import ALL_EXPERIMENTS, EXPERIMENTS, UNCOMPRESSED, Experiment
from lab.flops import added_cost
from lab.tower import train_tower
from lab.train_vlm import ROOT, processor_of, train_experiment
from lab.training import add_options, deadline_of, describe_machine, group_of, read_config


RESULTS = Path(__file__).parent / "results"
TEST_SEED, PICTURES = 99, {"cpu": 100, "gpu": 300}  # of each domain, in seen and in held-out style
FASTV_TOKENS = (9, 36)


def fastv_answer(keep: int):
    """As `evaluate.answer`, with all but `keep` vision tokens of each image dropped after the second decoder layer."""

    def pruned(model, processor, inputs):
        is_vision = inputs["input_ids"] == model.config.image_token_id
        with FastV(model.model.language_model.layers, is_vision, keep):
            return answer(model, processor, inputs)

    return pruned


def jobs(scale: str, names: Collection[str] | None = None, from_nano: bool = False) -> list[tuple[Experiment, int]]:
    """What to train, the uncompressed model first if others start from it; those of the scale if none are named."""
    seeds = read_config("compressed")["seeds"][scale]
    chosen = EXPERIMENTS[scale] if names is None else [found for found in ALL_EXPERIMENTS if found.name in names]
    first = [] if from_nano else [(UNCOMPRESSED, read_config("uncompressed")["seed"])]
    return first + [(experiment, seed) for seed in seeds for experiment in chosen]


def measure_all(model, processor, scale: str, **options) -> dict[str, dict]:
    """Both styles of test pictures: those of training, and those held out."""
    results = {}
    for style in ("seen", "held out"):
        cases = list(draw_cases(TEST_SEED, PICTURES[scale], style == "held out"))
        results[style], _ = measure(model, processor, cases, **options)
    return results


def result_file(experiment: Experiment, seed: int, args: argparse.Namespace) -> Path:
    return RESULTS / group_of(args) / f"{experiment.name}-{seed}.json"


def run(experiment: Experiment, seed: int, args: argparse.Namespace, deadline: float | None) -> bool:
    """Trains and measures one model, unless its result is there; False if time was up.

    The uncompressed model is trained for its weights, too: the others start from its decoder.
    """
    path, folder = result_file(experiment, seed, args), args.runs / group_of(args)
    has_weights = (folder / path.stem / "model.safetensors").is_file()
    if path.is_file() and (experiment != UNCOMPRESSED or has_weights):
        return True
    trained = train_experiment(experiment, args.scale, seed, folder, deadline, args.from_nano)
    if trained is None or (deadline is not None and time.monotonic() > deadline):
        return False
    start = time.monotonic()
    (model, log), processor = trained, processor_of(experiment)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    common = {"projector": experiment.projector, "seed": seed, **added_cost(model)}
    if args.from_nano:
        common["start_sha256"] = hashlib.sha256((ROOT / "model.safetensors").read_bytes()).hexdigest()
    looked_at = list(draw_cases(TEST_SEED, 20, True, ("ocr", "table", "chart")))
    result = {
        "experiment": experiment.name,
        "module": experiment.module,
        **common,
        "right": measure_all(model, processor, args.scale),
        "attention": attention_on_vision(model, processor, looked_at),
        "losses": [[entry["step"], entry["loss"]] for entry in log if "loss" in entry],
        "train_seconds": round(sum(entry["seconds"] for entry in log)),
        "test_seconds": round(time.monotonic() - start),
        **describe_machine(),
    }
    if experiment == UNCOMPRESSED:
        for keep in FASTV_TOKENS:
            right = measure_all(model, processor, args.scale, answer=fastv_answer(keep))
            pruned = {"experiment": f"fastv-{keep}", "module": "fastv", **common, "tokens": keep, "right": right}
            path.with_name(f"fastv-{keep}-{seed}.json").write_text(json.dumps({**pruned, **describe_machine()}) + "\n")
    path.write_text(json.dumps(result) + "\n")
    return True


def main() -> None:
    """Go on with the experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    names = [experiment.name for experiment in ALL_EXPERIMENTS]
    parser.add_argument("--experiments", nargs="+", choices=names, metavar="NAME", help="of " + ", ".join(names))
    parser.add_argument("--list", action="store_true", help="only say what is done and what is missing")
    args = parser.parse_args()
    todo = jobs(args.scale, args.experiments, args.from_nano)
    missing = [job for job in todo if not result_file(*job, args).is_file()]
    if args.list:
        for job in todo:
            print("missing" if job in missing else "done   ", job[0].name, job[1])
        return
    if not missing:
        print("every result is there")
        return
    deadline, results = deadline_of(args), RESULTS / group_of(args)
    results.mkdir(parents=True, exist_ok=True)
    if not args.from_nano:
        tower = args.runs / args.scale / "tower"
        if not train_tower(args.scale, tower, deadline):
            return
        shutil.copy(tower / "log.json", results / "tower.json")
    for experiment, seed in todo:
        print(f"{experiment.name}, seed {seed}", flush=True)
        if not run(experiment, seed, args, deadline):
            print("time is up: the same command goes on")
            return


if __name__ == "__main__":
    main()
