"""Stages two and three: projector, modules and decoder learn to answer, over the frozen tower.

Stage two is the upper bound, where every patch is a token. The arms of stage three start from its decoder, as real
models start from a pretrained one; their projectors and modules are new. `python -m lab.table` trains them.
"""

import json
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file, save_file

from lab.arms import STAGES, UPPER, Arm, make_model
from lab.dialogues import Dialogues
from lab.drawing import Turn
from lab.nano import make_processor
from lab.samples import SHARES, draw_dialogue, draw_sample, sample_texts
from lab.training import read_config, train
from llava_vr import LlavaVrForConditionalGeneration, LlavaVrProcessor


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


def train_arm(
    arm: Arm, scale: str, seed: int, runs: Path, deadline: float | None
) -> tuple[LlavaVrForConditionalGeneration, list[dict[str, float]]] | None:
    """
    An arm's trained model and its log, trained now or before; None if time was up.

    `runs / scale` holds the tower, and the upper bound whose decoder the other arms start from.
    """
    folder, processor = runs / scale / f"{arm.name}-{seed}", processor_of(arm)
    decoder = None
    if arm != UPPER:
        upper = load_file(runs / scale / f"{UPPER.name}-{read_config('upper')['seed']}" / "model.safetensors")
        prefix = "model.language_model."
        decoder = {name.removeprefix(prefix): value for name, value in upper.items() if name.startswith(prefix)}
    model = make_model(arm, runs / scale / "tower", processor.tokenizer, seed, decoder)
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
