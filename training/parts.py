"""The parts of a model: which are trained, and LoRA on the decoder."""

from collections import Counter
from collections.abc import Mapping
from itertools import chain

import torch
from torch.func import functional_call

from llava_vr.card_llava_vr import PARTS


def part_of(name: str) -> str:
    """The part of the model that a parameter of this name belongs to."""
    return next(part for part in PARTS if part in name)


def freeze_unread(model):
    """
    Freezes what the vision tower has behind the last hidden state that is read.

    It never has a gradient: DDP would wait for one, and FSDP2 for the optimizer's state of it when training is resumed.
    """
    config, tower = model.config, model.model.vision_tower
    read = [*config.feature_layers, *config.projector_kwargs.get("feature_layers", [])]
    read += config.remember_feature_layers if config.remember_layers else []
    weights = {
        name: torch.empty_like(value, device="meta", requires_grad=value.is_floating_point())
        for name, value in chain(tower.named_parameters(), tower.named_buffers())
    }
    size = config.vision_config.image_size
    pixels = torch.empty(1, 3, size, size, dtype=tower.dtype, device="meta")
    states = functional_call(tower, weights, pixels, {"output_hidden_states": True}).hidden_states
    inputs = [weights[name] for name, _ in tower.named_parameters()]
    gradients = torch.autograd.grad(sum(states[i].sum() for i in read), inputs, allow_unused=True)
    for parameter, gradient in zip(tower.parameters(), gradients):
        if gradient is None:
            parameter.requires_grad_(False)


def add_lora(model, rank: int, trained_whole: list[str]):
    """LoRA on every linear layer of the decoder, beside modules that are trained whole."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=r".*language_model\.layers\..*_proj",
        modules_to_save=trained_whole,
    )
    return get_peft_model(model, config)


def table(model, rate: float | None = None, rates: Mapping[str, float] = {}) -> str:
    """Trainable and all parameters by part, and the learning rate if one is given, as Markdown."""
    total, trainable = Counter(), Counter()
    for name, parameter in model.named_parameters():
        if "original_module" not in name:  # the copy that PEFT keeps of a module that it trains
            size = getattr(parameter, "quant_state", parameter).shape.numel()  # 4-bit weights are packed
            total[part_of(name)] += size
            trainable[part_of(name)] += size * parameter.requires_grad
    rows = [["part", "trainable", "parameters"], ["---", "---:", "---:"]]
    rows += [[part, f"{trainable[part]:,}", f"{total[part]:,}"] for part in PARTS if part in total]
    rows.append(["all", f"{trainable.total():,}", f"{total.total():,}"])
    if rate is not None:
        used = [f"{rates.get(part, rate):g}" if trainable[part] else "" for part in PARTS if part in total]
        rows = [[*row, cell] for row, cell in zip(rows, ["learning rate", "---:", *used, ""])]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
