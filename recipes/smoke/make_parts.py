"""Tiny parts of random weights and drawn pictures in LLaVA's format, for recipes/smoke/run.sh.

    python -m recipes.smoke.make_parts work/smoke

Writes parts/decoder, parts/tower, data/stage1.json and data/stage2.json with their pictures there, and
questions.parquet here.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from evaluation.questions import write_questions
from examples.draw_tickets import QUESTIONS, draw_ticket


ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}


def make_parts(folder: Path) -> None:
    """A decoder with the tokenizer of the nano checkpoint, and a vision tower of 32 x 32 pixels."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT)
    tokenizer.chat_template = None
    config = Qwen2Config(**SIZES, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=1024)
    config.eos_token_id, config.pad_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id, None
    Qwen2ForCausalLM(config).save_pretrained(folder / "decoder")
    tokenizer.save_pretrained(folder / "decoder")
    tower = CLIPVisionConfig(**SIZES, image_size=32, patch_size=8, projection_dim=64)
    CLIPVisionModel(tower).save_pretrained(folder / "tower")
    square = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder / "tower")


def draw_data(folder: Path, count: int) -> None:
    """Captions and conversations about `count` tickets; one conversation in ten is text alone."""
    folder.mkdir(parents=True)
    captions, chats = [], []
    for number in range(count):
        rng = np.random.default_rng((3, number))
        image, facts = draw_ticket(rng)
        image.save(folder / f"{number}.png")
        caption = ", ".join(f"{name} {fact}" for name, fact in facts.items())
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": caption}]
        captions.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
        turns = [(str(rng.choice(QUESTIONS[name])), fact) for name, fact in facts.items()]
        turns = [{"from": side, "value": text} for turn in turns for side, text in zip(("human", "gpt"), turn)]
        row = {"id": str(number), "conversations": turns}
        if number % 10:
            row["image"], turns[0]["value"] = f"{number}.png", f"<image>\n{turns[0]['value']}"
        chats.append(row)
    for name, rows in (("stage1", captions), ("stage2", chats)):
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1))


def main() -> None:
    """Write all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--pictures", type=int, default=200, help="pictures to draw (default 200)")
    args = parser.parse_args()
    make_parts(args.folder / "parts")
    draw_data(args.folder / "data", args.pictures)
    write_questions(Path("questions.parquet"), 1, seed=99)  # where the task looks for them


if __name__ == "__main__":
    main()
