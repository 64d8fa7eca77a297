"""Training in pieces: one file holds weights, optimizer and how far a run has come; the next piece goes on from it."""

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from lab.muon import MuonAdamW
from lab.training import has_fast_bfloat16


LOG_STEPS, SAVE_MINUTES = 100, 10
POOL = 4  # batches sorted together; `LOG_STEPS` is a multiple, so a run saved on its way goes on with a new pool
PEAK_LR = 2e-3


def share_cores(threads: int) -> None:
    """Makes this process one of several that train together, if `torchrun` has started it; each has so many threads."""
    torch.set_num_threads(threads)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class From:
    """The numbers from `first` on, as a sampler; each of the processes has its own."""

    def __init__(self, first: int):
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first + rank(), processes())


def same_length(sample: Any) -> int:
    return 0


def load_batches(
    data: Dataset,
    first: int,
    size: int,
    workers: int,
    collate: Callable = default_collate,
    length: Callable = same_length,
) -> Iterator[Any]:
    """Batches of samples from number `first` on, without end, each of samples of about the same length."""

    def collate_pool(samples: list) -> list:
        samples = sorted(samples, key=length)
        return [collate(samples[i : i + size]) for i in range(0, len(samples), size)]

    options = {"num_workers": workers} if workers else {}
    pools = DataLoader(data, batch_size=POOL * size, sampler=From(first), collate_fn=collate_pool, **options)
    return itertools.chain.from_iterable(pools)


class Run:
    """A model in training, its optimizer, and how far it has come; one file holds all of it.

    Args:
        model: what is trained, where gradients are required; its method `loss` takes a batch.
        state: the file; what is in it is loaded, if there is one.
        seed: of the pictures, to be told.
        batch_size: of a new run, for each process; a resumed one keeps its own.
    """

    def __init__(self, model: nn.Module, state: Path, seed: int, batch_size: int = 16):
        self.file, self.model, self.optimizer = state, model, MuonAdamW(model, PEAK_LR)
        self.facts = {"step": 0, "images": 0, "seconds": 0, "seed": seed, "batch_size": batch_size}
        self.facts |= {"lr": PEAK_LR, "decay_from": 0, "decay_steps": 0}
        if state.is_file():
            self.load()

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def load(self) -> None:
        with safe_open(self.file, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            self.facts |= json.loads(file.metadata()["run"])
        weights = {name: tensors.get(f"model.{name}") for name in self.trained}
        if missing := [name for name, weight in weights.items() if weight is None]:
            raise ValueError(f"{self.file} has no {missing[0]}: it is of another model. --state names another file.")
        self.model.load_state_dict(weights, strict=False)
        for name, weight in self.trained.items():
            keys = [key for key in ("momentum", "first", "second") if f"{key}.{name}" in tensors]
            self.optimizer.state[weight] = {key: tensors[f"{key}.{name}"].float() for key in keys}
            if "first" in keys:
                self.optimizer.state[weight]["count"] = self.facts["step"]

    def save(self) -> None:
        """Weights are float32, the optimizer's averages bfloat16; the old file stays until the new one is complete."""
        tensors = {f"model.{name}": weight.detach() for name, weight in self.trained.items()}
        for name, weight in self.trained.items():
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
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16())
        with autocast:
            loss = self.model.loss(**batch)
        self.optimizer.zero_grad()
        (loss / processes()).backward()
        if dist.is_initialized():
            for weight in self.trained.values():
                dist.all_reduce(weight.grad)
        nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        with autocast:
            self.optimizer.step()
        self.facts["step"] += 1
        self.facts["images"] += len(batch["pixel_values"]) * processes()
        return loss.item()


def train(
    run: Run,
    data: Dataset,
    collate: Callable,
    measure: Callable[[], float],
    args: argparse.Namespace,
    length: Callable = same_length,
) -> None:
    """
    Trains until it is over, time is up or it is stopped; says how it goes, a line of JSON every `LOG_STEPS` steps.

    Args:
        data: samples by their number, without end.
        measure: a figure of the model on held-out pictures, told at every save.
        args: of `add_options`.
        length: of a sample, where that differs.
    """
    if run.is_over:
        return
    if args.lr:
        run.facts["lr"] = args.lr
    if args.decay_steps and not run.facts["decay_steps"]:
        run.facts |= {"decay_from": run.facts["step"], "decay_steps": args.decay_steps}
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    facts, losses, began, saved = run.facts, [], time.monotonic(), time.monotonic()
    for batch in load_batches(data, facts["images"], facts["batch_size"], args.workers, collate, length):
        losses.append(run.step(batch))
        now = time.monotonic()
        is_last = run.is_over or is_true_of_any(now > deadline)
        if len(losses) == LOG_STEPS or is_last:
            facts["seconds"] += now - began
            rate = len(losses) * facts["batch_size"] * processes() / (now - began)
            line = {"step": facts["step"], "images": facts["images"], "seconds": round(facts["seconds"])}
            line |= {
                "loss": round(float(np.mean(losses)), 4),
                "lr": run.learning_rate(),
                "images_a_second": round(rate, 1),
            }
            if rank() == 0:
                if now - saved > 60 * SAVE_MINUTES or is_last:
                    run.save()
                    line["held_out"], saved = round(measure(), 4), now
                print(json.dumps(line), flush=True)
            losses, began = [], time.monotonic()
        if is_last:
            break


def is_true_of_any(flag: bool) -> bool:
    """Whether it is true in any of the processes."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(float(flag))
    dist.all_reduce(flags)
    return flags.item() > 0


def add_options(parser: argparse.ArgumentParser, state: Path) -> None:
    """Options of every command that trains in pieces."""
    parser.add_argument("--state", type=Path, default=state, help=f"file to go on from and to save (default {state})")
    parser.add_argument("--minutes", type=float, help="save and stop after this long")
    parser.add_argument(
        "--decay-steps", type=int, help="let the learning rate fall to zero over so many steps from now"
    )
    parser.add_argument("--lr", type=float, help=f"learning rate from now on (default: as before, {PEAK_LR} at first)")
    parser.add_argument("--batch-size", type=int, default=16, help="of a new run, in each process (default 16)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw (default 1)")
