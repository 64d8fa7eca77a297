"""Bar and line charts of three to five different values from 1 to 9, each with a letter below."""

from dataclasses import dataclass

import numpy as np

from lab.data.dense_labels import CANVAS, COLOURS, KEYS, MAX_VALUE
from lab.data.drawing import Canvas, Picture, Turn, ask_selection, phrase


TRANSCRIBE = ("List all values.", "Read the chart.", "What are the values in the chart?")
SELECT = ("Give the values of {names}.", "List {names}.")
VALUE = ("What is the value of {name}?", "How high is {name}?")
HIGHEST = ("Which is highest?", "Which one has the highest value?")
ABOVE = ("How many are above {value}?", "How many values are higher than {value}?")
COMPARE = ("Which is higher, {first} or {second}?", "Which has the higher value, {first} or {second}?")
QUESTION_TYPES = ("transcribe", "value", "highest", "above", "compare")


@dataclass(frozen=True)
class Chart:
    names: tuple[str, ...]
    values: tuple[int, ...]


def draw_chart(rng: np.random.Generator) -> Chart:
    count = int(rng.integers(3, 6))
    names = (KEYS[i] for i in rng.choice(len(KEYS), count, replace=False))
    return Chart(tuple(names), tuple(int(v) + 1 for v in rng.choice(MAX_VALUE, count, replace=False)))


def draw(rng: np.random.Generator, held_out: bool = False) -> Picture:
    """Bars or a line between axes from 0 to 9; with a grid behind if held out."""
    canvas, chart = Canvas(rng, held_out), draw_chart(rng)
    canvas.set_font(rng.uniform(10, 12.5))
    left, right = canvas.width("9") + rng.uniform(4, 8), CANVAS - rng.uniform(2, 8)
    bottom, top = CANVAS - canvas.line_height - rng.uniform(1, 5), rng.uniform(5, 12)
    height = lambda value: bottom - (bottom - top) * value / MAX_VALUE  # noqa: E731
    for tick in (0, MAX_VALUE):
        canvas.text(left - 2.5 - canvas.width(str(tick)), height(tick) - canvas.line_height / 2, str(tick))
    for tick in range(0, MAX_VALUE, 3) if held_out else ():
        canvas.line([(left, height(tick)), (right, height(tick))], 0.5)
    canvas.line([(left, top), (left, bottom), (right, bottom)])

    slot = (right - left) / len(chart.names)
    middles = [left + slot * (i + 0.5) for i in range(len(chart.names))]
    points = [(middle, height(value)) for middle, value in zip(middles, chart.values)]
    is_line, half = rng.random() < 0.5, slot * rng.uniform(0.25, 0.42)
    colour = tuple(COLOURS.values())[rng.integers(len(COLOURS) - 1)]  # not black
    if is_line:
        canvas.line(points)
    for place, (name, value, (x, y)) in enumerate(zip(chart.names, chart.values, points), 1):
        labels = {"place": place, "name": name, "number": value}
        canvas.text(x - canvas.width(name) / 2, bottom + 0.5, name, **labels)
        if is_line:
            box, shape = (x - 2.5, y - 2.5, x + 2.5, y + 2.5), "ellipse"
        else:
            box, shape = (x - half, y, x + half, bottom), "rectangle"
        canvas.labels.mark(*box, glyph=f"value {value}", **labels)
        canvas.box(*box, shape=shape, fill=colour, outline=canvas.ink)
    return canvas.finish(chart)


def ask(rng: np.random.Generator, chart: Chart, question_type: str) -> Turn:
    """A question of one type about the chart, with its answer."""
    first, second = (int(i) for i in rng.choice(len(chart.names), 2, replace=False))
    lines = {name: f"{name} {value}" for name, value in zip(chart.names, chart.values)}
    if question_type == "transcribe":
        return Turn(question_type, phrase(rng, TRANSCRIBE), "\n".join(lines.values()))
    if question_type == "select":
        return ask_selection(rng, SELECT, lines, least=2)
    if question_type == "value":
        return Turn(
            question_type, phrase(rng, VALUE, name=chart.names[first]), str(chart.values[first]), chart.names[first]
        )
    if question_type == "highest":
        highest = max(chart.values)
        return Turn(question_type, phrase(rng, HIGHEST), chart.names[chart.values.index(highest)], str(highest))
    if question_type == "above":
        value = int(rng.integers(1, MAX_VALUE))
        return Turn(question_type, phrase(rng, ABOVE, value=value), str(sum(v > value for v in chart.values)))
    question = phrase(rng, COMPARE, first=chart.names[first], second=chart.names[second])
    return Turn(question_type, question, chart.names[first if chart.values[first] > chart.values[second] else second])
