"""Whole models: the picture and the prompt to the first token, a decode step, peak memory, and the cache.

    python -m benchmarks.prefill                                                # on a CPU: a sibling of 0.5B dimensions
    python -m benchmarks.prefill --scale 2b                                     # on a CPU: the 2B model
    python -m benchmarks.prefill --device cuda --scale full --minutes 8         # a piece; the same command goes on
    python -m benchmarks.prefill --device cuda --scale full --minutes 8 --compile

Every model gets the same picture, as its own processor would cut it, in a prompt of 64 or 1,024 tokens of text. Weights
are random, of true dimensions. Ours is one model that takes any s; beside it at s = 2:

- ours, s = 1 and ours, s = 4: the same with more and with fewer vision tokens.
- off: ours without the modules, on the same weights.
- uncompressed: transformers' LlavaNext around the same tower and decoder, on the same weights; for a picture of one
  tile, which LlavaNext cannot have, transformers' Llava.
- at scale 2b transformers' DeepSeek-VL-7B, which reads one picture of 1,024 pixels; at full scale on a GPU also
  LLaVA-OneVision of 0.5B and 7B dimensions.

`encode` is the tower, `prefill` all from its output to the logits of the last position, keys and values of the memory
included, and `first token` both. At scale 2b the decoder layers of DeepSeek-VL-7B share one set of weights, as 7B
parameters in float32 do not fit into the memory; a decoder of four layers is timed with and without that. `--compile`
compiles the decoders of ours and off, which alone are then measured, and gives decode steps a static cache. The image's
part of the cache is its share of the positions.
"""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
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


TOWERS = ("vision_tower", "vision_model", "high_res_vision_model")  # names that models give them
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
        repetitions, warmup, steps: prefills, those before them that are not counted, and decode steps of each model.
        config: fields of our configuration, where they are not the 2B model's.
        peers: others of transformers, of `PEERS`.
        share_layers: whether the decoder layers of the peers share one set of weights.
    """

    tiles: tuple[int, ...]
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    repetitions: int = 20
    warmup: int = 3
    steps: int = 50
    config: dict[str, Any] = field(default_factory=dict)
    peers: tuple[str, ...] = ()
    share_layers: bool = False


SCALES = {
    "small": Scale((1, 5), (1,), (64,), repetitions=10, config=SIBLING),
    "2b": Scale((1, 5), (1,), (64,), 3, 1, 3, peers=("DeepSeek-VL-7B",), share_layers=True),
    "full": Scale((1, 5, 10), (1, 8), (64, 1024), peers=tuple(PEERS)),
}


# ---------------------------------------------------------------------------------------------------------- models


def make(model_class: type[PreTrainedModel], config: Any, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device(device):
        return model_class._from_config(config, dtype=dtype).eval()


def make_twin(model_class: type[PreTrainedModel], config: Any, source: PreTrainedModel) -> PreTrainedModel:
    """A model that has the weights and buffers of another."""
    twin = make(model_class, config, torch.device("meta"), source.dtype)
    twin.load_state_dict(source.state_dict(), strict=False, assign=True)
    for name, buffer in source.named_buffers():
        owner, _, name = name.rpartition(".")
        twin.get_submodule(owner).register_buffer(name, buffer, persistent=False)
    return twin


def repeat_layer(decoder: PreTrainedModel, count: int) -> None:
    """Gives a decoder of one layer so many of them, all with that layer's weights."""
    first, decoder.config.num_hidden_layers = decoder.layers[0], count
    for index in range(1, count):
        layer = copy.deepcopy(first, {id(parameter): parameter for parameter in first.parameters()})
        layer.self_attn.layer_idx = index
        decoder.layers.append(layer)


