"""What is drawn for the tower: pages of print, lines, receipts, tables, charts and shapes, from a seed and an index."""

import argparse

import numpy as np

from lab.data.fonts import SPLITS, font_files
from lab.data.page import COLOURS, SHAPES, SIDE, TWENTIETHS, Item, Page, Picture, draw_colours
from lab.data.text import (
    load_words,
    pick,
    random_digits,
    random_number,
    random_price,
    random_string,
    random_text,
    random_word,
)


def draw_size(rng: np.random.Generator, least: float = 10, most: float = 22) -> float:
    """An em in pixels, log-uniform."""
    return float(np.exp(rng.uniform(np.log(least), np.log(most))))


def dense_page(page: Page) -> None:
    """Lines from top to bottom; at times each in a font, a size or a colour of its own."""
    rng, size, margin = page.rng, draw_size(page.rng), page.rng.uniform(0, 14)
    mixed, leading, line = rng.random() < 0.3, rng.uniform(1.05, 1.5), 0
    base = margin * rng.random() + size * 0.9
    while base < SIDE - size * 0.2:
        line += 1
        if mixed:
            page.new_face()
        x = margin + rng.exponential(8) * (rng.random() < 0.3)
        text = page.fit(random_text(rng, int(3 * SIDE / size)), size, SIDE - x - margin * rng.random())
        if rng.random() < 0.06:  # a headline in inverse
            band = (0, base + size * page.face.top - 2, SIDE, base + size * page.face.bottom + 2)
            page.box(*band, fill=page.ink)
            page.text(x, base, text, size, line, page.paper)
        else:
            page.text(x, base, text, size, line)
        if mixed and rng.random() < 0.5:
            size = draw_size(rng)
        base += size * leading


def few_lines(page: Page) -> None:
    """One to seven lines, up to large print, some in boxes, some underlined or coloured."""
    rng, count, base, line = page.rng, page.rng.integers(1, 8), page.rng.uniform(0, 50), 0
    for _ in range(count):
        size = draw_size(rng, 10, 64 if count < 4 else 26)
        base += size * rng.uniform(1.0, 1.6)
        if base > SIDE - size * 0.2:
            break
        line += 1
        if rng.random() < 0.5:
            page.new_face()
        text = page.fit(random_text(rng, rng.integers(1, 40)), size, SIDE - 8)
        width = page.width(text, size)
        x, ink = rng.uniform(2, max(SIDE - width - 2, 3)), None
        edges = (x - 4, base + size * page.face.top - 3, x + width + 4, base + size * page.face.bottom + 3)
        frame = rng.random()
        if frame < 0.1:
            page.box(*edges, shape=pick(rng, ("rectangle", "rectangle", "rounded_rectangle")), outline=page.ink)
        elif frame < 0.2:
            paper, ink = draw_colours(rng)
            page.box(*edges, fill=paper)
        elif frame < 0.3:
            page.rule(x, edges[3], x + width, edges[3])
        page.text(x, base, text, size, line, ink)


def receipt(page: Page) -> None:
    """A heading, items with prices in a second column, rules, a total, a last line."""
    rng, size, margin = page.rng, draw_size(page.rng, 10, 18), page.rng.uniform(3, 16)
    leading, right, line = rng.uniform(1.1, 1.6), SIDE - page.rng.uniform(3, 16), 0
    base = rng.uniform(0.9, 2) * size
    rows = [(random_text(rng, rng.integers(4, 18)), None)]
    for _ in range(rng.integers(3, 12)):
        name = " ".join(random_word(rng) for _ in range(rng.integers(1, 3)))
        amount = pick(rng, ("", "", f"{random_digits(rng, 1, 1)} ", f"{random_digits(rng, 1, 2)} x "))
        rows.append((amount + name, random_price(rng)))
    rows.append(
        (pick(rng, ("Total", "TOTAL", "Total:", "Sum", "Subtotal", "Amount due", "Tax", "Balance")), random_price(rng))
    )
    rows.append((random_text(rng, rng.integers(4, 20)), None))
    dots = rng.random() < 0.2
    for name, price in rows:
        if base > SIDE - size * 0.2:
            break
        line += 1
        if price is None:
            name = page.fit(name, size, right - margin)
            page.text((SIDE - page.width(name, size)) / 2, base, name, size, line)
        else:
            at = right - page.width(price, size)
            end = page.text(margin, base, page.fit(name, size, max(at - margin - 6, 1)), size, line)
            page.text(at, base, price, size, line)
            if dots and at - end > 12:
                page.text(end + 4, base, page.fit("." * 40, size, at - end - 8), size, line)
        if rng.random() < 0.15:
            y = base + size * 0.35
            page.rule(margin, y, right, y)
        base += size * leading


