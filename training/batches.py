"""Sources as encoded rows, at random or as a stream, and what becomes of rows that cannot be used."""

import itertools
import json
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from llava_vr import LlavaVrCollator

from .sources import Source, require, with_id


BLOCK = 64  # rows that a stream reads in order, at most
BUFFER = 512  # rows among which a stream shuffles


def draw_order(sizes: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0) -> np.ndarray:
    """The rows of an epoch, numbered through all sources: each row of a source `weight` times. Of a fraction, a drawn
    share of the rows, the same in each epoch."""
    weights = [1.0] * len(sizes) if weights is None else weights
    if len(weights) != len(sizes) or min(weights) <= 0:
        raise ValueError(f"weights must be positive, one for each of {len(sizes)} sources, found {weights}.")
    rng, rows, start = np.random.default_rng(seed), [], 0
    for size, weight in zip(sizes, weights):
        times = np.full(size, int(weight))
        times[rng.permutation(size)[: round(weight % 1 * size)]] += 1
        rows.append(start + np.repeat(np.arange(size), times))
        start += size
    return np.concatenate(rows)


def hold_out(order: np.ndarray, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The order without `count` drawn rows, and these rows."""
    rows = np.unique(order)
    if count >= len(rows):
        raise ValueError(f"{count} of {len(rows)} rows cannot be held out: none would be left to train on.")
    held = np.random.default_rng(seed).choice(rows, count, replace=False)
    return order[~np.isin(order, held)], held


class SkippedRows:
    """
    Rows that cannot be used: each is named in a file of JSON lines, {"id": ..., "error": ...}.

    Raises:
        ValueError: at least `least` rows and more than `share` of those that this process has read cannot be used.
    """

    def __init__(self, path: str | os.PathLike, share: float = 0.01, least: int = 10):
        self.path, self.share, self.least, self.read, self.skipped = Path(path), share, least, 0, 0

    def add(self, name: str, error: Exception):
        self.skipped += 1
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:  # one short write: processes share the file
            file.write(json.dumps({"id": name, "error": str(error)}) + "\n")
        if self.skipped >= self.least and self.skipped > self.share * self.read:
            raise ValueError(
                f"{self.skipped} of {self.read} rows cannot be used, more than {self.share:.0%}: {self.path} names "
                f"them. The last: {error}"
            )

    def names(self) -> list[str]:
        """The rows that any process has skipped, each once."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        return list(dict.fromkeys(json.loads(line)["id"] for line in lines))


def encode(
    row: Mapping[str, Any], name: str, collator: LlavaVrCollator, index: int, skipped: SkippedRows | None
) -> dict[str, torch.Tensor] | None:
    """A row's tensors; None if it cannot be used and rows are skipped. `name` is its id if it has none."""
    if skipped is not None:
        skipped.read += 1
    try:
        row = with_id(row, name)
        encoded = collator.encode(row, index)
        collator.check_length(len(encoded["input_ids"]), row, index)
    except (OSError, ValueError) as error:
        if skipped is None:
            raise
        skipped.add(name if row.get("id") is None else row["id"], error)
        return None
    return encoded


class EncodedRows(Dataset):
    """
    Rows of several sources as `LlavaVrCollator.encode` makes them; its `pad` makes batches of them.

    Args:
        sources: see `open_sources`.
        order: which rows an epoch has, see `draw_order`; all of them, once, if not given.
        skipped: takes the rows that cannot be used; the next one that can be takes the place of each. If not given,
            such a row raises a ValueError that names it.
    """

    def __init__(self, sources: Sequence[Source], order: np.ndarray | None = None, skipped: SkippedRows | None = None):
        self.sources, self.skipped = list(sources), skipped
        self.starts = np.cumsum([0, *(len(source.rows) for source in sources)])
        self.order = np.arange(self.starts[-1]) if order is None else order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        for place in range(index, index + len(self)):
            if (encoded := encode(*self.read(place % len(self)), self.skipped)) is not None:
                return encoded
        raise ValueError(f"none of {len(self)} rows can be used: {self.skipped.path} names them.")

    def read(self, index: int) -> tuple[Mapping[str, Any], str, LlavaVrCollator, int]:
        """A row of the epoch, its name, its collator, and its number in its source."""
        place = self.order[index]
        i = int(np.searchsorted(self.starts, place, side="right")) - 1
        source, number = self.sources[i], int(place - self.starts[i])
        return source.rows[number], f"{source.name}:{number}", source.collator, number

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row of the epoch; 0 for one that is to be skipped."""
        return np.concatenate([source.lengths(self.skipped is not None) for source in self.sources])[self.order]


class EncodedStream(IterableDataset):
    """
    The same rows without an end, epoch after epoch, read in blocks that are shuffled, and shuffled among `BUFFER` rows.
    Each process and each of its workers has as many blocks of its own, so no row comes twice in an epoch.
    """

    def __init__(self, rows: EncodedRows, rank: int = 0, world_size: int = 1, seed: int = 0):
        self.rows, self.rank, self.world_size, self.seed = rows, rank, world_size, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        workers = worker.num_workers if worker else 1
        reader, readers = self.rank * workers + (worker.id if worker else 0), self.world_size * workers
        count = len(self.rows)
        if count < readers:
            raise ValueError(f"{count} rows cannot be streamed to {readers} processes and workers.")
        edges = np.linspace(0, count, readers * math.ceil(count / (readers * BLOCK)) + 1).astype(int).tolist()
        for epoch in itertools.count():
            blocks = np.random.default_rng((self.seed, epoch)).permutation(len(edges) - 1)[reader::readers]
            places = (place for block in blocks for place in range(edges[block], edges[block + 1]))
            rng = random.Random(f"{self.seed} {epoch} {reader}")
            for row in shuffled(map(self.rows.read, places), BUFFER, rng):
                if (encoded := encode(*row, self.rows.skipped)) is not None:
                    yield encoded


class HubStream(IterableDataset):
    """As `EncodedStream`, of a dataset of the Hub that is not stored but read as it is used."""

    def __init__(
        self,
        name: str,
        collator: LlavaVrCollator,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        skipped: SkippedRows | None = None,
        split: str = "train",
    ):
        datasets = require("datasets", name)
        dataset = datasets.load_dataset(name, split=split, streaming=True)
        if dataset.features:
            dataset = dataset.decode(False)  # pictures as they are stored
        dataset = dataset.shuffle(seed=seed, buffer_size=BUFFER)
        self.dataset = require("datasets.distributed", name).split_dataset_by_node(dataset, rank, world_size)
        self.name, self.collator, self.skipped = f"{name} in process {rank}", collator, skipped

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for epoch in itertools.count():
            self.dataset.set_epoch(epoch)
            number = -1
            for number, row in enumerate(self.dataset):
                if (encoded := encode(row, f"{self.name}:{number}", self.collator, number, self.skipped)) is not None:
                    yield encoded
            if number < 0:  # the dataset has fewer shards than there are workers: nothing for this one
                return


def shuffled(items: Iterable, size: int, rng: random.Random) -> Iterator:
    """The items in an order that is random among `size` of them at a time."""
    held = []
    for item in items:
        if len(held) == size:
            place = rng.randrange(size)
            item, held[place] = held[place], item
            yield item
        else:
            held.append(item)
    rng.shuffle(held)
    yield from held
