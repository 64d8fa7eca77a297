"""Trains the nano model on all domains, unless that is done, and writes its checkpoint folder, complete with code.

    python -m lab.export_nano --scale cpu --output lab/runs/nano              # from nothing
    python -m lab.export_nano --scale cpu --from-nano --output lab/runs/nano  # from tower and decoder of the root's

From nothing, tower and decoder of the lab are trained first where they are missing.
"""

import argparse
import json
from pathlib import Path

from lab.experiments import NANO, UNCOMPRESSED
from lab.tower import train_tower
from lab.train_vlm import processor_of, train_experiment
from lab.training import add_options, deadline_of, group_of, read_config
from llava_vr import LlavaVrForConditionalGeneration, LlavaVrProcessor


def save(model: LlavaVrForConditionalGeneration, processor: LlavaVrProcessor, folder: Path) -> None:
    """Write the whole checkpoint folder: weights, configuration, processor and code; it loads in float32."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("use_cache", None)  # left by Trainer, which turns the cache off
    config["dtype"] = "float32"  # whatever the weights are stored in
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Train all three stages as far as they are not done, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--output", type=Path, required=True, help="where to write the checkpoint folder")
    args = parser.parse_args()
    folder, deadline = args.runs / group_of(args), deadline_of(args)
    if not args.from_nano:
        if not train_tower(args.scale, folder / "tower", deadline):
            return
        seed = read_config("uncompressed")["seed"]
        if train_experiment(UNCOMPRESSED, args.scale, seed, folder, deadline) is None:
            return
    trained = train_experiment(NANO, args.scale, read_config("nano")["seed"], folder, deadline, args.from_nano)
    if trained is not None:
        save(trained[0], processor_of(NANO), args.output)


if __name__ == "__main__":
    main()
