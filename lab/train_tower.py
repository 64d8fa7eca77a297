"""Stage one: teach a small vision tower to read, from dense labels.

The pictures are drawn, so it is known what lies under every patch: which characters, and which item and price its row
holds. A tower trained on that is then frozen, as a real model starts from a pretrained tower.

    python -m lab.train_tower --output lab/runs/tower                     # about 20 minutes on two cores
    python -m lab.train_tower --output lab/runs/tower --steps 100         # a try
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import CLIPVisionConfig, CLIPVisionModel, Trainer, TrainingArguments

from lab.drawing import CANVAS, generator, pixels
from lab.muon import MuonAdamW
from lab.receipts import ITEMS, Receipt, draw_receipt


PATCH = 8
GRID = CANVAS // PATCH
CHARACTERS = " abcdefghijklmnopqrstuvwxyz0123456789"
TRAIN_SEED, TEST_SEED = 1, 2
LEARNING_RATE = 2e-3
READING_LEVELS = (4, 6)  # hidden states that name the characters; the last also names the row


def patch_labels(receipt: Receipt) -> dict[str, np.ndarray]:
    """What lies under each patch.

    Returns:
        characters: (patches, 2), at a quarter and at three quarters of the patch's width; 0 is blank.
        row: (patches, 3), the item, the tens and the ones of the row that the patch's centre lies in; 0 is none.
    """
    characters = np.zeros((GRID, 2 * GRID), dtype=np.int64)
    row = np.zeros((GRID, GRID, 3), dtype=np.int64)
    y = (np.arange(GRID) + 0.5) / GRID
    x = (np.arange(2 * GRID) + 0.5) / (2 * GRID)
    for glyphs in receipt.glyphs:
        inside = (y >= glyphs.top) & (y < glyphs.bottom)
        line = receipt.rows[glyphs.row]
        row[inside] = (ITEMS.index(line.item) + 1, line.price // 10 + 1, line.price % 10 + 1)
        place = np.searchsorted(glyphs.edges, x, side="right") - 1
        for column in np.flatnonzero((place >= 0) & (place < len(glyphs.text))):
            characters[inside, column] = CHARACTERS.index(glyphs.text[place[column]])
    return {"characters": characters.reshape(GRID * GRID, 2), "row": row.reshape(GRID * GRID, 3)}


class LabelledReceipts(Dataset):
    """Pictures with dense labels, drawn on demand from a seed and an index."""

    def __init__(self, seed: int, length: int):
        self.seed, self.length = seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        receipt = draw_receipt(generator(self.seed, index))
        arrays = {"pixel_values": pixels(receipt.image), **patch_labels(receipt)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class ReadingTower(nn.Module):
    """A vision tower with heads that name what each patch shows; the heads are thrown away afterwards."""

    def __init__(self, tower: CLIPVisionModel):
        super().__init__()
        width = tower.config.hidden_size
        self.tower = tower
        self.characters = nn.ModuleList(self.head(width, 2 * len(CHARACTERS)) for _ in READING_LEVELS)
        self.item, self.tens, self.ones = (self.head(width, size) for size in (len(ITEMS) + 1, 11, 11))

    @staticmethod
    def head(width: int, classes: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    @staticmethod
    def loss(spots: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy; spots with nothing to name, which are many and easy, count for a third."""
        logits, label = spots[0].float().flatten(0, -2), spots[1].flatten()
        weight = torch.ones(logits.shape[-1])
        weight[0] = 0.33
        return nn.functional.cross_entropy(logits, label, weight)

    def forward(self, pixel_values: torch.Tensor, characters: torch.Tensor, row: torch.Tensor) -> dict:
        """Loss, and for each label whether it was named, -1 where there is nothing to name."""
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        names = [
            (head(states[level][:, 1:]).unflatten(-1, (2, -1)), characters)  # (batch, patches, 2, classes)
            for head, level in zip(self.characters, READING_LEVELS)
        ]
        last = states[-1][:, 1:]
        rows = [(head(last), row[..., i]) for i, head in enumerate((self.item, self.tens, self.ones))]
        # Rows can be named only once characters are: their loss weighs little, and leads when the other has fallen.
        loss = sum(map(self.loss, names)) + 0.15 * sum(map(self.loss, rows))
        hits = [torch.where(label > 0, logits.argmax(-1) == label, -1).flatten(1) for logits, label in names[1:] + rows]
        return {"loss": loss, "hits": torch.cat(hits, dim=1).to(torch.int8)}


def accuracy(prediction) -> dict[str, float]:
    """Shares named among the spots where there is something to name."""
    hits = np.split(prediction.predictions, np.cumsum([2 * GRID**2, GRID**2, GRID**2]), axis=1)
    return {name: float(hit[hit >= 0].mean()) for name, hit in zip(("characters", "items", "tens", "ones"), hits)}


def main() -> None:
    """Train the tower, measure it on fresh pictures, save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the tower, its log and checkpoints")
    parser.add_argument("--steps", type=int, default=2000, help="batches of 32 pictures (default 2000)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    args = parser.parse_args()
    torch.manual_seed(TRAIN_SEED)
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=CANVAS,
        patch_size=PATCH,
        hidden_act="gelu",
        attn_implementation="eager",  # twice as fast as sdpa here: its backward pass on a CPU is slow
    )
    model = ReadingTower(CLIPVisionModel(config))
    training = TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=100,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=150,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=True,
        seed=TRAIN_SEED,
        logging_steps=25,
        eval_strategy="steps",
        eval_steps=250,
        save_steps=250,
        save_total_limit=1,
        label_names=["characters", "row"],
        remove_unused_columns=False,
        dataloader_num_workers=1,
        report_to="none",
    )
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=LabelledReceipts(TRAIN_SEED, args.steps * 32),
        eval_dataset=LabelledReceipts(TEST_SEED, 200),
        compute_metrics=accuracy,
        optimizers=(MuonAdamW(model, LEARNING_RATE), None),
    )
    trainer.train(resume_from_checkpoint=args.resume)
    model.tower.save_pretrained(args.output)
    Path(args.output, "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))


if __name__ == "__main__":
    main()
