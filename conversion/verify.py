"""Loads a result, runs a fixed input, and compares it with transformers' own class where one exists."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
)

from .plan import Plan
from .readers import ConversionError
from .sources import Source


TOLERANCE = 3e-5  # in float32


@torch.no_grad()
def verify(folder: Path, source: Source, plan: Plan) -> str:
    """What was seen, in one line.

    Raises:
        ConversionError: the result does not load, gives no finite logits, or others than the reference.
    """
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
        )
        AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    except Exception as error:  # whatever it is, the result is not to be kept
        raise ConversionError(f"--verify: the result does not load: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ConversionError(f"--verify: {kind} on loading: {sorted(map(str, info[kind]))[:5]}.")
    inputs = fixed_inputs(plan.config)
    logits = model.eval()(**inputs).logits
    if not logits.isfinite().all():
        raise ConversionError("--verify: the result's logits are not all finite.")
    reference = _reference(source, plan, model)
    if reference is None:
        return f"loads, {logits.shape[1]} positions with finite logits; transformers has no class to compare with"
    expected = reference.eval()(**inputs).logits
    difference = (logits[..., : expected.shape[-1]] - expected).abs().max().item()
    name = type(reference).__name__
    if not difference <= TOLERANCE:
        raise ConversionError(f"--verify: logits differ from those of {name} by {difference:.2g}.")
    return f"loads, logits as {name}'s (largest difference {difference:.2g})"


def fixed_inputs(config) -> dict[str, torch.Tensor]:
    """A text with an image that is half as wide again as high, the same each time."""
    generator, tile = torch.Generator().manual_seed(0), config.vision_config.image_size
    size, layout = (tile, tile + tile // 2), config.image_layout
    tokens = [config.image_token_id] * layout.num_tokens(size)
    text = [i for i in range(5, 15) if i != config.image_token_id]
    pixels = torch.randn(1, layout.num_tiles(size), 3, tile, tile, generator=generator)
    inputs = {"input_ids": torch.tensor([text[:5] + tokens + text[5:]])}
    if not layout.pinpoints:
        return inputs | {"pixel_values": pixels[:, 0]}
    return inputs | {"pixel_values": pixels, "image_sizes": torch.tensor([size])}


def _reference(source: Source, plan: Plan, model: PreTrainedModel) -> PreTrainedModel | None:
    """The source in transformers' own class, or that class with the result's weights; None where there is none."""
    config = plan.config
    trained = [step for step in plan.steps if step.handle and ".vision_remember." in step.target]
    if config.projector_type != "mlp" or trained:
        return None
    if source.has_reference:
        dtypes = {step.dtype for step in plan.steps if step.handle}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return AutoModelForImageTextToText.from_pretrained(source.folder, dtype=dtype).float()
    kinds = {
        "flat": (LlavaConfig, LlavaForConditionalGeneration),
        "anyres": (LlavaNextConfig, LlavaNextForConditionalGeneration),
        "anyres_max": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
    }
    kind = config.image_aspect_ratio.rpartition("_")[0] or config.image_aspect_ratio
    kind = kind if config.image_merge_type == "spatial_unpad" else "flat"
    if kind not in kinds or (kind == "flat") != (config.image_aspect_ratio in ("pad", "square")):
        return None
    their_config, their_class = kinds[kind]
    options = {} if kind == "flat" else {"image_grid_pinpoints": config.image_grid_pinpoints}
    if kind == "anyres_max":
        options["vision_aspect_ratio"] = config.image_aspect_ratio
    names = ("vision_config", "text_config", "vision_feature_layer", "tie_word_embeddings")
    options |= {name: getattr(config, name) for name in names}
    has_cls = config.vision_config.model_type == "clip_vision_model"
    options["vision_feature_select_strategy"] = "default" if has_cls else "full"
    reference = their_class(their_config(**options, image_token_index=config.image_token_id))
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".vision_remember." not in name}
    reference.load_state_dict(weights)
    return reference
