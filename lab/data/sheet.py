"""A contact sheet of drawn pictures with what lies under each spot: `python -m lab.data.sheet sheet.png`."""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lab.data.fonts import SPLITS, font_files
from lab.data.labels import GRID, PATCH, SPOTS, make_labels
from lab.data.page import CLASSES, SIDE, Picture
from lab.data.scenes import check_data, draw_picture


def mark_labels(picture: Picture, zoom: int) -> Image.Image:
    """The picture, larger, with the name of each spot on it: red where an item begins, else blue."""
    image = picture.image.resize((SIDE * zoom, SIDE * zoom), Image.Resampling.BICUBIC)
    pen, font, labels = ImageDraw.Draw(image), ImageFont.load_default(2.6 * zoom), make_labels(picture)
    for patch, names in enumerate(labels["name"]):
        for (down, across), name in np.ndenumerate(names):
            if name:
                x = (patch % GRID + (across + 0.5) / SPOTS[1]) * PATCH * zoom
                y = (patch // GRID + (down + 0.5) / SPOTS[0]) * PATCH * zoom
                text = CLASSES[name - 1]
                colour = "red" if labels["start"][patch, down, across] else "dodgerblue"
                pen.text((x, y), text if len(text) == 1 else text.split()[1][:2], colour, font, anchor="mm")
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="PNG file to write")
    parser.add_argument("--split", choices=SPLITS, default="train", help="fonts (default train)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first picture (default 0)")
    parser.add_argument("--count", type=int, default=12, help="of pictures (default 12)")
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--zoom", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="without the labels")
    args = parser.parse_args()
    check_data(parser)
    side, fonts = SIDE * args.zoom, font_files(args.split)
    sheet = Image.new(
        "RGB", (args.columns * (side + 8) - 8, -(-args.count // args.columns) * (side + 8) - 8), "magenta"
    )
    for number in range(args.count):
        picture = draw_picture(args.seed, args.first + number, fonts)
        image = picture.image.resize((side, side)) if args.plain else mark_labels(picture, args.zoom)
        sheet.paste(image, (number % args.columns * (side + 8), number // args.columns * (side + 8)))
    sheet.save(args.output)


if __name__ == "__main__":
    main()
