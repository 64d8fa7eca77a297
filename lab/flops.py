"""Parameters and FLOPs of what an experiment adds to the vision tower and the decoder."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_vr import LlavaVrForConditionalGeneration
from llava_vr.layout_llava_vr import cut_windows


@torch.no_grad()
def added_cost(model: LlavaVrForConditionalGeneration) -> dict[str, int]:
    """Trained parameters of projector and modules, and their FLOPs for one image (a multiply-add counts two)."""
    inner, config = model.model, model.config
    downsample, grid, options = config.projector_downsample, config.feature_grid, {"device": model.device}
    options["dtype"] = model.dtype
    features, levels = torch.randn(1, grid**2, config.feature_size, **options), None
    if inner.multi_modal_projector.uses_levels:
        width = config.vision_config.hidden_size * len(config.projector_kwargs["feature_layers"])
        levels = torch.randn(1, grid**2, width, **options)
    memory = torch.randn(1, grid, grid, config.memory_size, **options)
    tokens = config.image_layout.num_tokens(None, downsample)
    hidden_states = torch.randn(tokens, config.text_config.hidden_size, **options)
    with FlopCounterMode(display=False) as counter:
        inner.multi_modal_projector(features, downsample, levels)
        for module in inner.vision_remember.values():
            rows = cut_windows(module(memory), downsample, config.window_size(downsample))[0]
            module(hidden_states, rows, torch.ones(rows.shape[:2], dtype=torch.bool, device=model.device))
    parts = (inner.multi_modal_projector, inner.vision_remember)
    parameters = sum(p.numel() for part in parts for p in part.parameters())
    return {"tokens": tokens, "parameters": parameters, "flops": counter.get_total_flops()}
