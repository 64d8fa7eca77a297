"""Drawn pictures and turns about them as training samples."""

from collections.abc import Callable

import torch
from PIL import Image
from torch.utils.data import Dataset

from lab.drawing import Turn, pixels
from lab.nano import ASSISTANT, END, IMAGE, USER
from llava_vr import LlavaVrProcessor


class Dialogues(Dataset):
    """
    Tokenized dialogues about pictures; the loss is taken on the answers.

    Args:
        draw: gives the picture of an index and the turns about it.
        length: of a training run, in dialogues.
    """

    def __init__(self, processor: LlavaVrProcessor, draw: Callable[[int], tuple[Image.Image, list[Turn]]], length: int):
        self.tokenizer, self.draw, self.length = processor.tokenizer, draw, length
        self.image = IMAGE * processor.image_layout.num_tokens(None)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, turns = self.draw(index)
        parts = []
        for turn in turns:
            parts += [f"{USER}{self.image if not parts else ''}{turn.question}{END}{ASSISTANT}", f"{turn.answer}{END}"]
        pieces = self.tokenizer(parts, add_special_tokens=False)["input_ids"]
        labels = [token if number % 2 else -100 for number, piece in enumerate(pieces) for token in piece]
        return {
            "input_ids": torch.tensor(sum(pieces, [])),
            "labels": torch.tensor(labels),
            "pixel_values": torch.from_numpy(pixels(image)),
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
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        }
