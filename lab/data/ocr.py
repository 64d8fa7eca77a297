"""Lines of made-up words and of random letters and digits, slightly turned."""

import numpy as np

from lab.data.dense_labels import CANVAS
from lab.data.drawing import Canvas, Picture, Turn, phrase


MAX_LINES = 3
UNLIKE = "abcdefghjkmnpqrstuvwxyz23456789"  # no two look the same in some font, as l and 1, or o and 0, do
TRANSCRIBE = ("Read the text.", "What is written here?", "Read all lines.")
LINE = ("Read line {number}.", "What is in line {number}?")
QUESTION_TYPES = ("transcribe", "line")


def draw_text(rng: np.random.Generator) -> str:
    """A pronounceable word, or letters and digits in any order, of three to five characters."""
    length = int(rng.integers(3, 6))
    if rng.random() < 0.5:
        letters = ("bcdfghjklmnprstvwz", "aeiou")
        return "".join(letters[i % 2][rng.integers(len(letters[i % 2]))] for i in range(length))
    return "".join(UNLIKE[i] for i in rng.integers(len(UNLIKE), size=length))


def draw(rng: np.random.Generator, held_out: bool = False) -> Picture:
    """One to three lines, aligned on the left, or centred if held out; the facts are the lines."""
    canvas = Canvas(rng, held_out)
    lines = [draw_text(rng) for _ in range(rng.integers(1, MAX_LINES + 1))]
    width = lambda: max(map(canvas.width, lines))  # noqa: E731
    height = lambda: canvas.line_height * len(lines)  # noqa: E731
    canvas.fit_font(rng.uniform(15, 22), 8, lambda: width() <= CANVAS - 12 and height() <= CANVAS - 10)
    pitch = canvas.line_height * rng.uniform(1, min(1.3, (CANVAS - 10) / height()))
    left, top = rng.uniform(5, CANVAS - 5 - width()), rng.uniform(4, CANVAS - 4 - pitch * len(lines))
    for number, line in enumerate(lines):
        indent = (width() - canvas.width(line)) / 2 if held_out else 0
        canvas.text(left + indent, top + number * pitch, line, line=number + 1)
    return canvas.finish(lines, angle=rng.uniform(-4, 4) if rng.random() < 0.6 else 0)


def ask(rng: np.random.Generator, lines: list[str], question_type: str) -> Turn:
    """A question of one type about the lines, with its answer."""
    if question_type == "transcribe":
        return Turn(question_type, phrase(rng, TRANSCRIBE), "\n".join(lines))
    number = int(rng.integers(len(lines)))
    return Turn(question_type, phrase(rng, LINE, number=number + 1), lines[number])
