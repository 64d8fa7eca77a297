"""Stage one: teach a small vision tower to read, from dense labels.

The pictures are drawn, so it is known what lies under every patch: a character, a bar of some value, a shape. A tower
trained on that is then frozen, as a real model starts from a pretrained tower.

    python -m lab.tower --scale cpu                 # to lab/runs/cpu/tower
    python -m lab.tower --scale gpu --minutes 9     # a piece; the same command goes on where it stopped
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import CLIPVisionConfig, CLIPVisionModel

from lab.drawing import CANVAS, CLASSES, Picture, pixels
from lab.samples import DOMAINS, draw_sample
from lab.training import add_options, deadline_of, describe_machine, read_config, train


SPOTS = 2  # a patch is named at a quarter and at three quarters of its width
TEST_SEED = 2


def patch_labels(picture: Picture, grid: int) -> np.ndarray:
    """Which of `CLASSES` lies under each spot: `(grid * grid, SPOTS)`."""
    labels = np.asarray(picture.labels)
    rows = ((np.arange(grid) + 0.5) / grid * len(labels)).astype(int)
    columns = ((np.arange(SPOTS * grid) + 0.5) / (SPOTS * grid) * len(labels)).astype(int)
    return labels[rows][:, columns].reshape(grid * grid, SPOTS).astype(np.int64)


class LabelledPictures(Dataset):
    """Pictures with dense labels, drawn on demand from a seed and an index."""

    def __init__(self, seed: int, length: int, grid: int):
        self.seed, self.length, self.grid = seed, length, grid

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        _, _, picture = draw_sample(self.seed, index)
        labels = patch_labels(picture, self.grid)
        return {"pixel_values": torch.from_numpy(pixels(picture.image)), "labels": torch.from_numpy(labels)}


class ReadingTower(nn.Module):
    """A vision tower with heads that name what each patch shows; the heads are thrown away afterwards."""

    def __init__(self, tower: CLIPVisionModel, levels: list[int]):
        super().__init__()
        width = tower.config.hidden_size
        self.tower, self.levels = tower, levels
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, SPOTS * len(CLASSES))) for _ in levels
        )

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss, and the logits of the last level, `(pictures, patches, SPOTS, classes)`.

        Spots with nothing to name, which are many and easy, count for a third.
        """
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        named = [head(states[i][:, 1:]).unflatten(-1, (SPOTS, -1)) for head, i in zip(self.heads, self.levels)]
        weight = torch.ones(len(CLASSES), device=labels.device)
        weight[0] = 0.33
        losses = [nn.functional.cross_entropy(n.float().flatten(0, -2), labels.flatten(), weight) for n in named]
        return {"loss": sum(losses), "logits": named[-1]}


@torch.inference_mode()
def share_named(model: ReadingTower, grid: int, count: int = 100) -> dict[str, float]:
    """For each domain, the share of spots named right among those where there is something, on fresh pictures."""
    device, shares = next(model.parameters()).device, {}
    for name, domain in DOMAINS.items():
        pictures = [domain.draw(np.random.default_rng((TEST_SEED, index))) for index in range(count)]
        images = torch.stack([torch.from_numpy(pixels(picture.image)) for picture in pictures]).to(device)
        labels = torch.stack([torch.from_numpy(patch_labels(picture, grid)) for picture in pictures]).to(device)
        right = model(images, labels)["logits"].argmax(-1) == labels
        shares[name] = right[labels > 0].float().mean().item()
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
    result = {"named": share_named(model.eval(), grid), **describe_machine(), "log": log}
    (folder / "log.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["named"]))
    return True


def main() -> None:
    """Train the tower, measure it on fresh pictures, save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    args = parser.parse_args()
    train_tower(args.scale, args.runs / args.scale / "tower", deadline_of(args))


if __name__ == "__main__":
    main()
