"""A vision tower that reads print: trained from nothing on dense labels, in pieces.

    python -m lab.train_tower                      # goes on from the state file, until it is stopped
    python -m lab.train_tower --decay-steps 5000   # lets the learning rate fall to zero, then ends

The state is one file: weights, heads and optimizer, with the number of pictures seen. Pictures follow from a seed and
their number, so that training goes on with the next one wherever it is resumed.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, default_collate
from transformers import CLIPVisionConfig, CLIPVisionModel

from lab.data.fonts import font_files
from lab.data.labels import COUNTS, PATCH, SPOTS, make_labels
from lab.data.page import CLASSES, SIDE, Picture
from lab.data.scenes import check_data, draw_picture
from lab.pieces import Run, add_options, share_cores, train
from lab.training import has_fast_bfloat16


LEVELS = (5, 8)  # hidden states whose patches are named: at two thirds of the depth, and at the end
SEED, TEST_SEED = 1, 2
STATE = Path("lab/tower/state.safetensors")
TOWER = {
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "attn_implementation": "eager",
}


def normalise(picture: Picture) -> np.ndarray:
    """Values from -1 to 1, as an image processor with mean and deviation of a half makes them: (3, 192, 192)."""
    return np.asarray(picture.image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


class Pictures(Dataset):
    """Pictures with their labels, by number."""

    def __init__(self, seed: int, split: str):
        self.seed, self.fonts = seed, font_files(split)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        picture = draw_picture(self.seed, index, self.fonts)
        arrays = {"pixel_values": normalise(picture), **make_labels(picture)}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


class ReadingTower(nn.Module):
    """A vision tower, and heads that name what its patches show; only the tower is used afterwards."""

    def __init__(self):
        super().__init__()
        self.tower = CLIPVisionModel(CLIPVisionConfig(**TOWER))
        width, (down, across) = TOWER["hidden_size"], SPOTS
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in LEVELS)
        self.name = nn.Linear(width, down * across * (len(CLASSES) + 1))
        self.start = nn.Linear(width, down * across)
        self.counts = nn.ModuleDict({kind: nn.Linear(width, down * (most + 1)) for kind, most in COUNTS.items()})

    def forward(self, pixel_values: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        """Logits at each of `LEVELS`: of names (pictures, patches, down, across, classes), and so on as the labels."""
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        logits = {kind: [] for kind in ("name", "start", *COUNTS)}
        for norm, level in zip(self.norms, LEVELS):
            patches = norm(states[level][:, 1:])
            logits["name"].append(self.name(patches).unflatten(-1, (*SPOTS, -1)))
            logits["start"].append(self.start(patches).unflatten(-1, SPOTS))
            for kind, head in self.counts.items():
                logits[kind].append(head(patches).unflatten(-1, (SPOTS[0], -1)))
        return logits

    def loss(self, pixel_values: torch.Tensor, **labels: torch.Tensor) -> torch.Tensor:
        """Sum over levels; what a character belongs to can be told only once it is named, and weighs little."""
        logits = self(pixel_values)
        there = labels["start"] >= 0
        loss = sum(cross_entropy(level, labels["name"]) for level in logits["name"])
        for level in logits["start"]:
            starts = labels["start"][there].float()
            loss = loss + 0.3 * nn.functional.binary_cross_entropy_with_logits(level.float()[there], starts)
        return loss + 0.1 * sum(cross_entropy(level, labels[kind]) for kind in COUNTS for level in logits[kind])


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Spots with nothing to name, which are many and easy, count for a third."""
    weight = torch.ones(logits.shape[-1])
    weight[0] = 1 / 3
    return nn.functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), weight)


def new_run(state: Path, batch_size: int = 16) -> Run:
    """A tower in training, as far as the file has it."""
    torch.manual_seed(SEED)
    return Run(ReadingTower(), state, SEED, batch_size)


@torch.inference_mode()
def share_right(model: ReadingTower, split: str, count: int = 100, batch_size: int = 20) -> float:
    """Of the spots of test pictures that show something, the share named right at the last level."""
    right = there = 0
    pictures = Pictures(TEST_SEED, split)
    for first in range(0, count, batch_size):
        batch = default_collate([pictures[index] for index in range(first, min(first + batch_size, count))])
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
            named = model(batch["pixel_values"])["name"][-1].argmax(-1)
        shown = batch["name"] > 0
        right += (named == batch["name"])[shown].sum().item()
        there += shown.sum().item()
    return right / there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, STATE)
    args = parser.parse_args()
    check_data(parser)
    share_cores(args.threads)
    run = new_run(args.state, args.batch_size)
    train(run, Pictures(SEED, "train"), default_collate, partial(share_right, run.model, "held_out"), args)


if __name__ == "__main__":
    main()
