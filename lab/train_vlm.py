"""Stages two and three: projector, modules and decoder are trained to answer, over the frozen tower.

In stage two every patch is a token: the uncompressed model. The compressed models of stage three start from its
decoder, as real models start from a pretrained one; their projectors and modules are new. `python -m
lab.run_experiments` trains them.
"""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import AutoModel, CLIPVisionModel

from lab.data.drawing import Turn, pixels
from lab.data.samples import SHARES, draw_dialogue, draw_sample, sample_texts
from lab.experiments import SCHEDULES, STAGES, UNCOMPRESSED, Experiment, make_model
from lab.nano import ASSISTANT, END, IMAGE, USER, make_processor
from lab.training import read_config, train
from llava_vr import LlavaVrForConditionalGeneration, LlavaVrProcessor


ROOT = Path(__file__).parents[1]  # the nano checkpoint
DATA_SEED = 11  # every experiment and seed has the same pictures in the same order


class Dialogues(Dataset):
    """
    Tokenized dialogues about pictures, the processor's choices of s in turn; the loss is taken on the answers.

    Args:
        draw: gives the picture of an index and the turns about it.
        length: of a training run, in dialogues.
        downsamples: those of the choices that are used, all by default.
    """

    def __init__(
        self,
        processor: LlavaVrProcessor,
        draw: Callable[[int], tuple[Image.Image, list[Turn]]],
        length: int,
        downsamples: Sequence[int] | None = None,
    ):
        self.tokenizer, self.draw, self.length = processor.tokenizer, draw, length
        self.side = processor.image_processor.size["height"]
        choices = processor.projector_downsample_choices or [processor.projector_downsample]
        self.downsamples = downsamples or choices
        self.images = {s: IMAGE * processor.image_layout.num_tokens(None, s) for s in self.downsamples}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, turns = self.draw(index)
        downsample = self.downsamples[index % len(self.downsamples)]
        placeholders, parts = self.images[downsample], []
        for turn in turns:
            parts += [f"{USER}{placeholders}{turn.question}{END}{ASSISTANT}", f"{turn.answer}{END}"]
            placeholders = ""
        pieces = self.tokenizer(parts, add_special_tokens=False)["input_ids"]
        labels = [token if number % 2 else -100 for number, piece in enumerate(pieces) for token in piece]
        return {
            "input_ids": torch.tensor(sum(pieces, [])),
            "labels": torch.tensor(labels),
            "pixel_values": torch.from_numpy(pixels(image, self.side)),
            "image_downsamples": torch.tensor(downsample),
        }

    def collate(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Pads on the right."""

        def pad(name: str, value: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence([sample[name] for sample in samples], True, value)

        input_ids = pad("input_ids", self.tokenizer.pad_token_id)
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != self.tokenizer.pad_token_id).long(),
            "labels": pad("labels", -100),
            **{name: torch.stack([s[name] for s in samples]) for name in ("pixel_values", "image_downsamples")},
        }


def draw_turns(index: int, shares: Sequence[float]) -> tuple[Image.Image, list[Turn]]:
    """A picture of training and a dialogue about it."""
    rng, domain, picture = draw_sample(DATA_SEED, index, shares)
    return picture.image, draw_dialogue(rng, domain, picture)


@lru_cache(maxsize=1)
def all_texts() -> tuple[str, ...]:
    return tuple(sample_texts())


def processor_of(experiment: Experiment) -> LlavaVrProcessor:
    return make_processor(all_texts(), experiment.downsample, experiment.choices)


def training_of(experiment: Experiment, scale: str) -> tuple[dict[str, Any], Sequence[float]]:
    """The Trainer's settings of an experiment, and the shares of the domains in its pictures."""
    config = read_config(STAGES.get(experiment, "compressed"))
    settings = config[scale] | {"max_steps": config[scale]["max_steps"] * SCHEDULES[experiment.schedule]}
    return settings, config.get("shares", SHARES)


def start_of(
    experiment: Experiment, folder: Path, from_nano: bool
) -> tuple[CLIPVisionModel, dict[str, torch.Tensor] | None]:
    """The tower and the decoder that an experiment starts from; the uncompressed model has no decoder to start from."""
    if from_nano:
        nano = LlavaVrForConditionalGeneration.from_pretrained(ROOT).model
        return nano.vision_tower, nano.language_model.state_dict()
    tower = AutoModel.from_pretrained(folder / "tower")
    tower.config._name_or_path = ""
    if experiment == UNCOMPRESSED:
        return tower, None
    seed = read_config("uncompressed")["seed"]
    uncompressed = load_file(folder / f"{UNCOMPRESSED.name}-{seed}" / "model.safetensors")
    prefix = "model.language_model."
    return tower, {name.removeprefix(prefix): value for name, value in uncompressed.items() if name.startswith(prefix)}


def train_experiment(
    experiment: Experiment, scale: str, seed: int, folder: Path, deadline: float | None, from_nano: bool = False
) -> tuple[LlavaVrForConditionalGeneration, list[dict[str, float]]] | None:
    """
    An experiment's trained model and its log, trained now or before; None if time was up.

    Args:
        folder: of all experiments that start alike; it holds the tower and the uncompressed model whose decoder they
            start from.
        from_nano: start from tower and decoder of the checkpoint at the root instead.
    """
    processor = processor_of(experiment)
    tower, decoder = start_of(experiment, folder, from_nano)
    model = make_model(experiment, tower, processor.tokenizer, seed, decoder)
    folder = folder / f"{experiment.name}-{seed}"
    if (folder / "log.json").is_file():
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        return model, json.loads((folder / "log.json").read_text())
    settings, shares = training_of(experiment, scale)
    draw = partial(draw_turns, shares=shares)
    data = Dialogues(processor, draw, settings["max_steps"] * settings["per_device_train_batch_size"])
    log = train(model, data, folder / "checkpoints", settings, seed, deadline, data_collator=data.collate)
    if log is None:
        return None
    trained = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / "model.safetensors")
    (folder / "log.json").write_text(json.dumps(log) + "\n")
    return model, log
