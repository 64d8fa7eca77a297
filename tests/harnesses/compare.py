"""Compares the answers that a harness has logged with those that lab.evaluate hears, question by question.

    python tests/harnesses/compare.py MODEL RESULTS --n 20 --short RESULTS

RESULTS is a folder in which a harness wrote its results and samples of the task llava_vr_lab. Those of --short were
asked with a limit of three tokens.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from lab.evaluate import draw_cases, exact_match, measure


def first(value):
    """The text in the lists around it."""
    while isinstance(value, list):
        (value,) = value
    return value


def read(folder: Path) -> tuple[dict[str, float], list[str]]:
    """The scores and, in the order of the questions, the answers."""
    (samples,) = folder.rglob("*samples*llava_vr_lab*.jsonl")
    (results,) = folder.rglob("*results*.json")
    scores = json.loads(results.read_text())["results"]["llava_vr_lab"]
    scores = {key.split(",")[0]: value for key, value in scores.items() if isinstance(value, float)}
    rows = sorted(map(json.loads, samples.read_text(encoding="utf-8").splitlines()), key=lambda row: row["doc_id"])
    return scores, [first(row["filtered_resps"]) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the checkpoint's folder")
    parser.add_argument("results", type=Path)
    parser.add_argument("--n", type=int, default=20, help="pictures of each domain (default 20)")
    parser.add_argument("--downsample", type=int)
    parser.add_argument("--short", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True).eval()
    cases = list(draw_cases(99, args.n, True))
    right, misses = measure(model, processor, cases, downsample=args.downsample)
    wrong = {id(case): said for case, said in misses}
    expected = [wrong.get(id(case), case.turn.answer) for case in cases]
    scores, answers = read(args.results)
    shares = exact_match(right)
    shares = {domain: by_type["all"] for domain, by_type in shares.items()}
    differ = sum(said != answer for said, answer in zip(answers, expected, strict=True))
    kinds: dict[tuple[str, str], list[bool]] = {}
    for case, said in zip(cases, answers):
        kinds.setdefault((case.domain, case.turn.question_type), []).append(said == case.turn.answer)
    unequal = [kind for kind, hits in kinds.items() if sum(hits) != right[kind[0]][kind[1]].count("1")]
    unequal += [domain for domain, share in shares.items() if abs(scores[domain] - share) > 1e-9]
    print(f"{args.results}: {len(answers)} questions, exact match {scores['exact_match']:.4f}; {differ} answers and "
          f"{len(unequal)} of {len(kinds)} kinds differ from lab.evaluate's")  # fmt: skip
    longer = 0
    if args.short:
        tokenizer = processor.tokenizer
        lengths = [len(tokenizer(said, add_special_tokens=False)["input_ids"]) for said in read(args.short)[1]]
        longer = sum(length > 3 for length in lengths)
        print(f"{args.short}: a limit of 3 tokens: {longer} answers are longer")
    return 1 if differ or unequal or longer else 0


if __name__ == "__main__":
    sys.exit(main())
