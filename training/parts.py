"""The parts of a model: which are trained, and LoRA on the decoder."""

from collections import Counter
from collections.abc import Mapping

from llava_vr.card_llava_vr import PARTS


def part_of(name: str) -> str:
    """The part of the model that a parameter of this name belongs to."""
    return next(part for part in PARTS if part in name)


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
