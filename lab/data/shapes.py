"""The coarse control: one to four large shapes, their colours and their number."""

from dataclasses import dataclass

import numpy as np

from lab.data.dense_labels import CANVAS, COLOURS, SHAPES
from lab.data.drawing import Canvas, Picture, Turn, phrase


COUNT = ("How many shapes are there?", "How many shapes do you see?", "Count the shapes.")
COLOUR = ("What colour is the {shape}?", "Which colour has the {shape}?")
QUESTION_TYPES = ("count", "colour")


@dataclass(frozen=True)
class Shape:
    name: str
    colour: str


def draw_shape(canvas: Canvas, shape: Shape, x: float, y: float, radius: float, outlined: bool):
    """A shape around (x, y), and its label under the whole of it."""
    left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    paint = {"fill": COLOURS[shape.colour], "outline": canvas.ink if outlined else None}
    canvas.labels.mark(left, top, right, bottom, glyph=f"{shape.colour} {shape.name}")
    if shape.name == "triangle":
        canvas.polygon([(x, top), (right, bottom), (left, bottom)], **paint)
    elif shape.name == "cross":
        third = radius / 3
        canvas.box(left, y - third, right, y + third, **paint)
        canvas.box(x - third, top, x + third, bottom, **paint)
    else:
        canvas.box(left, top, right, bottom, shape="ellipse" if shape.name == "circle" else "rectangle", **paint)


def draw(rng: np.random.Generator, held_out: bool = False) -> Picture:
    """Different shapes, each in a quarter of the picture; outlined in ink if held out."""
    canvas = Canvas(rng, held_out)
    names = rng.permutation(SHAPES)[: rng.integers(1, len(SHAPES) + 1)]
    shapes = [Shape(str(name), list(COLOURS)[rng.integers(len(COLOURS))]) for name in names]
    canvas.box(0, 0, CANVAS, CANVAS, fill=tuple(max(colour, 205) for colour in canvas.paper))  # no colour is as light
    half = CANVAS / 2
    for shape, quarter in zip(shapes, rng.permutation(4)):
        radius = rng.uniform(11, 20)
        x, y = (half * offset + rng.uniform(radius + 1, half - radius - 1) for offset in divmod(int(quarter), 2))
        draw_shape(canvas, shape, x, y, radius, held_out)
    return canvas.finish(shapes)


def ask(rng: np.random.Generator, shapes: list[Shape], question_type: str) -> Turn:
    """A question of one type about the shapes, with its answer."""
    if question_type == "count":
        return Turn(question_type, phrase(rng, COUNT), str(len(shapes)))
    shape = shapes[rng.integers(len(shapes))]
    return Turn(question_type, phrase(rng, COLOUR, shape=shape.name), shape.colour)
