"""Where a model looks again: the attention of its Vision Remember modules, as maps over the original pictures.

outputs = model(**inputs, output_remember_attentions=True)
maps = remember_maps(outputs, inputs, model)          # of all image tokens, or of some
sequences = model.generate(**inputs)
maps = answer_maps(sequences, inputs, model)          # of the image tokens that the answer attended to
draw_map(picture, maps[0][layer]).save("map.png")
"""

import os
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import ModelOutput

from .configuration_llava_vr import LlavaVrConfig
from .images_llava_vr import open_image, to_rgb
from .layout_llava_vr import ImageLayout, cut_windows


HEAT = np.array([(255, 214, 64), (250, 120, 30), (200, 20, 40)])  # RGB, of a map's low, middle and high values


def remember_maps(
    outputs: ModelOutput,
    inputs: Mapping[str, torch.Tensor],
    model: PreTrainedModel,
    tokens: torch.Tensor | None = None,
    processor: ProcessorMixin | None = None,
) -> list[dict[int, np.ndarray]]:
    """What the Vision Remember modules attend to, over the pixels of each original picture.

    Attention is the mean of the heads. That to a patch is spread evenly over the pixels that the patch shows. Windows
    that overlap add up, and so do tiles that show the same pixels: a map's sum is the weight of its tokens, less what
    they attend to in padding.

    Args:
        outputs: of `model(**inputs, output_remember_attentions=True)`.
        inputs: what the processor returned.
        tokens: weights of the image tokens, such as a mask of those in question: `(tokens of all images,)`, or
            `(modules, tokens of all images)` for weights by module. 1 if not given.
        processor: needed with `image_aspect_ratio` "square": it alone knows whether it crops pictures.

    Returns:
        for each image its maps, float32 `(height, width)`, by the decoder layer that the module follows; zero at s = 1.

    Raises:
        ValueError: the outputs have no attention weights, or not those of the images in `inputs`.
    """
    base = _base_model(model)
    if outputs.remember_attentions is None:
        raise ValueError(
            "outputs.remember_attentions is None: pass output_remember_attentions=True to the model. One without "
            "remember_layers has no maps."
        )
    layout, _, downsamples = base._check_images(
        inputs["pixel_values"], inputs.get("image_sizes"), inputs.get("image_downsamples")
    )
    sizes = inputs["image_sizes"].tolist()
    counts = [layout.num_tokens(size, s) for size, s in zip(sizes, downsamples)]
    attentions = torch.stack([weights.detach().cpu().float().mean(1) for weights in outputs.remember_attentions])
    if sum(counts) != attentions.shape[1]:
        raise ValueError(
            f"outputs has {attentions.shape[1]} image tokens, but the images of inputs have {sum(counts)}: pass the "
            "inputs that the outputs were computed from."
        )
    if tokens is not None:
        attentions = attentions * tokens.cpu().float()[..., None]
    covered = layout.grid_size * base.config.vision_config.patch_size / layout.tile_size  # by whole patches
    maps = []
    for size, s, weights in zip(sizes, downsamples, attentions.split(counts, dim=1)):
        boxes = layout.tile_boxes(size, _square(base.config, processor, size))
        boxes[:, 2:] = boxes[:, :2] + (boxes[:, 2:] - boxes[:, :2]) * covered
        patches = _to_patches(weights, base, layout, size, s).numpy()
        maps.append({layer: _paint(tiles, boxes, size) for layer, tiles in zip(base.config.remember_layers, patches)})
    return maps


def answer_maps(
    sequences: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    model: PreTrainedModel,
    processor: ProcessorMixin | None = None,
) -> list[dict[int, np.ndarray]]:
    """The maps of a generated answer: where the image tokens that it attended to had looked.

    As `remember_maps`, with image tokens weighted by the attention that the answer pays them: the mean of the
    positions that predict its tokens, of the heads, and of the decoder layers after the module. It takes one more
    forward pass, with eager attention.

    Args:
        sequences: `(batch, prompt and answer)`, what `model.generate(**inputs)` returned.
    """
    base, start, pad = _base_model(model), inputs["input_ids"].shape[1], model.generation_config.pad_token_id
    is_answer = sequences != (-1 if pad is None else pad)
    is_answer[:, :start] = False
    mask = torch.cat([inputs["attention_mask"], is_answer[:, start:].to(inputs["attention_mask"])], dim=1)
    decoder = base.language_model
    implementation = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")  # others return no attention weights
    try:
        with torch.no_grad():
            outputs = model(
                **{**inputs, "input_ids": sequences, "attention_mask": mask},
                output_attentions=True,
                output_remember_attentions=True,
                use_cache=False,
            )
    finally:
        decoder.set_attn_implementation(implementation)
    predicts = is_answer.roll(-1, dims=1).float()
    predicts = predicts / predicts.sum(1, keepdim=True).clamp(min=1)  # (batch, sequence)
    paid = [torch.einsum("bq,bhqk->bk", predicts.to(a), a) / a.shape[1] for a in outputs.attentions]
    paid = torch.stack([layer[sequences == base.config.image_token_id].cpu() for layer in paid])  # (layers, tokens)
    tokens = torch.stack([paid[layer + 1 :].mean(0) for layer in base.config.remember_layers])
    return remember_maps(outputs, inputs, model, tokens, processor)


