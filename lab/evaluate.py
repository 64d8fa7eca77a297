"""Exact match on fresh pictures, through the public API, greedy decoding, one question a chat.

    python -m lab.evaluate --model . --n 200 --seed 99                            # fonts and layouts of the test alone
    python -m lab.evaluate --model . --n 200 --seed 99 --downsample 2                 # with more image tokens
    python -m lab.evaluate --model . --n 1000 --seed 99 --domains receipt --seen  # those of training

One question of each type is asked about every picture. An answer counts only if it is an exact match, alone or
after what was asked about ("Tea 4.20"); of transcriptions the share of right characters (1 - CER) is told as well.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, PreTrainedModel, ProcessorMixin

from lab.data.drawing import Turn, generator
from lab.data.reading import READING
from lab.data.samples import DOMAINS
from lab.training import describe_machine


MAX_NEW_TOKENS = 256  # the longest answers are transcriptions, and a letter is a token


@dataclass(frozen=True)
class Case:
    """One question about one picture."""

    domain: str
    image: Image.Image
    turn: Turn


def draw_cases(seed: int, count: int, held_out: bool, domains: Sequence[str] = tuple(DOMAINS)) -> Iterator[Case]:
    """Fresh pictures of each domain, each with one question of every type."""
    for name in domains:
        for index in range(count):
            rng = generator(seed, index)
            domain = (DOMAINS | READING)[name]
            picture = domain.draw(rng, held_out)
            for question_type in domain.QUESTION_TYPES:
                yield Case(name, picture.image, domain.ask(rng, picture.facts, question_type))


def encode(
    model: PreTrainedModel, processor: ProcessorMixin, cases: list[Case], downsample: int | None = None
) -> BatchFeature:
    """A batch of single-turn chats, padded on the left."""
    content = [[{"type": "image", "image": case.image}, {"type": "text", "text": case.turn.question}] for case in cases]
    return processor.apply_chat_template(
        [[{"role": "user", "content": parts}] for parts in content],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "projector_downsample": downsample},
    ).to(model.device)


@torch.inference_mode()
def answer(model: PreTrainedModel, processor: ProcessorMixin, inputs: BatchFeature) -> list[str]:
    """The model's answers to a batch of chats."""
    output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def measure(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    cases: list[Case],
    batch_size: int = 70,
    answer=answer,
    downsample: int | None = None,
) -> tuple[dict[str, dict[str, str]], list[tuple[Case, str]]]:
    """
    Asks all cases, those of one type together, as their answers are of like length.

    Returns:
        for each domain and type of question, a text with a 1 for each exact match and a 0 for each other picture;
        and the wrong answers.
    """
    order = sorted(range(len(cases)), key=lambda number: cases[number].turn.question_type)
    answers = {}
    for first in tqdm(range(0, len(cases), batch_size), desc="questions", unit="batch"):
        batch = order[first : first + batch_size]
        inputs = encode(model, processor, [cases[number] for number in batch], downsample)
        answers |= zip(batch, answer(model, processor, inputs))
    right: dict[str, dict[str, str]] = {}
    misses = []
    for number, case in enumerate(cases):
        by_type = right.setdefault(case.domain, {})
        is_right = answers[number] in (case.turn.answer, case.turn.full_answer)
        by_type[case.turn.question_type] = by_type.get(case.turn.question_type, "") + str(int(is_right))
        if not is_right:
            misses.append((case, answers[number]))
    return right, misses


def exact_match(right: dict[str, dict[str, str]]) -> dict[str, dict[str, float]]:
    """Shares of exact matches, by domain and type of question, and as "all" their mean."""
    shares = {
        domain: {name: hits.count("1") / len(hits) for name, hits in by_type.items()}
        for domain, by_type in right.items()
    }
    return {domain: {**by_type, "all": sum(by_type.values()) / len(by_type)} for domain, by_type in shares.items()}


def edit_distance(said: str, meant: str) -> int:
    """Characters to put in, leave out or change (Levenshtein)."""
    row = list(range(len(meant) + 1))
    for i, character in enumerate(said, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(meant, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (character != other))
    return row[-1]


def characters_right(cases: Sequence[Case], misses: Sequence[tuple[Case, str]]) -> dict[str, float]:
    """1 - CER of the transcriptions of each domain: edits that the wrong ones need, over all characters."""
    characters, edits = Counter(), Counter()
    for case in cases:
        characters[case.domain] += len(case.turn.answer) * (case.turn.question_type == "transcribe")
    for case, said in misses:
        edits[case.domain] += edit_distance(said, case.turn.answer) * (case.turn.question_type == "transcribe")
    return {domain: 1 - edits[domain] / count for domain, count in characters.items() if count}


@torch.inference_mode()
def attention_on_vision(model: PreTrainedModel, processor: ProcessorMixin, cases: list[Case]) -> list[float]:
    """For each decoder layer, the share of attention that the last token of the question pays to the vision tokens."""
    inputs = encode(model, processor, cases)
    is_vision = inputs["input_ids"] == model.config.image_token_id
    attentions = model(**inputs, output_attentions=True).attentions  # one (batch, heads, queries, keys) a layer
    return [layer[:, :, -1].mean(1)[is_vision].sum().item() / len(cases) for layer in attentions]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that asks a checkpoint."""
    parser.add_argument("--model", default=".", help="checkpoint folder or Hub name (default: this folder)")
    parser.add_argument("--subfolder", default="", help="of the model's, where its weights are (default: none)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the result here as well")


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, ProcessorMixin]:
    options = {"subfolder": args.subfolder, "trust_remote_code": True}
    model = AutoModelForImageTextToText.from_pretrained(args.model, **options).to(args.device).eval()
    return model, AutoProcessor.from_pretrained(args.model, **options)


def main() -> None:
    """Measure, print a table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--n", type=int, default=200, help="pictures of each domain (default 200)")
    parser.add_argument("--seed", type=int, default=99, help="stream of test pictures (default 99)")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS | READING, default=list(DOMAINS))
    parser.add_argument("--seen", action="store_true", help="fonts and layouts of training, not those held out")
    parser.add_argument("--batch-size", type=int, default=70)
    parser.add_argument("--downsample", type=int, help="s, one of the model's choices (default: its own)")
    parser.add_argument("--misses", type=int, default=0, help="print this many wrong answers (default 0)")
    args = parser.parse_args()
    model, processor = load(args)
    start = time.perf_counter()
    cases = list(draw_cases(args.seed, args.n, not args.seen, args.domains))
    right, misses = measure(model, processor, cases, args.batch_size, downsample=args.downsample)
    result = {
        "exact": exact_match(right),
        "characters": characters_right(cases, misses),
        "pictures": args.n,
        "seed": args.seed,
        "downsample": args.downsample or processor.projector_downsample,
        "fonts and layouts": "of training" if args.seen else "held out",
        "seconds": round(time.perf_counter() - start),
        **describe_machine(args.device),
    }
    print(json.dumps(result, indent=2))
    for case, said in misses[: args.misses]:
        print(f"{case.turn.question!r}: {said!r}, not {case.turn.answer!r}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
