"""Dense labels of a picture: what lies under each spot of each patch, and where in its text or chart it belongs."""

import numpy as np

from lab.data.page import NUMBERS, SIDE, Picture


PATCH = 12
GRID = SIDE // PATCH
SPOTS = (2, 4)  # in a patch, down and across: every 6 pixels down and every 3 across
COUNTS = {"line": 24, "place": 48, "letter": 12}  # what lies further on takes the last class


def find_spots(picture: Picture) -> np.ndarray:
    """The number of the item under each spot, counted from 1, or 0: (patches, down, across)."""
    rows, columns = ((np.arange(GRID * count) + 0.5) * PATCH / count for count in SPOTS)
    return by_patch(picture.find_items(*np.meshgrid(columns, rows)))


def by_patch(spots: np.ndarray) -> np.ndarray:
    """From rows and columns of spots to (patches, down, across)."""
    return spots.reshape(GRID, SPOTS[0], GRID, SPOTS[1]).transpose(0, 2, 1, 3).reshape(GRID * GRID, *SPOTS)


def by_row(spots: np.ndarray) -> np.ndarray:
    """From (patches, down, across) to rows and columns of spots."""
    return spots.reshape(GRID, GRID, *SPOTS).transpose(0, 2, 1, 3).reshape(GRID * SPOTS[0], GRID * SPOTS[1])


def make_labels(picture: Picture) -> dict[str, np.ndarray]:
    """
    What the heads of a tower should say.

    Returns:
        "name", (patches, down, across): what is under each spot, a number of `NUMBERS`; "start", of this shape: 1 where
        an item begins, 0 where it goes on, -100 where there is none; "line", "place" and "letter", (patches, down): of
        the leftmost item in each row of spots. 0 is nothing.
    """
    items = find_spots(picture)
    starts = by_patch(np.diff(by_row(items), axis=1, prepend=0) != 0)
    first = np.take_along_axis(items, (items > 0).argmax(-1)[..., None], -1)[..., 0]
    labels = {
        "name": np.asarray([0, *(NUMBERS[item.name] for item in picture.items)])[items],
        "start": np.where(items > 0, starts, -100),
    }
    for kind, most in COUNTS.items():
        labels[kind] = np.asarray([0, *(min(getattr(item, kind), most) for item in picture.items)])[first]
    return labels
