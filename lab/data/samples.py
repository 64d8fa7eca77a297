"""All domains together: pictures by seed and index, dialogues about them, and a contact sheet.

python -m lab.data.samples --sheet sheet.png                 # five samples of every domain, with questions and answers
python -m lab.data.samples --sheet held_out.png --held-out   # in the fonts and layouts that only the test has
python -m lab.data.samples --pictures docs/samples --seed 4 --held-out   # a picture of each domain
python -m lab.data.samples --pictures docs/samples --domains "print receipts" --seed 4 --held-out   # or of others
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill
from types import ModuleType

import numpy as np
from PIL import Image, ImageDraw

from lab.data import charts, ocr, receipts, shapes, tables
from lab.data.drawing import CANVAS, Picture, Turn, generator, load_font
from lab.data.reading import READING


DOMAINS: dict[str, ModuleType] = {
    "ocr": ocr,
    "table": tables,
    "chart": charts,
    "receipt": receipts,
    "shapes": shapes,
}
SHARES = (0.3, 0.3, 0.2, 0.15, 0.05)  # of training


def draw_sample(
    seed: int, index: int, shares: Sequence[float] = SHARES
) -> tuple[np.random.Generator, ModuleType, Picture]:
    """A picture of any domain, by their shares, and what its questions are drawn with."""
    rng = generator(seed, index)
    domain = list(DOMAINS.values())[rng.choice(len(DOMAINS), p=shares)]
    return rng, domain, domain.draw(rng)


def draw_dialogue(rng: np.random.Generator, domain: ModuleType, picture: Picture, turns: int = 6) -> list[Turn]:
    """
    Several turns about one picture: look-ups, then a selection of rows, or another of the domain's lists, and a
    transcription.

    A look-up after the transcription could copy from it, so the transcription is last in most dialogues. It can be read
    from line to line; only look-ups and selections teach to find a thing by its name, and selections do so most often.
    Selections and lists are for practice alone: no test has them.
    """
    lists = getattr(domain, "LISTS", ())
    long = [lists[rng.integers(len(lists))]] if lists else ["select"] * hasattr(domain, "SELECT")
    long += ["transcribe"] * ("transcribe" in domain.QUESTION_TYPES)
    short = [question_type for question_type in domain.QUESTION_TYPES if question_type != "transcribe"]
    short += getattr(domain, "PRACTICE", ())
    question_types = [short[i] for i in rng.integers(len(short), size=turns)] + long
    question_types = question_types[::-1] if rng.random() < 0.15 else question_types
    asked = [domain.ask(rng, picture.facts, question_type) for question_type in question_types]
    return list({(turn.question_type, turn.answer): turn for turn in asked[::-1]}.values())[::-1]  # no answer twice


def sample_texts(seed: int = 0, count: int = 6000) -> Iterator[str]:
    """Questions and answers for a tokenizer to learn from; not `ocr`'s answers, which stay characters."""
    for index in range(count):
        rng, domain, picture = draw_sample(seed, index)
        for turn in draw_dialogue(rng, domain, picture):
            yield turn.question
            if domain is not ocr:
                yield turn.answer


def draw_sheet(seed: int, held_out: bool) -> Image.Image:
    """A row of samples for each domain, as the model sees them, with one question of every type."""
    font, width, height, columns = load_font("default", 13), 300, 400, 5
    sheet = Image.new("RGB", (columns * width, len(DOMAINS) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for row, domain in enumerate(DOMAINS.values()):
        for column in range(columns):
            rng, x, y = generator(seed, row * columns + column), column * width, row * height
            picture = domain.draw(rng, held_out)
            seen = picture.image.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
            sheet.paste(seen.resize((2 * CANVAS, 2 * CANVAS)), (x, y))
            turns = [domain.ask(rng, picture.facts, question_type) for question_type in domain.QUESTION_TYPES]
            lines = [fill(f"{turn.question} {turn.answer.replace(chr(10), ' / ')}", 42) for turn in turns]
            pen.multiline_text((x + 4, y + 2 * CANVAS + 6), "\n".join(lines), fill="black", font=font)
    return sheet


def main() -> None:
    """Write a contact sheet, or pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", type=Path, help="where to write the PNG of a contact sheet")
    parser.add_argument("--pictures", type=Path, help="folder for one picture of each domain, DOMAIN.png")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS | READING, default=list(DOMAINS), help="of --pictures")
    parser.add_argument("--seed", type=int, default=7, help="stream of samples (default 7)")
    parser.add_argument("--held-out", action="store_true", help="fonts and layouts of the test")
    args = parser.parse_args()
    if args.sheet:
        draw_sheet(args.seed, args.held_out).save(args.sheet)
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
        for name in args.domains:
            picture = (DOMAINS | READING)[name].draw(generator(args.seed, 0), args.held_out)
            picture.image.save(args.pictures / f"{name.replace(' ', '_')}.png")


if __name__ == "__main__":
    main()
