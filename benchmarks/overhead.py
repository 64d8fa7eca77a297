"""What Vision Remember costs: a decode step and a prefill, with the modules and without, as ratios of one run.

The decoder has the dimensions of Qwen2-0.5B, the memory those of CLIP-ViT-L/14-336 (three levels), of random weights.
Both models share every weight but the modules'. Image features are drawn once: encoding them costs both the same.

    python benchmarks/overhead.py                                  # about five minutes on two cores
    python benchmarks/overhead.py --tiles 1 --steps 50 --output overhead.json
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import CLIPVisionConfig, DynamicCache, Qwen2Config

from llava_vr import LlavaVrConfig, LlavaVrModel
from llava_vr.modeling_llava_vr import LlavaVrImageFeatures


PROMPT = 64


def build(device: str) -> dict[str, LlavaVrModel]:
    """The model with its modules and without, on shared weights. The tower is cut to one layer: it is not measured."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=1,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_window_layers=24,
    )
    models = {}
    for name, layers in {"with": None, "without": []}.items():
        config = LlavaVrConfig(
            vision_config=vision,
            text_config=text,
            remember_feature_layers=[0, 0, 1],
            remember_layers=layers,
            remember_hidden_size=512,
            remember_num_heads=8,
        )
        models[name] = LlavaVrModel(config).to(device).eval()
    models["without"].load_state_dict(models["with"].state_dict(), strict=False, assign=True)
    return models


def interleaved(calls: dict[str, Callable[[], None]], repetitions: int, title: str) -> dict[str, list[float]]:
    """Seconds of each call, the calls taking turns, after one round to warm up."""
    seconds = {name: [] for name in calls}
    for repetition in tqdm(range(repetitions + 1), desc=title):
        for name in calls if repetition % 2 else reversed(calls):
            start = time.perf_counter()
            calls[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Medians in milliseconds and their ratio; the ratio's quartiles are over the rounds."""
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"])]
    low, _, high = statistics.quantiles(ratios, n=4)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **{f"{name}_ms": 1000 * value for name, value in medians.items()},
        "ratio": medians["with"] / medians["without"],
        "ratio_quartiles": [low, high],
    }


@torch.no_grad()
def measure(models: dict[str, LlavaVrModel], tiles: int, steps: int, prefills: int, device: str) -> dict:
    """Ratios for one image of so many tiles and a prompt of 64 tokens."""
    config = models["with"].config
    tokens, window = tiles * config.image_layout.tokens_per_tile, config.window_size**2
    vision = torch.randn(tokens, config.text_config.hidden_size, device=device)
    rows = torch.randn(tokens, window * config.memory_size + 1, device=device)
    rows[:, -1] = 1
    ids = torch.full((1, PROMPT + tokens), 1, device=device)
    ids[:, PROMPT // 2 : PROMPT // 2 + tokens] = config.image_token_id
    features = {"with": [[rows]], "without": None}

    def prefill(name: str, cache: DynamicCache | None = None):
        images = LlavaVrImageFeatures(pooler_output=[vision], deepstack_features=features[name])
        cache = DynamicCache(config=config.text_config) if cache is None else cache
        models[name](input_ids=ids, mm_encoder_outputs={"image": images}, past_key_values=cache, use_cache=True)

    caches = {name: DynamicCache(config=config.text_config) for name in models}
    flops = {}
    for name in models:
        with FlopCounterMode(display=False) as counter:
            prefill(name, caches[name])
        flops[name] = counter.get_total_flops()
    next_id = torch.ones(1, 1, dtype=torch.long, device=device)

    def decode(name: str):
        models[name](input_ids=next_id, past_key_values=caches[name], use_cache=True)

    return {
        "tiles": tiles,
        "vision_tokens": tokens,
        "prefill": summary(
            interleaved({n: lambda n=n: prefill(n) for n in models}, prefills, f"prefill, {tiles} tiles")
        ),
        "prefill_flops_ratio": flops["with"] / flops["without"],
        "decode_step": summary(
            interleaved({n: lambda n=n: decode(n) for n in models}, steps, f"decode, {tiles} tiles")
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 5], help="tiles of the image (default 1 5)")
    parser.add_argument("--steps", type=int, default=100, help="decode steps of each model (default 100)")
    parser.add_argument("--prefills", type=int, default=10, help="prefills of each model (default 10)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    models = build(args.device)
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {args.device}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "modules_after_layers": models["with"].config.remember_layers,
        "runs": [measure(models, tiles, args.steps, args.prefills, args.device) for tiles in args.tiles],
    }
    print("| tiles | vision tokens | prefill, with / without | floating-point operations | decode step |")
    print("|---|---|---|---|---|")
    for run in result["runs"]:
        ratios = (run["prefill"]["ratio"], run["prefill_flops_ratio"], run["decode_step"]["ratio"])
        print(f"| {run['tiles']} | {run['vision_tokens']} |", " | ".join(f"{ratio:.3f}" for ratio in ratios), "|")
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