def table(page: Page) -> None:
    """Cells of words, numbers or strings, with rules or shaded rows or neither."""
    rng, size = page.rng, draw_size(page.rng, 10, 16)
    columns, step = int(rng.integers(2, 6)), size * rng.uniform(1.3, 2)
    top, left = rng.uniform(2, 30), rng.uniform(2, 14)
    edges = left + np.cumsum([0, *rng.dirichlet(np.full(columns, 6.0))]) * (SIDE - 2 * left)
    rows = int(min(rng.integers(2, 13), (SIDE - top) // step))
    rules, bottom = rng.random(2) < 0.5, top + rows * step
    forms = [pick(rng, (random_word, random_number, random_number, random_string)) for _ in range(columns)]
    shaded = tuple((7 * paper + ink) // 8 for paper, ink in zip(page.paper, page.ink)) if rng.random() < 0.3 else None
    for row in range(rows):
        y = top + row * step
        if shaded and row % 2 == 0:
            page.box(edges[0], y, edges[-1], y + step, fill=shaded)
        if rules[0]:
            page.rule(edges[0], y, edges[-1], y)
        for column, form in enumerate(forms):
            inner = edges[column + 1] - edges[column] - 6
            text = page.fit((random_word if row == 0 else form)(rng), size, inner)
            space = (inner - page.width(text, size)) * (form is random_number)
            page.text(edges[column] + 3 + max(space, 0), y + (step + size * 0.7) / 2, text, size, row + 1)
    if rules[0]:
        page.rule(edges[0], bottom, edges[-1], bottom)
    for edge in edges if rules[1] else ():
        page.rule(edge, top, edge, bottom)


def chart(page: Page) -> None:
    """Bars on an axis with numbers, names beneath or beside them; bars stand or lie."""
    rng, count, lying = page.rng, int(page.rng.integers(2, 8)), page.rng.random() < 0.3
    left, right = rng.uniform(26, 46), SIDE - rng.uniform(4, 16)
    top, bottom = rng.uniform(14, 40), SIDE - rng.uniform(18, 34)
    size, grid, one_colour = draw_size(rng, 10, 14), rng.random() < 0.5, rng.random() < 0.5
    start, end, low, high = (top, bottom, left, right) if lying else (left, right, bottom, top)
    title = page.fit(random_text(rng, 20), size, SIDE - 10)
    if rng.random() < 0.6:
        page.text(rng.uniform(2, SIDE - 4 - page.width(title, size)), top - 4, title, size, 1)
    ticks, unit = int(pick(rng, (2, 4, 5, 10))), int(pick(rng, (1, 1, 2, 5, 10, 20, 25, 50, 100)))
    for tick in range(ticks + 1):
        if lying and ticks > 5 and tick % 2:
            continue
        at, label = low + (high - low) * tick / ticks, str(tick * unit)
        if lying:
            page.text(at - page.width(label, size) / 2, bottom + size + 1, label, size, 24)
            page.rule(at, top if grid else bottom, at, bottom + 2, 0.5)
        elif (bottom - top) / ticks >= size or tick % 2 == 0:
            page.text(left - 4 - page.width(label, size), at + size * 0.35, label, size, min(24, 2 + ticks - tick))
            page.rule(left - 2, at, right if grid else left, at, 0.5)
    colours, step = list(COLOURS.values()), (end - start) / count
    thickness, colour = step * rng.uniform(0.5, 0.9), pick(rng, colours)
    for bar in range(count):
        value = int(rng.integers(1, TWENTIETHS + 1))
        tip, at = low + (high - low) * value / TWENTIETHS, start + (bar + 0.5) * step
        box = (
            (left, at - thickness / 2, tip, at + thickness / 2)
            if lying
            else (at - thickness / 2, tip, at + thickness / 2, bottom)
        )
        page.box(*box, fill=colour if one_colour else pick(rng, colours), outline=page.ink if grid else None)
        page.add(Item(f"bar {value}", 1, bar + 1, 1, box[2] - box[0]), *box)
        name = page.fit(random_word(rng), size, left - 5 if lying else step - 2)
        if lying:
            page.text(left - 4 - page.width(name, size), at + size * 0.35, name, size, min(24, bar + 2))
        else:
            page.text(at - page.width(name, size) / 2, bottom + size + 1, name, size, 24)
    page.rule(left, top, left, bottom)
    page.rule(left, bottom, right, bottom)


def shapes(page: Page) -> None:
    """One to nine shapes of a named colour, in cells of a grid, some with a word beside them."""
    rng, cells = page.rng, int(page.rng.integers(1, 4))
    step, place = SIDE / cells, 0
    for cell in range(cells * cells):
        if rng.random() < 0.25:
            continue
        place += 1
        colour, shape = pick(rng, list(COLOURS)), pick(rng, SHAPES)
        if not page.stands_out(COLOURS[colour]):
            continue
        radius = step * rng.uniform(0.18, 0.42)
        x = (cell % cells + 0.5) * step + rng.uniform(-1, 1) * (step / 2 - radius)
        y = (cell // cells + 0.5) * step + rng.uniform(-1, 1) * (step / 2 - radius)
        draw_shape(page, shape, COLOURS[colour], x, y, radius)
        item, edge = Item(f"{colour} {shape}", cell // cells + 1, place, 1, 2 * radius), 0.8 * radius
        page.add(item, x - edge, y - edge, x + edge, y + edge)
        if rng.random() < 0.3:
            size = draw_size(rng, 10, 16)
            text = page.fit(random_word(rng), size, step)
            page.text(x - page.width(text, size) / 2, min(y + radius + size, SIDE - 3), text, size, cell // cells + 1)


def draw_shape(page: Page, shape: str, colour: tuple[int, ...], x: float, y: float, radius: float) -> None:
    """One of `SHAPES` about (x, y)."""
    r, third = radius, radius / 3
    if shape in ("circle", "square"):
        page.box(x - r, y - r, x + r, y + r, shape="ellipse" if shape == "circle" else "rectangle", fill=colour)
    elif shape == "cross":
        page.box(x - r, y - third, x + r, y + third, fill=colour)
        page.box(x - third, y - r, x + third, y + r, fill=colour)
    else:
        corners = {"triangle": [(0, -r), (r, r), (-r, r)], "diamond": [(0, -r), (r, 0), (0, r), (-r, 0)]}[shape]
        page.polygon([(x + dx, y + dy) for dx, dy in corners], fill=colour)


SCENES = {dense_page: 0.52, few_lines: 0.2, receipt: 0.08, table: 0.07, chart: 0.07, shapes: 0.06}


def draw_picture(seed: int, index: int, fonts: dict[str, list]) -> Picture:
    """The picture of this seed and index, in these fonts."""
    rng = np.random.default_rng((seed, index))
    page = Page(rng, fonts)
    scene = list(SCENES)[rng.choice(len(SCENES), p=list(SCENES.values()))]
    scene(page)
    return page.finish()


def check_data(parser: argparse.ArgumentParser) -> None:
    """Ends the command with one line that says what to fetch, if fonts or words are missing."""
    try:
        load_words()
        for split in SPLITS:
            font_files(split)
    except (FileNotFoundError, ImportError) as error:
        parser.error(str(error))
