"""What pictures can show, and the dense labels that say what lies where."""

import numpy as np
from PIL import Image


ITEMS = (
    "tea", "coffee", "milk", "juice", "water", "beer", "wine", "cider", "cocoa", "soda",
    "bread", "roll", "toast", "bagel", "cake", "pie", "tart", "muffin", "scone", "waffle",
    "apple", "pear", "plum", "grape", "melon", "lemon", "cherry", "banana", "orange", "fig",
    "soup", "salad", "pasta", "pizza", "rice", "beans", "fish", "ham", "bacon", "egg",
    "cheese", "butter", "honey", "jam", "salt", "pepper", "sugar", "olive", "onion", "tomato",
    "potato", "carrot", "candle", "soap", "pencil", "paper",
)  # fmt: skip
ROWS = ("tea", "pie", "fig", "ham", "egg", "jam", "rye", "oil", "nut", "pea", "cod", "bun")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
KEYS = LETTERS[:8]  # of columns and of bars
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 119, 180),
    "orange": (255, 150, 20),
    "purple": (128, 60, 190),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
MAX_VALUE = 9

CANVAS = 96  # the model's image side; pictures are drawn at one to three times that
LABEL_TYPES = {
    "glyph": (
        *LETTERS,
        *"0123456789",
        *(f"value {value}" for value in range(1, MAX_VALUE + 1)),
        *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
    ),
    "line": tuple(range(1, 7)),  # of text, from above
    "place": tuple(range(1, 7)),  # from the left: of a character in its line, a cell in its row, a bar in its chart
    "name": tuple(dict.fromkeys((*ITEMS, *ROWS, *KEYS))),  # of the row or the bar it belongs to
    "column": tuple(KEYS),  # the letter above
    "tens": tuple(range(10)),  # of the number in its row or cell, or of its bar
    "ones": tuple(range(10)),
}
PLANES = {label_type: plane for plane, label_type in enumerate(LABEL_TYPES)}
CLASSES = {
    label_type: {value: number for number, value in enumerate(values, 1)} for label_type, values in LABEL_TYPES.items()
}


class Labels:
    """For each type of label a map of 96 x 96, with 0 where there is nothing to name: `maps`, (types, 96, 96)."""

    def __init__(self):
        self.maps = np.zeros((len(LABEL_TYPES), CANVAS, CANVAS), dtype=np.uint8)

    def mark(self, left: float, top: float, right: float, bottom: float, number: int | None = None, **labels):
        """Names a box, in 96ths of the picture's side; a number of at most two digits is named by its tens and ones."""
        if number is not None:
            labels |= {"tens": number // 10, "ones": number % 10}
        x, y = max(round(left), 0), max(round(top), 0)
        box = slice(y, max(round(bottom), y + 1)), slice(x, max(round(right), x + 1))
        for label_type, value in labels.items():
            self.maps[PLANES[label_type]][box] = CLASSES[label_type][value]

    def turn(self, angle: float):
        """Turns all maps by `angle` degrees, as Pillow turns a picture."""
        self.maps = np.stack([np.asarray(Image.fromarray(plane).rotate(angle)) for plane in self.maps])
