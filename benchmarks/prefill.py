"""Whole models: the picture and the prompt to the first token, a decode step, peak memory, and the cache.

    python -m benchmarks.prefill                                                # on a CPU: a sibling of 0.5B dimensions
    python -m benchmarks.prefill --device cuda --scale full --minutes 8         # a piece; the same command goes on
    python -m benchmarks.prefill --device cuda --scale full --minutes 8 --compile

Every model gets the same picture, as its own processor would cut it, in a prompt of 64 or 1,024 tokens of text. Weights
are random, of true dimensions. Beside ours:

- off: ours without the modules, on the same weights.
- uncompressed: transformers' LlavaNext around the same tower and decoder, on the same weights; for a picture of one
  tile, which LlavaNext cannot have, transformers' Llava.
- at full scale on a GPU: transformers' DeepSeek-VL-7B and LLaVA-OneVision of 0.5B and 7B dimensions.

`encode` is the tower and the projector, `prefill` the decoder from there to the logits of the last position, and
`first token` both. `--compile` compiles the decoders of ours and off, which alone are then measured, and gives decode
steps a static cache. The image's part of the cache is its share of the positions.
"""

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    StaticCache,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from benchmarks.common import (
    add_device_options,
    begin,
    compare,
    count_flops,
    dtype_of,
    extra_memory,
    head,
    interleave,
    markdown_table,
    new_parser,
    plot,
    show,
    write_json,
    write_table,
)
from llava_vr import LlavaVrConfig, LlavaVrForConditionalGeneration


WARMUP = 3
STAGES = ("encode", "prefill", "first token", "decode step")
QWEN2_05B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_window_layers": 24,
    "tie_word_embeddings": True,
}
SIBLING = {"text_config": QWEN2_05B, "remember_hidden_size": 512, "remember_num_heads": 8}  # for a CPU
QWEN2_7B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_window_layers": 28,
}
SIGLIP_LARGE = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 16,
}
LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "max_position_embeddings": 16384,
}
PEERS = {
    "DeepSeek-VL-7B": (
        DeepseekVLHybridForConditionalGeneration,
        DeepseekVLHybridConfig,
        {"text_config": LLAMA_7B, "vision_config": SIGLIP_LARGE, "tie_word_embeddings": False},
    ),
    "OneVision-0.5B": (LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig, {"text_config": QWEN2_05B}),
    "OneVision-7B": (LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig, {"text_config": QWEN2_7B}),
}


@dataclass(frozen=True)
class Scale:
    """
    Args:
        repetitions, steps: prefills and decode steps of each model.
        config: fields of our configuration, where they are not the 2B model's.
        peers: others of transformers, of `PEERS`.
    """

    tiles: tuple[int, ...]
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    repetitions: int = 20
    steps: int = 50
    config: dict[str, Any] = field(default_factory=dict)
    peers: tuple[str, ...] = ()


SCALES = {
    "small": Scale((1, 5), (1,), (64,), config=SIBLING),
    "full": Scale((1, 5, 10), (1, 8), (64, 1024), peers=tuple(PEERS)),
}


# ---------------------------------------------------------------------------------------------------------- models


