"""Training data checked once and written as Arrow, with the length of each row."""

import contextlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .batches import SkippedRows
from .sources import PREPARED, Source, fingerprint


BATCH = 256  # rows of an Arrow batch
Checked = tuple[dict[str, Any], str | None]  # a row to store; or its id alone, and why it cannot be used


def prepare(
    sources: Sequence[Source], output: str | os.PathLike, processes: int = 1, skipped: SkippedRows | None = None
) -> int:
    """
    Writes the rows of all sources, in their order, to a folder for `load_rows`: `id`, `messages`, `images` (paths, or
    bytes where the source holds them) and `length` in tokens. Of a picture the size is read, and no pixel.

    Args:
        processes: as many read and check at once.
        skipped: takes the rows that cannot be used. If not given, such a row raises a ValueError that names it.

    Returns:
        the number of rows written.
    """
    import pyarrow as pa

    output, written = Path(output), 0
    if (output / PREPARED).exists():
        raise ValueError(f"{output} holds prepared data already: remove it, or name another folder.")
    output.mkdir(parents=True, exist_ok=True)
    partial = output / f"{PREPARED}.part"
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, _schema()) as writer:
        for batch in _batches(_usable(_check_all(sources, processes), skipped)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, _schema()))
            written += len(batch)
    info = {"rows": written, "batch": BATCH, "fingerprint": fingerprint(sources[0].collator.processor)}
    (output / "info.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, output / PREPARED)
    return written


def _schema():
    import pyarrow as pa

    part = pa.struct({"type": pa.string(), "text": pa.string()})
    message = pa.struct({"role": pa.string(), "content": pa.list_(part)})
    image = pa.struct({"bytes": pa.large_binary(), "path": pa.string()})
    fields = {"id": pa.string(), "messages": pa.list_(message), "images": pa.list_(image), "length": pa.int32()}
    return pa.schema(fields)


def _batches(rows: Iterable[dict]) -> Iterator[list[dict]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _usable(checked: Iterable[Checked], skipped: SkippedRows | None) -> Iterator[dict]:
    for row, error in checked:
        if skipped is not None:
            skipped.read += 1
        if error is None:
            yield row
        elif skipped is None:
            raise ValueError(error)
        else:
            skipped.add(row["id"], error)


def _check_all(sources: Sequence[Source], processes: int) -> Iterator[Checked]:
    """The rows in their order, checked by several processes, which are never far ahead."""
    tasks = [
        (i, range(first, min(first + BATCH, len(source.rows))))
        for i, source in enumerate(sources)
        for first in range(0, len(source.rows), BATCH)
    ]
    total = sum(len(source.rows) for source in sources)
    with tqdm(total=total, desc="rows", unit="row") as progress, contextlib.ExitStack() as stack:
        if processes == 1:
            results = (list(_check(sources[i], numbers)) for i, numbers in tasks)
        else:
            context = multiprocessing.get_context("fork")  # rows in memory are shared and not sent
            pool = stack.enter_context(ProcessPoolExecutor(processes, context, _start, (sources,)))
            results = _in_order(pool, tasks, ahead=4 * processes)
        for checked in results:
            yield from checked
            progress.update(len(checked))


def _in_order(pool: ProcessPoolExecutor, tasks: Iterable[tuple[int, range]], ahead: int) -> Iterator[list[Checked]]:
    waiting: deque = deque()
    for task in tasks:
        waiting.append(pool.submit(_check_here, *task))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_sources: Sequence[Source] = ()


def _start(sources: Sequence[Source]):
    global _sources
    _sources = sources
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _check_here(i: int, numbers: range) -> list[Checked]:
    return list(_check(_sources[i], numbers))


def _check(source: Source, numbers: range) -> Iterator[Checked]:
    for number in numbers:
        name = f"{source.name}:{number}"
        try:
            chat = source[number]
            name = str(chat["id"])
            row = {"id": name, "length": source.collator.length(chat, number), **_store(source.collator.messages(chat))}
            yield row, None
        except (OSError, ValueError) as error:
            yield {"id": name}, str(error)


def _store(messages: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """Messages whose contents are lists of parts, and their pictures apart."""
    stored, images = [], []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "image":
                image = part["image"]
                images.append({"bytes": image["bytes"]} if isinstance(image, Mapping) else {"path": str(image)})
        stored.append({"role": message["role"], "content": [{k: p.get(k) for k in ("type", "text")} for p in parts]})
    return {"messages": stored, "images": images}
