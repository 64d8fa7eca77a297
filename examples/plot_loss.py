"""Draws the loss curve of a run of examples/finetune.py."""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python examples/plot_loss.py fine-tuned/log.json loss.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("log", type=Path, help="log.json in the run's output folder")
    parser.add_argument("picture", help="the PNG to write")
    args = parser.parse_args()
    entries = [entry for entry in json.loads(args.log.read_text()) if "loss" in entry]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([entry["step"] for entry in entries], [entry["loss"] for entry in entries])
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(args.picture, dpi=150)


if __name__ == "__main__":
    main()
