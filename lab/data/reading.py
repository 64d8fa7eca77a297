"""Documents of print and questions about them, for the checkpoint: lines, receipts, tables and bar charts.

Each domain draws a page in any of the fonts and asks about what it shows. Words, names and amounts are open: whatever
`lab.data.text` makes up. All print has at least the size that the tower was trained on, and no name contains another.
Layouts that are held out: lines on the right or in the middle, rules between the rows of receipts, rules around every
cell, a grid behind bars. The tower has seen such layouts, but no held-out font family. What is found by its name is
asked more often in training (`PRACTICE`); `PLACE`, `SELECT` and `COLUMN` are asked in training alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from lab.data.drawing import Turn, ask_selection, phrase
from lab.data.fonts import font_files
from lab.data.page import COLOURS, SIDE, TWENTIETHS, Page
from lab.data.scenes import draw_size
from lab.data.text import pick, random_text, random_word


LEAST_SIZE = 10  # an em in pixels, as in `lab.data.scenes`
Facts = TypeVar("Facts")


class Document(NamedTuple):
    """A finished picture of 192 x 192 pixels, and what it shows."""

    image: Image.Image
    facts: Any


def begin(rng: np.random.Generator, held_out: bool) -> Page:
    return Page(rng, font_files("held_out" if held_out else "train"))


def distinct(rng: np.random.Generator, make: Callable, count: int, most: int) -> list[str]:
    """Texts of at most so many characters; none is in another or in "total", whatever their case."""
    found: list[str] = []
    while len(found) < count:
        text = make(rng)[:most].strip()
        if text and not any(contain_each_other(text, other) for other in ("total", *found)):
            found.append(text)
    return found


def contain_each_other(one: str, other: str) -> bool:
    one, other = one.lower(), other.lower()
    return one in other or other in one


def as_asked(rng: np.random.Generator, name: str) -> str:
    """A name as people type it: its case does not matter."""
    return pick(rng, (name, name, name, name.lower(), name.lower(), name.capitalize(), name.upper()))


def absent(rng: np.random.Generator, texts: Sequence[str]) -> str:
    """A word that is in none of the texts, nor in "total"."""
    taken = " ".join((*texts, "total")).lower()
    return next(word for word in iter(lambda: random_word(rng), None) if word.lower() not in taken)


def draw_fitting(
    rng: np.random.Generator,
    draw_facts: Callable[[np.random.Generator], Facts],
    size: float,
    fits: Callable[[Facts, float], bool],
) -> tuple[Facts, float]:
    """Facts that fit on the page, drawn again until they do, and the largest size that does it, from `size` down."""
    while True:
        facts, smaller = draw_facts(rng), size
        while smaller >= LEAST_SIZE:
            if fits(facts, smaller):
                return facts, smaller
            smaller *= 0.94


class Lines:
    """One to seven lines of at most 24 characters; the facts are the lines."""

    TRANSCRIBE = ("Transcribe the image.", "Read the text.", "What is written here?", "What does the image say?")
    FIRST = ("What does the first line say?", "Read the first line.", "What is in line 1?")
    LAST = ("What does the last line say?", "Read the last line.")
    NUMBER = ("What does line {number} say?", "Read line {number}.", "What is in line {number}?")
    COUNT = ("How many lines are there?", "How many lines of text are there?")
    QUESTION_TYPES = ("transcribe", "first", "last", "number", "count")

    def facts(self, rng: np.random.Generator) -> list[str]:
        """None is of signs alone: '' and " look the same in print."""
        lines = (random_text(rng, int(rng.integers(2, 25))) for _ in iter(int, None))
        with_letters = (line for line in lines if any(map(str.isalnum, line)))
        return list(islice(with_letters, int(rng.integers(1, 8))))

    def draw(self, rng: np.random.Generator, held_out: bool = False) -> Document:
        page, margin, leading = begin(rng, held_out), rng.uniform(3, 12), rng.uniform(1.15, 1.6)

        def fits(lines, size):
            widest = max(page.width(line, size) for line in lines)
            return widest <= SIDE - 2 * margin and len(lines) * size * leading <= SIDE - 2 * margin

        lines, size = draw_fitting(rng, self.facts, draw_size(rng, LEAST_SIZE, pick(rng, (24, 24, 44))), fits)
        base = rng.uniform(margin, max(margin, SIDE - margin - len(lines) * size * leading)) + size
        align = rng.choice((0.5, 1)) if held_out else 0
        for number, line in enumerate(lines, 1):
            space = SIDE - 2 * margin - page.width(line, size)
            page.text(margin + max(space, 0) * align, base, line, size, number)
            base += size * leading
        return Document(page.finish(whole=True).image, lines)

    def ask(self, rng: np.random.Generator, lines: list[str], question_type: str) -> Turn:
        number = int(rng.integers(len(lines)))
        asked = {
            "transcribe": (self.TRANSCRIBE, "\n".join(lines)),
            "first": (self.FIRST, lines[0]),
            "last": (self.LAST, lines[-1]),
            "number": (self.NUMBER, lines[number]),
            "count": (self.COUNT, str(len(lines))),
        }
        templates, answer = asked[question_type]
        return Turn(question_type, phrase(rng, templates, number=number + 1), answer)


