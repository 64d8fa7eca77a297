"""Stage one: teach a small vision tower to read, from dense labels.

The pictures are drawn, so it is known what lies under every patch: a character, a bar of some value, a shape, and to
which line, row, column or number it belongs. A tower trained on that is then frozen, as a real model starts from a
pretrained tower. `python -m lab.run_experiments` trains it first.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, default_collate
from transformers import CLIPVisionConfig, CLIPVisionModel

from lab.data.dense_labels import CANVAS, LABEL_TYPES
from lab.data.drawing import Picture, generator, pixels
from lab.data.samples import DOMAINS, draw_sample
from lab.training import describe_machine, read_config, train


SPOTS = 2  # glyphs are named at a quarter and at three quarters of a patch's width
TEST_SEED = 2


def patch_labels(picture: Picture, grid: int) -> dict[str, np.ndarray]:
    """The number of what lies under each patch, for each of `LABEL_TYPES`: (patches,), of glyphs (patches, SPOTS)."""
    rows = ((np.arange(grid) + 0.5) / grid * CANVAS).astype(int)
    columns = ((np.arange(SPOTS * grid) + 0.5) / (SPOTS * grid) * CANVAS).astype(int)
    spots = picture.labels.maps[:, rows][:, :, columns].reshape(len(LABEL_TYPES), grid * grid, SPOTS).astype(np.int64)
    labels = dict(zip(LABEL_TYPES, np.where(spots[..., 0] > 0, spots[..., 0], spots[..., 1])))
    return {**labels, "glyph": spots[0]}


def as_tensors(picture: Picture, grid: int) -> dict[str, torch.Tensor]:
    arrays = {"pixel_values": pixels(picture.image), **patch_labels(picture, grid)}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class LabelledPictures(Dataset):
    """Pictures with dense labels, drawn on demand from a seed and an index."""

    def __init__(self, seed: int, length: int, grid: int):
        self.seed, self.length, self.grid = seed, length, grid

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return as_tensors(draw_sample(self.seed, index)[2], self.grid)


class ReadingTower(nn.Module):
    """A vision tower with heads that name what each patch shows; the heads are thrown away afterwards.

    Glyphs are named at each of `levels`, what they belong to only at the last, which has the context.
    """

    def __init__(self, tower: CLIPVisionModel, levels: list[int]):
        super().__init__()
        width = tower.config.hidden_size
        self.tower, self.levels = tower, levels
        self.glyphs = nn.ModuleList(self.head(width, SPOTS * (len(LABEL_TYPES["glyph"]) + 1)) for _ in levels)
        self.others = nn.ModuleDict(
            {
                label_type: self.head(width, len(LABEL_TYPES[label_type]) + 1)
                for label_type in LABEL_TYPES
                if label_type != "glyph"
            }
        )

    @staticmethod
    def head(width: int, classes: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    @staticmethod
    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy; spots with nothing to name, which are many and easy, count for a third."""
        weight = torch.ones(logits.shape[-1], device=logits.device)
        weight[0] = 0.33
        return nn.functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), weight)

    def forward(self, pixel_values: torch.Tensor, **labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss, and for each of `LABEL_TYPES` the logits of the last level, (pictures, patches, [SPOTS,] classes).

        What glyphs belong to can be named only once they are: its loss weighs little, and leads when theirs has fallen.
        """
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        glyphs = [head(states[i][:, 1:]).unflatten(-1, (SPOTS, -1)) for head, i in zip(self.glyphs, self.levels)]
        others = {label_type: head(states[-1][:, 1:]) for label_type, head in self.others.items()}
        loss = sum(self.loss(logits, labels["glyph"]) for logits in glyphs)
        loss = loss + 0.15 * sum(self.loss(logits, labels[label_type]) for label_type, logits in others.items())
        return {"loss": loss, "glyph": glyphs[-1], **others}


@torch.inference_mode()
def share_named(model: ReadingTower, grid: int, held_out: bool, count: int = 100) -> dict[str, dict[str, float]]:
    """By domain and type of label: the share named right of what is there to name, on fresh pictures."""
    device, shares = next(model.parameters()).device, {}
    for name, domain in DOMAINS.items():
        pictures = [domain.draw(generator(TEST_SEED, index), held_out) for index in range(count)]
        batch = default_collate([as_tensors(picture, grid) for picture in pictures])
        named = model(**{key: value.to(device) for key, value in batch.items()})
        shares[name] = {}
        for label_type in LABEL_TYPES:
            there = batch[label_type] > 0
            if there.any():
                right = named[label_type].argmax(-1).cpu() == batch[label_type]
                shares[name][label_type] = round(right[there].float().mean().item(), 4)
    return shares


def train_tower(scale: str, folder: Path, deadline: float | None) -> bool:
    """Trains the tower into `folder`, unless it is there; whether it is finished."""
    if (folder / "log.json").is_file():
        return True
    config = read_config("tower")
    torch.manual_seed(config["seed"])
    tower_config = CLIPVisionConfig(image_size=CANVAS, attn_implementation="eager", **config["tower"])
    model = ReadingTower(CLIPVisionModel(tower_config), config["reading_levels"])
    settings, grid = config[scale], CANVAS // tower_config.patch_size
    pictures = LabelledPictures(config["seed"], settings["max_steps"] * settings["per_device_train_batch_size"], grid)
    log = train(model, pictures, folder / "checkpoints", settings, config["seed"], deadline)
    if log is None:
        return False
    model.tower.save_pretrained(folder)
    named = {style: share_named(model.eval(), grid, style == "held out") for style in ("seen", "held out")}
    result = {"named": named, **describe_machine(), "log": log}
    (folder / "log.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(named, indent=1))
    return True
