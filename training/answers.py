"""Chats about images whose open questions the teacher answers beforehand, kept on disk as they come."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch.utils.data import Dataset
from tqdm import tqdm

from llava_vr.collator_llava_vr import LlavaVrCollator
from llava_vr.evaluation.answering import generate


def open_turns(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Which messages are questions that no answer follows."""
    roles = [message["role"] for message in messages] + [None]
    return [i for i, role in enumerate(roles) if role == "user" and roles[i + 1] != "assistant"]


def fill(messages: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[Mapping[str, Any]]:
    """The messages with these answers after the first questions that have none."""
    filled, before = [], 0
    for i, answer in zip(open_turns(messages), answers):
        filled += [*messages[before : i + 1], {"role": "assistant", "content": answer}]
        before = i + 1
    return filled + list(messages[before:])


def parts_of(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def key_of(row: Mapping[str, Any]) -> str:
    """A row's id and its open questions: what an answer of the teacher is kept under."""
    texts = [[part.get("text") for part in parts_of(row["messages"][i])] for i in open_turns(row["messages"])]
    return json.dumps([row["id"], texts], ensure_ascii=False)


class Rows(Dataset):
    """
    Chats with images, as rows for `LlavaVrCollator`, each with an `id`. Those without an image, where teacher and
    student are the same, are left out.

    Args:
        rows: a source of `open_sources`, or those of `image_rows`.
        answers: the teacher's, by `key_of` the row. If given, rows that an answer is missing of or empty in are left
            out, too.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], answers: Mapping[str, list[str]] | None = None):
        self.rows, self.answers = rows, answers or {}
        self.kept = [i for i in range(len(rows)) if self._has_image(rows[i].get("messages") or [])]
        if not self.kept:
            raise ValueError("no row has an image: without one, teacher and student are the same.")
        if answers is not None:
            self.kept = [i for n, i in enumerate(self.kept) if self._is_answered(self[n]["messages"])]
        if not self.kept:
            raise ValueError(
                "the teacher, the model at s = 1, answers nothing: is the chat template the one that the source was "
                "trained with, and does the source itself answer?"
            )

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[self.kept[index]]
        row = {**row, "id": str(row.get("id") or self.kept[index])}
        answers = self.answers.get(key_of(row), ()) if self.answers else ()
        return {**row, "messages": fill(row["messages"], answers)}

    @staticmethod
    def _has_image(messages: Sequence[Mapping[str, Any]]) -> bool:
        return any(part.get("type") == "image" for message in messages for part in parts_of(message))

    @staticmethod
    def _is_answered(messages: Sequence[Mapping[str, Any]]) -> bool:
        return not open_turns(messages) and all(m["content"] for m in messages if m["role"] == "assistant")


def answer_in_turn(model, processor, chats: list, max_new_tokens: int) -> list[list[str]]:
    """The teacher's answers to the open questions of each chat, each asked after the answers before it."""
    answers: list[list[str]] = [[] for _ in chats]
    while True:
        filled = [fill(chat, said) for chat, said in zip(chats, answers)]
        waiting = {i: turns[0] for i, chat in enumerate(filled) if (turns := open_turns(chat))}
        if not waiting:
            return answers
        prompts = [filled[i][: turn + 1] for i, turn in waiting.items()]
        for i, said in zip(waiting, generate(model, processor, prompts, 1, max_new_tokens)):
            answers[i].append(said)


def read_answers(folder: Path) -> dict[str, list[str]]:
    """The teacher's answers that a folder holds, by `key_of` the row."""
    answers = {}
    for path in folder.glob("answers-*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line that was cut off when a run was ended
                answers |= {(said := json.loads(line))["row"]: said["answers"]}
    return answers


def write_answers(
    model, processor, rows: Rows, collator: LlavaVrCollator, folder: Path, batch_size: int, max_new_tokens: int
) -> dict[str, list[str]]:
    """
    The teacher's answers to all open questions of the rows, by `key_of` the row.

    Every row is a line of JSON in FOLDER/answers-PROCESS.jsonl as soon as it is answered, and is not asked again. Each
    process answers its share.
    """
    state, done = PartialState(), read_answers(folder)
    share = (rows[i] for i in range(state.process_index, len(rows), state.num_processes))
    todo = [row for row in share if open_turns(row["messages"]) and key_of(row) not in done]
    state.wait_for_everyone()  # all have read
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"answers-{state.process_index}.jsonl", "a", encoding="utf-8") as file:
        file.write("\n" * bool(todo))  # ends a line that was cut off
        progress = tqdm(total=len(todo), desc="the teacher answers", unit="row", disable=not state.is_main_process)
        for first in range(0, len(todo), batch_size):
            batch = todo[first : first + batch_size]
            try:
                chats = [collator.messages(row) for row in batch]
                answers = answer_in_turn(model, processor, chats, max_new_tokens)
            except (OSError, ValueError) as error:
                raise ValueError(f"one of the rows {', '.join(row['id'] for row in batch)}: {error}") from error
            for row, said in zip(batch, answers):
                file.write(json.dumps({"row": key_of(row), "answers": said}, ensure_ascii=False) + "\n")
            file.flush()
            progress.update(len(batch))
        progress.close()
    state.wait_for_everyone()
    return read_answers(folder)
