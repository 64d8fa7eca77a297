"""Stages two and three: projector, modules and decoder learn to answer, over the frozen tower.

Stage two is the upper bound, where every patch is a token. The arms of stage three start from its decoder, as real
models start from a pretrained one; their projectors and modules are new. `python -m lab.table` trains them.
"""

import json
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPVisionModel

from lab.arms import STAGES, UPPER, Arm, make_model
from lab.dialogues import Dialogues
from lab.drawing import Turn
from lab.nano import make_processor
from lab.samples import SHARES, draw_dialogue, draw_sample, sample_texts
from lab.training import read_config, train
from llava_vr import LlavaVrForConditionalGeneration, LlavaVrProcessor


ROOT = Path(__file__).parents[1]  # the nano checkpoint
DATA_SEED = 11  # every arm and seed sees the same pictures in the same order


@lru_cache(maxsize=1)
def all_texts() -> tuple[str, ...]:
    return tuple(sample_texts())


def draw_turns(index: int, shares: Sequence[float]) -> tuple[Image.Image, list[Turn]]:
    """A picture of training and a dialogue about it."""
    rng, domain, picture = draw_sample(DATA_SEED, index, shares)
    return picture.image, draw_dialogue(rng, domain, picture)


def processor_of(arm: Arm) -> LlavaVrProcessor:
    return make_processor(all_texts(), arm.downsample)


def training_of(arm: Arm, scale: str) -> tuple[dict[str, Any], Sequence[float]]:
    """The Trainer's settings of an arm, and the shares of the domains in its pictures."""
    config = read_config(STAGES.get(arm, "compressed"))
    settings = config[scale] | {"max_steps": config[scale]["max_steps"] * (arm.longer or 1)}
    return settings, config.get("shares", SHARES)


def start_of(arm: Arm, folder: Path, from_nano: bool) -> tuple[CLIPVisionModel, dict[str, torch.Tensor] | None]:
    """The tower and the decoder that an arm starts from; the upper bound has no decoder to start from."""
    if from_nano:
        nano = LlavaVrForConditionalGeneration.from_pretrained(ROOT).model
        return nano.vision_tower, nano.language_model.state_dict()
    tower = AutoModel.from_pretrained(folder / "tower")
    tower.config._name_or_path = ""
    if arm == UPPER:
        return tower, None
    upper = load_file(folder / f"{UPPER.name}-{read_config('upper')['seed']}" / "model.safetensors")
    prefix = "model.language_model."
    return tower, {name.removeprefix(prefix): value for name, value in upper.items() if name.startswith(prefix)}


def train_arm(
    arm: Arm, scale: str, seed: int, folder: Path, deadline: float | None, from_nano: bool = False
) -> tuple[LlavaVrForConditionalGeneration, list[dict[str, float]]] | None:
    """
    An arm's trained model and its log, trained now or before; None if time was up.

    Args:
        folder: of all arms that start alike; it holds the tower and the upper bound whose decoder they start from.
        from_nano: start from tower and decoder of the checkpoint at the root instead.
    """
    processor = processor_of(arm)
    tower, decoder = start_of(arm, folder, from_nano)
    model = make_model(arm, tower, processor.tokenizer, seed, decoder)
    folder = folder / f"{arm.name}-{seed}"
    if (folder / "log.json").is_file():
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        return model, json.loads((folder / "log.json").read_text())
    settings, shares = training_of(arm, scale)
    draw = partial(draw_turns, shares=shares)
    data = Dialogues(processor, draw, settings["max_steps"] * settings["per_device_train_batch_size"])
    log = train(model, data, folder / "checkpoints", settings, seed, deadline, data_collator=data.collate)
    if log is None:
        return None
    trained = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / "model.safetensors")
    (folder / "log.json").write_text(json.dumps(log) + "\n")
    return model, log