def make_peer(name: str, share_layers: bool, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    model_class, config_class, sizes = PEERS[name]
    config = config_class(**sizes)
    layers = config.text_config.num_hidden_layers
    if share_layers:
        config.text_config.num_hidden_layers = 1
    model = make(model_class, config, device, dtype)
    if share_layers:
        repeat_layer(model.model.language_model, layers)
    return model


def make_models(scale: Scale, device: torch.device, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """All models; ours, off and the uncompressed two share their weights."""
    tile = LlavaVrConfig(**scale.config).vision_config.image_size
    fields = {**scale.config, "image_grid_pinpoints": [[2 * tile, 2 * tile], [3 * tile, 3 * tile]]}
    config = LlavaVrConfig(**fields, projector_downsample_choices=[1, 2, 4])
    ours = make(LlavaVrForConditionalGeneration, config, device, dtype)
    for module in ours.model.vision_remember.values():
        nn.init.normal_(module.out.weight, std=0.02)  # a GPU multiplies zeros faster
    backbones = {key: getattr(config, key) for key in ("vision_config", "text_config", "image_token_id")}
    llava_next = LlavaNextConfig(**backbones, image_grid_pinpoints=fields["image_grid_pinpoints"])
    models = {
        "ours": ours,
        "off": make_twin(LlavaVrForConditionalGeneration, LlavaVrConfig(**fields, remember_layers=[]), ours),
        "Llava": make_twin(LlavaForConditionalGeneration, LlavaConfig(**backbones), ours),
        "LlavaNext": make_twin(LlavaNextForConditionalGeneration, llava_next, ours),
    }
    return models | {name: make_peer(name, scale.share_layers, device, dtype) for name in scale.peers}


def pictures(model: PreTrainedModel, tiles: int, batch: int, side: int, downsample: int = 2) -> dict[str, torch.Tensor]:
    """Arguments of `get_image_features`: noise for a square picture of `side` pixels in each row."""
    config, size = model.config, model.config.vision_config.image_size

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, device=model.device).to(model.dtype)

    if config.model_type == "deepseek_vl_hybrid":
        high = config.high_res_vision_config.image_size
        return {"pixel_values": noise(3, size, size), "high_res_pixel_values": noise(3, high, high)}
    options = {}
    if config.model_type == "llava_vr":
        options["image_downsamples"] = torch.full((batch,), downsample)
    if config.model_type == "llava" or (config.model_type == "llava_vr" and tiles == 1):
        return {"pixel_values": noise(3, size, size), **options}
    count = image_size_to_num_patches((side, side), config.image_grid_pinpoints, size)
    sizes = torch.tensor([[side, side]] * batch, device=model.device)
    return {"pixel_values": noise(count, 3, size, size), "image_sizes": sizes, **options}


class Run:
    """One model on a batch of rows, each of a picture and text."""

    def __init__(self, model: PreTrainedModel, images: dict[str, torch.Tensor], batch: int, prompt: int):
        self.model, self.pictures = model, images
        self.text_config = model.config.get_text_config()
        features = self.record()
        self.image_tokens = sum(map(len, features.pooler_output)) // batch
        self.ids = torch.ones(batch, prompt + self.image_tokens, dtype=torch.long, device=model.device)
        self.ids[:, prompt // 2 : prompt // 2 + self.image_tokens] = model.config.image_token_id
        self.next_ids = self.ids[:, :1]

    def record(self) -> Any:
        """The image features; notes the calls of the towers."""
        self.calls = []

        def note(tower, args, kwargs, output):
            self.calls.append((tower, args, kwargs, copy.copy(output)))

        towers = [getattr(self.model.model, name) for name in TOWERS if hasattr(self.model.model, name)]
        hooks = [tower.register_forward_hook(note, with_kwargs=True) for tower in towers]
        features = self.model.model.get_image_features(**self.pictures)
        for hook in hooks:
            hook.remove()
        return features

    @contextmanager
    def recorded_towers(self) -> Iterator[None]:
        """The towers return what they returned before."""
        for tower, _, _, output in self.calls:
            tower.forward = lambda *args, output=output, **kwargs: copy.copy(output)
        yield
        for tower, *_ in self.calls:
            del tower.forward

    def encode(self) -> None:
        for tower, args, kwargs, _ in self.calls:
            tower(*args, **kwargs)

    def prefill(self, cache: DynamicCache | StaticCache | None = None) -> None:
        """From the towers' output to the logits of the last position."""
        with self.recorded_towers():
            self.first_token(cache)

    def first_token(self, cache: DynamicCache | StaticCache | None = None) -> None:
        self.cache = DynamicCache(config=self.text_config) if cache is None else cache
        images = self.model.model.get_image_features(**self.pictures)
        if isinstance(self.model, LlavaVrForConditionalGeneration):
            inputs = {"input_ids": self.ids, "mm_encoder_outputs": {"image": images}}
        else:
            embeds = self.model.get_input_embeddings()(self.ids)
            is_image = (self.ids == self.model.config.image_token_id)[..., None]
            features = torch.cat(list(images.pooler_output)).to(embeds)
            inputs = {"inputs_embeds": embeds.masked_scatter(is_image, features)}
        self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def decode(self) -> None:
        self.model(input_ids=self.next_ids, past_key_values=self.cache, use_cache=True)

    def costs(self, compiled: bool) -> dict[str, int]:
        """What is counted, not timed. At the first call for a shape, it also warms up."""
        costs = {"image_tokens": self.image_tokens, "prefill_flops": count_flops(self.prefill)}
        cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
        if compiled:
            self.model.model.language_model.compile(dynamic=False)
            self.prefill()
        self.cache = None
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
    chosen = {"ours": ("ours", 2), "off": ("off", 2)}  # a model and its s
    if not compiled:
        chosen |= {f"ours, s = {downsample}": ("ours", downsample) for downsample in (1, 4)}
        chosen["uncompressed"] = ("Llava" if tiles == 1 else "LlavaNext", 1)
        chosen |= {name: (name, 1) for name in scale.peers}
    runs, figures = {}, {}
    for name, (key, downsample) in chosen.items():
        try:
            model = models[key]
            run = Run(model, pictures(model, tiles, batch, side, downsample), batch, prompt)
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
        seconds[stage] = interleave(calls, scale.repetitions, scale.warmup, f"{stage}, {title}")
    seconds["first token"] = {
        name: [sum(pair) for pair in zip(seconds["encode"][name], seconds["prefill"][name])] for name in runs
    }
    if compiled:
        for run in runs.values():
            room = run.ids.shape[1] + scale.warmup + scale.steps
            with torch.compiler.set_stance("force_eager"):
                run.prefill(StaticCache(config=run.text_config, max_cache_len=room))
    calls = {name: run.decode for name, run in runs.items()}
    seconds["decode step"] = interleave(calls, scale.steps, scale.warmup, f"decode, {title}")
    for stage in STAGES:
        for name, times in compare(seconds[stage]).items():
            figures[name][stage] = times
    return figures


@torch.no_grad()
def measure_sharing(scale: Scale, device: torch.device, dtype: torch.dtype, layers: int = 4) -> dict[str, Any]:
    """The prefill of a decoder whose few layers share one set of weights, over that of one whose layers do not."""
    sizes = {**PEERS[scale.peers[0]][2]["text_config"], "vocab_size": 2}
    decoders = {}
    for name, made in (("shared", 1), ("separate", layers)):
        config = AutoConfig.for_model(**{**sizes, "num_hidden_layers": made})
        with torch.device(device):
            decoders[name] = AutoModel.from_config(config, dtype=dtype).eval()
    repeat_layer(decoders["shared"], layers)
    embeds = torch.randn(1, 640, sizes["hidden_size"], device=device).to(dtype)
    calls = {name: lambda decoder=decoder: decoder(inputs_embeds=embeds) for name, decoder in decoders.items()}
    times = compare(interleave(calls, 2 * scale.repetitions, scale.warmup, "sharing weights"), "shared")
    return {"decoder": scale.peers[0], "layers": layers, **times}


def measure_all(
    scale: Scale, settings: dict[str, Any], path: Path, device: torch.device, dtype: torch.dtype, minutes: float | None
) -> dict[str, Any]:
    """Measures the cases that the file of results lacks, one after the other, as long as there is time."""
    result = begin(path, settings, cases=[], sharing=None, seconds=0)
    start, before = time.monotonic(), result["seconds"]
    if scale.share_layers and result["sharing"] is None:
        result["sharing"] = measure_sharing(scale, device, dtype)
        write_json(path, result)
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
            f"; with the modules over without them: prefill {show(off['prefill']['ours_over'])}, FLOPs "
            f"{ours['prefill_flops'] / off['prefill_flops']:.3f}"
        )
        parts.append(f"{title}:\n\n{markdown_table(header, rows)}")
    if sharing := result["sharing"]:
        parts.append(
            f"{sharing['layers']} layers of {sharing['decoder']}'s decoder, 640 tokens: time with one set of weights "
            f"over that with one for each {show(sharing['separate']['ours_over'])}.\n"
        )
    rows = [
        [
            str(case["tiles"]),
            str(downsample),
            str(row["image_tokens"]),
            *(show(row[stage]["ms"]) for stage in STAGES[:3]),
            f"{row['image_cache_bytes'] / 1e6:.3g}",
        ]
        for case in smallest_cases(result)
        for downsample, row in by_downsample(case).items()
    ]
    if rows:
        header = ["tiles", "s", "vision tokens", *(f"{stage} (ms)" for stage in STAGES[:3]), "image's cache (MB)"]
        parts.append(f"One model, the number of tokens is the caller's choice:\n\n{markdown_table(header, rows)}")
    return parts


def smallest_cases(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of the smallest batch and prompt, by tiles."""
    smallest = min((case["batch"], case["prompt"]) for case in result["cases"])
    cases = [case for case in result["cases"] if (case["batch"], case["prompt"]) == smallest]
    return sorted(cases, key=lambda case: case["tiles"])


def by_downsample(case: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Our model's rows of a case, by s; none where only s = 2 was measured."""
    names = {1: "ours, s = 1", 2: "ours", 4: "ours, s = 4"}
    found = {downsample: measured(case)[name] for downsample, name in names.items() if name in measured(case)}
    return found if len(found) > 1 else {}


def plots(result: dict[str, Any]) -> dict[str, tuple]:
    """Panels of first token and cache against tiles, and of first token against tokens of one model, of the smallest
    batch and prompt."""
    cases, panels = smallest_cases(result), {}
    title = f"batch {cases[0]['batch']}, prompt {cases[0]['prompt']}"
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
        panels[f"{label}, {title}"] = ("tiles", label, curves)
    curves = {}
    for case in cases:
        if points := [(row["image_tokens"], row["first token"]["ms"][0]) for row in by_downsample(case).values()]:
            curves[f"{case['tiles']} tiles"] = tuple(zip(*points))
    if curves:
        panels[f"one model at s = 1, 2 and 4, {title}"] = ("vision tokens", "time to the first token (ms)", curves)
    return panels


def main() -> None:
    parser = new_parser(__doc__, tuple(SCALES))
    add_device_options(parser)
    parser.add_argument("--compile", action="store_true", help="ours and off with compiled decoders")
    parser.add_argument("--minutes", type=float, help="begin no case after this long; the same command goes on")
    args = parser.parse_args()
    dtype, folder = dtype_of(args), args.results / args.device.type
    name = "prefill-compiled" if args.compile else "prefill-2b" if args.scale == "2b" else "prefill"
    settings = head(args.scale, args.device, dtype=str(dtype).removeprefix("torch."), compiled=args.compile)
    scale = replace(SCALES[args.scale], peers=(), share_layers=False) if args.compile else SCALES[args.scale]
    result = measure_all(scale, settings, folder / f"{name}.json", args.device, dtype, args.minutes)
    write_table(folder / f"{name}.md", "Whole models", result, *tables(result))
    plot(folder / f"{name}.png", plots(result))


if __name__ == "__main__":
    main()
