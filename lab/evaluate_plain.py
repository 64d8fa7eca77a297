"""What a newcomer would try: ten plain pictures, dark on white, in ten of the held-out families, 28 questions.

python -m lab.evaluate_plain --subfolder reader --json lab/results/reader_plain.json
python -m lab.evaluate_plain                                  # the checkpoint at the root
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lab.data.drawing import Turn
from lab.data.fonts import font_files
from lab.evaluate import Case, add_options, load, measure
from lab.training import describe_machine


SIDE, MARGIN, COLUMN = 240, 12, 70
PAGES = (  # lines of cells, a size in pixels, and questions with their answers
    ([["Hello World"]], 22, [Turn("transcribe", "Transcribe the image.", "Hello World")]),
    (
        [["Meeting at 3 pm"], ["Room 204"], ["Bring the report"]],
        22,
        [
            Turn("transcribe", "Transcribe the image.", "Meeting at 3 pm\nRoom 204\nBring the report"),
            Turn("last", "What does the last line say?", "Bring the report"),
            Turn("count", "How many lines are there?", "3"),
        ],
    ),
    (
        [["Wi-Fi password:"], ["kT7#pq92"]],
        22,
        [
            Turn("last", "What does the last line say?", "kT7#pq92"),
            Turn("first", "What does the first line say?", "Wi-Fi password:"),
        ],
    ),
    (
        [["Dear Anna,"], ["see you on Friday"], ["Tom"]],
        22,
        [
            Turn("first", "What does the first line say?", "Dear Anna,"),
            Turn("number", "Read line 2.", "see you on Friday"),
        ],
    ),
    (
        [["Coffee", "3.50"], ["Bagel", "2.25"], ["Juice", "4.00"], ["Total", "9.75"]],
        22,
        [
            Turn("price", "How much is the coffee?", "3.50", "coffee"),
            Turn("total", "What is the total?", "9.75"),
            Turn("item", "What costs 2.25?", "Bagel", "2.25"),
            Turn("dearest", "Which is the most expensive?", "Juice", "4.00"),
            Turn("no item", "How much is the tea?", "There is no tea.", "tea"),
            Turn("count", "How many items are there?", "3"),
        ],
    ),
    (
        [["CAFE ROMA"], ["Espresso", "$2.80"], ["Cappuccino", "$3.90"], ["Total", "$6.70"]],
        22,
        [
            Turn("price", "How much is the espresso?", "$2.80", "espresso"),
            Turn("total", "What is the total?", "$6.70"),
            Turn("cheapest", "Which is the cheapest?", "Espresso", "$2.80"),
            Turn(
                "transcribe",
                "Transcribe the image.",
                "CAFE ROMA\nEspresso $2.80\nCappuccino $3.90\nTotal $6.70",
            ),
        ],
    ),
    (
        [["Milk", "1.19"], ["Bread", "2.49"], ["Eggs", "3.29"], ["Butter", "2.99"], ["Total", "9.96"]],
        22,
        [
            Turn("price", "How much is the bread?", "2.49", "bread"),
            Turn("price", "Price of eggs?", "3.29", "eggs"),
            Turn("total", "What is the total?", "9.96"),
        ],
    ),
    (
        [["", "Age", "Height"], ["Anna", "31", "165"], ["Bob", "27", "182"], ["Carl", "45", "178"]],
        20,
        [
            Turn("cell", "What is the Age of Bob?", "27", "Age Bob"),
            Turn("cell", "What is the Height of Anna?", "165", "Height Anna"),
            Turn("highest", "Which has the highest Age?", "Carl", "Age 45"),
            Turn("count", "How many rows are there?", "3"),
        ],
    ),
    (
        [["", "Jan", "Feb"], ["Rent", "800", "820"], ["Food", "310", "295"]],
        22,
        [
            Turn("cell", "What is Feb of Rent?", "820", "Feb Rent"),
            Turn("cell", "What is Jan of Food?", "310", "Jan Food"),
        ],
    ),
    (
        [["Open 9:00 - 18:00"], ["Closed on Sunday"]],
        20,
        [Turn("transcribe", "Transcribe the image.", "Open 9:00 - 18:00\nClosed on Sunday")],
    ),
)


def draw(lines: list[list[str]], size: int, file: Path) -> Image.Image:
    """The first cell of a line on the left, the others in columns that end on the right."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.truetype(str(file), size)
    for number, (first, *others) in enumerate(lines):
        y = MARGIN + number * 1.4 * size
        pen.text((MARGIN, y), first, fill="black", font=font)
        for column, text in enumerate(reversed(others)):
            pen.text((SIDE - MARGIN - column * COLUMN, y), text, fill="black", font=font, anchor="ra")
    return image


def draw_cases() -> list[Case]:
    """Every question about every page, each page in a family of its own."""
    files = [files[0] for _, files in sorted(font_files("held_out").items())]
    cases = []
    for (lines, size, turns), file in zip(PAGES, files):
        image = draw(lines, size, file)
        cases += [Case("plain print", image, turn) for turn in turns]
    return cases


def main() -> None:
    """Measure, print what is wrong, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    args = parser.parse_args()
    model, processor = load(args)
    cases = draw_cases()
    _, misses = measure(model, processor, cases)
    result = {
        "right": len(cases) - len(misses),
        "questions": len(cases),
        "wrong": [[case.turn.question, said, case.turn.answer] for case, said in misses],
        **describe_machine(args.device),
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
