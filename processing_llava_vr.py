"""Processor of LLaVA-VR: images to pixel values, and one placeholder in the text for each vision token."""

import itertools
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import ImageInput, get_image_size, load_image
from transformers.processing_utils import MultiModalData

from .configuration_llava_vr import ImageLayout


def to_rgb(image: Image.Image) -> Image.Image:
    """A still picture of any mode as upright RGB: EXIF orientation applied, transparency on white, 16 bits scaled to 8.

    Raises:
        ValueError: the picture has no pixels, several frames, or floating-point pixels; OSError: its file is damaged.
    """
    if getattr(image, "n_frames", 1) > 1:
        raise ValueError(
            f"it has {image.n_frames} frames: pass one of them, as in `image.seek(0); image.convert('RGB')`"
        )
    if 0 in image.size:
        raise ValueError(f"it is {image.width} x {image.height} pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.max() > 65535 or pixels.min() < 0:
            raise ValueError("its 32-bit pixels exceed 0 to 65535: scale them and convert it to RGB")
        image = Image.fromarray((pixels / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: scale them to 0 to 255 and convert it to RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def check_array(image: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """An array or tensor as it is, once it is known to hold pixels.

    Raises:
        ValueError: it is empty, not 2- or 3-dimensional, or has values that are not finite.
    """
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"its shape is {tuple(image.shape)}: an image is (3, height, width) or (height, width, 3)")
    if not np.isfinite(np.asarray(image)).all():
        raise ValueError("it has NaN or infinite values")
    return image


class LlavaVrProcessor(ProcessorMixin):
    r"""Image processor and tokenizer as one, and the number of placeholders that an image gets.

    Args:
        image_processor: transformers' own: LLaVA-NeXT's for tiles ("anyres", "anyres_max_N"), LLaVA's with `do_pad` for
            "pad", CLIP's or SigLIP's for "square".
        tokenizer: with `image_token` as one token.
        chat_template (`str`, *optional*)
        image_token (`str`, defaults to `"<image>"`): the placeholder, once for each image in the text given.
        patch_size, projector_downsample, image_aspect_ratio, image_merge_type: the configuration's fields of these names.
        image_end_tokens (`int`, defaults to 0): tokens that the projector adds to each tile.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        patch_size: int = 14,
        projector_downsample: int = 2,
        image_aspect_ratio: str = "anyres",
        image_merge_type: str = "spatial_unpad",
        image_end_tokens: int = 0,
        **kwargs,
    ):
        if image_token not in tokenizer.get_vocab():
            raise ValueError(f"image_token {image_token!r} is not a token of the tokenizer: add it as a special token.")
        if image_aspect_ratio.startswith("anyres") and not getattr(image_processor, "image_grid_pinpoints", None):
            raise ValueError(
                f"image_aspect_ratio {image_aspect_ratio!r} needs an image processor with image_grid_pinpoints, such as "
                f"LlavaNextImageProcessor; found {type(image_processor).__name__}."
            )
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.patch_size = patch_size
        self.projector_downsample = projector_downsample
        self.image_aspect_ratio = image_aspect_ratio
        self.image_merge_type = image_merge_type
        self.image_end_tokens = image_end_tokens
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def image_layout(self) -> ImageLayout:
        """As the configuration's property of this name, from the processor's own fields."""
        size = getattr(self.image_processor, "crop_size", None) or self.image_processor.size
        tile_size = size.get("height") or size.get("shortest_edge")
        return ImageLayout.create(
            self.image_aspect_ratio,
            tile_size,
            self.patch_size,
            self.projector_downsample,
            getattr(self.image_processor, "image_grid_pinpoints", None),
            self.image_merge_type,
            self.image_end_tokens,
        )

    def __call__(
        self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """
        Args:
            images: PIL images, arrays, tensors, paths or URLs; one, a list, or a list for each text.
            text: one text or a list, each with an `image_token` for each of its images.

        Returns:
            `input_ids`, `attention_mask`, and with images `pixel_values` `(images, tiles, 3, height, width)` or, with one
            tile, `(images, 3, height, width)`, and `image_sizes` `(images, 2)` as (height, width).

        Raises:
            ValueError: as many images as placeholders are needed; an image that cannot be read is named by its number.
        """
        if images is None:
            return super().__call__(text=text, **kwargs)
        images, sizes = self._read_images(images)
        if text is not None and not hasattr(ProcessorMixin, "get_text_with_replacements"):  # transformers below 5.8
            text = self._expand_placeholders([text] if isinstance(text, str) else text, sizes)
        inputs = super().__call__(images=images, text=text, **kwargs)
        if "image_sizes" not in inputs:
            is_tensor = isinstance(inputs["pixel_values"], torch.Tensor)
            inputs["image_sizes"] = torch.tensor(sizes) if is_tensor else np.array(sizes)
        return inputs

    def apply_chat_template(self, conversation: list, *args, sanitize_control_tokens: bool = False, **kwargs):
        """As transformers' own, and refuses an `image_token` that is written out in a message's text."""
        if sanitize_control_tokens:
            kwargs["sanitize_control_tokens"] = True
        else:
            self._check_conversation(conversation)
        return super().apply_chat_template(conversation, *args, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of one image: `image_token`, as often as the model has vision tokens for it."""
        size = image_inputs["image_sizes"][image_idx] if "image_sizes" in image_inputs else None
        size = size if size is None or isinstance(size, (list, tuple)) else size.tolist()
        return self.image_token * self.image_layout.num_tokens(size)

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs) -> MultiModalData:
        """Placeholders of images of these sizes, (height, width) in pixels; asked by serving engines."""
        if image_sizes is None:
            return MultiModalData()
        counts = [self.image_layout.num_tokens(size) for size in image_sizes]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))

    @property
    def model_input_names(self) -> list[str]:
        return list(dict.fromkeys([*super().model_input_names, "image_sizes"]))

    def _read_images(self, images: ImageInput) -> tuple[list, list[tuple[int, int]]]:
        """The images as upright RGB arrays in the nesting they came in, and their (height, width), flat."""
        numbers, sizes = itertools.count(), []

        def read(image):
            if isinstance(image, (list, tuple)):
                return [read(part) for part in image]
            if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 4:
                return [read(part) for part in image]
            number = next(numbers)
            try:
                if isinstance(image, str):
                    local = not image.startswith(("http://", "https://", "data:")) and len(image) < 4096
                    image = Image.open(image) if local else load_image(image)
                if isinstance(image, Image.Image):
                    # channels first: transformers guesses the axis, and a picture 1 or 3 pixels high misleads it
                    image = np.asarray(to_rgb(image)).transpose(2, 0, 1)
                elif isinstance(image, (np.ndarray, torch.Tensor)):
                    image = check_array(image)
                else:
                    raise ValueError(
                        f"a {type(image).__name__} is not an image: pass a PIL image, an array, a path or a URL"
                    )
            except (OSError, ValueError, SyntaxError) as error:
                raise ValueError(f"images[{number}] cannot be read: {error}.") from error
            sizes.append(get_image_size(image) if image.ndim == 3 else tuple(image.shape))
            return image

        images = read(images)
        return images if isinstance(images, list) else [images], sizes

    def _expand_placeholders(self, texts: list[str], sizes: list[tuple[int, int]]) -> list[str]:
        found = sum(text.count(self.image_token) for text in texts)
        if found != len(sizes):
            raise ValueError(
                f"Found {found} {self.image_token} in the text but {len(sizes)} images: one for each is needed."
            )
        counts = (self.image_layout.num_tokens(size) for size in sizes)
        parts = (text.split(self.image_token) for text in texts)
        return [first + "".join(self.image_token * next(counts) + part for part in rest) for first, *rest in parts]

    def _check_conversation(self, conversation: list):
        for message in conversation:
            if isinstance(message, list):
                self._check_conversation(message)
                continue
            content = message.get("content") or []
            texts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
            if any(self.image_token in text for text in texts):
                raise ValueError(
                    f"A message's text holds {self.image_token!r}, which stands for an image: pass the image as "
                    "{'type': 'image', 'image': ...} in the content, or set sanitize_control_tokens=True to keep it as text."
                )


__all__ = ["LlavaVrProcessor"]
