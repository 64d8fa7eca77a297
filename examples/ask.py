"""Asks a LLaVA-VR model about a picture and prints its answer."""

import argparse
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = """examples:
  python examples/ask.py examples/receipt.png "how much is the salad?"
  python examples/ask.py examples/receipt.png "Transcribe the image." --max-new-tokens 200
  python examples/ask.py examples/receipt.png "how much is the salad?" --downsample 2
  python examples/ask.py photo.jpg "What costs 12?" --model path/to/another/checkpoint
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", help="the picture: a path or a URL")
    parser.add_argument("question", help="what to ask about it")
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub name of the model (default: this repository)")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="longest answer, in tokens (default: 100)")
    parser.add_argument("--downsample", type=int, help="s: s x s patches become one token; one of the model's choices")
    args = parser.parse_args()

    logging.disable_progress_bar()
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True)
    content = [{"type": "image", "image": args.image}, {"type": "text", "text": args.question}]
    try:
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"projector_downsample": args.downsample},
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    answer = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
