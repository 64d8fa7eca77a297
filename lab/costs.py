"""Parameters and floating-point operations of what an arm adds to the vision tower and the decoder."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_vr import LlavaVrForConditionalGeneration


@torch.no_grad()
def added_cost(model: LlavaVrForConditionalGeneration) -> dict[str, int]:
    """Trained parameters of projector and modules, and their operations for one image (a multiply-add counts two)."""
    inner, config = model.model, model.config
    device, dtype, layout = model.device, model.dtype, config.image_layout
    features = torch.randn(1, config.feature_grid**2, config.vision_config.hidden_size, device=device, dtype=dtype)
    levels = None
    if inner.multi_modal_projector.uses_levels:
        levels = features.repeat(1, 1, len(config.projector_kwargs["feature_layers"]))
    tokens = layout.tokens_per_tile
    hidden_states = torch.randn(tokens, config.text_config.hidden_size, device=device, dtype=dtype)
    memory = torch.randn(tokens, config.window_size**2, config.memory_size, device=device, dtype=dtype)
    with FlopCounterMode(display=False) as counter:
        inner.multi_modal_projector(features, levels)
        for module in inner.vision_remember.values():
            module(hidden_states, memory, torch.ones(tokens, dtype=torch.bool, device=device))
    parts = (inner.multi_modal_projector, inner.vision_remember)
    parameters = sum(p.numel() for part in parts for p in part.parameters())
    return {"tokens": tokens, "parameters": parameters, "operations": counter.get_total_flops()}
