"""The models that the lab compares. An experiment is a way to compress and a way to bring features back."""

from dataclasses import dataclass, replace

import torch
from transformers import CLIPVisionModel, PreTrainedTokenizerFast

from lab.baselines import MODULES, WideAvgPool
from lab.nano import IMAGE, make_decoder_config, prepare
from lab.training import read_config
from llava_vr import LlavaVrConfig, LlavaVrForConditionalGeneration


PROJECTORS = ("avg_pool", "pixel_shuffle", "ldpv2", "c_abstractor", "tokenpacker", "resampler")
SCHEDULES = {"default": 1, "retrained": 1, "long_schedule": 3}  # how many times the steps of the configuration file


@dataclass(frozen=True)
class Experiment:
    """A model of the table.

    Args:
        projector, downsample: as in the configuration; s x s patches become one token. With mlp it is uncompressed.
        module: one of `baselines.MODULES`, or "none", or "wide" for a wider projector instead.
        layers, levels, ratio, key_value_heads: of the module; None for those of the configuration file.
        choices: `projector_downsample_choices`, which take turns in training; None for `downsample` alone.
        schedule: one of `SCHEDULES`; "retrained" is the uncompressed model trained as the compressed ones are.
    """

    projector: str
    downsample: int
    module: str = "none"
    layers: tuple[int, ...] | None = None
    levels: tuple[int, ...] | None = None
    ratio: float | None = None
    key_value_heads: int | None = None
    choices: tuple[int, ...] | None = None
    schedule: str = "default"

    @property
    def name(self) -> str:
        parts = [f"{self.projector}-{self.downsample**2}", self.module.replace(" ", "_")]
        if self.projector == "mlp":
            parts = ["uncompressed"]
        for field in ("layers", "levels", "ratio", "key_value_heads", "choices"):
            if (value := getattr(self, field)) is not None:
                parts.append(field + "_".join(f"{v:g}" for v in (value if isinstance(value, tuple) else (value,))))
        if self.schedule != "default":
            parts.append(self.schedule)
        return "-".join(parts)


UNCOMPRESSED = Experiment("mlp", 1)
UNCOMPRESSED_RETRAINED = replace(UNCOMPRESSED, schedule="retrained")
NANO = Experiment("avg_pool", 3, "ours", ratio=2.0, choices=(2, 3, 4))  # what the root of the repository holds
PAIRS = [Experiment(p, s, module) for s in (4, 2) for p in PROJECTORS for module in ("none", "ours")]
REFERENCE = Experiment("avg_pool", 4, "ours")
BASELINES = [replace(REFERENCE, module=module) for module in ("wide", "deepstack", "sva", "global")]
ABLATION = [
    *(replace(REFERENCE, layers=layers) for layers in ((0,), (2,), (3,), (0, 2), (1, 2, 3), (0, 1, 2, 3))),
    *(replace(REFERENCE, levels=levels) for levels in ((2,), (4,), (6,))),
    *(replace(REFERENCE, ratio=ratio) for ratio in (1.5, 2.0)),
    *(replace(REFERENCE, key_value_heads=heads) for heads in (2, 1)),
    replace(REFERENCE, ratio=2.0, key_value_heads=2),
    replace(REFERENCE, module="mean"),
]
STAGES = {UNCOMPRESSED: "uncompressed", NANO: "nano"}  # whose configuration files these train by; else "compressed"
EXPERIMENTS = {  # of each scale
    "cpu": [pair for pair in PAIRS if pair.downsample == 4 and pair.projector in ("avg_pool", "tokenpacker")],
    "gpu": [*PAIRS, *BASELINES, *ABLATION],
}
LONG_SCHEDULE = [replace(pair, schedule="long_schedule") for pair in EXPERIMENTS["cpu"]]
ALL_EXPERIMENTS = [*EXPERIMENTS["gpu"], UNCOMPRESSED_RETRAINED, *LONG_SCHEDULE]  # what can be asked for by name


def make_config(experiment: Experiment, tower: CLIPVisionModel, tokenizer: PreTrainedTokenizerFast) -> LlavaVrConfig:
    """The configuration of an experiment around a tower."""
    options = dict(read_config("compressed")["remember"])
    chosen = {
        "remember_layers": experiment.layers,
        "remember_feature_layers": experiment.levels,
        "remember_window_ratio": experiment.ratio,
        "remember_num_key_value_heads": experiment.key_value_heads,
        "projector_downsample_choices": experiment.choices,
    }
    for field, value in chosen.items():
        if value is not None:
            options[field] = list(value) if isinstance(value, tuple) else value
    if experiment.module in ("none", "wide"):
        options["remember_layers"] = []
    return LlavaVrConfig(
        vision_config=tower.config,
        text_config=make_decoder_config(tokenizer, read_config("uncompressed")["decoder"]),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        projector_type=experiment.projector,
        projector_downsample=experiment.downsample,
        vision_feature_layer=-1,
        image_aspect_ratio="pad",
        image_merge_type="flat",
        **options,
    )


def make_model(
    experiment: Experiment,
    tower: CLIPVisionModel,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    decoder: dict[str, torch.Tensor] | None = None,
) -> LlavaVrForConditionalGeneration:
    """An experiment's model: the tower, frozen, a new projector and modules, and the decoder given or a new one."""
    torch.manual_seed(seed)
    config = make_config(experiment, tower, tokenizer)
    model = LlavaVrForConditionalGeneration(config)
    if experiment.module == "wide":
        model.model.multi_modal_projector = WideAvgPool(config).apply(model._init_weights)
    for key in model.model.vision_remember:
        if experiment.module != "ours":
            model.model.vision_remember[key] = MODULES[experiment.module](config).apply(model._init_weights)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False).eval()
    if decoder is not None:
        model.model.language_model.load_state_dict(decoder)
    return prepare(model, tokenizer)