def make(model_class: type[PreTrainedModel], config: Any, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device(device):
        return model_class._from_config(config, dtype=dtype).eval()


def make_models(scale: Scale, device: torch.device, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """All models; ours, off and the uncompressed two share their weights."""
    tile = LlavaVrConfig(**scale.config).vision_config.image_size
    pinpoints = [[2 * tile, 2 * tile], [3 * tile, 3 * tile]]
    config = LlavaVrConfig(**scale.config, image_grid_pinpoints=pinpoints)
    ours = make(LlavaVrForConditionalGeneration, config, device, dtype)
    for module in ours.model.vision_remember.values():
        nn.init.normal_(module.out.weight, std=0.02)  # a GPU multiplies zeros faster
    off = LlavaVrConfig(**scale.config, image_grid_pinpoints=pinpoints, remember_layers=[])
    backbones = {key: getattr(config, key) for key in ("vision_config", "text_config", "image_token_id")}
    models = {
        "ours": ours,
        "off": make(LlavaVrForConditionalGeneration, off, device, dtype),
        "Llava": make(LlavaForConditionalGeneration, LlavaConfig(**backbones), device, dtype),
        "LlavaNext": make(
            LlavaNextForConditionalGeneration,
            LlavaNextConfig(**backbones, image_grid_pinpoints=pinpoints),
            device,
            dtype,
        ),
    }
    for name in ("off", "Llava", "LlavaNext"):
        models[name].load_state_dict(ours.state_dict(), strict=False, assign=True)
    for name in scale.peers:
        model_class, config_class, sizes = PEERS[name]
        models[name] = make(model_class, config_class(**sizes), device, dtype)
    return models


def pictures(model: PreTrainedModel, tiles: int, batch: int, side: int) -> dict[str, torch.Tensor]:
    """Arguments of `get_image_features`: noise for a square picture of `side` pixels in each row."""
    config, size = model.config, model.config.vision_config.image_size

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, device=model.device).to(model.dtype)

    if config.model_type == "deepseek_vl_hybrid":
        high = config.high_res_vision_config.image_size
        return {"pixel_values": noise(3, size, size), "high_res_pixel_values": noise(3, high, high)}
    if config.model_type == "llava" or (config.model_type == "llava_vr" and tiles == 1):
        return {"pixel_values": noise(3, size, size)}
    count = image_size_to_num_patches((side, side), config.image_grid_pinpoints, size)
    sizes = torch.tensor([[side, side]] * batch, device=model.device)
    return {"pixel_values": noise(count, 3, size, size), "image_sizes": sizes}


class Run:
    """One model on a batch of rows, each of a picture and text."""

    def __init__(self, model: PreTrainedModel, images: dict[str, torch.Tensor], batch: int, prompt: int):
        self.model, self.pictures, self.batch, self.prompt = model, images, batch, prompt
        self.text_config = model.config.get_text_config()
        self.encode()
        self.image_tokens = sum(map(len, self.features)) // batch
        self.ids = torch.ones(batch, prompt + self.image_tokens, dtype=torch.long, device=model.device)
        self.ids[:, prompt // 2 : prompt // 2 + self.image_tokens] = model.config.image_token_id
        self.next_ids = self.ids[:, :1]

    def encode(self) -> None:
        output = self.model.model.get_image_features(**self.pictures)
        self.features = list(output.pooler_output)
        self.images = {"image": output} if isinstance(self.model, LlavaVrForConditionalGeneration) else None

    def prefill(self, cache: DynamicCache | StaticCache | None = None) -> None:
        self.cache = DynamicCache(config=self.text_config) if cache is None else cache
        if self.images is not None:
            inputs = {"input_ids": self.ids, "mm_encoder_outputs": self.images}
        else:
            embeds = self.model.get_input_embeddings()(self.ids)
            is_image = (self.ids == self.model.config.image_token_id)[..., None]
            inputs = {"inputs_embeds": embeds.masked_scatter(is_image, torch.cat(self.features).to(embeds))}
        self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def first_token(self) -> None:
        self.encode()
        self.prefill()

    def decode(self) -> None:
        self.model(input_ids=self.next_ids, past_key_values=self.cache, use_cache=True)

    def release(self) -> None:
        self.features = self.images = self.cache = None

    def costs(self, compiled: bool) -> dict[str, int]:
        """What is counted, not timed. At the first call for a shape, it also warms up."""
        costs = {"image_tokens": self.image_tokens, "prefill_flops": count_flops(self.prefill)}
        cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
        if compiled:
            self.model.model.language_model.compile(dynamic=False)
            self.prefill()
        self.release()
        parameters = {p.data_ptr(): p.nbytes for p in self.model.parameters()}
        return {
            **costs,
            "weights_bytes": sum(parameters.values()),
            "extra_bytes": extra_memory(self.first_token, self.model.device),
            "image_cache_bytes": cached * self.image_tokens // self.ids.shape[1],
        }


# ------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def measure(
    models: dict[str, PreTrainedModel], tiles: int, batch: int, prompt: int, scale: Scale, compiled: bool
) -> dict[str, dict[str, Any]]:
    """All figures of every model; of one that does not fit in the GPU's memory, `{"fits": False}`."""
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64  # all decoders share the functions that wrap them
    side = max(1, math.isqrt(tiles - 1)) * models["ours"].config.vision_config.image_size  # a base tile and a square
    chosen = {"ours": "ours", "off": "off", "uncompressed": "Llava" if tiles == 1 else "LlavaNext"}
    chosen |= {name: name for name in scale.peers}
    if compiled:
        chosen = {name: name for name in ("ours", "off")}
    runs, figures = {}, {}
    for name, key in chosen.items():
        try:
            model = models[key]
            run = Run(model, pictures(model, tiles, batch, side), batch, prompt)
            figures[name] = run.costs(compiled)
            runs[name] = run
        except torch.OutOfMemoryError:
            figures[name] = {"fits": False}
        run = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    title = f"{tiles} tiles, {batch} rows, prompt {prompt}"
    seconds = {}
    for stage in ("encode", "prefill"):
        calls = {name: getattr(run, stage) for name, run in runs.items()}
        seconds[stage] = interleave(calls, scale.repetitions, WARMUP, f"{stage}, {title}")
    seconds["first token"] = {
        name: [sum(pair) for pair in zip(seconds["encode"][name], seconds["prefill"][name])] for name in runs
    }
    if compiled:
        for run in runs.values():
            room = run.ids.shape[1] + WARMUP + scale.steps
            with torch.compiler.set_stance("force_eager"):
                run.prefill(StaticCache(config=run.text_config, max_cache_len=room))
    calls = {name: run.decode for name, run in runs.items()}
    seconds["decode step"] = interleave(calls, scale.steps, WARMUP, f"decode, {title}")
    for stage in STAGES:
        for name, times in compare(seconds[stage]).items():
            figures[name][stage] = times
    return figures


def measure_all(
    scale: Scale, settings: dict[str, Any], path: Path, device: torch.device, dtype: torch.dtype, minutes: float | None
) -> dict[str, Any]:
    """Measures the cases that the file of results lacks, one after the other, as long as there is time."""
    result = begin(path, settings, cases=[], seconds=0)
    start, before = time.monotonic(), result["seconds"]
    done = [(case["tiles"], case["batch"], case["prompt"]) for case in result["cases"]]
    missing = [
        (tiles, batch, prompt)
        for batch in scale.batches
        for prompt in scale.prompts
        for tiles in scale.tiles
        if (tiles, batch, prompt) not in done
    ]
    torch.manual_seed(0)
    models = make_models(scale, device, dtype) if missing else {}
    for number, (tiles, batch, prompt) in enumerate(missing):
        if number and minutes is not None and time.monotonic() - start > 60 * minutes:
            print(f"time is up, {len(missing) - number} cases are missing: the same command goes on")
            break
        figures = measure(models, tiles, batch, prompt, scale, settings["compiled"])
        result["cases"].append({"tiles": tiles, "batch": batch, "prompt": prompt, "models": figures})
        result["seconds"] = before + round(time.monotonic() - start)
        write_json(path, result)
    return result


def measured(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The models of a case that fitted into memory."""
    return {name: row for name, row in case["models"].items() if row.get("fits", True)}


def tables(result: dict[str, Any]) -> list[str]:
    header = ["model", "vision tokens", *(f"{stage} (ms)" for stage in STAGES), "first token, ours over it"]
    header += ["decode, ours over it", "prefill TFLOP", "weights (GB)", "more at the peak (GB)", "image's cache (MB)"]
    units = {"prefill_flops": 1e12, "weights_bytes": 1e9, "extra_bytes": 1e9, "image_cache_bytes": 1e6}
    parts = []
    for case in result["cases"]:
        rows = [
            [
                name,
                str(row["image_tokens"]),
                *(show(row[stage]["ms"]) for stage in STAGES),
                *(show(row[stage]["ours_over"]) for stage in STAGES[2:]),
                *(f"{row[key] / unit:.3g}" for key, unit in units.items()),
            ]
            for name, row in measured(case).items()
        ]
        title = f"{case['tiles']} tiles, {case['batch']} rows, prompt of {case['prompt']}"
        if missing := set(case["models"]) - set(measured(case)):
            title += f", without those that do not fit in memory ({', '.join(sorted(missing))})"
        ours, off = (case["models"][name] for name in ("ours", "off"))
        title += (
            f"; with the modules over without them: prefill {show(off['prefill']['ours_over'])}, floating-point "
            f"operations {ours['prefill_flops'] / off['prefill_flops']:.3f}"
        )
        parts.append(f"{title}:\n\n{markdown_table(header, rows)}")
    return parts


def plots(result: dict[str, Any]) -> dict[str, tuple]:
    """Panels of first token and cache against tiles, of the smallest batch and prompt."""
    smallest = min((case["batch"], case["prompt"]) for case in result["cases"])
    cases = [case for case in result["cases"] if (case["batch"], case["prompt"]) == smallest]
    cases.sort(key=lambda case: case["tiles"])
    panels = {}
    for label, figure in (
        ("time to the first token (ms)", lambda row: row["first token"]["ms"][0]),
        ("image's part of the cache (MB)", lambda row: row["image_cache_bytes"] / 1e6),
    ):
        curves = {}
        for case in cases:
            for name, row in measured(case).items():
                xs, ys = curves.setdefault(name, ([], []))
                xs.append(case["tiles"])
                ys.append(figure(row))
        panels[f"{label}, batch {smallest[0]}, prompt {smallest[1]}"] = ("tiles", label, curves)
    return panels


def main() -> None:
    parser = new_parser(__doc__)
    add_device_options(parser)
    parser.add_argument("--compile", action="store_true", help="ours and off with compiled decoders")
    parser.add_argument("--minutes", type=float, help="begin no case after this long; the same command goes on")
    args = parser.parse_args()
    dtype, folder = dtype_of(args), args.results / args.device.type
    name = "prefill-compiled" if args.compile else "prefill"
    settings = head(args.scale, args.device, dtype=str(dtype).removeprefix("torch."), compiled=args.compile)
    scale = replace(SCALES[args.scale], peers=()) if args.compile else SCALES[args.scale]
    result = measure_all(scale, settings, folder / f"{name}.json", args.device, dtype, args.minutes)
    write_table(folder / f"{name}.md", "Whole models", result, *tables(result))
    plot(folder / f"{name}.png", plots(result))


if __name__ == "__main__":
    main()
