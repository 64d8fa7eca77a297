"""What a newcomer would try: ten plain pictures, dark on white, in ten of the held-out families, 28 questions.

python -m lab.evaluate_plain --subfolder reader --json lab/results/reader_plain.json
python -m lab.evaluate_plain                                  # the checkpoint at the root
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModelForImageTextToText, AutoProcessor

from lab.data.drawing import Turn
from lab.data.fonts import font_files
from lab.evaluate import Case, measure
from lab.training import describe_machine


SIDE, MARGIN, COLUMN = 240, 12, 70
PAGES = (  # lines of cells, a size in pixels, and questions with their answers
    ([["Hello World"]], 22, {"Transcribe the image.": "Hello World"}),
    (
        [["Meeting at 3 pm"], ["Room 204"], ["Bring the report"]],
        22,
        {
            "Transcribe the image.": "Meeting at 3 pm\nRoom 204\nBring the report",
            "What does the last line say?": "Bring the report",
            "How many lines are there?": "3",
        },
    ),
    (
        [["Wi-Fi password:"], ["kT7#pq92"]],
        22,
        {"What does the last line say?": "kT7#pq92", "What does the first line say?": "Wi-Fi password:"},
    ),
    (
        [["Dear Anna,"], ["see you on Friday"], ["Tom"]],
        22,
        {"What does the first line say?": "Dear Anna,", "Read line 2.": "see you on Friday"},
    ),
    (
        [["Coffee", "3.50"], ["Bagel", "2.25"], ["Juice", "4.00"], ["Total", "9.75"]],
        22,
        {
            "How much is the coffee?": "3.50",
            "What is the total?": "9.75",
            "What costs 2.25?": "Bagel",
            "Which is the most expensive?": "Juice",
            "How much is the tea?": "is not there.",
            "How many items are there?": "3",
        },
    ),
    (
        [["CAFE ROMA"], ["Espresso", "$2.80"], ["Cappuccino", "$3.90"], ["Total", "$6.70"]],
        22,
        {
            "How much is the espresso?": "$2.80",
            "What is the total?": "$6.70",
            "Which is the cheapest?": "Espresso",
            "Transcribe the image.": "CAFE ROMA\nEspresso $2.80\nCappuccino $3.90\nTotal $6.70",
        },
    ),
    (
        [["Milk", "1.19"], ["Bread", "2.49"], ["Eggs", "3.29"], ["Butter", "2.99"], ["Total", "9.96"]],
        22,
        {"How much is the bread?": "2.49", "Price of eggs?": "3.29", "What is the total?": "9.96"},
    ),
    (
        [["", "Age", "Height"], ["Anna", "31", "165"], ["Bob", "27", "182"], ["Carl", "45", "178"]],
        20,
        {
            "What is the Age of Bob?": "27",
            "What is the Height of Anna?": "165",
            "Which has the highest Age?": "Carl",
            "How many rows are there?": "3",
        },
    ),
    (
        [["", "Jan", "Feb"], ["Rent", "800", "820"], ["Food", "310", "295"]],
        22,
        {"What is Feb of Rent?": "820", "What is Jan of Food?": "310"},
    ),
    (
        [["Open 9:00 - 18:00"], ["Closed on Sunday"]],
        20,
        {"Transcribe the image.": "Open 9:00 - 18:00\nClosed on Sunday"},
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
    """Every question; the answer may come after what is asked about."""
    files = [files[0] for _, files in sorted(font_files("held_out").items())]
    cases = []
    for (lines, size, answers), file in zip(PAGES, files):
        image = draw(lines, size, file)
        cases += [Case("plain print", image, Turn("all", question, answer)) for question, answer in answers.items()]
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".", help="checkpoint folder or Hub name (default: this folder)")
    parser.add_argument("--subfolder", default="", help="of the model's, where its weights are (default: none)")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    args = parser.parse_args()
    options = {"subfolder": args.subfolder, "trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(args.model, **options)
    model = AutoModelForImageTextToText.from_pretrained(args.model, **options).eval()
    cases = draw_cases()
    _, misses = measure(model, processor, cases)
    misses = [(case, said) for case, said in misses if not said.endswith(f" {case.turn.answer}")]
    result = {
        "right": len(cases) - len(misses),
        "questions": len(cases),
        "wrong": [[case.turn.question, said, case.turn.answer] for case, said in misses],
        **describe_machine(),
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
