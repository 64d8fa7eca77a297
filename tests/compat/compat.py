"""Compares what a checkpoint answers with a stored reference; `run` starts it under several versions of transformers.

python tests/compat/compat.py . --write      # after a change of the root checkpoint: write reference.json anew
python tests/compat/compat.py .              # compare with it
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

HERE = Path(__file__).resolve().parent
PICTURE = HERE.parents[1] / "examples" / "receipt.png"
QUESTION = "how much is the salad?"
TOLERANCE = 1e-4  # of a logit, in float32


def pictures() -> list[Image.Image]:
    """The example's picture, a wide one and a tall one. NEAREST, so that the pixels are the same everywhere."""
    picture = Image.open(PICTURE).convert("RGB")
    return [picture, *(picture.resize(size, Image.Resampling.NEAREST) for size in ((150, 60), (50, 130)))]


def chat(*images: Image.Image, question: str = QUESTION) -> list[dict]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


@torch.no_grad()
def observe(folder: str) -> dict:
    """What is compared: class names, logits of the last position, and token ids or texts that were generated."""
    remote = {"trust_remote_code": True}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **remote).eval()
    processor = AutoProcessor.from_pretrained(folder, **remote)
    processor.tokenizer.padding_side = "left"
    first, wide, tall = pictures()
    greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": 8, "min_new_tokens": 4}
    greedy["suppress_tokens"] = [model.config.image_token_id]  # of random weights: there is no image for it

    def prepare(conversations):
        return processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )

    def generate(conversations, **options):
        inputs = prepare(conversations)
        rows = model.generate(**inputs, **{**greedy, **options})[:, inputs["input_ids"].shape[1] :].tolist()
        return [[token for token in row if token != processor.tokenizer.pad_token_id] for row in rows]

    one, two = chat(first), chat(wide, tall)
    mixed = [one, chat(question="hello"), chat(first, wide, tall)]
    pipe = pipeline("image-text-to-text", model=folder, device="cpu", dtype=torch.float32, **remote)
    return {
        "classes": [
            type(AutoConfig.from_pretrained(folder, **remote)).__name__,
            type(AutoModel.from_pretrained(folder, **remote)).__name__,
            type(model).__name__,
            type(processor).__name__,
        ],
        "prompt": prepare([one])["input_ids"].tolist(),
        "logits": model(**prepare([one])).logits[0, -1].tolist(),
        "logits, two images": model(**prepare([two])).logits[0, -1].tolist(),
        "greedy": generate([one]),
        "greedy, without cache": generate([one], use_cache=False),
        "left padding, three rows": generate(mixed),
        "the three rows, each alone": [generate([row])[0] for row in mixed],
        "beams": generate([two, chat(question="hello"), chat(tall, first)], num_beams=3, num_return_sequences=2),
        "pipeline": pipe(text=one, return_full_text=False, generate_kwargs=greedy)[0]["generated_text"],
    }


def differences(found: dict, expected: dict) -> list[str]:
    """One line for each entry that is not as expected."""
    lines = []
    for name in expected:
        if name.startswith("logits"):
            gap = (torch.tensor(found[name]) - torch.tensor(expected[name])).abs().max().item()
            if not gap <= TOLERANCE:
                lines.append(f"{name}: {gap:.2e} apart, allowed are {TOLERANCE:.0e}")
        elif found[name] != expected[name]:
            lines.append(f"{name}: found {found[name]}, expected {expected[name]}")
    if found["left padding, three rows"] != found["the three rows, each alone"]:
        lines.append("left padding changes an answer")
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default=str(HERE.parents[1]), help="the checkpoint (default: the root's)")
    parser.add_argument("--reference", type=Path, default=HERE / "reference.json", help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help="write the reference instead of comparing with it")
    args = parser.parse_args()

    weights = Path(args.folder, "model.safetensors")
    if not weights.is_file():
        sys.exit(f"{weights}: no such file")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    found = observe(args.folder)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    if args.write:
        reference = {"written_with": versions, "weights_sha256": digest, "answers": found}
        args.reference.write_text(json.dumps(reference) + "\n", encoding="utf-8")
        print(f"{args.reference}: written with {versions}")
        return
    if not args.reference.is_file():
        sys.exit(f"{args.reference}: no such file; write it with --write")
    reference = json.loads(args.reference.read_text(encoding="utf-8"))
    if reference["weights_sha256"] != digest:
        sys.exit(f"{args.reference} belongs to other weights than {weights}: write it anew with --write")
    lines = differences(found, reference["answers"])
    print(f"{versions}: " + ("as the reference" if not lines else "differs from the reference"))
    sys.exit("\n".join(f"  {line}" for line in lines) if lines else 0)


if __name__ == "__main__":
    main()
