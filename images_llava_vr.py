"""Pictures as users have them: opened from files, URLs and bytes, and turned into RGB."""

import base64
import io
import os
from collections.abc import Mapping

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_utils import load_image


URL_TIMEOUT = 10  # seconds without an answer


def open_image(source: str | os.PathLike | Mapping) -> Image.Image:
    """The picture at a path or URL, or in a data URI or base64 text; or of a dictionary {"bytes": ..., "path": ...}, as
    `datasets` stores it. From a URL, it comes as RGB already.

    Raises:
        OSError: there is no such file, or no picture in it; a server is silent for `URL_TIMEOUT` seconds.
    """
    if isinstance(source, Mapping):
        if source.get("bytes") is not None:
            return Image.open(io.BytesIO(source["bytes"]))
        source = source.get("path") or ""
    source = os.fspath(source)
    if source.startswith(("http://", "https://")):
        try:
            return load_image(source, timeout=URL_TIMEOUT)
        except Exception as error:  # the HTTP client's own, or Pillow's
            raise OSError(f"{source[:100]!r} gave no picture: {str(error) or type(error).__name__}") from error
    if os.path.exists(source):
        return Image.open(source)
    try:
        return Image.open(io.BytesIO(base64.b64decode(source.split(",")[-1])))
    except (OSError, ValueError):
        raise FileNotFoundError(f"{source[:100]!r} is no file that exists, no URL and no base64 image") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """A still picture of any mode as upright RGB: EXIF orientation applied, transparency on white, 16 bits scaled to 8.

    Raises:
        ValueError: the picture has no pixels, several frames, or floating-point pixels; OSError: its file is damaged.
    """
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a camera's photo with previews of it
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


def image_size(image) -> tuple[int, int]:
    """Height and width of a picture that the processor takes, as it is shown. Of a file, no pixel is decoded."""
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return to_rgb_array(image)[0].shape[1:]
    if not isinstance(image, Image.Image):
        with open_image(image) as opened:
            return image_size(opened)
    # Not PNG's own `getexif`, which decodes the picture to look behind it
    is_turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) >= 5
    return image.size if is_turned else image.size[::-1]


def to_rgb_array(image: np.ndarray | torch.Tensor, channels_last: bool | None = None) -> tuple[np.ndarray, bool]:
    """An array or tensor of pixels as 8-bit RGB (3, height, width), and whether its white was 1 and not 255.

    White is 1 for bool, and for floats of which none reaches 2: as of torchvision's ToTensor. In floats from 0 to 255
    such a picture would be black to the eye.

    Args:
        channels_last: where its channels are; inferred if not said.

    Raises:
        ValueError: it has another shape or type, is empty, or has values that are not finite or beyond black and white.
    """
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    shape = image.shape
    if image.ndim == 2:
        image, channels_last = image[None], False
    if channels_last is None and image.ndim == 3:
        axes = [axis for channels in (3, 1) for axis in (0, 2) if shape[axis] == channels]
        channels_last = axes[:1] == [2]
    if channels_last:
        image = np.moveaxis(image, -1, 0)
    if image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in shape:
        raise ValueError(
            f"its shape is {shape}: an image is (3, height, width), (height, width, 3) or, if grey, (height, width)"
        )
    if image.dtype.kind not in "buif":
        raise ValueError(f"its type is {image.dtype}: pixels are numbers")
    if not np.isfinite(image).all():
        raise ValueError("it has NaN or infinite values")
    low, high = image.min(), image.max()
    unit_range = image.dtype.kind == "b" or (image.dtype.kind == "f" and high < 2)
    if image.dtype != np.uint8:
        pixels = (image * 255.0 if unit_range else image).round()
        if pixels.min() < 0 or pixels.max() > 255:
            raise ValueError(
                f"its values are from {low:.7g} to {high:.7g}: pixels are from 0 to 255 or, as floats, from 0 to 1, "
                "before they are normalised"
            )
        image = pixels.astype(np.uint8)
    return np.repeat(image, 3, axis=0) if len(image) == 1 else image, unit_range
