"""Draws the picture at the top of README.md, docs/maps.png: where the image tokens that an answer used had looked."""

import argparse
from pathlib import Path

import matplotlib
import numpy as np


matplotlib.use("agg")
import matplotlib.pyplot as plt
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_vr import answer_maps, draw_map


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = """examples:
  python docs/draw_maps.py
  python docs/draw_maps.py --question "how much is the jam?" --output jam.png
"""

parser = argparse.ArgumentParser(
    description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--image", default=str(ROOT / "examples" / "receipt.png"), help="a path or URL")
parser.add_argument("--question", default="how much is the salad?")
parser.add_argument("--model", default=str(ROOT), help="folder or Hub name of the model (default: this repository)")
parser.add_argument("--output", default=str(ROOT / "docs" / "maps.png"), help="the picture to write")
args = parser.parse_args()

processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True)
content = [{"type": "image", "image": args.image}, {"type": "text", "text": args.question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
sequences = model.generate(**inputs, max_new_tokens=100, do_sample=False)
answer = processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
(maps,) = answer_maps(sequences, inputs, model, processor)

nothing = np.zeros(inputs["image_sizes"][0].tolist())
panels = {f"“{args.question}” {answer}": nothing}
panels |= {f"after decoder layer {layer}": found for layer, found in maps.items()}
figure, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 3.4), layout="constrained")
for axis, (title, found) in zip(axes, panels.items()):
    axis.imshow(draw_map(args.image, found))
    axis.set_title(title, fontsize=11)
    axis.axis("off")
figure.savefig(args.output, dpi=100, bbox_inches="tight")
