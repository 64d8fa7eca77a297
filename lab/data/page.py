"""A page being drawn, with an account of what lies where, and what a camera or a file format does to it."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, features

from lab.data.text import CHARACTERS, pick


SIDE = 192  # pixels of a finished picture; all lengths on a page are in these
EM = 200  # pixels of the font that metrics are taken from
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 119, 180),
    "orange": (255, 150, 20),
    "purple": (128, 60, 190),
    "black": (20, 20, 20),
    "yellow": (240, 215, 40),
    "grey": (130, 130, 130),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
TWENTIETHS = 20  # a bar's value is named by twentieths of its axis
CLASSES = (
    *CHARACTERS,
    *(f"bar {value}" for value in range(1, TWENTIETHS + 1)),
    *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
)
NUMBERS = {name: number for number, name in enumerate(CLASSES, 1)}  # 0 is the empty class


class Item(NamedTuple):
    """A character, a bar or a shape: what it is, and where in the text or the chart it belongs.

    Args:
        name: one of `CLASSES`.
        line: from above, from 1.
        place: from the left in its text, from 1.
        letter: from the left in its word, from 1.
        width: in pixels of the finished picture.
        family: of the font, "" for what is not a character.
    """

    name: str
    line: int
    place: int
    letter: int
    width: float
    family: str = ""


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Args:
        image: 192 x 192, RGB.
        items: what is on it.
        find_items: takes x and y in pixels, arrays of one shape; gives the number of the item at each point, counted
            from 1, or 0.
    """

    image: Image.Image
    items: list[Item]
    find_items: Callable[[np.ndarray, np.ndarray], np.ndarray]


class Face:
    """A font file at any size: advances and kerning in ems, and the height of its letters."""

    def __init__(self, file: str, family: str):
        self.file, self.family = file, family
        measure = ImageFont.truetype(file, EM, layout_engine=ImageFont.Layout.BASIC)
        self.advances = {character: measure.getlength(character) / EM for character in " " + CHARACTERS}
        _, top, _, bottom = measure.getbbox("dTgy", anchor="ls")
        self.top, self.bottom = top / EM, bottom / EM  # from the base line, downwards
        self.shaper = ImageFont.truetype(file, EM) if features.check("raqm") else None
        self.kerns = np.full((128, 128), np.nan, np.float16)

    def kern(self, left: str, right: str) -> float:
        """What the space between two characters is changed by, in ems; needs Pillow with raqm, else 0."""
        if self.shaper is None:
            return 0.0
        key = ord(left), ord(right)
        if np.isnan(self.kerns[key]):
            pair = self.shaper.getlength(left + right, features=["-liga", "-clig", "-calt"]) / EM
            self.kerns[key] = pair - self.advances[left] - self.advances[right]
        return float(self.kerns[key])

    @lru_cache(maxsize=64)  # noqa: B019
    def at(self, size: float) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(self.file, size, layout_engine=ImageFont.Layout.BASIC)

    def offsets(self, text: str, size: float, spacing: float = 0) -> list[float]:
        """Where each character begins and, last, where the text ends; `spacing` is added to each, in ems."""
        ends, x = [0.0], 0.0
        for left, right in zip(text, text[1:] + " "):
            x += (self.advances[left] + (self.kern(left, right) if right != " " != left else 0) + spacing) * size
            ends.append(x)
        return ends


@cache
def load_face(file: str, family: str) -> Face:
    return Face(file, family)


