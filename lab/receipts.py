"""Drawn price lists, and questions about them.

Every sample follows from a stream's seed and an index alone, so nothing is stored:

    python -m lab.receipts --sheet sheet.png             # sixteen samples with questions and answers
    python -m lab.receipts --one examples/receipt.png    # one picture, larger than the model's 96 x 96
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lab.drawing import (
    FONTS,
    HELD_OUT_FONTS,
    Picture,
    Turn,
    add_noise,
    ask_selection,
    draw_colours,
    generator,
    load_font,
    phrase,
)
from lab.labels import CANVAS, ITEMS, Labels


MAX_ROWS = 5


@dataclass(frozen=True)
class Row:
    """One line of a price list."""

    item: str
    price: int


@dataclass(frozen=True)
class Glyphs:
    """Where one text lies, as fractions of the picture's side: its band and the edges of its characters."""

    text: str
    row: int
    top: float
    bottom: float
    edges: tuple[float, ...]  # len(text) + 1


@dataclass(frozen=True)
class Receipt:
    """A picture, what it says, and where each character lies."""

    image: Image.Image
    rows: tuple[Row, ...]
    glyphs: tuple[Glyphs, ...]


def draw_rows(rng: np.random.Generator) -> tuple[Row, ...]:
    """Two to five rows, every item and every price at most once."""
    count = int(rng.integers(2, MAX_ROWS + 1))
    items = rng.choice(len(ITEMS), count, replace=False)
    prices = rng.choice(99, count, replace=False) + 1
    return tuple(Row(ITEMS[item], int(price)) for item, price in zip(items, prices))


def draw_receipt(rng: np.random.Generator, scale: float | None = None, held_out: bool = False) -> Receipt:
    """Draw a price list of random rows, font, size, colours, layout and noise.

    Args:
        rng: source of every choice.
        scale: picture side in units of 96 pixels; drawn between 1 and 3 if not given.
        held_out: take the fonts that are kept for tests, and draw a rule above every row.
    """
    rows = draw_rows(rng)
    scale = float(rng.uniform(1, 3)) if scale is None else scale
    side = round(CANVAS * scale)
    paper, ink = draw_colours(rng)
    fonts = HELD_OUT_FONTS if held_out else FONTS
    name = fonts[rng.integers(len(fonts))]
    margin, gap = 3 * scale, 6 * scale
    size = int(rng.uniform(11.5, 17) * scale)
    while True:  # the largest size up to the drawn one that fits
        font = load_font(name, size)
        item_width = max(font.getlength(row.item) for row in rows)
        price_width = max(font.getlength(str(row.price)) for row in rows)
        ascent, descent = font.getmetrics()
        width, height = item_width + gap + price_width, (ascent + descent) * len(rows)
        if width <= side - 2 * margin and height <= side:
            break
        size -= 1

    left = rng.uniform(margin, side - margin - width)
    column = rng.uniform(left + width, side - margin)  # where prices end, if they are aligned
    aligned = rng.random() < 0.6
    pitch = rng.uniform(1, min(1.5, side / height)) * (ascent + descent)
    top = rng.uniform(0, side - pitch * len(rows))

    image = Image.new("RGB", (side, side), paper)
    pen = ImageDraw.Draw(image)
    glyphs = []
    for number, row in enumerate(rows):
        price, y = str(row.price), top + number * pitch
        end = left + font.getlength(row.item) + gap
        price_x = column - font.getlength(price) if aligned else end
        if held_out:
            pen.line([(left, y), (column, y)], fill=ink, width=max(1, round(scale / 2)))
        for text, x in ((row.item, left), (price, price_x)):
            pen.text((x, y), text, fill=ink, font=font)
            edges = tuple((x + font.getlength(text[:i])) / side for i in range(len(text) + 1))
            glyphs.append(Glyphs(text, number, y / side, (y + ascent + descent) / side, edges))
    return Receipt(add_noise(rng, image), rows, tuple(glyphs))


