"""Where training rows come from: JSON, parquet, prepared folders, datasets; and LLaVA's rows as chats."""

import bisect
import glob
import hashlib
import importlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llava_vr import LlavaVrCollator


ROLES = {"human": "user", "gpt": "assistant", "system": "system"}  # LLaVA's names
PLACEHOLDER = "<image>"  # of LLaVA's data, whatever the tokenizer's is
PREPARED = "rows.arrow"  # in a folder that `prepare` wrote


def to_chat(row: Mapping[str, Any]) -> dict[str, Any]:
    """
    A row with `messages` and `images`, as `LlavaVrCollator` takes them. LLaVA's rows have `conversations` and `image`.

    Each <image> becomes an image part. A turn's only image comes first, as in LLaVA's training. The newline beside a
    placeholder is left out: the chat template writes what stands between an image and a text.

    Raises:
        ValueError: a turn is not LLaVA's.
    """
    if "conversations" not in row:
        return dict(row)
    images = row.get("image", row.get("images"))
    images = list(images) if isinstance(images, (list, tuple)) else [images] if images else []
    messages = []
    for turn in row["conversations"]:
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        if role not in ROLES or not isinstance(text, str):
            raise ValueError(f"a turn must be {{'from': 'human' or 'gpt', 'value': text}}, found {turn!r}.")
        texts = text.split(PLACEHOLDER)
        if len(texts) == 2:
            texts = ["", "".join(texts).strip()]
        parts = [{"type": "text", "text": texts[0]}] if texts[0] else []
        for text in texts[1:]:
            text = text.removeprefix("\n")
            parts += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
        messages.append({"role": ROLES[role], "content": parts})
    return {"id": row.get("id"), "messages": messages, "images": images}


class ParquetRows(Sequence):
    """Rows of parquet files. A group of rows is read at a time: fast in order, slow at random."""

    def __init__(self, paths: Sequence[Path]):
        import pyarrow.parquet as parquet

        self.paths, self.groups, self.starts = list(paths), [], [0]
        for path in self.paths:
            metadata = parquet.read_metadata(path)
            for group in range(metadata.num_row_groups):
                self.groups.append((path, group))
                self.starts.append(self.starts[-1] + metadata.row_group(group).num_rows)
        self._read = None

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        import pyarrow.parquet as parquet

        group = bisect.bisect_right(self.starts, index) - 1
        if self._read is None or self._read[0] != group:
            path, number = self.groups[group]
            with parquet.ParquetFile(path) as file:
                self._read = group, file.read_row_group(number)
        return self._read[1].slice(index - self.starts[group], 1).to_pylist()[0]

    def __getstate__(self):
        return {**self.__dict__, "_read": None}


class DatasetRows(Sequence):
    """Rows of a `datasets.Dataset`, with images as they are stored and not as decoded pictures."""

    def __init__(self, dataset):
        self.dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[int(index)].to_pylist()[0]


