"""The models that the lab compares. An arm is a way to compress and a way to bring features back."""

from dataclasses import dataclass, replace

import torch
from transformers import CLIPVisionModel, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from lab.baselines import MODULES, WideAvgPool
from lab.nano import IMAGE, MAX_LENGTH
from lab.training import read_config
from llava_vr import LlavaVrConfig, LlavaVrForConditionalGeneration


PROJECTORS = ("avg_pool", "pixel_shuffle", "ldpv2", "c_abstractor", "tokenpacker", "resampler")


@dataclass(frozen=True)
class Arm:
    """A model of the table.

    Args:
        projector, downsample: as in the configuration; s x s patches become one token.
        module: one of `baselines.MODULES`, or "none", or "wide" for a wider projector instead.
        layers, levels, window, shared: of the module, `shared` the heads of its keys and values; None for those of the
            configuration file.
        longer: trains for this many times the steps of the configuration file; None for once.
    """

    projector: str
    downsample: int
    module: str = "none"
    layers: tuple[int, ...] | None = None
    levels: tuple[int, ...] | None = None
    window: int | None = None
    shared: int | None = None
    longer: int | None = None

    @property
    def name(self) -> str:
        parts = [f"{self.projector}-{self.downsample**2}", self.module.replace(" ", "_")]
        for field in ("layers", "levels", "window", "shared", "longer"):
            if (value := getattr(self, field)) is not None:
                parts.append(field + "_".join(map(str, value if isinstance(value, tuple) else (value,))))
        return "-".join(parts)


UPPER = Arm("mlp", 1)
AGAIN = replace(UPPER, longer=1)  # uncompressed, too, but trained in stage three, as the compressed models are
NANO = Arm("avg_pool", 3, "ours", window=7)  # what the root of the repository holds
PAIRS = [Arm(p, s, module) for s in (4, 2) for p in PROJECTORS for module in ("none", "ours")]
CENTRE = Arm("avg_pool", 4, "ours")
BASELINES = [replace(CENTRE, module=module) for module in ("wide", "deepstack", "sva", "global")]
SHARED = (2, 1)  # heads of keys and values, of eight
ABLATION = [
    *(replace(CENTRE, layers=layers) for layers in ((0,), (2,), (4,), (0, 2), (0, 2, 4), (2, 3, 4))),
    *(replace(CENTRE, levels=levels) for levels in ((2,), (4,), (6,))),
    *(replace(CENTRE, window=window) for window in (6, 8)),
    *(replace(CENTRE, shared=heads) for heads in SHARED),
    replace(CENTRE, window=8, shared=2),  # a larger window at the operations of `CENTRE`
    *(replace(CENTRE, module=module) for module in ("no bias", "mean")),
]
STAGES = {UPPER: "upper", NANO: "nano"}  # whose configuration files these train by; "compressed" for all others
ARMS = {
    "cpu": [arm for arm in PAIRS if arm.downsample == 4 and arm.projector in ("avg_pool", "tokenpacker")],
    "gpu": [*PAIRS, *BASELINES, *ABLATION],
}
LONGER = [replace(arm, longer=3) for arm in ARMS["cpu"]]
ROWS = [*ARMS["gpu"], AGAIN, *LONGER]  # all that can be asked for by name


def make_config(arm: Arm, tower: CLIPVisionModel, tokenizer: PreTrainedTokenizerFast) -> LlavaVrConfig:
    """The configuration of an arm around a tower."""
    remember = dict(read_config("compressed")["remember"])
    chosen = {
        "remember_layers": arm.layers,
        "remember_feature_layers": arm.levels,
        "remember_window": arm.window,
        "remember_num_key_value_heads": arm.shared,
    }
    for field, value in chosen.items():
        if value is not None:
            remember[field] = list(value) if isinstance(value, tuple) else value
    if arm.module in ("none", "wide"):
        remember["remember_layers"] = []
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **read_config("upper")["decoder"],
    )
    return LlavaVrConfig(
        vision_config=tower.config,
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        projector_type=arm.projector,
        projector_downsample=arm.downsample,
        vision_feature_layer=-1,
        image_aspect_ratio="pad",
        image_merge_type="flat",
        **remember,
    )


def make_model(
    arm: Arm,
    tower: CLIPVisionModel,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    decoder: dict[str, torch.Tensor] | None = None,
) -> LlavaVrForConditionalGeneration:
    """An arm's model: the tower, frozen, a fresh projector and modules, and the decoder given or a fresh one."""
    torch.manual_seed(seed)
    config = make_config(arm, tower, tokenizer)
    model = LlavaVrForConditionalGeneration(config)
    if arm.module == "wide":
        model.model.multi_modal_projector = WideAvgPool(config).apply(model._init_weights)
    for key in model.model.vision_remember:
        if arm.module != "ours":
            module = MODULES[arm.module](config).apply(model._init_weights)
            for parameter in () if hasattr(module, "gate") else module.out.parameters():
                torch.nn.init.zeros_(parameter)
            model.model.vision_remember[key] = module
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False).eval()
    if decoder is not None:
        model.model.language_model.load_state_dict(decoder)
    for part in (model.model.vision_tower, model.model.language_model):  # sdpa's backward pass on a CPU is slow
        part.set_attn_implementation("eager")
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        suppress_tokens=[config.image_token_id],  # an answer never holds a placeholder
    )
    return model