def draw(rng: np.random.Generator, held_out: bool = False) -> Picture:
    """A price list as a picture with its map; the facts are its rows."""
    receipt = draw_receipt(rng, held_out=held_out)
    labels = Labels()
    for glyphs in receipt.glyphs:
        row = receipt.rows[glyphs.row]
        for character, left, right in zip(glyphs.text, glyphs.edges, glyphs.edges[1:]):
            box = [CANVAS * value for value in (left, glyphs.top, right, glyphs.bottom)]
            place = 1 if glyphs.text == row.item else 2
            labels.mark(*box, glyph=character, line=glyphs.row + 1, place=place, name=row.item, number=row.price)
    return Picture(receipt.image, labels, receipt.rows)


# ---------------------------------------------------------------------------------------------------------- questions

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
KINDS = ("transcribe", "price", "item", "cheapest", "dearest", "no item", "no price")


def made_up_word(rng: np.random.Generator) -> str:
    """A word of syllables that is no item, so that refusing does not depend on knowing the word."""
    count = rng.integers(2, 4)
    word = "".join("bcdfghklmnprstvw"[rng.integers(16)] + "aeiou"[rng.integers(5)] for _ in range(count))
    return word + "nrsltk"[rng.integers(6)] if rng.random() < 0.5 else word


def ask(rng: np.random.Generator, rows: tuple[Row, ...], kind: str) -> Turn:
    """A question of one kind about the rows, with its answer."""
    row = rows[rng.integers(len(rows))]
    lines = {row.item: f"{row.item} {row.price}" for row in rows}
    if kind == "transcribe":
        return Turn(kind, phrase(rng, TRANSCRIBE), "\n".join(lines.values()))
    if kind == "select":
        return ask_selection(rng, SELECT, lines)
    if kind == "price":
        return Turn(kind, phrase(rng, PRICE, item=row.item), str(row.price))
    if kind == "item":
        return Turn(kind, phrase(rng, ITEM, price=row.price), row.item)
    if kind == "cheapest":
        return Turn(kind, phrase(rng, CHEAPEST), min(rows, key=lambda row: row.price).item)
    if kind == "dearest":
        return Turn(kind, phrase(rng, DEAREST), max(rows, key=lambda row: row.price).item)
    if kind == "no item":
        absent = [item for item in ITEMS if item not in {row.item for row in rows}]
        item = absent[rng.integers(len(absent))] if rng.random() < 0.7 else made_up_word(rng)
        return Turn(kind, phrase(rng, PRICE, item=item), f"There is no {item}.")
    absent = [price for price in range(1, 100) if price not in {row.price for row in rows}]
    price = absent[rng.integers(len(absent))]
    return Turn(kind, phrase(rng, ITEM, price=price), f"Nothing costs {price}.")


def main() -> None:
    """Write a contact sheet of samples, or one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of sixteen samples here")
    parser.add_argument("--one", type=Path, help="write one picture of 288 x 288 here, and print what it says")
    parser.add_argument("--seed", type=int, default=7, help="stream of samples (default 7)")
    args = parser.parse_args()
    if args.one:
        receipt = draw_receipt(generator(args.seed, 0), scale=3)
        receipt.image.save(args.one)
        print("\n".join(f"{row.item} {row.price}" for row in receipt.rows))
    if args.sheet:
        font, cell = load_font("default", 13), (300, 410)
        sheet = Image.new("RGB", (4 * cell[0], 4 * cell[1]), "white")
        pen = ImageDraw.Draw(sheet)
        for index in range(16):
            rng = generator(args.seed, index)
            receipt, x, y = draw_receipt(rng), index % 4 * cell[0], index // 4 * cell[1]
            sheet.paste(receipt.image.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC).resize((192, 192)), (x, y))
            turns = [ask(rng, receipt.rows, kind) for kind in KINDS]
            lines = [f"{turn.question} {turn.answer.replace(chr(10), ' / ')}" for turn in turns]
            pen.multiline_text((x + 4, y + 200), "\n".join(lines), fill="black", font=font)
        sheet.save(args.sheet)


if __name__ == "__main__":
    main()
