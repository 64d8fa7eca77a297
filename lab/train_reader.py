"""The checkpoint that reads print: projector, modules and decoder, trained in pieces over the frozen tower.

    python -m lab.train_reader --downsamples 1                   # with every patch a token, as it begins best
    python -m lab.train_reader --start reader --lr 8e-4          # begins with the weights of a checkpoint
    python -m lab.train_reader --decay-steps 3000                # lets the learning rate fall to zero, then ends
    python -m lab.train_reader --minutes 1 --output lab/runs/reader   # and writes the checkpoint folder

All go on from the state file, if there is one, until they are stopped.

The tower comes from the state file of `lab.train_tower`. Pictures are those of `lab.data.reading` and, for a part, of
`lab.data.samples`. A letter is a token; so are a word of the questions, and a digit with the space before it.
`python -m lab.evaluate --domains "print lines" "print receipts" "print tables" "print charts"` asks in families that no
training saw. The domains that it asks by default have only their layouts held out from this one.
"""

import argparse
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig, PreTrainedTokenizerFast

from lab import train_tower
from lab.data.drawing import Turn, generator
from lab.data.labels import PATCH
from lab.data.page import SIDE
from lab.data.reading import READING
from lab.data.samples import DOMAINS, draw_dialogue, draw_sample
from lab.data.scenes import check_data
from lab.evaluate import draw_cases, exact_match, measure
from lab.export_nano import save
from lab.nano import IMAGE, USER, make_decoder_config, make_processor, prepare
from lab.pieces import Run, add_options, rank, share_cores, train
from lab.train_vlm import DATA_SEED, Dialogues
from lab.training import read_config
from llava_vr import LlavaVrConfig, LlavaVrForConditionalGeneration, LlavaVrProcessor


CONFIG = read_config("reader")
STATE = Path("lab/runs/reader.safetensors")
MAX_LENGTH = 1024
DEVELOPMENT_SEED = 41


def question_texts() -> Iterator[str]:
    """The words of all questions, as `phrase` may begin them, without the names they ask about."""
    for domain in (*READING.values(), *DOMAINS.values()):
        owner = vars(domain) or vars(type(domain))
        for name, templates in owner.items():
            if name.isupper() and isinstance(templates, tuple) and all(" " in str(text) for text in templates):
                texts = [re.sub(r"{\w+}", "", text) for text in templates]
                yield from texts + [text[0].lower() + text[1:] for text in texts]


def make_reader_processor() -> LlavaVrProcessor:
    model = CONFIG["model"]
    texts = ["There is no", " 0 1 2 3 4 5 6 7 8 9", *question_texts()] * 8
    options = {"side": SIDE, "patch_size": PATCH}
    processor = make_processor(texts, model["projector_downsample"], model["projector_downsample_choices"], **options)
    processor.tokenizer.model_max_length = MAX_LENGTH
    return processor


def make_reader(tokenizer: PreTrainedTokenizerFast, tower: Path) -> LlavaVrForConditionalGeneration:
    """The model, with the tower of a state file, frozen, and all else new."""
    torch.manual_seed(CONFIG["seed"])
    text = make_decoder_config(tokenizer, CONFIG["decoder"])
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    vision = CLIPVisionConfig(**train_tower.TOWER)
    config = LlavaVrConfig(vision_config=vision, text_config=text, image_token_id=image_token_id, **CONFIG["model"])
    model = LlavaVrForConditionalGeneration(config)
    with safe_open(tower, "pt") as file:
        prefix = "model.tower."
        weights = {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}
    model.model.vision_tower.load_state_dict(weights)
    model.model.vision_tower.requires_grad_(False)
    return prepare(model, tokenizer)


