"""Chats with images to training batches, with loss on what the assistant says and nowhere else."""

import copy
import os
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from .images_llava_vr import image_size


SOURCES = ("image", "url", "path", "base64")  # keys under which chat templates take a picture


class LlavaVrCollator:
    """
    A data collator for rows of chat messages with images, as transformers' chat templates and TRL take them:

        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                      {"role": "assistant", "content": "A plum."}],
         "images": ["plum.png"],
         "id": "plum-1"}

    A part of type "image" holds its picture itself or, as here, takes the next of the row's `images`. A picture is
    whatever the processor takes. `id` is optional, and named in errors. A batch may mix rows without images and with.

    Args:
        processor: a `LlavaVrProcessor` whose chat template marks the assistant's turns with {% generation %}. If its
            tokenizer has no pad token, rows are padded with the one that ends a text.
        max_length (`int`, *optional*): most tokens of a row, those of its images included; the tokenizer's
            `model_max_length` if not given. A row is never cut.
        too_long (`str`, defaults to `"raise"`): what happens to a row past `max_length`: "raise" or "drop".
        image_folder (defaults to the working directory): where relative paths of pictures begin.
        projector_downsample (`int` or `str`, *optional*): s of all images, one of the processor's choices; or "random",
            a choice for each row, to train a model for several numbers of tokens. The processor's if not given.
        seed (`int`, defaults to 0): of the random choices; with workers, together with torch's seed.
    """

    def __init__(
        self,
        processor,
        max_length: int | None = None,
        too_long: str = "raise",
        image_folder: str | os.PathLike | None = None,
        projector_downsample: int | str | None = None,
        seed: int = 0,
    ):
        if too_long not in ("raise", "drop"):
            raise ValueError(f"too_long must be 'raise' or 'drop', found {too_long!r}.")
        choices = processor.projector_downsample_choices or [processor.projector_downsample]
        if projector_downsample not in (None, "random", *choices):
            raise ValueError(
                f"projector_downsample must be one of {choices} or 'random', found {projector_downsample!r}."
            )
        self.projector_downsample, self.choices, self.seed, self.random = projector_downsample, choices, seed, None
        self.max_length = processor.tokenizer.model_max_length if max_length is None else max_length
        self.too_long, self.image_folder = too_long, image_folder
        ids = (processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id, 0)
        self.pad_token_id = next(i for i in ids if i is not None)  # any will do: attention_mask leaves it out
        self.processor = copy.copy(processor)  # its length is judged here
        self.processor.tokenizer = copy.copy(processor.tokenizer)
        self.processor.tokenizer.model_max_length = sys.maxsize

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `input_ids`, `attention_mask` and `labels` `(rows, length)`, padded on the right, labels -100 but for the
            assistant's tokens; with images what the processor makes of them, in the order of their placeholders.

        Raises:
            ValueError: a row has no messages, a picture that cannot be read or is missing or left over, nothing that
                the assistant says, or more than `max_length` tokens. The row is named by its place and its `id`.
        """
        encoded = [self.encode(row, i, self._choose()) for i, row in enumerate(rows)]
        fitting = [row for row in encoded if len(row["input_ids"]) <= self.max_length]
        for i, row in enumerate(encoded):
            if self.too_long == "raise" or not fitting:
                self.check_length(len(row["input_ids"]), rows[i], i)
        return self.pad(fitting)

    def check_length(self, length: int, row: Mapping[str, Any], index: int | None = None):
        """Raises a ValueError for a row of more than `max_length` tokens."""
        if length > self.max_length:
            raise ValueError(
                f"{_name(row, index)} has {length} tokens, those of its images included, and max_length is "
                f"{self.max_length}: shorten it, raise max_length, or drop it (too_long='drop', which needs a row that "
                "fits in each batch; `fits` filters a dataset beforehand)."
            )

    def pad(self, encoded: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The batch of rows that `encode` has made."""

        def pad(name: str, value: int) -> torch.Tensor:
            return pad_sequence([row[name] for row in encoded], batch_first=True, padding_value=value)

        batch = {
            "input_ids": pad("input_ids", self.pad_token_id),
            "attention_mask": pad("attention_mask", 0),
            "labels": pad("labels", -100),
        }
        pixels = [row["pixel_values"] for row in encoded if "pixel_values" in row]
        if pixels:
            if pixels[0].ndim == 5:  # (images, tiles, 3, height, width)
                tiles = max(images.shape[1] for images in pixels)
                pixels = [F.pad(images, (0,) * 7 + (tiles - images.shape[1],)) for images in pixels]
            batch["pixel_values"] = torch.cat(pixels)
            for key in ("image_sizes", "image_downsamples"):
                if values := [row[key] for row in encoded if key in row]:
                    batch[key] = torch.cat(values)
        return batch

    def fits(self, row: Mapping[str, Any], index: int | None = None) -> bool:
        """Whether the row has at most `max_length` tokens: for `dataset.filter(collator.fits, with_indices=True)`."""
        return self.length(row, index) <= self.max_length

    def length(self, row: Mapping[str, Any], index: int | None = None) -> int:
        """Tokens of the row, those of its images included, at most (for a random s). It takes the sizes of the images
        alone: a file's pixels are not decoded."""
        downsample = min(self.choices) if self.projector_downsample == "random" else self.projector_downsample
        try:
            messages, sizes = self.messages(row), []
            contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
            for part in (part for content in contents for part in content):
                if isinstance(part, Mapping) and part.get("type") == "image":
                    try:
                        sizes.append(image_size(part["image"]))
                    except Exception as error:  # each decoder of a file format raises its own
                        raise ValueError(f"images[{len(sizes)}] cannot be read: {error}") from error
            text, tokenizer = self.processor.apply_chat_template(messages), self.processor.tokenizer
        except (OSError, ValueError) as error:
            raise ValueError(f"{_name(row, index)}: {error}") from error
        counts = self.processor._get_num_multimodal_tokens(sizes, downsample)["num_image_tokens"] if sizes else []
        has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        return len(tokenizer(text, add_special_tokens=not has_bos)["input_ids"]) - len(counts) + sum(counts)

    def _choose(self) -> int | None:
        """The s of a row."""
        if self.projector_downsample != "random":
            return self.projector_downsample
        worker = torch.utils.data.get_worker_info()
        key = f"{self.seed} {worker.seed if worker else None}"  # a worker's seed is another in each epoch
        if self.random is None or self.random[0] != key:
            self.random = key, random.Random(key)
        return self.random[1].choice(self.choices)

    def encode(
        self, row: Mapping[str, Any], index: int | None = None, projector_downsample: int | None = None
    ) -> dict[str, torch.Tensor]:
        """One row's `input_ids`, `attention_mask` and `labels` `(length,)`, and its images. Errors name the row."""
        try:
            inputs = self.processor.apply_chat_template(
                self.messages(row),
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                return_assistant_tokens_mask=True,
                processor_kwargs={"projector_downsample": projector_downsample},
            )
            ids, spoken = inputs["input_ids"][0], torch.as_tensor(inputs["assistant_masks"])[0].bool()
            if not spoken.any():
                raise ValueError(
                    "all labels are masked: no message is the assistant's, all of them are empty, or the chat template "
                    "does not mark what the assistant says with {% generation %}."
                )
        except (OSError, ValueError) as error:
            raise ValueError(f"{_name(row, index)}: {error}") from error
        images = {key: inputs[key] for key in ("pixel_values", "image_sizes", "image_downsamples") if key in inputs}
        labels = ids.masked_fill(~spoken, -100)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **images}

    def messages(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The row's messages, each image part with its picture; a ValueError says which is missing or left over."""
        if not row.get("messages"):
            raise ValueError("messages is empty or missing: a row is {'messages': [...]}, with 'images' if need be.")
        images, wanted = list(row.get("images") or []), 0

        def fill(part: Any) -> Any:
            nonlocal wanted
            if not isinstance(part, Mapping):
                return part  # the processor refuses it
            part = {key: value for key, value in part.items() if value is not None}  # datasets fill gaps with None
            if part.get("type") != "image":
                return part
            source = next((part[key] for key in SOURCES if key in part), None)
            if source is None:
                wanted += 1
                source = images[wanted - 1] if wanted <= len(images) else None
            return {"type": "image", "image": self._locate(source)}

        messages = [
            {**message, "content": content if isinstance(content, str) else [fill(part) for part in content or []]}
            for message in row["messages"]
            for content in [message.get("content")]
        ]
        if wanted != len(images):
            raise ValueError(
                f"the content has {wanted} image parts without a picture of their own, but images has {len(images)}: "
                "give one for each."
            )
        return messages

    def _locate(self, source):
        if isinstance(source, Mapping) and source.get("bytes") is None:
            source = source.get("path")
        is_path = isinstance(source, (str, os.PathLike)) and self.image_folder is not None
        if is_path and os.path.exists(path := os.path.join(self.image_folder, source)):
            return path
        return source


def _name(row: Mapping[str, Any], index: int | None) -> str:
    name = "row" if index is None else f"row {index}"
    return name if row.get("id") is None else f"{name} (id {row['id']!r})"


__all__ = ["LlavaVrCollator"]
