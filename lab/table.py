"""Trains and measures every model of the table, one after the other; each result is a file in lab/results.

    python -m lab.table --scale cpu                               # two projectors at 16 to 1, with and without; hours
    python -m lab.table --scale cpu --arms avg_pool-16-deepstack  # another row at the same scale
    python -m lab.table --from-nano --arms avg_pool-16-ours       # from tower and decoder of the root: half an hour
    python -m lab.table --scale gpu --minutes 9                   # a piece of the whole table; the same command goes on
    python -m lab.table --scale gpu --list                        # what there is to do

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

from lab.answers import ROOT, processor_of, train_arm
from lab.arms import ARMS, ROWS, UPPER, Arm
from lab.baselines import FastV
from lab.costs import added_cost
from lab.evaluate import answer, attention_on_vision, draw_cases, measure
from lab.tower import train_tower
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


def jobs(scale: str, names: Collection[str] | None = None, from_nano: bool = False) -> list[tuple[Arm, int]]:
    """The models to train, the upper bound first if they start from it; those of the scale if no others are named."""
    seeds = read_config("compressed")["seeds"][scale]
    arms = ARMS[scale] if names is None else [arm for arm in ROWS if arm.name in names]
    first = [] if from_nano else [(UPPER, read_config("upper")["seed"])]
    return first + [(arm, seed) for seed in seeds for arm in arms]


def measure_all(model, processor, scale: str, **options) -> dict[str, dict]:
    """Both styles of test pictures: those of training, and those held out."""
    results = {}
    for style in ("seen", "held out"):
        cases = list(draw_cases(TEST_SEED, PICTURES[scale], style == "held out"))
        results[style], _ = measure(model, processor, cases, **options)
    return results


def result_file(arm: Arm, seed: int, args: argparse.Namespace) -> Path:
    return RESULTS / group_of(args) / f"{arm.name}-{seed}.json"


def run(arm: Arm, seed: int, args: argparse.Namespace, deadline: float | None) -> bool:
    """Trains and measures one model, unless its result is there; False if time was up.

    The upper bound is trained for its weights, too: the others start from its decoder.
    """
    path, folder = result_file(arm, seed, args), args.runs / group_of(args)
    if path.is_file() and (arm != UPPER or (folder / path.stem / "model.safetensors").is_file()):
        return True
    trained = train_arm(arm, args.scale, seed, folder, deadline, args.from_nano)
    if trained is None or (deadline is not None and time.monotonic() > deadline):
        return False
    start = time.monotonic()
    (model, log), processor = trained, processor_of(arm)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    common = {"projector": arm.projector, "seed": seed, **added_cost(model)}
    if args.from_nano:
        common["start_sha256"] = hashlib.sha256((ROOT / "model.safetensors").read_bytes()).hexdigest()
    looked_at = list(draw_cases(TEST_SEED, 20, True, ("ocr", "table", "chart")))
    result = {
        "arm": arm.name,
        "module": arm.module,
        **common,
        "right": measure_all(model, processor, args.scale),
        "attention": attention_on_vision(model, processor, looked_at),
        "losses": [[entry["step"], entry["loss"]] for entry in log if "loss" in entry],
        "train_seconds": round(sum(entry["seconds"] for entry in log)),
        "test_seconds": round(time.monotonic() - start),
        **describe_machine(),
    }
    if arm == UPPER:
        for keep in FASTV_TOKENS:
            right = measure_all(model, processor, args.scale, answer=fastv_answer(keep))
            pruned = {"arm": f"fastv-{keep}", "module": "fastv", **common, "tokens": keep, "right": right}
            path.with_name(f"fastv-{keep}-{seed}.json").write_text(json.dumps({**pruned, **describe_machine()}) + "\n")
    path.write_text(json.dumps(result) + "\n")
    return True


def main() -> None:
    """Go on with the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    names = [arm.name for arm in ROWS]
    parser.add_argument("--arms", nargs="+", choices=names, metavar="NAME", help="these rows: " + ", ".join(names))
    parser.add_argument("--list", action="store_true", help="only say what is done and what is missing")
    args = parser.parse_args()
    todo = jobs(args.scale, args.arms, args.from_nano)
    missing = [job for job in todo if not result_file(*job, args).is_file()]
    if args.list:
        for arm, seed in todo:
            print("missing" if (arm, seed) in missing else "done   ", arm.name, seed)
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
    for arm, seed in todo:
        print(f"{arm.name}, seed {seed}", flush=True)
        if not run(arm, seed, args, deadline):
            print("time is up: the same command goes on")
            return


if __name__ == "__main__":
    main()
