"""Tables of numbers: a column of names, one to four columns of numbers with a letter above each."""

from dataclasses import dataclass

import numpy as np

from lab.data.dense_labels import CANVAS, KEYS, ROWS
from lab.data.drawing import Canvas, Picture, Turn, ask_selection, phrase


TRANSCRIBE = ("Read the table.", "List all rows of the table.", "What does the table say?")
SELECT = ("List {names}.", "Read the rows {names}.")
CELL = ("What is {column} of {row}?", "Which number is in {column} of {row}?")
LARGEST = ("Which row is largest in {column}?", "Which row has the highest {column}?")
QUESTION_TYPES = ("transcribe", "cell", "largest")


@dataclass(frozen=True)
class Table:
    """Names of rows and columns, and the numbers: different ones in each column."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    numbers: tuple[tuple[int, ...], ...]  # one tuple a row


def draw_table(rng: np.random.Generator) -> Table:
    rows, columns = int(rng.integers(2, 5)), int(rng.choice(4, p=(0.3, 0.35, 0.25, 0.1))) + 1
    numbers = np.stack([rng.choice(99, rows, replace=False) + 1 for _ in range(columns)], axis=1)
    return Table(
        tuple(ROWS[i] for i in rng.choice(len(ROWS), rows, replace=False)),
        tuple(KEYS[i] for i in rng.choice(len(KEYS), columns, replace=False)),
        tuple(tuple(map(int, line)) for line in numbers),
    )


def draw(rng: np.random.Generator, held_out: bool = False) -> Picture:
    """A table with or without a rule below its head; with a rule above and below every row if held out."""
    canvas, table = Canvas(rng, held_out), draw_table(rng)
    gap, height = rng.uniform(4, 7), len(table.rows) + 1
    label = lambda: max(map(canvas.width, table.rows))  # noqa: E731
    cell = lambda: canvas.width("00") + gap  # noqa: E731
    width = lambda: label() + cell() * len(table.columns)  # noqa: E731
    canvas.fit_font(rng.uniform(11, 16), 5, lambda: width() <= CANVAS - 8 and canvas.line_height * height <= CANVAS - 6)
    pitch = canvas.line_height * rng.uniform(1, min(1.25, (CANVAS - 6) / (canvas.line_height * height)))
    left, top = rng.uniform(4, CANVAS - 4 - width()), rng.uniform(3, CANVAS - 3 - pitch * height)
    ends = [left + label() + cell() * (i + 1) for i in range(len(table.columns))]
    for place, (end, letter) in enumerate(zip(ends, table.columns), 2):
        canvas.text(end - canvas.width(letter), top, letter, line=1, place=place, column=letter)
    for line, (name, values) in enumerate(zip(table.rows, table.numbers), 2):
        y = top + (line - 1) * pitch
        canvas.text(left, y, name, line=line, place=1, name=name)
        for place, (end, value, letter) in enumerate(zip(ends, values, table.columns), 2):
            labels = {"line": line, "place": place, "name": name, "column": letter, "number": value}
            canvas.text(end - canvas.width(str(value)), y, str(value), **labels)
    rules = range(height + 1) if held_out else [1] if rng.random() < 0.5 else []
    for number in rules:
        y = top + number * pitch
        canvas.line([(left - 2, y), (left + width() + 2, y)], 0.5)
    return canvas.finish(table)


def ask(rng: np.random.Generator, table: Table, question_type: str) -> Turn:
    """A question of one type about the table, with its answer."""
    lines = {name: " ".join((name, *map(str, values))) for name, values in zip(table.rows, table.numbers)}
    if question_type == "select":
        return ask_selection(rng, SELECT, lines)
    if question_type == "transcribe":
        return Turn(question_type, phrase(rng, TRANSCRIBE), "\n".join((" ".join(table.columns), *lines.values())))
    row, column = int(rng.integers(len(table.rows))), int(rng.integers(len(table.columns)))
    if question_type == "cell":
        names = {"row": table.rows[row], "column": table.columns[column]}
        answer = str(table.numbers[row][column])
        return Turn(question_type, phrase(rng, CELL, **names), answer, f"{names['column']} {names['row']}")
    values, name = [line[column] for line in table.numbers], table.columns[column]
    answer, subject = table.rows[values.index(max(values))], f"{name} {max(values)}"
    return Turn(question_type, phrase(rng, LARGEST, column=name), answer, subject)
