"""Price lists: rows of an item and a price, and questions about them."""

from dataclasses import dataclass

import numpy as np

from lab.data.dense_labels import CANVAS, ITEMS
from lab.data.drawing import Canvas, Picture, Turn, ask_selection, phrase


MAX_ROWS = 5
TRANSCRIBE = ("Transcribe the image.", "Read the receipt.", "What does the image say?", "List all items and prices.")
SELECT = ("List {names}.", "Give the prices of {names}.")
PRICE = (
    "How much is the {item}?",
    "What does the {item} cost?",
    "What is the price of the {item}?",
    "Tell me the price of the {item}.",
)
ITEM = ("What costs {price}?", "Which item costs {price}?", "What can I buy for {price}?")
CHEAPEST = ("Which is cheapest?", "What is the cheapest item?", "Which item costs the least?")
DEAREST = ("Which is dearest?", "What is the most expensive item?", "Which item costs the most?")
QUESTION_TYPES = ("transcribe", "price", "item", "cheapest", "dearest", "no item", "no price")


@dataclass(frozen=True)
class Row:
    """One line of a price list."""

    item: str
    price: int


def draw_rows(rng: np.random.Generator) -> tuple[Row, ...]:
    """Two to five rows, every item and every price at most once."""
    count = int(rng.integers(2, MAX_ROWS + 1))
    items = rng.choice(len(ITEMS), count, replace=False)
    prices = rng.choice(99, count, replace=False) + 1
    return tuple(Row(ITEMS[item], int(price)) for item, price in zip(items, prices))


def draw(rng: np.random.Generator, held_out: bool = False) -> Picture:
    """A price list, prices in a column or each right after its item; a rule above every row if held out."""
    canvas, rows, gap = Canvas(rng, held_out), draw_rows(rng), 6
    width = lambda: max(canvas.width(r.item) for r in rows) + gap + max(canvas.width(str(r.price)) for r in rows)  # noqa: E731
    height = lambda: canvas.line_height * len(rows)  # noqa: E731
    canvas.fit_font(rng.uniform(11.5, 17), 6, lambda: width() <= CANVAS - 6 and height() <= CANVAS)
    left = rng.uniform(3, CANVAS - 3 - width())
    column = rng.uniform(left + width(), CANVAS - 3)  # where prices end, if they are aligned
    is_aligned = rng.random() < 0.6
    pitch = canvas.line_height * rng.uniform(1, min(1.5, CANVAS / height()))
    top = rng.uniform(0, CANVAS - pitch * len(rows))
    for number, row in enumerate(rows):
        y, price = top + number * pitch, str(row.price)
        labels = {"line": number + 1, "name": row.item, "number": row.price}
        if held_out:
            canvas.line([(left, y), (column, y)], 0.5)
        canvas.text(left, y, row.item, place=1, **labels)
        x = column - canvas.width(price) if is_aligned else left + canvas.width(row.item) + gap
        canvas.text(x, y, price, place=2, **labels)
    return canvas.finish(rows)


def made_up_word(rng: np.random.Generator) -> str:
    """A word of syllables that is no item, so that refusing does not depend on knowing the word."""
    count = rng.integers(2, 4)
    word = "".join("bcdfghklmnprstvw"[rng.integers(16)] + "aeiou"[rng.integers(5)] for _ in range(count))
    return word + "nrsltk"[rng.integers(6)] if rng.random() < 0.5 else word


def ask(rng: np.random.Generator, rows: tuple[Row, ...], question_type: str) -> Turn:
    """A question of one type about the rows, with its answer."""
    row = rows[rng.integers(len(rows))]
    lines = {row.item: f"{row.item} {row.price}" for row in rows}
    if question_type == "transcribe":
        return Turn(question_type, phrase(rng, TRANSCRIBE), "\n".join(lines.values()))
    if question_type == "select":
        return ask_selection(rng, SELECT, lines)
    if question_type == "price":
        return Turn(question_type, phrase(rng, PRICE, item=row.item), str(row.price), row.item)
    if question_type == "item":
        return Turn(question_type, phrase(rng, ITEM, price=row.price), row.item, str(row.price))
    if question_type in ("cheapest", "dearest"):
        templates, find = (CHEAPEST, min) if question_type == "cheapest" else (DEAREST, max)
        row = find(rows, key=lambda row: row.price)
        return Turn(question_type, phrase(rng, templates), row.item, str(row.price))
    if question_type == "no item":
        absent = [item for item in ITEMS if item not in {row.item for row in rows}]
        item = absent[rng.integers(len(absent))] if rng.random() < 0.7 else made_up_word(rng)
        return Turn(question_type, phrase(rng, PRICE, item=item), f"There is no {item}.", item)
    absent = [price for price in range(1, 100) if price not in {row.price for row in rows}]
    price = absent[rng.integers(len(absent))]
    return Turn(question_type, phrase(rng, ITEM, price=price), f"Nothing costs {price}.", str(price))
