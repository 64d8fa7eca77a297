"""The lab's questions as a file for harnesses: the same pictures and answers that `lab.evaluate` draws.

    python -m evaluation.questions questions.parquet --n 20 --seed 99

Each row has an image, a question, its answer, its kind (the type of question) and its domain.
"""

import argparse
from pathlib import Path

from datasets import Dataset, Features, Image, Value

from lab.data.samples import DOMAINS
from lab.evaluate import draw_cases


FEATURES = Features({"image": Image(), **{name: Value("string") for name in ("question", "answer", "kind", "domain")}})


def write_questions(path: Path, count: int, seed: int, held_out: bool = True, domains=tuple(DOMAINS)) -> int:
    """Writes the questions about `count` pictures of each domain; how many they are."""
    rows = [
        {
            "image": case.image,
            "question": case.turn.question,
            "answer": case.turn.answer,
            "kind": case.turn.question_type,
            "domain": case.domain,
        }
        for case in draw_cases(seed, count, held_out, domains)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, FEATURES).to_parquet(path)
    return len(rows)


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="parquet file to write")
    parser.add_argument("--n", type=int, default=20, help="pictures of each domain (default 20)")
    parser.add_argument("--seed", type=int, default=99, help="stream of test pictures (default 99)")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--seen", action="store_true", help="fonts and layouts of training, not those held out")
    args = parser.parse_args()
    print(f"{write_questions(args.path, args.n, args.seed, not args.seen, args.domains)} questions in {args.path}")


if __name__ == "__main__":
    main()