@dataclass(frozen=True)
class Receipt:
    """As printed: a heading or "", items with prices in cents, the total or None, and how money is written."""

    heading: str
    items: tuple[str, ...]
    prices: tuple[int, ...]
    total: int | None
    sign: str
    mark: str

    def money(self, cents: int) -> str:
        return f"{self.sign}{cents // 100}{self.mark}{cents % 100:02}" if self.mark else f"{self.sign}{cents // 100}"

    @property
    def rows(self) -> dict[str, str]:
        """The names on the left and the amounts on the right, as printed."""
        rows = {item: self.money(price) for item, price in zip(self.items, self.prices)}
        return rows if self.total is None else rows | {"Total": self.money(self.total)}


class Receipts:
    """Two to seven items with prices, mostly with decimals, a total below them in three of four."""

    TRANSCRIBE = ("Transcribe the image.", "Read the receipt.", "What does the image say?")
    SELECT = ("List {names}.", "Give the prices of {names}.")
    PRICE = (
        "How much is the {item}?",
        "What does the {item} cost?",
        "What is the price of the {item}?",
        "What is the price of {item}?",
        "How much does the {item} cost?",
        "Price of {item}?",
    )
    TOTAL = ("What is the total?", "How much is the total?", "What is the total price?", "How much is it in total?")
    ITEM = ("What costs {price}?", "Which item costs {price}?")
    CHEAPEST = ("Which is the cheapest?", "Which is cheapest?", "What is the cheapest item?", "Which costs the least?")
    DEAREST = ("Which is the most expensive?", "What is the most expensive item?", "Which item costs the most?")
    COUNT = ("How many items are there?", "How many items are on the receipt?")
    QUESTION_TYPES = ("transcribe", "price", "total", "item", "cheapest", "dearest", "count", "no item")
    PRACTICE = ("price", "price", "price", "item")

    def facts(self, rng: np.random.Generator) -> Receipt:
        count = int(rng.integers(2, 8))
        name = lambda rng: " ".join(random_word(rng) for _ in range(rng.choice((1, 1, 1, 2))))  # noqa: E731
        mark, most = str(rng.choice((".", ",", ""), p=(0.75, 0.12, 0.13))), 10 ** rng.uniform(2.2, 5)
        step = 100 if not mark else 5 if rng.random() < 0.5 else 1
        steps = max(int(most) // step, 3 * count)
        prices = tuple(int(i + 1) * step for i in rng.choice(steps, count, replace=False))
        return Receipt(
            heading=random_text(rng, int(rng.integers(4, 16))) if rng.random() < 0.4 else "",
            items=tuple(distinct(rng, name, count, 14)),
            prices=prices,
            total=sum(prices) if rng.random() < 0.75 else None,
            sign="$" if rng.random() < 0.25 else "",
            mark=mark,
        )

    def draw(self, rng: np.random.Generator, held_out: bool = False) -> Document:
        page, margin, leading = begin(rng, held_out), rng.uniform(3, 12), rng.uniform(1.15, 1.5)

        def height(receipt, size):
            return (len(receipt.rows) + bool(receipt.heading) + 0.4) * size * leading

        def fits(receipt, size):
            widest = max(page.width(name, size) + page.width(price, size) + 8 for name, price in receipt.rows.items())
            widest = max(widest, page.width(receipt.heading, size))
            return widest <= SIDE - 2 * margin and height(receipt, size) <= SIDE - 2 * margin

        receipt, size = draw_fitting(rng, self.facts, draw_size(rng, LEAST_SIZE, 22), fits)
        rows = list(receipt.rows.items())
        base = rng.uniform(margin, SIDE - margin - height(receipt, size)) + size
        widest = max(page.width(name, size) for name, _ in rows) + max(page.width(price, size) for _, price in rows)
        is_wide, has_dots = held_out or rng.random() < 0.6, not held_out and rng.random() < 0.3
        right = SIDE - margin if is_wide else min(SIDE - margin, margin + widest + rng.uniform(8, 60))
        if receipt.heading:
            page.text((SIDE - page.width(receipt.heading, size)) / 2, base, receipt.heading, size, 1)
            base += size * leading
        for number, (name, price) in enumerate(rows):
            is_total = receipt.total is not None and number == len(rows) - 1
            if is_total or (held_out and number):
                page.rule(margin, base - 0.9 * size, right, base - 0.9 * size)
            base += 0.2 * size * is_total
            at = right - page.width(price, size)
            end = page.text(margin, base, name, size, number + 2)
            page.text(at, base, price, size, number + 2)
            if has_dots and at - end > 14:
                page.text(end + 4, base, page.fit("." * 40, size, at - end - 10), size, number + 2)
            base += size * leading
        return Document(page.finish(whole=True).image, receipt)

    def ask(self, rng: np.random.Generator, receipt: Receipt, question_type: str) -> Turn:
        number = int(rng.integers(len(receipt.items)))
        lines = {name: f"{name} {price}" for name, price in receipt.rows.items()}
        if question_type == "select":
            return ask_selection(rng, self.SELECT, {item: lines[item] for item in receipt.items})
        missing, price = absent(rng, (*receipt.items, receipt.heading)), receipt.rows[receipt.items[number]]
        cheapest, dearest = (receipt.items[int(find(receipt.prices))] for find in (np.argmin, np.argmax))
        asked = {
            "transcribe": (
                self.TRANSCRIBE,
                "\n".join([receipt.heading] * bool(receipt.heading) + list(lines.values())),
            ),
            "price": (self.PRICE, price),
            "total": (self.TOTAL, receipt.rows.get("Total", "There is no total.")),
            "item": (self.ITEM, receipt.items[number]),
            "cheapest": (self.CHEAPEST, cheapest),
            "dearest": (self.DEAREST, dearest),
            "count": (self.COUNT, str(len(receipt.items))),
            "no item": (self.PRICE, f"There is no {missing.lower()}."),
        }
        templates, answer = asked[question_type]
        item = as_asked(rng, missing if question_type == "no item" else receipt.items[number])
        subjects = {"price": item, "item": price, "no item": item}
        subjects |= {"cheapest": receipt.rows[cheapest], "dearest": receipt.rows[dearest]}
        return Turn(
            question_type, phrase(rng, templates, item=item, price=price), answer, subjects.get(question_type, "")
        )


@dataclass(frozen=True)
class Table:
    """Names of columns and rows, and the numbers as printed, a tuple for each row."""

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    numbers: tuple[tuple[str, ...], ...]

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """Row by row, names included."""
        return [("", *self.columns), *((row, *numbers) for row, numbers in zip(self.rows, self.numbers))]


class Tables:
    """Two to six rows of one to four numbers, with names above and on the left."""

    TRANSCRIBE = ("Transcribe the image.", "Read the table.", "What does the table say?")
    SELECT = ("List {names}.", "Read the rows {names}.")
    CELL = (
        "What is {column} of {row}?",
        "What is the {column} of {row}?",
        "What is the {column} for {row}?",
        "What is in row {row}, column {column}?",
    )
    HIGHEST = ("Which has the highest {column}?", "Which row is highest in {column}?")
    LOWEST = ("Which has the lowest {column}?", "Which row is lowest in {column}?")
    COUNT = ("How many rows are there?", "How many rows does the table have?")
    PLACE = ("What is {number}?", "Which row has {number}?", "Which is {number}?")
    COLUMN = ("List the {column} of all rows.", "Read column {column}.")
    QUESTION_TYPES = ("transcribe", "cell", "highest", "lowest", "count", "no row", "no column")
    PRACTICE = ("cell",) * 5 + ("place",) * 3
    LISTS = ("select", "column")

    def facts(self, rng: np.random.Generator) -> Table:
        rows, columns = int(rng.integers(2, 7)), int(rng.integers(1, 5))
        names = distinct(rng, random_word, rows + columns, 12 if columns < 3 else 7)
        numbers = []
        for _ in range(columns):
            digits, decimals = 10 ** rng.uniform(1.2, 4), int(rng.choice((0, 0, 1, 2)))
            values = rng.choice(max(int(digits), 3 * rows), rows, replace=False)
            numbers.append([f"{value / 10**decimals:.{decimals}f}" for value in values])
        return Table(tuple(names[rows:]), tuple(names[:rows]), tuple(zip(*numbers)))

    def draw(self, rng: np.random.Generator, held_out: bool = False) -> Document:
        page, margin = begin(rng, held_out), rng.uniform(3, 10)
        gap, leading = rng.uniform(5, 12), rng.uniform(1.3, 1.7)

        def widths(table, size):
            return [max(page.width(cell, size) for cell in column) + gap for column in zip(*table.cells)]

        def fits(table, size):
            return max(sum(widths(table, size)), len(table.cells) * size * leading) <= SIDE - 2 * margin

        table, size = draw_fitting(rng, self.facts, draw_size(rng, LEAST_SIZE, 20), fits)
        cells, step, inner = table.cells, size * leading, widths(table, size)
        extra = (SIDE - 2 * margin - sum(inner)) * rng.uniform(0, 1) / len(inner)
        edges = margin + np.cumsum([0, *(width + extra for width in inner)])
        top = rng.uniform(margin, SIDE - margin - len(cells) * step)
        bottom = top + len(cells) * step
        for number, row in enumerate(cells):
            base = top + (number + 0.5) * step + 0.35 * size
            for column, text in enumerate(row):
                at = edges[column] + gap / 2 if not column else edges[column + 1] - gap / 2 - page.width(text, size)
                page.text(at, base, text, size, number + 1)
        rules = range(len(cells) + 1) if held_out or rng.random() < 0.3 else (1,) if rng.random() < 0.6 else ()
        for number in rules:
            page.rule(edges[0], top + number * step, edges[-1], top + number * step, 0.7)
        for edge in edges if held_out else ():
            page.rule(edge, top, edge, bottom, 0.7)
        return Document(page.finish(whole=True).image, table)

    def ask(self, rng: np.random.Generator, table: Table, question_type: str) -> Turn:
        lines = {row: " ".join((row, *numbers)) for row, numbers in zip(table.rows, table.numbers)}
        if question_type == "select":
            return ask_selection(rng, self.SELECT, lines)
        row, column = int(rng.integers(len(table.rows))), int(rng.integers(len(table.columns)))
        texts = [numbers[column] for numbers in table.numbers]
        values = [float(text) for text in texts]
        lowest, highest = int(np.argmin(values)), int(np.argmax(values))
        missing, number = absent(rng, (*table.rows, *table.columns)), table.numbers[row][column]
        asked = {
            "transcribe": (self.TRANSCRIBE, "\n".join((" ".join(table.columns), *lines.values()))),
            "cell": (self.CELL, number),
            "place": (self.PLACE, f"{table.columns[column]} {table.rows[row]}"),
            "highest": (self.HIGHEST, table.rows[highest]),
            "lowest": (self.LOWEST, table.rows[lowest]),
            "count": (self.COUNT, str(len(table.rows))),
            "no row": (self.CELL, f"There is no {missing.lower()}."),
            "no column": (self.CELL, f"There is no {missing.lower()}."),
            "column": (self.COLUMN, "\n".join(f"{name} {text}" for name, text in zip(table.rows, texts))),
        }
        templates, answer = asked[question_type]
        names = {"row": table.rows[row], "column": table.columns[column]}
        if question_type in ("no row", "no column"):
            names[question_type.removeprefix("no ")] = missing
        names = {key: as_asked(rng, name) for key, name in names.items()}
        subjects = {"cell": f"{names['column']} {names['row']}", "no row": names["row"], "no column": names["column"]}
        subjects |= {name: f"{names['column']} {texts[at]}" for name, at in (("highest", highest), ("lowest", lowest))}
        subjects |= {"column": names["column"], "place": number}
        return Turn(
            question_type, phrase(rng, templates, number=number, **names), answer, subjects.get(question_type, "")
        )


@dataclass(frozen=True)
class Chart:
    """Names of the bars, their ends in twentieths of the axis, the number at its end, and how many steps it has."""

    names: tuple[str, ...]
    twentieths: tuple[int, ...]
    most: int
    ticks: int

    @property
    def values(self) -> list[str]:
        """As a reader writes them."""
        return [f"{self.most * i / TWENTIETHS:g}" for i in self.twentieths]

    @property
    def labels(self) -> list[str]:
        """Of the axis, from zero."""
        return [f"{self.most * tick / self.ticks:g}" for tick in range(self.ticks + 1)]


class Charts:
    """Two to six bars, standing or lying, on an axis of two, four or five steps.

    In half of the charts the values are at the bars, in the others all bars end at a tenth of the axis.
    """

    TRANSCRIBE = ("Transcribe the image.", "Read the chart.", "List all values.")
    SELECT = ("Give the values of {names}.", "List {names}.")
    VALUE = ("What is the value of {name}?", "How high is {name}?", "How much is {name}?")
    HIGHEST = ("Which is the highest?", "Which is highest?", "Which has the highest value?")
    LOWEST = ("Which is the lowest?", "Which is lowest?", "Which has the lowest value?")
    COUNT = ("How many bars are there?", "How many bars does the chart have?")
    QUESTION_TYPES = ("transcribe", "value", "highest", "lowest", "count", "no bar")
    PRACTICE = ("value",) * 3

    def facts(self, rng: np.random.Generator, lying: bool, at_bar: bool) -> Chart:
        count, unit = int(rng.integers(2, 7)), 1 if at_bar else 2
        return Chart(
            names=tuple(distinct(rng, random_word, count, 11 if lying else 28 // count)),
            twentieths=tuple((int(i) + 1) * unit for i in rng.choice(TWENTIETHS // unit, count, replace=False)),
            most=pick(rng, (10, 20, 20, 40, 50, 100, 100, 200, 400, 1000)),
            ticks=pick(rng, (2, 4, 5)),
        )

    def draw(self, rng: np.random.Generator, held_out: bool = False) -> Document:
        page, lying, at_bar = begin(rng, held_out), bool(rng.random() < 0.35), bool(rng.random() < 0.5)
        top, right, gap = rng.uniform(14, 26), SIDE - rng.uniform(12, 22) - 18 * (lying and at_bar), rng.uniform(4, 10)

        def widest(texts, size):
            return max(page.width(text, size) for text in texts)

        def left_of(chart, size):
            return widest(chart.names if lying else chart.labels, size) + 8

        def fits(chart, size):
            left, (count, texts) = left_of(chart, size), (len(chart.names), chart.names)
            if lying:
                count, texts = chart.ticks, chart.labels
            step = (right - left) / count
            room = SIDE - right - 4 if lying else step
            is_free = not at_bar or widest(chart.values, size) <= room
            return left < 0.4 * SIDE and widest(texts, size) <= step - 2 and is_free

        draw_facts = partial(self.facts, lying=lying, at_bar=at_bar)
        chart, size = draw_fitting(rng, draw_facts, draw_size(rng, LEAST_SIZE, 15), fits)
        left, bottom = left_of(chart, size), SIDE - size - gap
        step = ((bottom - top) if lying else (right - left)) / len(chart.names)
        low, high = (left, right) if lying else (bottom, top)
        for tick, label in enumerate(chart.labels):
            at = low + (high - low) * tick / chart.ticks
            if lying:
                page.text(at - page.width(label, size) / 2, bottom + size + 1, label, size, 24)
                page.rule(at, top if held_out else bottom, at, bottom + 2, 0.6)
            else:
                page.text(left - 4 - page.width(label, size), at + 0.35 * size, label, size, min(24, tick + 2))
                page.rule(left - 2, at, right if held_out else left, at, 0.6)
        colours = [colour for colour in COLOURS.values() if page.stands_out(colour)]
        one_colour, thickness = pick(rng, colours), step * rng.uniform(0.5, 0.85)
        is_mixed, start = rng.random() < 0.5, top if lying else left
        for bar, (name, value, twentieth) in enumerate(zip(chart.names, chart.values, chart.twentieths)):
            tip, middle = low + (high - low) * twentieth / TWENTIETHS, start + (bar + 0.5) * step
            across, along = (middle - thickness / 2, middle + thickness / 2), sorted((low, tip))
            (x0, x1), (y0, y1) = (along, across) if lying else (across, along)
            page.box(x0, y0, x1, y1, fill=pick(rng, colours) if is_mixed else one_colour)
            if lying:
                page.text(left - 4 - page.width(name, size), middle + 0.35 * size, name, size, min(24, bar + 2))
            else:
                page.text(middle - page.width(name, size) / 2, bottom + size + 1, name, size, 24)
            if at_bar:
                x = tip + 2 if lying else middle - page.width(value, size) / 2
                page.text(x, middle + 0.35 * size if lying else tip - 2, value, size, min(24, bar + 2))
        page.rule(left, top, left, bottom)
        page.rule(left, bottom, right, bottom)
        return Document(page.finish(whole=True).image, chart)

    def ask(self, rng: np.random.Generator, chart: Chart, question_type: str) -> Turn:
        lines = {name: f"{name} {value}" for name, value in zip(chart.names, chart.values)}
        if question_type == "select":
            return ask_selection(rng, self.SELECT, lines)
        bar = int(rng.integers(len(chart.names)))
        lowest, highest = int(np.argmin(chart.twentieths)), int(np.argmax(chart.twentieths))
        missing = absent(rng, chart.names)
        asked = {
            "transcribe": (self.TRANSCRIBE, "\n".join(lines.values())),
            "value": (self.VALUE, chart.values[bar]),
            "highest": (self.HIGHEST, chart.names[highest]),
            "lowest": (self.LOWEST, chart.names[lowest]),
            "count": (self.COUNT, str(len(chart.names))),
            "no bar": (self.VALUE, f"There is no {missing.lower()}."),
        }
        templates, answer = asked[question_type]
        name = as_asked(rng, missing if question_type == "no bar" else chart.names[bar])
        subjects = {"value": name, "no bar": name, "highest": chart.values[highest], "lowest": chart.values[lowest]}
        return Turn(question_type, phrase(rng, templates, name=name), answer, subjects.get(question_type, ""))


READING = {"print lines": Lines(), "print receipts": Receipts(), "print tables": Tables(), "print charts": Charts()}
