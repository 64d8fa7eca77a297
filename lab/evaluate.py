"""Exact match of the nano model on fresh pictures, through the public API, greedy decoding, one question a chat.

    python -m lab.evaluate --model . --n 1000 --seed 99
    python -m lab.evaluate --model lab/runs/nano --n 100 --json result.json

Every picture is asked one question of each kind. An answer counts only if it is right to the letter.
"""

import argparse
import json
import platform
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from lab.receipts import KINDS, Turn, ask, draw_receipt, generator


def draw_cases(seed: int, count: int) -> Iterator[tuple[Image.Image, Turn]]:
    """Fresh pictures at 96 to 288 pixels a side, each with one question of every kind."""
    for index in range(count):
        rng = generator(seed, index)
        receipt = draw_receipt(rng)
        for kind in KINDS:
            yield receipt.image, ask(rng, receipt.rows, kind)


@torch.inference_mode()
def answer(model, processor, cases: list[tuple[Image.Image, Turn]]) -> list[str]:
    """The model's answers to a batch of single-turn chats."""
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": turn.question}]}]
        for image, turn in cases
    ]
    inputs = processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    """Measure, print a table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".", help="checkpoint folder or Hub name (default: this folder)")
    parser.add_argument("--n", type=int, default=1000, help="pictures (default 1000)")
    parser.add_argument("--seed", type=int, default=99, help="stream of test pictures (default 99)")
    parser.add_argument("--batch-size", type=int, default=70)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--misses", type=int, default=0, help="print this many wrong answers (default 0)")
    args = parser.parse_args()
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True).to(args.device).eval()

    start, right, misses = time.perf_counter(), Counter(), []
    cases = list(draw_cases(args.seed, args.n))
    for first in range(0, len(cases), args.batch_size):
        batch = cases[first : first + args.batch_size]
        for (_, turn), said in zip(batch, answer(model, processor, batch)):
            right[turn.kind] += said == turn.answer
            if said != turn.answer:
                misses.append((turn, said))

    looks = [kind for kind in KINDS if kind != "transcribe"]
    result = {
        "exact": {kind: right[kind] / args.n for kind in KINDS},
        "look-ups": sum(right[kind] for kind in looks) / (args.n * len(looks)),
        "transcriptions": right["transcribe"] / args.n,
        "pictures": args.n,
        "seed": args.seed,
        "seconds": round(time.perf_counter() - start),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {args.device}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(result, indent=2))
    for turn, said in misses[: args.misses]:
        print(f"{turn.question!r}: {said!r}, not {turn.answer!r}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
