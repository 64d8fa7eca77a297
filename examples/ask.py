"""Asks a LLaVA-VR model about pictures, one by one, and prints its answers.

With one picture it prints the answer alone, with several a line for each. A picture that cannot be read is named on
stderr; the others are answered.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, ProcessorMixin
from transformers.utils import cached_file, logging


ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT) if (ROOT / "config.json").is_file() else "."  # installed, this file lies beside no checkpoint
EXAMPLES = """examples:
  python examples/ask.py examples/receipt.png "how much is the salad?"
  python examples/ask.py examples/receipt.png "Transcribe the image." --max-new-tokens 200
  python examples/ask.py examples/receipt.png "how much is the salad?" --downsample 2
  python examples/ask.py examples "Transcribe the image." --batch-size 16 --json
  python examples/ask.py docs/samples/print_receipts.png "What is the total?" --subfolder reader
  python examples/ask.py a.jpg b.jpg "What costs 12?" --model path/to/another/checkpoint
"""


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {number}")
    return number


def list_pictures(sources: Sequence[str]) -> list[str]:
    """Paths and URLs as they are, and for a folder the pictures in it, by their suffixes."""
    suffixes, pictures = Image.registered_extensions(), []
    for source in sources:
        if Path(source).is_dir():
            pictures += sorted(str(path) for path in Path(source).iterdir() if path.suffix.lower() in suffixes)
        else:
            pictures.append(source)
    return pictures


def encode(processor: ProcessorMixin, pictures: Sequence[str], question: str, downsample: int | None) -> BatchFeature:
    """One chat for each picture, as a batch padded on the left."""
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
        for picture in pictures
    ]
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"projector_downsample": downsample, "padding": True},
    )


def batches(
    processor: ProcessorMixin, pictures: Sequence[str], question: str, downsample: int | None, size: int
) -> Iterator[tuple[Sequence[str], BatchFeature]]:
    """The pictures in batches, with their inputs; those that cannot be read are named on stderr and left out."""

    def is_readable(picture: str) -> bool:
        try:
            encode(processor, [picture], question, downsample)
        except (OSError, ValueError) as error:
            print(f"error: {picture}: {error}", file=sys.stderr)
            return False
        return True

    for first in range(0, len(pictures), size):
        batch = pictures[first : first + size]
        try:
            yield batch, encode(processor, batch, question, downsample)
        except (OSError, ValueError):
            if batch := [picture for picture in batch if is_readable(picture)]:
                yield batch, encode(processor, batch, question, downsample)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="pictures: paths, URLs, or folders of them")
    parser.add_argument("question", metavar="QUESTION", help="what to ask about each")
    parser.add_argument("--model", default=MODEL, help="folder or Hub name of the model (default: this repository)")
    parser.add_argument("--subfolder", default="", help="of the model's, where its weights are (default: none)")
    parser.add_argument("--max-new-tokens", type=positive, default=100, help="longest answer, in tokens (default: 100)")
    parser.add_argument("--downsample", type=int, help="s: s x s patches become one token; one of the model's choices")
    parser.add_argument("--batch-size", type=positive, default=8, help="pictures answered at once (default: 8)")
    parser.add_argument("--json", action="store_true", help="print JSON lines: image, question, answer, image_tokens")
    args = parser.parse_args()
    pictures = list_pictures(args.images)
    if not pictures:
        parser.error(f"no picture in {', '.join(args.images)}")

    logging.disable_progress_bar()
    try:
        if cached_file(args.model, "config.json", subfolder=args.subfolder) is None:
            raise OSError("there is no config.json")
        processor, model = (
            auto.from_pretrained(args.model, subfolder=args.subfolder, trust_remote_code=True)
            for auto in (AutoProcessor, AutoModelForImageTextToText)
        )
    except (OSError, ValueError) as error:
        source = f"{args.model} --subfolder {args.subfolder}" if args.subfolder else args.model
        parser.error(f"--model {source}: {str(error).splitlines()[0]}")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor.tokenizer.padding_side = "left"
    answered = 0
    with tqdm(total=len(pictures), unit="picture", disable=len(pictures) == 1) as progress:
        for batch, inputs in batches(processor, pictures, args.question, args.downsample, args.batch_size):
            output = model.generate(**inputs.to(model.device), max_new_tokens=args.max_new_tokens, do_sample=False)
            answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            tokens = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
            for picture, answer, count in zip(batch, answers, tokens):
                record = {"image": picture, "question": args.question, "answer": answer, "image_tokens": count}
                line = answer if len(pictures) == 1 else f"{picture}: {answer}"
                progress.write(json.dumps(record, ensure_ascii=False) if args.json else line)
            answered += len(batch)
            progress.update(len(batch))
    return 0 if answered == len(pictures) else 2


if __name__ == "__main__":
    sys.exit(main())
