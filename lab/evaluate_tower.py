"""What a tower names right, on test pictures in fonts it was trained on and in families held out.

python -m lab.evaluate_tower --json lab/results/tower.json
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from lab.data.fonts import SPLITS, font_files
from lab.data.labels import COUNTS, find_spots, make_labels
from lab.data.page import CLASSES, NUMBERS, Item
from lab.data.scenes import check_data, draw_picture
from lab.data.text import CHARACTERS
from lab.train_tower import STATE, TEST_SEED, ReadingTower, new_run, normalise
from lab.training import describe_machine


WIDTHS = {"under 6 px": 6, "6 to 8 px": 8, "8 to 11 px": 11, "wider": float("inf")}


def class_of(item: Item) -> dict[str, str]:
    """The groups that an item counts in."""
    if item.name not in CHARACTERS:
        return {"kind": item.name.split()[0] if item.name.startswith("bar") else "shape"}
    width = next(name for name, limit in WIDTHS.items() if item.width < limit)
    kinds = {"lower case": item.name.islower(), "capitals": item.name.isupper(), "digits": item.name.isdigit()}
    kind = next((kind for kind, holds in kinds.items() if holds), "signs")
    return {"kind": kind, "width": width, "family": item.family, "characters": "all"}


@torch.inference_mode()
def evaluate(model: ReadingTower, split: str, count: int, seed: int = TEST_SEED) -> dict[str, dict[str, float]]:
    """
    Shares named right on `count` pictures of a split.

    An item is named by the sum of the log-probabilities at all of its spots, and may be called nothing. Characters too
    narrow to lie under a spot are left out, and counted by "characters without a spot".

    Returns:
        By group: "characters", "width", "family" and "kind" (of the character, bar or shape), and "patches", which says
        how often line, place, letter and the beginnings of characters are right.
    """
    fonts, right, patches = font_files(split), defaultdict(list), defaultdict(list)
    missed = shown = 0
    for index in range(count):
        picture = draw_picture(seed, index, fonts)
        labels, spots = make_labels(picture), torch.from_numpy(find_spots(picture)).flatten().long()
        logits = {kind: levels[-1][0] for kind, levels in model(torch.from_numpy(normalise(picture))[None]).items()}
        scores = logits["name"].flatten(0, -2).log_softmax(-1)
        sums = torch.zeros(len(picture.items) + 1, len(CLASSES) + 1).index_add_(0, spots, scores)
        named = sums.argmax(-1)
        found = set(spots.tolist())
        for number, item in enumerate(picture.items, 1):
            groups = class_of(item)
            shown += "width" in groups
            missed += "width" in groups and number not in found
            if number in found:
                for group, name in groups.items():
                    right[group, name].append(named[number].item() == NUMBERS[item.name])
        for kind in COUNTS:
            there = labels[kind] > 0
            patches[kind] += (logits[kind].argmax(-1).numpy() == labels[kind])[there].tolist()
        there = labels["start"] >= 0
        patches["start"] += ((logits["start"].numpy() > 0) == labels["start"])[there].tolist()
    result = defaultdict(dict)
    for (group, name), values in sorted(right.items()):
        result[group][name] = round(float(np.mean(values)), 4)
    result["width"] = {name: result["width"][name] for name in WIDTHS if name in result["width"]}
    result["patches"] = {kind: round(float(np.mean(values)), 4) for kind, values in patches.items()}
    result["counts"] = {"pictures": count, "characters": shown, "characters without a spot": missed}
    return dict(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=STATE, help=f"the tower's training state (default {STATE})")
    parser.add_argument("--n", type=int, default=400, help="pictures of each split (default 400)")
    parser.add_argument("--json", type=Path, help="file to write as well")
    args = parser.parse_args()
    check_data(parser)
    if not args.state.is_file():
        parser.error(f"{args.state} is missing: `python -m lab.train_tower` trains a tower")
    run = new_run(args.state)
    result = {"training": run.facts, "seed": TEST_SEED, **describe_machine("cpu")}
    result |= {split: evaluate(run.model.eval(), split, args.n) for split in SPLITS}
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
