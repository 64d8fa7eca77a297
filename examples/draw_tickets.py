"""Draws tickets with a date and a total: a domain that the checkpoint of this folder has never seen.

Writes pictures and two files of chats, train.jsonl and test.jsonl, as examples/finetune.py takes them. With --model, it
asks the model about the test pictures instead, and prints the share of answers that are right to the letter.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm


EXAMPLES = """examples:
  python examples/draw_tickets.py tickets --train 8000 --test 200
  python examples/draw_tickets.py tickets --model .
  python examples/draw_tickets.py tickets --model fine-tuned
"""
QUESTIONS = {
    "date": ("What is the date of the ticket?", "When was the ticket issued?", "Which day is on the ticket?"),
    "total": ("What is the total of the ticket?", "How much was paid in total?", "What sum is on the ticket?"),
}


def draw_ticket(rng: np.random.Generator) -> tuple[Image.Image, dict[str, str]]:
    """A picture of 192 x 192 pixels with a date and a total, in either order, and what both are."""
    facts = {
        "date": f"{rng.integers(1, 32):02}/{rng.integers(1, 13):02}",
        "total": f"{rng.integers(1, 100)}.{rng.integers(100):02}",
    }
    light, dark = (tuple(int(value) for value in rng.integers(*limits, 3)) for limits in ((205, 256), (0, 100)))
    image = Image.new("RGB", (192, 192), light)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(int(rng.integers(26, 33)))
    top = rng.integers(4, 60)
    for name in rng.permutation(list(facts)):
        text = f"{name} {facts[name]}"
        pen.text((rng.integers(4, 188 - font.getlength(text)), top), text, fill=dark, font=font)
        top += rng.integers(40, 64)
    return image, facts


def write(folder: Path, name: str, count: int, seed: int):
    (folder / name).mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for number in tqdm(range(count), desc=name):
            rng = np.random.default_rng((seed, number))
            image, facts = draw_ticket(rng)
            path = f"{name}/{number}.png"
            image.save(folder / path)
            messages = []
            for fact in rng.permutation(list(facts)):
                text = {"type": "text", "text": str(rng.choice(QUESTIONS[fact]))}
                content = [text] if messages else [{"type": "image"}, text]
                messages += [{"role": "user", "content": content}, {"role": "assistant", "content": facts[fact]}]
            file.write(json.dumps({"messages": messages, "images": [path]}) + "\n")


def exact_match(folder: Path, name: str, batch_size: int = 100) -> float:
    """The share of test questions, each asked alone, that the model answers to the letter."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True)
    cases = []
    with open(folder / "test.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        picture = {"type": "image", "image": str(folder / row["images"][0])}
        for question, answer in zip(row["messages"][::2], row["messages"][1::2]):
            cases.append(([{"role": "user", "content": [picture, question["content"][-1]]}], answer["content"]))
    right = 0
    for first in tqdm(range(0, len(cases), batch_size), desc="asking"):
        chats, answers = zip(*cases[first : first + batch_size])
        inputs = processor.apply_chat_template(
            list(chats),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=20)
        said = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(text == answer for text, answer in zip(said, answers))
    return right / len(cases)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the tickets are or shall be")
    parser.add_argument("--train", type=int, default=8000, help="pictures to train on (default: 8000)")
    parser.add_argument("--test", type=int, default=200, help="pictures to ask about (default: 200)")
    parser.add_argument("--model", help="ask this model, a folder or Hub name, about the test pictures")
    args = parser.parse_args()
    if args.model:
        print(f"{exact_match(args.folder, args.model):.1%} right")
    else:
        write(args.folder, "train", args.train, seed=1)
        write(args.folder, "test", args.test, seed=2)


if __name__ == "__main__":
    main()
