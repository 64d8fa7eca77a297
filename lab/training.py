"""How every stage trains: transformers' Trainer with the lab's optimizer, in pieces that resume, on any device."""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from lab.muon import MuonAdamW


CONFIGS = Path(__file__).parent / "configs"
SCALES = ("cpu", "gpu")
FROM_NANO = "-from-nano"


def read_config(stage: str) -> dict[str, Any]:
    """The configuration file of a stage: tower, uncompressed, compressed or nano."""
    return json.loads((CONFIGS / f"{stage}.json").read_text())


def describe_machine(device: str | None = None) -> dict[str, str]:
    """What a result was found on: `device`, "cpu" or "cuda"; a GPU by default, if there is one."""
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 is faster than float32 here: on a GPU or with AVX-512. With AVX2 alone it is much slower."""
    return torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() == "AVX512"


class Clock(TrainerCallback):
    """Logs how long the steps took, in all pieces of a run; saves and stops when the time is up."""

    def __init__(self, deadline: float | None):
        self.deadline, self.last_log = deadline, time.monotonic()

    def on_log(self, args, state, control, **kwargs):
        now = time.monotonic()
        state.log_history[-1]["seconds"] = round(now - self.last_log, 1)
        self.last_log = now

    def on_step_end(self, args, state, control, **kwargs):
        if self.deadline is not None and time.monotonic() > self.deadline and state.global_step < state.max_steps:
            control.should_log = control.should_save = control.should_training_stop = True


def train(
    model: nn.Module,
    train_dataset: Dataset,
    output: Path,
    settings: dict[str, Any],
    seed: int,
    deadline: float | None = None,
    trainer: type[Trainer] = Trainer,
    **trainer_options: Any,
) -> list[dict[str, float]] | None:
    """
    Trains from the last checkpoint in `output`, if there is one.

    Args:
        settings: of transformers' `TrainingArguments`, as a scale of a configuration file has them.
        deadline: `time.monotonic()` at which to save and stop.
        trainer, trainer_options: what trains, and what else it takes.

    Returns:
        The log, or None if time was up before the end.
    """
    arguments = TrainingArguments(
        output_dir=str(output),
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        bf16=has_fast_bfloat16(),
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        train_sampling_strategy="sequential",
        logging_steps=25,
        save_steps=500,
        save_total_limit=1,
        remove_unused_columns=False,
        dataloader_num_workers=max(1, (os.cpu_count() or 2) - 1),
        dataloader_persistent_workers=True,
        report_to="none",
        **settings,
    )
    run = trainer(
        model=model,
        args=arguments,
        train_dataset=train_dataset,
        optimizers=(MuonAdamW(model, arguments.learning_rate), None),
        callbacks=[Clock(deadline)],
        **trainer_options,
    )
    run.train(resume_from_checkpoint=get_last_checkpoint(str(output)) if output.is_dir() else None)
    return run.state.log_history if run.state.global_step >= arguments.max_steps else None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that trains."""
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="column of the configuration files")
    parser.add_argument(
        "--from-nano",
        action="store_true",
        help="start from tower and decoder of the checkpoint at the root, in place of stages one and two",
    )
    parser.add_argument("--minutes", type=float, help="save and stop after this long; the same command goes on")
    parser.add_argument("--runs", type=Path, default=Path("lab/runs"), help="folder for models (default lab/runs)")


def group_of(args: argparse.Namespace) -> str:
    """The folder of all models that start alike, in `--runs` and in the results."""
    return args.scale + FROM_NANO * args.from_nano


def deadline_of(args: argparse.Namespace) -> float | None:
    return None if args.minutes is None else time.monotonic() + 60 * args.minutes
