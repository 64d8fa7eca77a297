"""Draws the picture of README.md, docs/architecture.png.

python docs/draw_architecture.py
"""

import argparse
from pathlib import Path

import matplotlib


matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle


INK, GREY, RED = "#222222", "#666666", "#c0392b"
PLAIN, TOKENS, MEMORY, MODULE = "#ececec", "#cfe3f5", "#f9e2b8", "#f5c4b0"
ONE, TWO = (55.8, 26), (55.8, 42)  # the middle image token, and its row of the memory

argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
figure = plt.figure(figsize=(12, 6.6))
axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 120), ylim=(0, 66))
axes.axis("off")


def box(x, y, width, height, text, colour=PLAIN, **options):
    style = "round,pad=0,rounding_size=0.8"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc=colour, ec=INK, lw=1))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=INK, **options)


def squares(x, y, cells, size, colour):
    for i in range(cells * cells):
        corner = (x + i % cells * size, y + i // cells * size)
        axes.add_patch(Rectangle(corner, size, size, fc=colour, ec=INK, lw=0.6))


def frame(x, y, size):
    axes.add_patch(Rectangle((x, y), size, size, fc="none", ec=RED, lw=2, zorder=3))


def path(*points, colour=INK, style="-|>", line="-"):
    if len(points) > 2:
        axes.plot(*zip(*points[:-1]), color=colour, lw=1.2)
    arrow = {"arrowstyle": style, "color": colour, "lw": 1.2, "linestyle": line, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=arrow)


def note(x, y, text, **options):
    axes.text(x, y, text, **{"color": GREY, "fontsize": 10, "va": "center", "ha": "center", **options})


# image, tower
squares(3, 29, 4, 2.5, "white")
note(8, 26.6, "image", color=INK, fontsize=11)
path((13.6, 34), (18, 34))
box(18, 20, 9, 28, "vision\ntower", fontsize=11)

# lower road: image tokens
path((27, 26), (37, 26))
note(32, 27.8, "one layer")
box(37, 22, 11, 8, "projector\n$s \\times s$ to 1", TOKENS, fontsize=11)
path((48, 26), (53.6, 26))
for dy in (-4, 0, 4):
    squares(ONE[0] - 1.5, ONE[1] - 1.5 + dy, 1, 3, TOKENS)
frame(ONE[0] - 1.5, ONE[1] - 1.5, 3)
note(ONE[0], 18.6, "image tokens", color=INK, fontsize=11)

# upper road: memory
path((27, 42), (37, 42))
note(32, 46.2, "memory:\nseveral\nlayers")
squares(37, 37.2, 6, 1.6, MEMORY)
frame(37 + 3.2, 37.2 + 3.2, 3.2)
note(41.8, 49.4, "keys, values:\nevery patch", color=INK, fontsize=11)
path((47.2, 42), (53.6, 42))
for dy in (-4, 0, 4):
    squares(TWO[0] - 1.5, TWO[1] - 1.5 + dy, 2, 1.5, MEMORY)
frame(TWO[0] - 1.5, TWO[1] - 1.5, 3)
note(ONE[0], 49.4, "one window\na token", color=INK, fontsize=11)
path((ONE[0], 32.2), (ONE[0], 35.8), colour=RED, style="<|-|>", line=":")
note(57, 34, "same order", color=RED, ha="left")

# decoder
axes.add_patch(FancyBboxPatch((76, 5), 41, 54.5, boxstyle="round,pad=0,rounding_size=1", fc="#fafafa", ec=INK, lw=1))
note(96.5, 61.8, "decoder, its own code untouched", color=INK, fontsize=11)
box(82, 8, 29, 5, "embeddings, image tokens in place", fontsize=10.5)
for y, name in ((17.5, "decoder layer"), (37.5, "decoder layer")):
    box(82, y, 29, 5, name, fontsize=11)
    path((96.5, y + 5), (96.5, y + 9.5))
    note(97.5, y + 7, "hidden states of image tokens", ha="left", fontsize=9)
    box(82, y + 9.5, 29, 6, "Vision Remember", MODULE, fontsize=11.5, weight="bold")
path((96.5, 13), (96.5, 17.5))
path((96.5, 33), (96.5, 37.5))
path((96.5, 53), (96.5, 57))
note(97.5, 55, "and so on", ha="left", fontsize=9)
path((58.2, 26), (66, 26), (66, 12), (82, 12))
box(18, 6, 9, 6, "text", fontsize=11)
path((27, 9), (82, 9))
for y in (30, 50):
    path((58.2, 42), (71, 42), (71, y), (82, y))

note(
    3,
    1.8,
    r"$h \leftarrow h + \mathrm{out}\,(\mathrm{softmax}(q\,k^{\top}/\sqrt{d})\,v)$   with   "
    r"$q = \mathrm{query}(\mathrm{norm}\,h)$,   $k, v = \mathrm{key}, \mathrm{value}\,(\mathrm{norm}\,m)$;   "
    r"$h$: hidden state of one image token,   $m$: the patches of its own window",
    ha="left",
    color=INK,
)
target = Path(__file__).with_name("architecture.png")
figure.savefig(target, dpi=130, facecolor="white")
print(target)