class PreparedRows(Sequence):
    """Rows that `prepare` wrote, in a file that is mapped into memory: processes share what they read of it."""

    def __init__(self, folder: str | os.PathLike):
        import pyarrow as pa

        self.folder = Path(folder)
        self.info = json.loads((self.folder / "info.json").read_text(encoding="utf-8"))
        self._file = pa.ipc.open_file(pa.memory_map(str(self.folder / PREPARED)))
        self._batch = lru_cache(maxsize=8)(self._file.get_batch)

    def __len__(self) -> int:
        return self.info["rows"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch, place = divmod(int(index), self.info["batch"])
        row = self._batch(batch).slice(place, 1).to_pylist()[0]
        return {key: row[key] for key in ("id", "messages", "images")}

    def lengths(self, fingerprint: str) -> np.ndarray:
        """Tokens of each row, if they were counted for a processor of this fingerprint."""
        if fingerprint != self.info["fingerprint"]:
            raise ValueError(
                f"{self.folder} was prepared with another tokenizer, chat template (--prompt) or number of image "
                "tokens: its lengths do not hold. Prepare the data again."
            )
        batches = range(self._file.num_record_batches)
        return np.concatenate([self._file.get_batch(i).column("length").to_numpy() for i in batches])

    def __reduce__(self):
        return PreparedRows, (self.folder,)


def read_json(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON list, or of JSON lines; each is named by its place unless it has an `id`."""
    rows = []
    with open(path, encoding="utf-8") as file:
        is_list = file.read(100).lstrip().startswith("[")
        file.seek(0)
        try:
            found = json.load(file) if is_list else file
        except ValueError as error:
            raise ValueError(f"{path} is no JSON list: {error}") from None
        for number, row in enumerate(found, start=1):
            try:
                rows.append({"id": f"{path.name}:{number}", **(row if is_list else json.loads(row))})
            except (TypeError, ValueError) as error:
                place = "row" if is_list else "line"
                raise ValueError(f"{path}, {place} {number} is no JSON object: {error}") from None
    return rows


def load_rows(source: str | os.PathLike, split: str = "train") -> Sequence[dict[str, Any]]:
    """
    The rows of a source, not yet chats.

    Args:
        source: a file of JSON lines, a JSON list or a parquet file; a glob or folder of such files; a folder that
            `prepare` or `datasets` wrote; or a dataset's name on the Hub.

    Raises:
        ValueError: it is none of these.
    """
    path, files = Path(source), _files(str(source))
    if files:
        if files[0].suffix == ".parquet":
            require("pyarrow", source)
            return ParquetRows(files)
        tables = [read_json(file) for file in files]
        return tables[0] if len(tables) == 1 else list(itertools.chain.from_iterable(tables))
    if (path / PREPARED).is_file():
        require("pyarrow", source)
        return PreparedRows(path)
    datasets = require("datasets", source)
    try:
        is_folder = path.is_dir()
        dataset = datasets.load_from_disk(path) if is_folder else datasets.load_dataset(str(source), split=split)
    except (OSError, ValueError, ConnectionError) as error:
        raise ValueError(f"{source} is no file, folder or dataset that can be read: {error}") from None
    return DatasetRows(dataset[split] if isinstance(dataset, dict) else dataset)


def _files(source: str) -> list[Path]:
    """The files of a path, glob or folder: of a folder those of the first kind that it has."""
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        if (path / PREPARED).exists() or any(path.glob("dataset_*.json")):
            return []
        found = [sorted(path.rglob(kind)) for kind in ("*.parquet", "*.jsonl", "*.json")]
        return next(filter(None, found), [])
    return sorted(map(Path, glob.glob(source, recursive=True)))


def require(library: str, source: str | os.PathLike):
    """An optional library that a source needs."""
    try:
        return importlib.import_module(library)
    except ImportError:
        kinds = {"datasets": "no file or folder of JSON or parquet", "pyarrow": "no JSON"}
        library = library.partition(".")[0]
        raise ValueError(f"{source} is {kinds[library]}: `pip install {library}` first.") from None


def is_remote(source: str) -> bool:
    """Whether it is a name on the Hub."""
    return not _files(source) and not Path(source).exists()


@dataclass
class Source:
    """Rows as chats, and what encodes them; `collator.image_folder` is where their relative paths begin."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    collator: LlavaVrCollator
    _lengths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row as a chat with an `id`."""
        return with_id(self.rows[index], f"{self.name}:{index}")

    def lengths(self, skip_errors: bool = False) -> np.ndarray:
        """Tokens of each row, as prepared or counted once; 0 for one that cannot be used, if errors are skipped."""
        if self._lengths is None and isinstance(self.rows, PreparedRows):
            self._lengths = self.rows.lengths(fingerprint(self.collator.processor))
        elif self._lengths is None:
            numbers = tqdm(range(len(self.rows)), desc=f"lengths of {self.name}")
            self._lengths = np.fromiter((self._length(i, skip_errors) for i in numbers), np.int32, len(self.rows))
        return self._lengths

    def _length(self, index: int, skip_errors: bool) -> int:
        try:
            return self.collator.length(self[index], index)
        except (OSError, ValueError):
            if skip_errors:
                return 0
            raise


def fingerprint(processor) -> str:
    """What the length of a row depends on, beside the row."""
    parts = (processor.image_layout, processor.projector_downsample, processor.chat_template, len(processor.tokenizer))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def with_id(row: Mapping[str, Any], default: str) -> dict[str, Any]:
    """The row as a chat; errors name its `id`, or the default."""
    name = default if row.get("id") is None else row["id"]
    try:
        return {**to_chat(row), "id": name}
    except ValueError as error:
        raise ValueError(f"row (id {name!r}): {error}") from None


def folder_of(name: str | os.PathLike) -> Path:
    """Where the relative paths of a source begin: the folder that it is or lies in, or the last one before a glob."""
    folder = Path(name).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def open_sources(
    names: Sequence[str], processor, max_length: int | None = None, image_folder: str | os.PathLike | None = None
) -> list[Source]:
    """The sources of these names. Relative paths of images begin at `image_folder`, or else at the source's folder."""
    sources, image_folder = [], image_folder and Path(image_folder).absolute()
    for name in names:
        collator = LlavaVrCollator(processor, max_length, image_folder=image_folder or folder_of(name))
        sources.append(Source(Path(name).name or name, load_rows(name), collator))
    return sources