def draw_colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Paper and ink; one in five times light on dark, one in five times faint or coloured."""
    paper = rng.integers(200, 256) + rng.integers(-25, 26, 3) * (rng.random() < 0.5)
    ink = rng.integers(0, 60, 3) if rng.random() < 0.6 else rng.integers(0, 170, 3)
    while paper.mean() - ink.mean() < 90:
        ink = ink // 2
    pair = [tuple(int(value) for value in np.clip(colour, 0, 255)) for colour in (paper, ink)]
    return (pair[1], pair[0]) if rng.random() < 0.2 else (pair[0], pair[1])


class Page:
    """A square page. Lengths are in pixels of the finished picture, whatever it is drawn at.

    Args:
        rng: all that is random.
        fonts: the font files of each family.
    """

    def __init__(self, rng: np.random.Generator, fonts: dict[str, list]):
        self.rng, self.fonts = rng, fonts
        self.scale = float(rng.choice((1, 1.5, 2, 3), p=(0.2, 0.3, 0.4, 0.1)))
        self.paper, self.ink = draw_colours(rng)
        self.side = round(SIDE * self.scale)
        self.image = self.background()
        self.pen = ImageDraw.Draw(self.image)
        self.items: list[Item] = []
        self.map = np.zeros((self.side, self.side), np.int16)
        self.new_face()

    def background(self) -> Image.Image:
        """The paper: plain, shaded from side to side, or blotched."""
        form = self.rng.random()
        if form < 0.65:
            return Image.new("RGB", (self.side, self.side), self.paper)
        spread = 10 if form < 0.9 else 22
        patches = self.rng.integers(2, 5) if form < 0.85 else 12
        coarse = np.asarray(self.paper) + self.rng.normal(0, spread, (patches, patches, 1)).clip(
            -2 * spread, 2 * spread
        )
        coarse = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
        return coarse.resize((self.side, self.side), Image.Resampling.BILINEAR)

    def new_face(self) -> None:
        """Takes a family, all alike, and one of its styles, the regular one most often."""
        family = pick(self.rng, sorted(self.fonts))
        files = self.fonts[family]
        regular = [file for file in files if file.stem.endswith(("400Regular", "Regular", "Sans", "Serif", "Mono"))]
        file = pick(self.rng, regular if regular and self.rng.random() < 0.35 else files)
        self.face = load_face(str(file), family)
        self.spacing = self.rng.normal(0, 0.015) if self.rng.random() < 0.3 else 0.0

    def width(self, text: str, size: float) -> float:
        return self.face.offsets(text, size, self.spacing)[-1]

    def fit(self, text: str, size: float, width: float) -> str:
        """As much of the text as fits into a width, at least a character."""
        offsets = self.face.offsets(text, size, self.spacing)
        return text[: max(1, sum(offset <= width for offset in offsets[1:]))].rstrip()

    def add(self, item: Item, left: float, top: float, right: float, bottom: float) -> None:
        """Says that an item fills a box, edges in pixels of the finished picture."""
        self.items.append(item)
        left, top, right, bottom = (max(0, round(edge * self.scale)) for edge in (left, top, right, bottom))
        self.map[top:bottom, left:right] = len(self.items)

    def text(
        self, x: float, base: float, text: str, size: float, line: int, ink: tuple[int, ...] | None = None
    ) -> float:
        """Writes a text whose base line begins at (x, base); returns where it ends. Size is that of an em."""
        font, scale, face = self.face.at(size * self.scale), self.scale, self.face
        offsets, letter = face.offsets(text, size, self.spacing), 0
        for place, character in enumerate(text):
            if character == " ":
                letter = 0
                continue
            letter += 1
            left, right = x + offsets[place], x + offsets[place + 1]
            self.pen.text((left * scale, base * scale), character, fill=ink or self.ink, font=font, anchor="ls")
            item = Item(character, line, place + 1, letter, right - left, face.family)
            self.add(item, left, base + face.top * size, right, base + face.bottom * size)
        return x + offsets[-1]

    def rule(self, x0: float, y0: float, x1: float, y1: float, width: float = 1, ink: tuple[int, ...] | None = None):
        points = [value * self.scale for value in (x0, y0, x1, y1)]
        self.pen.line(points, fill=ink or self.ink, width=max(1, round(width * self.scale)))

    def stands_out(self, colour: tuple[int, ...]) -> bool:
        """Whether what has this colour is seen on the paper."""
        return max(abs(a - b) for a, b in zip(colour, self.paper)) >= 60

    def box(self, left: float, top: float, right: float, bottom: float, shape: str = "rectangle", **options):
        """Draws Pillow's shape of this name; a filled one covers what was there."""
        edges = [round(value * self.scale) for value in (left, top, max(left, right), max(top, bottom))]
        getattr(self.pen, shape)(edges, **options)
        if options.get("fill"):
            left, top, right, bottom = (max(edge, 0) for edge in edges)
            self.map[top : bottom + 1, left : right + 1] = 0

    def polygon(self, points: list[tuple[float, float]], **options):
        self.pen.polygon([(x * self.scale, y * self.scale) for x, y in points], **options)

    def is_whole(self, matrix: np.ndarray) -> bool:
        """Whether the part of the items that is on the page stays in the picture that this view gives."""
        rows, columns = (np.flatnonzero(self.map.any(axis)) for axis in (1, 0))
        corners = [(x, y, 1) for x in columns[[0, -1]] for y in rows[[0, -1]]]
        u, v, w = np.linalg.inv(matrix) @ np.array(corners).T
        return bool((np.stack([u, v]) >= 0).all() and (np.stack([u, v]) < w * self.side).all())

    def finish(self, whole: bool = False) -> Picture:
        """The picture at its size, as a camera or a file format may leave it; if `whole`, with all that is on it."""
        rng, image = self.rng, self.image
        matrix = draw_view(rng, self.side)
        if whole and not self.is_whole(matrix):
            matrix = np.eye(3)
        if not np.array_equal(matrix, np.eye(3)):
            image = image.transform(
                image.size,
                Image.Transform.PERSPECTIVE,
                matrix.flatten()[:8],
                Image.Resampling.BILINEAR,
                fillcolor=self.paper,
            )
        if self.scale != 1:
            image = image.resize((SIDE, SIDE), pick(rng, (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)))
        return Picture(degrade(rng, image), self.items, self.finder(matrix))

    def finder(self, matrix: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        scale, item_map = self.scale, self.map

        def find_items(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            u, v, w = matrix @ np.stack([x.ravel() * scale, y.ravel() * scale, np.ones(x.size)])
            columns, rows = np.floor(u / w).astype(int), np.floor(v / w).astype(int)
            inside = (columns >= 0) & (columns < len(item_map)) & (rows >= 0) & (rows < len(item_map))
            found = item_map[rows.clip(0, len(item_map) - 1), columns.clip(0, len(item_map) - 1)]
            return np.where(inside, found, 0).reshape(x.shape)

        return find_items


def draw_view(rng: np.random.Generator, side: int) -> np.ndarray:
    """
    On two in five pages a slight turn, slant and perspective about the middle.

    Returns:
        (3, 3), takes points of the picture to points of the page, homogeneous, in pixels that the page is drawn at.
    """
    if rng.random() >= 0.4:
        return np.eye(3)
    angle, slant = rng.normal(0, 0.025), rng.uniform(-0.12, 0.28) * (rng.random() < 0.6)
    tilt = rng.uniform(-0.12, 0.12, 2) / side * (rng.random() < 0.5)
    middle = np.array([[1, 0, side / 2], [0, 1, side / 2], [0, 0, 1]])
    turn = np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [*tilt, 1]])
    matrix = middle @ turn @ np.array([[1, slant, 0], [0, 1, 0], [0, 0, 1]]) @ np.linalg.inv(middle)
    return matrix / matrix[2, 2]


def degrade(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Blur, noise and JPEG, each on some of the pictures."""
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    if rng.random() < 0.35:
        noise = rng.standard_normal((*image.size, 1), dtype=np.float32) * rng.uniform(2, 12)
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(rng.integers(40, 96)))
        image = Image.open(file).convert("RGB")
    return image