def _to_patches(
    attentions: torch.Tensor, base: PreTrainedModel, layout: ImageLayout, image_size: list[int], downsample: int
) -> torch.Tensor:
    """An image's attention weights `(modules, tokens, window * window)`, by patch: `(modules, tiles, g, g)`.

    The memory's way from patches to rows is linear: windows, tiles, unpadding, resampling. The way back of attention
    along it is its gradient.
    """
    window = base.config.window_size(downsample)
    attentions = attentions[..., : window**2]  # smaller windows of a batch are filled up
    with torch.inference_mode(False), torch.enable_grad():
        grid = torch.ones(layout.num_tiles(image_size), layout.grid_size, layout.grid_size, 1, requires_grad=True)
        rows = cut_windows(grid, downsample, window).flatten(2)
        rows = layout.pack(rows, image_size, torch.zeros(2, window**2))  # (tokens, window * window), 1 where present
        shares = attentions.clone() / rows.detach().clamp(min=1e-6)  # of a resampled entry, its parts'
        return torch.stack([torch.autograd.grad(rows, grid, share, retain_graph=True)[0] for share in shares])[..., 0]


def draw_map(image: Image.Image | str | os.PathLike, attention: np.ndarray, opacity: float = 0.75) -> Image.Image:
    """A map `(height, width)` over its picture, which is a PIL image, a path or a URL; the largest value is red."""
    picture = to_rgb(image if isinstance(image, Image.Image) else open_image(image))
    if attention.shape != picture.size[::-1]:
        raise ValueError(
            f"attention must be {picture.size[::-1]}, the picture's (height, width); found {attention.shape}."
        )
    strength = attention / max(attention.max(), np.finfo(np.float32).tiny)
    heat = np.stack([np.interp(strength, np.linspace(0, 1, len(HEAT)), channel) for channel in HEAT.T], axis=-1)
    alpha = opacity * strength[..., None]
    return Image.fromarray((alpha * heat + (1 - alpha) * np.asarray(picture)).round().astype(np.uint8))


def _base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The `LlavaVrModel` in a model, which PEFT may have wrapped."""
    return next(module for module in model.modules() if hasattr(module, "vision_remember"))


def _square(config: LlavaVrConfig, processor: ProcessorMixin | None, image_size: list[int]) -> float | None:
    """Side of the centred square of an image that a single tile shows; None where the image is stretched."""
    if config.image_aspect_ratio == "pad":
        return max(image_size)
    if config.image_aspect_ratio != "square":
        return None
    if processor is None:
        raise ValueError("image_aspect_ratio 'square' does not say whether pictures are cropped: pass processor=...")
    image_processor = processor.image_processor
    shortest = image_processor.size.get("shortest_edge")
    if not shortest or not getattr(image_processor, "do_center_crop", False):
        return None
    return min(image_size) * image_processor.crop_size["height"] / shortest


def _paint(tiles: np.ndarray, boxes: np.ndarray, size: list[int]) -> np.ndarray:
    """The weights of patches `(tiles, g, g)` over the pixels `(height, width)` that their tiles show."""
    picture = np.zeros(size, dtype=np.float32)
    for patches, (top, left, bottom, right) in zip(tiles, boxes):
        rows, columns = (_shares(a, b, len(patches), n) for a, b, n in ((top, bottom, size[0]), (left, right, size[1])))
        picture += rows.T @ patches @ columns
    return picture


def _shares(start: float, end: float, parts: int, pixels: int) -> np.ndarray:
    """Of each of the equal parts of a span, what share lies in each pixel: `(parts, pixels)`."""
    edges, ends = np.linspace(start, end, parts + 1), np.arange(1, pixels + 1)
    overlaps = np.minimum(edges[1:, None], ends) - np.maximum(edges[:-1, None], ends - 1)
    return (overlaps.clip(min=0) * parts / (end - start)).astype(np.float32)


__all__ = ["answer_maps", "draw_map", "remember_maps"]