def take_weights(model: LlavaVrForConditionalGeneration, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """
    All but the tower's, from a checkpoint folder.

    Raises:
        ValueError: if the checkpoint has another tokenizer.
    """
    if PreTrainedTokenizerFast.from_pretrained(folder).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--start {folder}: its tokenizer has other tokens than that of configs/reader.json.")
    weights = LlavaVrForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
    weights = {name: weight for name, weight in weights.items() if "vision_tower" not in name}
    model.load_state_dict(weights, strict=False)


@torch.no_grad()
def code_places(model: LlavaVrForConditionalGeneration, pixel_values: torch.Tensor) -> None:
    """
    Adds to the projector's first layer a code of where a token is: sines and cosines of its column and row.

    They are fitted by least squares to the states before the tower's first layer, on some pictures, and go in random
    directions, 0.44 times as large as what is read besides.
    """
    tower, linear = model.model.vision_tower, model.model.multi_modal_projector.linear_1
    states = tower(pixel_values, output_hidden_states=True).hidden_states
    first, last = states[0][:, 1:].flatten(0, 1), states[-1][:, 1:].flatten(0, 1)
    side = SIDE // PATCH
    places = torch.arange(side**2)
    waves = [
        f(2 * math.pi * place / period)
        for place in (places % side, places // side)
        for period in (32, 16, 8, 4)
        for f in (torch.sin, torch.cos)
    ]
    targets = torch.stack(waves, 1).repeat(len(pixel_values), 1)
    fitted = torch.linalg.lstsq(first, targets, driver="gelsd").solution
    code = torch.randn(linear.out_features, len(waves)) @ fitted.T
    size = linear(torch.cat([first, last], 1)).std(0).mean() / (first @ code.T).std(0).mean()
    linear.weight[:, : first.shape[1]] += 0.44 * size * code


class Questions(Dialogues):
    """
    Dialogues in which a turn sees the picture and itself alone, as if it were asked first; in one of eight it sees
    the turns before it as well.

    Otherwise the answers are copied from those before them, and reading is not learned from them.
    """

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        user, image = self.tokenizer.convert_tokens_to_ids([USER, IMAGE])
        ids, places = sample["input_ids"], torch.arange(len(sample["input_ids"]))
        tokens = (ids == image).sum()
        begins = (ids == user) & (places > 0) & (index % 8 > 0)
        moved = torch.where(begins, places - tokens, 0).cummax(0).values
        turns = torch.where(begins, -1, begins.cumsum(0) + (places > tokens))
        return sample | {"position_ids": places - moved, "turns": turns}

    def collate(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The attention mask is what decoders add: `(batch, 1, tokens, tokens)`, float, 0 where a token is seen."""
        batch = super().collate(samples)
        turns, places = (pad_sequence([s[name] for s in samples], True, -1) for name in ("turns", "position_ids"))
        is_seen = (turns[:, None] == 0) | (turns[:, None] == turns[:, :, None])
        least = torch.finfo(torch.float32).min
        mask = torch.where(is_seen.tril(), 0, least)[:, None]
        return batch | {"attention_mask": mask, "position_ids": places.clamp(min=0)}


class Reader(nn.Module):
    """The model, and its loss on a batch of dialogues."""

    def __init__(self, model: LlavaVrForConditionalGeneration):
        super().__init__()
        self.model = model

    def loss(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.model(**batch, use_cache=False).loss


def draw(index: int) -> tuple[Image.Image, list[Turn]]:
    """A picture of training and a dialogue about it."""
    rng, shares, turns = generator(CONFIG["seed"], index), CONFIG["domains"], CONFIG["turns"]
    name = list(shares)[rng.choice(len(shares), p=list(shares.values()))]
    if name == "drawn":
        rng, domain, picture = draw_sample(DATA_SEED, index)  # with our seed, its domain would follow from ours
    else:
        domain = READING[name]
        picture = domain.draw(rng)
    dialogue = draw_dialogue(rng, domain, picture, turns)
    return picture.image, [replace(turn, answer=turn.full_answer) for turn in dialogue]


def share_right(
    model: LlavaVrForConditionalGeneration, processor: LlavaVrProcessor, downsample: int, count: int = 4
) -> float:
    """The mean over the domains of print of what is answered right, in families and layouts held out."""
    model.eval()
    cases = list(draw_cases(DEVELOPMENT_SEED, count, True, tuple(READING)))
    right, _ = measure(model, processor, cases, downsample=downsample)
    model.train()
    return sum(domain["all"] for domain in exact_match(right).values()) / len(READING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, STATE)
    parser.add_argument("--tower", type=Path, default=train_tower.STATE, help="state file of the tower")
    parser.add_argument("--start", type=Path, help="checkpoint folder whose weights a new run begins with")
    parser.add_argument("--output", type=Path, help="where to write the checkpoint folder when it ends")
    choices = CONFIG["model"]["projector_downsample_choices"]
    text = "choices of s, for one picture after the other; may repeat (default: each once)"
    parser.add_argument("--downsamples", type=int, nargs="+", choices=choices, help=text)
    args = parser.parse_args()
    check_data(parser)
    share_cores(args.threads)
    processor = make_reader_processor()
    model = make_reader(processor.tokenizer, args.tower)
    dialogues = Questions(processor, draw, 0, args.downsamples)
    if args.start and not args.state.is_file():
        take_weights(model, args.start, processor.tokenizer)
    elif not args.state.is_file():
        code_places(model, torch.stack([dialogues[index]["pixel_values"] for index in range(16)]))
    run = Run(Reader(model), args.state, CONFIG["seed"], args.batch_size)
    score = partial(share_right, model, processor, dialogues.downsamples[0])
    train(run, dialogues, dialogues.collate, score, args, lambda sample: len(sample["input_ids"]))
    if args.output and rank() == 0:
        save(model.bfloat16(), processor, args.output)


if __name__ == "__main__":
    main()
