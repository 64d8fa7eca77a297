"""What all drawn domains share: fonts, colours, a canvas that keeps account of what lies where, and questions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lab.data.dense_labels import CANVAS, Labels


FONTS = (
    "default",
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "STIXGeneral",
    "cmr10",
    "cmss10",
)
HELD_OUT_FONTS = ("DejaVuSans-Oblique", "DejaVuSerif-Italic", "DejaVuSansMono-Oblique", "STIXGeneralBol", "cmtt10")


@dataclass(frozen=True)
class Picture:
    """A drawn picture.

    Args:
        image: square, RGB.
        labels: what lies where.
        facts: what the picture shows; its domain's questions are asked about them.
    """

    image: Image.Image
    labels: Labels
    facts: Any


@dataclass(frozen=True)
class Turn:
    """One question of a given type, its answer, and what it asks about, if that has a name, as it is asked."""

    question_type: str
    question: str
    answer: str
    subject: str = ""

    @property
    def full_answer(self) -> str:
        """The answer after its subject: who says a name first finds what stands beside it as when reading on."""
        if not self.subject:
            return self.answer
        return f"{self.subject} {'is not there.' if self.question_type.startswith('no ') else self.answer}"


def generator(seed: int, index: int) -> np.random.Generator:
    """The random numbers of one sample."""
    return np.random.default_rng((seed, index))


@lru_cache(maxsize=1024)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that Pillow or matplotlib carries in its wheel."""
    if name == "default":
        return ImageFont.load_default(size)
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")), size)


def draw_colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Paper and ink: dark on light, or now and then light on dark."""
    light = tuple(int(value) for value in rng.integers(205, 256, 3))
    dark = tuple(int(value) for value in rng.integers(0, 100, 3))
    return (dark, light) if rng.random() < 0.15 else (light, dark)


def add_noise(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Grey noise on half of the pictures."""
    if rng.random() >= 0.5:
        return image
    noise = rng.standard_normal((*image.size, 1), dtype=np.float32) * rng.uniform(2, 10)
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def pixels(image: Image.Image, side: int = CANVAS) -> np.ndarray:
    """What the image processor makes of a square picture: (3, side, side), values in -1 to 1."""
    small = image.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


class Canvas:
    """A picture being drawn, and beside it the map of what lies where. Lengths are in 96ths of its side."""

    def __init__(self, rng: np.random.Generator, held_out: bool = False):
        self.rng, self.scale = rng, rng.uniform(1, 3)
        self.paper, self.ink = draw_colours(rng)
        fonts = HELD_OUT_FONTS if held_out else FONTS
        self.font_name = fonts[rng.integers(len(fonts))]
        self.slant = 0 if held_out or rng.random() < 0.5 else rng.uniform(-0.15, 0.35)
        side = round(CANVAS * self.scale)
        self.image, self.labels = Image.new("RGB", (side, side), self.paper), Labels()
        self.pen = ImageDraw.Draw(self.image)
        self.set_font(12)
        if not held_out and rng.random() < 0.3:
            self.clutter()

    def set_font(self, size: float):
        self.font = load_font(self.font_name, round(size * self.scale))

    def fit_font(self, largest: float, smallest: float, fits: Callable[[], bool]):
        """Takes the largest font size in these bounds for which `fits()` holds, else the smallest."""
        for size in np.arange(largest, smallest - 0.01, -0.5):
            self.set_font(size)
            if fits():
                return

    def width(self, text: str) -> float:
        return self.font.getlength(text) / self.scale

    @property
    def line_height(self) -> float:
        return sum(self.font.getmetrics()) / self.scale

    def text(self, x: float, y: float, text: str, **labels):
        """Writes a line whose upper left corner is (x, y). A character's place is its own, if none is given."""
        self.write(x * self.scale, y * self.scale, text)
        for i, character in enumerate(text):
            edges = (x + self.width(text[:i]), y, x + self.width(text[: i + 1]), y + self.line_height)
            self.labels.mark(*edges, **{"glyph": character, "place": i + 1, **labels})

    def write(self, x: float, y: float, text: str):
        """Draws a text, in pixels; slanted, if letters slant here, around the middle of its height."""
        if not self.slant:
            self.pen.text((x, y), text, fill=self.ink, font=self.font)
            return
        left, top, height = math.floor(x), math.floor(y), sum(self.font.getmetrics())
        mask = Image.new("L", (round(self.font.getlength(text)) + 2 * height, height))
        ImageDraw.Draw(mask).text((height + x - left, y - top), text, fill=255, font=self.font)
        slanted = (1, self.slant, -self.slant * height / 2, 0, 1, 0)
        mask = mask.transform(mask.size, Image.Transform.AFFINE, slanted, Image.Resampling.BICUBIC)
        self.image.paste(self.ink, (left - height, top), mask)

    def clutter(self):
        """One to three thin lines from edge to edge, anywhere."""
        for across in self.rng.random(self.rng.integers(1, 4)) < 0.7:
            at = self.rng.uniform(0, CANVAS)
            self.line([(0, at), (CANVAS, at)] if across else [(at, 0), (at, CANVAS)], 0.5)

    def box(self, left: float, top: float, right: float, bottom: float, shape="rectangle", **options):
        """Draws Pillow's shape of this name."""
        corners = [round(v * self.scale) for v in (left, top, max(left, right - 0.5), max(top, bottom - 0.5))]
        getattr(self.pen, shape)(corners, **options)

    def line(self, points: Sequence[tuple[float, float]], width: float = 1):
        scaled = [(x * self.scale, y * self.scale) for x, y in points]
        self.pen.line(scaled, fill=self.ink, width=max(1, round(width * self.scale)))

    def polygon(self, points: Sequence[tuple[float, float]], **options):
        self.pen.polygon([(x * self.scale, y * self.scale) for x, y in points], **options)

    def finish(self, facts: Any, angle: float = 0) -> Picture:
        """The picture with its map, turned by `angle` degrees, with noise or without."""
        image = self.image
        if angle:
            image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=self.paper)
            self.labels.turn(angle)
        return Picture(add_noise(self.rng, image), self.labels, facts)


def phrase(rng: np.random.Generator, templates: tuple[str, ...], **values: object) -> str:
    """One of the templates, at times without its capital or its final mark."""
    text = templates[rng.integers(len(templates))].format(**values)
    if rng.random() < 0.4:
        text = text[0].lower() + text[1:]
    return text[:-1] if rng.random() < 0.25 else text


def ask_selection(rng: np.random.Generator, templates: tuple[str, ...], lines: dict[str, str], least: int = 1) -> Turn:
    """Asks for at least so many of the lines, by their names, in an order of its own."""
    names = list(lines)
    chosen = [names[i] for i in rng.permutation(len(names))[: rng.integers(least, len(names) + 1)]]
    return Turn("select", phrase(rng, templates, names=", ".join(chosen)), "\n".join(lines[name] for name in chosen))
