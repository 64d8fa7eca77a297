"""Processor of LLaVA-VR: images to pixel values, and one placeholder in the text for each vision token."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData
from transformers.utils import logging

from .collator_llava_vr import LlavaVrCollator
from .configuration_llava_vr import LlavaVrConfig
from .images_llava_vr import open_image, to_rgb, to_rgb_array
from .layout_llava_vr import ImageLayout, make_layout


logger = logging.get_logger(__name__)


class LlavaVrProcessor(ProcessorMixin):
    r"""Image processor and tokenizer as one, and the number of placeholders that an image gets.

    Args:
        image_processor: transformers' own: LLaVA-NeXT's for tiles ("anyres", "anyres_max_N"), LLaVA's with `do_pad` for
            "pad", CLIP's or SigLIP's for "square".
        tokenizer: with `image_token` as one token.
        chat_template (`str`, *optional*)
        image_token (`str`, defaults to `"<image>"`): the placeholder, once for each image in the text given.
        patch_size, projector_downsample, projector_downsample_choices, image_aspect_ratio, image_merge_type: as in the
            configuration; without an `image_aspect_ratio` it is "anyres" for an image processor that makes tiles, else
            "square".
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        patch_size: int = 14,
        projector_downsample: int = 2,
        projector_downsample_choices: list[int] | None = None,
        image_aspect_ratio: str | None = None,
        image_merge_type: str = "spatial_unpad",
        **kwargs,
    ):
        if image_token not in tokenizer.get_vocab():
            raise ValueError(f"image_token {image_token!r} is not a token of the tokenizer: add it as a special token.")
        has_tilings = bool(getattr(image_processor, "image_grid_pinpoints", None))
        if image_aspect_ratio is None:
            image_aspect_ratio = "anyres" if has_tilings else "square"
        if image_aspect_ratio.startswith("anyres") and not has_tilings:
            raise ValueError(
                f"image_aspect_ratio {image_aspect_ratio!r} needs an image processor with image_grid_pinpoints, such "
                f"as LlavaNextImageProcessor; found {type(image_processor).__name__}."
            )
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.patch_size = patch_size
        self.projector_downsample = projector_downsample
        self.projector_downsample_choices = projector_downsample_choices
        self.image_aspect_ratio = image_aspect_ratio
        self.image_merge_type = image_merge_type
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_layout  # noqa: B018  # refuses fields that do not go together

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As transformers' own; and where a model's config.json lies beside it, a text may have at most as many tokens
        as its decoder's context.

        Raises:
            ValueError: that config.json has other tilings, or another count of tokens for an image.
        """
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        kwargs.pop("trust_remote_code", None)
        try:
            values, _ = LlavaVrConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        except OSError:  # there is none
            values = {}
        if values.get("model_type") == LlavaVrConfig.model_type:
            config = LlavaVrConfig.from_dict(values)
            fields = ("image_layout", "projector_downsample", "projector_downsample_choices")
            found, expected = (
                repr([getattr(owner, field) for field in fields])  # a reload makes the layout's class anew
                for owner in (processor, config)
            )
            if found != expected:
                raise ValueError(
                    "The processor and the model's config.json must have the same image_grid_pinpoints in the same "
                    "order, image_aspect_ratio, image_merge_type, projector_downsample and its choices, patch_size and "
                    f"size of a tile: found {found} and {expected}."
                )
            tokenizer, context = processor.tokenizer, getattr(config.text_config, "max_position_embeddings", None)
            tokenizer.model_max_length = min(tokenizer.model_max_length, context or tokenizer.model_max_length)
        return processor

    @property
    def image_layout(self) -> ImageLayout:
        """As the configuration's property of this name, from the processor's own fields."""
        size = getattr(self.image_processor, "crop_size", None) or self.image_processor.size
        tile_size = size.get("height") or size.get("shortest_edge")
        pinpoints = getattr(self.image_processor, "image_grid_pinpoints", None)
        return make_layout(self.image_aspect_ratio, self.image_merge_type, tile_size, self.patch_size, pinpoints)

    def __call__(
        self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """
        Args:
            images: PIL images, arrays, tensors, paths, URLs or base64 texts; one, a list, or a list for each text.
                Arrays and tensors hold 0 to 255, as bool or floats also 0 to 1, which `do_rescale=False` says, too.
            text: one text or a list, each with an `image_token` for each of its images.
            projector_downsample (`int` or `list[int]`, *optional*): s, how many patches a side become one vision token:
                one of `projector_downsample_choices`, or a list of them, one for each image.

        Returns:
            `input_ids`, `attention_mask`, and with images `pixel_values` `(images, tiles, 3, height, width)` or, with
            one tile, `(images, 3, height, width)`, and `image_sizes` `(images, 2)` as (height, width); with a
            `projector_downsample` also `image_downsamples` `(images,)`.

        Raises:
            ValueError: as many images as placeholders are needed; an image that cannot be read is named by its number;
                a text longer than the tokenizer's `model_max_length`.
        """
        options = dict(kwargs.pop("images_kwargs", None) or {})
        data_format = kwargs.pop("input_data_format", options.pop("input_data_format", None))
        if "projector_downsample" in options:
            kwargs["projector_downsample"] = options.pop("projector_downsample")
        images, counts, unit_range = self._read_images([] if images is None else images, data_format)
        if unit_range and not kwargs.get("do_rescale", options.get("do_rescale", self.image_processor.do_rescale)):
            kwargs.pop("do_rescale", None)  # they were from 0 to 1, and are to be so again
            (options or kwargs).update(do_rescale=True, rescale_factor=1 / 255)
        if options:
            kwargs["images_kwargs"] = options
        text = [text] if isinstance(text, str) else text
        if text is not None and not kwargs.get("sanitize_control_tokens"):  # it marks what is not a placeholder
            self._check_placeholders(text, len(images), counts)
            self._check_role_markers(text)
        inputs = super().__call__(images=images or None, text=text, **kwargs)
        self._check_length(inputs)
        return inputs

    def _merge_kwargs(self, *args, projector_downsample: int | list[int] | None = None, **kwargs) -> dict[str, dict]:
        merged = super()._merge_kwargs(*args, **kwargs)
        if projector_downsample is not None:  # not a field of any image processor's
            merged["images_kwargs"]["projector_downsample"] = projector_downsample
        return merged

    def _process_images(
        self, images: list, projector_downsample: int | list[int] | None = None, **kwargs
    ) -> tuple[BatchFeature, list[str]]:
        inputs = self.image_layout.process(images, self.image_processor, **kwargs)
        convert = torch.tensor if isinstance(inputs["pixel_values"], torch.Tensor) else np.array
        if "image_sizes" not in inputs:
            inputs["image_sizes"] = convert([tuple(image.shape[1:]) for image in images])
        if projector_downsample is not None:
            inputs["image_downsamples"] = convert(self._check_downsamples(projector_downsample, len(images)))
        return inputs, [self.replace_image_token(inputs, i) for i in range(len(images))]

    def _check_downsamples(self, asked: int | list[int], num_images: int) -> list[int]:
        """One s for each image, each of them one that the model takes."""
        values, choices = np.asarray(asked), self.projector_downsample_choices or [self.projector_downsample]
        downsamples = values.flatten().tolist() * (num_images if values.ndim == 0 else 1)
        if values.dtype.kind not in "iu" or len(downsamples) != num_images or not set(downsamples) <= set(choices):
            raise ValueError(
                f"projector_downsample must be one of {choices} (projector_downsample_choices), or a list of them, one "
                f"for each of the {num_images} images; found {asked}."
            )
        return downsamples

    def apply_chat_template(self, conversation: list, *args, sanitize_control_tokens: bool = False, **kwargs):
        """As transformers' own, and refuses an `image_token` that is written out in a message's text."""
        self._check_conversation(conversation, sanitize_control_tokens)
        if sanitize_control_tokens:
            kwargs["sanitize_control_tokens"] = True
        return super().apply_chat_template(conversation, *args, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of one image: `image_token`, as often as the model has vision tokens for it."""
        size, downsample = image_inputs["image_sizes"][image_idx], self.projector_downsample
        if "image_downsamples" in image_inputs:
            downsample = int(image_inputs["image_downsamples"][image_idx])
        return self.image_token * self.image_layout.num_tokens([int(side) for side in size], downsample)

    def _get_num_multimodal_tokens(
        self, image_sizes: list | None = None, projector_downsample: int | list[int] | None = None, **kwargs
    ) -> MultiModalData:
        """Placeholders of images of these sizes, (height, width) in pixels; serving engines call it."""
        if image_sizes is None:
            return MultiModalData()
        asked = self.projector_downsample if projector_downsample is None else projector_downsample
        downsamples = self._check_downsamples(asked, len(image_sizes))
        counts = [self.image_layout.num_tokens(size, s) for size, s in zip(image_sizes, downsamples)]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))

    def make_collator(self, **options: Any) -> LlavaVrCollator:
        """The collator of training batches with this processor; options are those of `LlavaVrCollator`."""
        return LlavaVrCollator(self, **options)

    @property
    def model_input_names(self) -> list[str]:
        return list(dict.fromkeys([*super().model_input_names, "image_sizes"]))

    def _read_images(self, images: ImageInput, data_format: str | None) -> tuple[list, list[int] | None, bool]:
        """The images as upright 8-bit RGB arrays (3, height, width), flat; how many each text has if they came nested;
        whether the white of any was 1 and not 255."""
        arrays, unit_range = [], False
        channels_last = None if data_format is None else data_format == "channels_last"

        def read(image) -> int:
            nonlocal unit_range
            is_array = isinstance(image, (np.ndarray, torch.Tensor))
            if isinstance(image, (list, tuple)) or (is_array and image.ndim == 4):
                return sum(map(read, image))
            try:
                if isinstance(image, (str, os.PathLike, Mapping)):
                    image = open_image(image)
                if isinstance(image, Image.Image):
                    image = np.array(to_rgb(image)).transpose(2, 0, 1)
                elif is_array:
                    image, scaled = to_rgb_array(image, channels_last)
                    unit_range |= scaled
                else:
                    raise ValueError(
                        f"{type(image).__name__} is not a type of image: pass a PIL image, an array, a path or a URL"
                    )
            except Exception as error:  # each decoder of a file format raises its own
                raise ValueError(f"images[{len(arrays)}] cannot be read: {str(error).rstrip('.')}.") from error
            arrays.append(image)
            return 1

        if not isinstance(images, (list, tuple)):
            images = [images]
        counts = [read(image) for image in images]
        return arrays, counts if any(isinstance(image, (list, tuple)) for image in images) else None, unit_range

    def _check_placeholders(self, texts: list[str], num_images: int, counts: list[int] | None):
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("text must be a string or a list of strings.")
        found = [text.count(self.image_token) for text in texts]
        if counts is not None and len(counts) == len(found):
            for row, (placeholders, count) in enumerate(zip(found, counts)):
                if placeholders != count:
                    raise ValueError(
                        f"text[{row}] has {placeholders} {self.image_token} but images[{row}] has {count} images: "
                        "one for each is needed."
                    )
        if sum(found) != num_images:
            raise ValueError(
                f"The number of {self.image_token} tokens in the prompts should be the same as the number of images: "
                f"found {sum(found)} and {num_images}. Write one for each image, where it belongs, as in "
                f"'{self.image_token}What is this?'; or give apply_chat_template, or a pipeline as its text, messages: "
                "[{'role': 'user', 'content': [{'type': 'image', 'image': ...}, {'type': 'text', 'text': ...}]}]."
            )

    def _check_role_markers(self, texts: list[str]):
        """Warns of a prompt with images that has nothing of what the chat template writes around a message."""
        if self.chat_template is None or not any(self.image_token in text for text in texts):
            return
        message = {"role": "user", "content": [{"type": "text", "text": "\0"}]}
        try:
            rendered = self.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        except Exception:  # templates raise what they like: this one is not for such a chat
            return
        markers = [line.strip() for line in rendered.replace("\0", "\n").split("\n") if line.strip()]
        if markers and not all(any(mark in text for mark in markers) for text in texts if self.image_token in text):
            logger.warning_once(
                f"A text with images has none of {markers}, which the chat template writes around a message: a model "
                "that was trained on chats may answer nothing. Build the text with processor.apply_chat_template."
            )

    def _check_length(self, inputs: BatchFeature):
        limit = self.tokenizer.model_max_length
        longest = max(map(len, inputs.get("input_ids", [])), default=0)
        if longest > limit:
            raise ValueError(
                f"text has {longest} tokens, those of its images included, but the tokenizer's model_max_length is "
                f"{limit}: shorten it or pass fewer images; text alone may be cut by truncation=True."
            )

    def _check_conversation(self, conversation: list, sanitized: bool):
        for message in conversation:
            if isinstance(message, (list, tuple)):
                self._check_conversation(message, sanitized)
                continue
            if not isinstance(message, Mapping):
                raise ValueError(f"A message must be {{'role': ..., 'content': ...}}, found {message!r}.")
            content = message.get("content") or []
            if not isinstance(content, (str, list, tuple)):
                raise ValueError(f"A message's content must be a text or a list of parts, found {content!r}.")
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if not isinstance(part, Mapping) or "type" not in part:
                    raise ValueError(
                        "A part of a message's content must be {'type': 'text', 'text': ...} or "
                        f"{{'type': 'image', 'image': ...}}, found {part!r}."
                    )
                if not sanitized and self.image_token in (part.get("text") or ""):
                    raise ValueError(
                        f"A message's text holds {self.image_token!r}, which stands for an image: pass the image as "
                        "{'type': 'image', 'image': ...} in the content, or set sanitize_control_tokens=True to keep "
                        "it as text."
                    )


__all__ = ["LlavaVrProcessor"]
