"""A vision tower that reads print: trained from nothing on dense labels, in pieces.

    python -m lab.train_tower                      # goes on from the state file, until it is stopped
    python -m lab.train_tower --decay-steps 5000   # lets the learning rate fall to zero, then ends

The state is one file: weights, heads and optimizer, with the number of pictures seen. Pictures follow from a seed and
their number, so that training goes on with the next one wherever it is resumed.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import CLIPVisionConfig, CLIPVisionModel

from lab.data.fonts import font_files
from lab.data.labels import COUNTS, PATCH, SPOTS, make_labels
from lab.data.page import CLASSES, SIDE, Picture
from lab.data.scenes import check_data, draw_picture
from lab.muon import MuonAdamW
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


class From:
    """The numbers from `first` on, as a sampler."""

    def __init__(self, first: int):
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first)


def load_batches(first: int, size: int, workers: int) -> DataLoader:
    """Batches of training pictures from number `first` on, without end."""
    options = {"num_workers": workers, "prefetch_factor": 4} if workers else {}
    return DataLoader(Pictures(SEED, "train"), batch_size=size, sampler=From(first), **options)


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


class Run:
    """A model in training, its optimizer, and how far it has come; one file holds all of it.

    Args:
        state: the file; what is in it is loaded, if there is one.
        batch_size: of a new run; a resumed one keeps its own.
    """

    def __init__(self, state: Path, batch_size: int = 16, lr: float = 2e-3):
        torch.manual_seed(SEED)
        self.file, self.model = state, ReadingTower()
        self.optimizer = MuonAdamW(self.model, lr)
        self.facts = {"step": 0, "images": 0, "batch_size": batch_size, "lr": lr, "decay_from": 0, "decay_steps": 0}
        self.facts |= {"seed": SEED, "seconds": 0}
        if state.is_file():
            self.load()

    def load(self) -> None:
        with safe_open(self.file, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            self.facts |= json.loads(file.metadata()["run"])
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        for name, weight in self.model.named_parameters():
            keys = [key for key in ("momentum", "first", "second") if f"{key}.{name}" in tensors]
            self.optimizer.state[weight] = {key: tensors[f"{key}.{name}"].float() for key in keys}
            if "first" in keys:
                self.optimizer.state[weight]["count"] = self.facts["step"]

    def save(self) -> None:
        """Weights are float32, the optimizer's averages bfloat16; the old file stays until the new one is complete."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, weight in self.model.named_parameters():
            for key, value in self.optimizer.state[weight].items():
                if key != "count":
                    tensors[f"{key}.{name}"] = value.bfloat16()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        save_file({key: value.contiguous() for key, value in tensors.items()}, part, {"run": json.dumps(self.facts)})
        os.replace(part, self.file)

    @property
    def is_over(self) -> bool:
        facts = self.facts
        return facts["decay_steps"] > 0 and facts["step"] >= facts["decay_from"] + facts["decay_steps"]

    def learning_rate(self, warmup: int = 300) -> float:
        """Rises over `warmup` steps, stays, and falls to zero over the steps of decay, once these have begun."""
        facts = self.facts
        rate = facts["lr"] * min(1, (facts["step"] + 1) / warmup)
        if facts["decay_steps"]:
            rate *= max(0, 1 - (facts["step"] - facts["decay_from"]) / facts["decay_steps"])
        return rate

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """Trains on a batch; its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
            loss = self.model.loss(**batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.facts["step"] += 1
        self.facts["images"] += len(batch["pixel_values"])
        return loss.item()


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


def train(run: Run, workers: int, minutes: float | None, log_steps: int = 100, save_minutes: float = 10) -> None:
    """Trains until it is over, time is up or it is stopped; says how it goes, a line of JSON at a time."""
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    facts, losses, began, saved = run.facts, [], time.monotonic(), time.monotonic()
    for batch in load_batches(facts["images"], facts["batch_size"], workers):
        losses.append(run.step(batch))
        now = time.monotonic()
        is_last = run.is_over or now > deadline
        if len(losses) == log_steps or is_last:
            facts["seconds"] += now - began
            rate = len(losses) * facts["batch_size"] / (now - began)
            line = {"step": facts["step"], "images": facts["images"], "seconds": round(facts["seconds"])}
            line |= {
                "loss": round(float(np.mean(losses)), 4),
                "lr": run.learning_rate(),
                "images_a_second": round(rate, 1),
            }
            if now - saved > 60 * save_minutes or is_last:
                run.save()
                line["held_out"], saved = round(share_right(run.model, "held_out"), 4), now
            print(json.dumps(line), flush=True)
            losses, began = [], time.monotonic()
        if is_last:
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=STATE, help=f"file to go on from and to save (default {STATE})")
    parser.add_argument("--minutes", type=float, help="save and stop after this long")
    parser.add_argument(
        "--decay-steps", type=int, help="let the learning rate fall to zero over so many steps from now"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="of a new run (default 16)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw (default 1)")
    args = parser.parse_args()
    check_data(parser)
    torch.set_num_threads(args.threads)
    run = Run(args.state, args.batch_size)
    if args.decay_steps and not run.facts["decay_steps"]:
        run.facts |= {"decay_from": run.facts["step"], "decay_steps": args.decay_steps}
    train(run, args.workers, args.minutes)


if __name__ == "__main__":
    main()
