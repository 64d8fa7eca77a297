"""transformers' Trainer with a learning rate for each part, grouping by known lengths, and streams."""

from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from .parts import part_of


def training_arguments(
    parser: ArgumentParser, defaults: Mapping[str, Any], options: Sequence[str]
) -> TrainingArguments:
    """transformers' arguments, of what a script's parser has left over; that parser reports what is wrong with them."""
    flags = [part for name, value in defaults.items() if value is not None for part in (f"--{name}", str(value))]
    try:
        (training,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses([*flags, *options])
    except ValueError as error:
        parser.error(str(error))
    if training.n_gpu > 1:
        parser.error("several GPUs in one process would part the images from their rows: use accelerate launch")
    training.remove_unused_columns = False
    return training


class EpochSampler(Sampler):
    """
    Rows at random, or grouped by their lengths, in an order that depends on seed and epoch alone: the same in every
    process, and when training is resumed. (accelerate does not reach a sampler of several processes then.)
    """

    def __init__(self, rows: int, epoch: Callable[[], int], seed: int, lengths: list[int] | None, batch_size: int):
        self.rows, self.epoch, self.seed, self.lengths, self.batch_size = rows, epoch, seed, lengths, batch_size

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        if self.lengths is None:
            return iter(torch.randperm(self.rows, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class LlavaVrTrainer(Trainer):
    """
    transformers' Trainer for `EncodedRows` or a stream of them.

    Args:
        learning_rates: of parts, see `PARTS`; the others have that of the arguments.
    """

    def __init__(self, *args, learning_rates: Mapping[str, float] | None = None, **kwargs):
        self.learning_rates = learning_rates or {}
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """transformers' optimizer, each of its groups split by the rates of its parameters."""
        optimizer = super().create_optimizer(model)
        named = (self.model if model is None else model).named_parameters()
        rates = {id(parameter): self.learning_rates.get(part_of(name)) for name, parameter in named}
        groups = []
        for group in optimizer.param_groups:
            by_rate = {}
            for parameter in group["params"]:
                rate = rates.get(id(parameter))
                by_rate.setdefault(group["lr"] if rate is None else rate, []).append(parameter)
            groups += [{**group, "lr": rate, "params": parameters} for rate, parameters in by_rate.items()]
        optimizer.param_groups = groups
        return optimizer

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        strategy, rows = self.args.train_sampling_strategy, self.train_dataset
        if strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        lengths = rows.lengths.tolist() if strategy == "group_by_length" else None
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochSampler(len(rows), lambda: int(self.state.epoch or 0), self.args.seed, lengths, batch_size)

    def _get_eval_sampler(self, eval_dataset) -> None:
        """In their order: grouping would encode all of them beforehand."""

    def get_train_dataloader(self) -> DataLoader:
        """A stream gives each process its own rows already: accelerate would share them out again."""
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        arguments = self.args
        return DataLoader(
            self.train_dataset,
            batch_size=arguments.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory,
            prefetch_factor=arguments.dataloader_prefetch_factor,
        )


def end_together():
    """Waits for all processes and ends their group: one that ends before the others can take them down."""
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
