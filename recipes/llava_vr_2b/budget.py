"""What the recipe costs, by arithmetic: parameters, tokens and FLOPs a step, GPU hours, memory of a GPU.

    python -m recipes.llava_vr_2b.budget
    python -m recipes.llava_vr_2b.budget --peak 312 --utilization 0.4        # an A100

Nothing here is measured. A forward pass takes 2 FLOPs a parameter and token, plus those of attention; a backward pass
through frozen weights as many, through trained ones twice as many; gradient checkpointing one forward pass more.
"""

import argparse
from dataclasses import dataclass

import torch

from llava_vr import LlavaVrConfig, LlavaVrForConditionalGeneration
from llava_vr.training import part_of


@dataclass(frozen=True)
class Stage:
    """A stage of training. `passes` is over one forward pass of the decoder, `tower_passes` of the tower."""

    name: str
    rows: int
    batch: int
    text_tokens: int
    image_size: tuple[int, int]
    passes: int
    tower_passes: int
    trained: tuple[str, ...]
    rows_a_gpu: int


PROJECTOR = ("multi_modal_projector", "image_newline", "vision_remember")
STAGES = (
    Stage("1, captions", 558_000, 256, 25, (480, 640), 3, 1, PROJECTOR, 16),
    Stage("2, instructions", 780_000, 128, 250, (480, 640), 4, 4, (*PROJECTOR, "vision_tower", "language_model"), 4),
)


def sizes(model: LlavaVrForConditionalGeneration) -> dict[str, int]:
    """Parameters by part, embeddings with the decoder."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        found[part_of(name)] = found.get(part_of(name), 0) + parameter.numel()
    return found


def forward_flops(parameters: int, tokens: int, width: int, layers: int) -> int:
    """Of one sequence: matrix products with the weights, and of the attention."""
    return 2 * parameters * tokens + 4 * layers * width * tokens**2


def row_cost(config: LlavaVrConfig, parts: dict[str, int], stage: Stage) -> tuple[int, float]:
    """Tokens of a row in the decoder, and the FLOPs that training takes on it."""
    layout, vision, text = config.image_layout, config.vision_config, config.text_config
    tokens = layout.num_tokens(stage.image_size, config.projector_downsample) + stage.text_tokens
    tiles, patches = layout.num_tiles(stage.image_size), (vision.image_size // vision.patch_size) ** 2 + 1
    tower = tiles * forward_flops(parts["vision_tower"], patches, vision.hidden_size, vision.num_hidden_layers)
    decoder = forward_flops(parts["language_model"], tokens, text.hidden_size, text.num_hidden_layers)
    return tokens, stage.passes * decoder + stage.tower_passes * tower


def memory(parts: dict[str, int], stage: Stage, shards: int) -> float:
    """Bytes of weights, gradients and AdamW's state on a GPU, in float32."""
    total, trained = sum(parts.values()), sum(size for part, size in parts.items() if part in stage.trained)
    return (4 * total + 12 * trained) / shards


def activations(config: LlavaVrConfig, stage: Stage, tokens: int) -> float:
    """Bytes of a step with gradient checkpointing: a hidden state a layer in bf16, logits three times in float32."""
    text = config.text_config
    return stage.rows_a_gpu * tokens * (2 * text.hidden_size * text.num_hidden_layers + 12 * text.vocab_size)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of a GPU in bf16 (default: 989, an H100)")
    parser.add_argument("--utilization", type=float, default=0.3, help="assumed share of it that is reached")
    args = parser.parse_args()
    config = LlavaVrConfig()
    with torch.device("meta"):
        parts = sizes(LlavaVrForConditionalGeneration(config))
    print("| part | parameters |\n|---|---:|")
    for part, size in [*parts.items(), ("all", sum(parts.values()))]:
        print(f"| {part} | {size:,} |")
    print("\n| stage | rows | rows a step | steps | tokens a row | tokens a step | PFLOPs a step | GPU hours |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for stage in STAGES:
        tokens, flops = row_cost(config, parts, stage)
        hours = flops * stage.rows / (args.peak * 1e12 * args.utilization) / 3600
        cells = (stage.rows, stage.batch, stage.rows // stage.batch, tokens, tokens * stage.batch)
        cells = [f"{cell:,}" for cell in cells] + [f"{flops * stage.batch / 1e15:.2f}", f"{hours:.1f}"]
        print(f"| {stage.name} | {' | '.join(cells)} |")
    print("\n| GiB on a GPU | weights, gradients, AdamW: DDP | FSDP2, 8 GPUs | FSDP2, 16 GPUs | and activations |")
    print("|---|---:|---:|---:|---:|")
    for stage in STAGES:
        tokens, _ = row_cost(config, parts, stage)
        cells = [*(memory(parts, stage, shards) for shards in (1, 8, 16)), activations(config, stage, tokens)]
        print(f"| stage {stage.name} | {' | '.join(f'{cell / 2**30:.1f}' for cell in cells)} |")


if __name__ == "__main__":
    main()
