"""The plan of a conversion: each tensor of the source with its target, or why it is dropped; each target's origin."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llava_vr import LlavaVrConfig, LlavaVrForConditionalGeneration
from llava_vr.modeling_llava_vr import VisionRemember
from llava_vr.projectors_llava_vr import PROJECTORS

from . import mapping
from .adapters import LowRank
from .mapping import Drop
from .readers import ConversionError, Handle
from .sources import Source


EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
POSITIONS = "model.vision_tower.embeddings.position_embedding.weight"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMED = 5  # at most so many tensors are named in an error


@dataclass
class Step:
    """One tensor of the result: read from `handle` or, without one, new; `low_rank` is what an adapter adds to it."""

    target: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    handle: Handle | None = None
    low_rank: LowRank | None = None
    change: str = ""  # "rows": the vocabulary grows; "patches": a position embedding loses its first, CLS

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Plan:
    """All steps, in the model's order, and what is left out."""

    config: LlavaVrConfig
    steps: list[Step]
    dropped: list[tuple[Handle, Drop]] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(step.num_bytes for step in self.steps)

    def lines(self) -> Iterator[str]:
        """The plan as text: source tensor, target, shape; then what is new and what is dropped and why."""
        for step in self.steps:
            source = step.handle.place if step.handle else "new"
            notes = [
                {"rows": "rows added", "patches": "without CLS"}.get(step.change),
                "+ LoRA" if step.low_rank else "",
            ]
            note = "".join(f" ({note})" for note in notes if note)
            dtype = str(step.dtype).removeprefix("torch.")
            yield f"{source} -> {step.target} {list(step.shape)} {dtype}{note}"
        for handle, reason in self.dropped:
            yield f"{handle.place} {list(handle.shape)} dropped: {reason}"

    def summary(self) -> str:
        """Counts and bytes in one line, reasons for what is dropped below it."""
        read = sum(step.handle is not None for step in self.steps)
        merged = sum(step.low_rank is not None for step in self.steps)
        text = f"{read} tensors mapped{f' ({merged} with LoRA)' if merged else ''}, {len(self.steps) - read} new, "
        text += f"{len(self.dropped)} dropped; {self.num_bytes / 1e9:.3f} GB"
        reasons = Counter(reason for _, reason in self.dropped)
        return "\n".join([text, *(f"  dropped {count}: {reason}" for reason, count in reasons.items())])


def check_config(source: Source, maps: list) -> int:
    """Compares the configuration with the tensors, before anything of its sizes is built.

    Returns:
        Rows of the source's embeddings.

    Raises:
        ConversionError: it has more layers or patches than the tensors, or a choice that transformers does not know, or
            there are no embeddings.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for part in source.parts:
        for name, handle in part.names(maps):
            shapes.setdefault(str(mapping.target_of(name, part.rules)), handle.shape)
    for name in (EMBEDDINGS, POSITIONS):
        if len(shapes.get(name, ())) != 2:
            raise ConversionError(f"{source.folder}: {name} is missing, or is not a matrix.")
    vision, text = source.config["vision_config"], source.config["text_config"]
    options = source.config.get("projector_kwargs") or {}
    for name, layers, prefix in (
        ("text_config.num_hidden_layers", text.num_hidden_layers, "model.language_model.layers."),
        ("vision_config.num_hidden_layers", vision.num_hidden_layers, "model.vision_tower.encoder.layers."),
        ("projector_kwargs.depth", options.get("depth") or 0, "model.multi_modal_projector."),
        ("projector_kwargs.mlp_depth", options.get("mlp_depth") or 0, "model.multi_modal_projector."),
    ):
        if layers > (held := sum(key.startswith(prefix) for key in shapes)):
            raise ConversionError(f"{source.folder}: {name} is {layers}, but only {held} tensors are {prefix}*.")
    patches, (rows, width) = (vision.image_size // vision.patch_size) ** 2, shapes[POSITIONS]
    if patches > rows or width != vision.hidden_size:
        raise ConversionError(
            f"{source.folder}: image_size {vision.image_size} and patch_size {vision.patch_size} of the vision tower "
            f"make {patches} patches of width {vision.hidden_size}, but {POSITIONS} has shape {[rows, width]}."
        )
    rope_type = (getattr(text, "rope_parameters", None) or {}).get("rope_type")
    for name, choice, choices in (
        ("text_config.hidden_act", getattr(text, "hidden_act", None), ACT2FN),
        ("vision_config.hidden_act", getattr(vision, "hidden_act", None), ACT2FN),
        ("text_config.rope_parameters.rope_type", rope_type, {"default", *ROPE_INIT_FUNCTIONS}),
    ):
        if choice is not None and choice not in choices:
            raise ConversionError(f"{source.folder}: {name} {choice!r} is unknown to transformers.")
    return shapes[EMBEDDINGS][0]


def make_plan(source: Source, config: LlavaVrConfig, maps: list, dtype: torch.dtype | None = None) -> Plan:
    """Matches the source's tensors with the model's.

    Raises:
        ConversionError: a tensor is missing, unexpected, there twice, or of a wrong shape or dtype.
    """
    with torch.device("meta"):
        model = LlavaVrForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    found, dropped = _match(source, config, maps)
    new_dtype = dtype or _majority([handle.dtype for handle in found.values()])
    low_rank: dict[str, LowRank] = {}
    if source.adapter:
        if config.tie_word_embeddings:
            _check_tied(source, maps)
        low_rank = _low_rank(source, found, dropped, maps)

    steps, missing = [], []
    for target, shape in shapes.items():
        handle = found.pop(target, None)
        if handle is None and not target.startswith(source.new or ("\0",)):
            missing.append(target)
            continue
        step = Step(target, shape, dtype or (handle.dtype if handle else new_dtype), handle, low_rank.pop(target, None))
        if handle:
            step.change = _fit(step)
            if handle.dtype not in FLOATS:
                raise ConversionError(
                    f"{handle.place} has dtype {str(handle.dtype).removeprefix('torch.')}, which is not a weight's: "
                    "quantised checkpoints are not read."
                )
            if step.dtype == torch.float64:
                step.dtype = torch.float32
        steps.append(step)
    if joined := [name for name in missing if ".experts." in name]:
        raise ConversionError(
            f"{source.folder}: decoder {config.text_config.model_type!r} is a mixture of experts whose weights "
            f"transformers joins when it loads them ({joined[0]}): such decoders are not read."
        )
    if missing:
        hint = "; if the head shares the embeddings, set tie_word_embeddings in config.json" if HEAD in missing else ""
        raise ConversionError(f"{source.folder}: nothing for {_some(missing)}{hint}.")
    if found:
        target, handle = next(iter(found.items()))
        raise ConversionError(f"{handle.place} is unexpected: the model has no {target} ({len(found)} such).")
    config.dtype = _majority([step.dtype for step in steps for _ in range(max(1, step.num_bytes >> 20))])
    return Plan(config, steps, dropped)


def _match(source: Source, config: LlavaVrConfig, maps: list) -> tuple[dict[str, Handle], list[tuple[Handle, Drop]]]:
    found: dict[str, Handle] = {}
    dropped, unexpected = [], []
    for part in source.parts:
        given = set(found)
        for name, handle in part.names(maps):
            target = mapping.target_of(name, part.rules)
            if target == HEAD and config.tie_word_embeddings:
                target = mapping.TIED
            if target is None:
                unexpected.append(handle)
            elif isinstance(target, Drop):
                dropped.append((handle, target))
            elif target in given:
                dropped.append((handle, mapping.REPLACED))
            elif target in found:
                raise ConversionError(f"{handle.place} and {found[target].place} are both {target}.")
            else:
                found[target] = handle
    if unexpected:
        raise ConversionError(f"{unexpected[0].file.path.name}: unexpected {_some([h.name for h in unexpected])}.")
    return found, dropped


def _check_tied(source: Source, maps: list):
    """Refuses an adapter that gives embeddings and head, which are one tensor here, different weights."""
    rules = source.parts[0].rules
    whole = {mapping.target_of(name, rules): handle for name, handle in source.parts[0].names(maps)}
    updated = {mapping.target_of(mapping.apply_maps(name, maps), rules) for name in source.adapter.updates}
    changed = [target for target in (EMBEDDINGS, HEAD) if target in updated or target in whole]
    both = len(changed) == 2 and not updated & set(changed)  # as PEFT saves them where the vocabulary grew
    if changed and not (both and torch.equal(whole[EMBEDDINGS].load(), whole[HEAD].load())):
        raise ConversionError(
            f"{source.folder}: the adapter changes {changed[0]}, but head and embeddings share their weights "
            "(tie_word_embeddings): merge it with PEFT."
        )


def _low_rank(source: Source, found: dict[str, Handle], dropped: list, maps: list) -> dict[str, LowRank]:
    """The adapter's updates by the name of our weight; those of a weight that is left out are `dropped`, too."""
    updates = {}
    for name, update in source.adapter.updates.items():
        target = mapping.target_of(mapping.apply_maps(name, maps), source.parts[0].rules)
        if isinstance(target, Drop):
            dropped += [(update.a, target), (update.b, target)]
        elif target not in found:
            raise ConversionError(f"{update.a.place} is unexpected: the base has no {name}.")
        elif update.shape() != found[target].shape:
            raise ConversionError(
                f"{update.a.place} {list(update.a.shape)} and its B {list(update.b.shape)} do not fit "
                f"{list(found[target].shape)}."
            )
        else:
            updates[target] = update
    return updates


def _fit(step: Step) -> str:
    """How the source's tensor becomes one of the target's shape."""
    theirs, ours = step.handle.shape, step.shape
    if theirs == ours:
        return ""
    if step.target in (EMBEDDINGS, HEAD) and theirs[1:] == ours[1:] and theirs[0] < ours[0]:
        return "rows"
    if step.target.endswith(".position_embedding") and theirs == (1, ours[1] + 1, ours[2]):
        return "patches"
    raise ConversionError(f"{step.handle.place} has shape {list(theirs)}, but {step.target} needs {list(ours)}.")


def _majority(dtypes: list[torch.dtype]) -> torch.dtype:
    floats = [dtype for dtype in dtypes if dtype in FLOATS[:3]]
    return Counter(floats).most_common(1)[0][0] if floats else torch.float32


def _some(names: list[str]) -> str:
    text = f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:NAMED])}"
    return text + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


class TensorBuilder:
    """Builds the tensors of a plan, one at a time."""

    def __init__(self, plan: Plan, allow_nonfinite: bool = False):
        self.plan, self.allow_nonfinite = plan, allow_nonfinite
        self._module: tuple[str, dict[str, torch.Tensor]] = ("", {})  # the new module that was built last

    @torch.no_grad()
    def build(self, step: Step) -> torch.Tensor:
        """The tensor of a step, contiguous.

        Raises:
            ConversionError: it holds NaN or infinite values.
        """
        if step.handle is None:
            return self._new(step).to(step.dtype)
        tensor = self._check(step.handle.load(), step.handle, "has")
        if step.change or step.low_rank:
            tensor = self._check(self._changed(tensor, step), step.handle, "becomes, changed,")
        if tensor.dtype != step.dtype:
            verb = f"does not fit into {str(step.dtype).removeprefix('torch.')}: it has"
            tensor = self._check(tensor.to(step.dtype), step.handle, verb)
        return tensor

    def _changed(self, tensor: torch.Tensor, step: Step) -> torch.Tensor:
        if step.low_rank:
            a, b = (self._check(handle.load(), handle, "has") for handle in (step.low_rank.a, step.low_rank.b))
            tensor = step.low_rank.delta(a, b).add_(tensor)
        if step.change == "rows":
            mean = tensor.mean(0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(step.shape[0] - len(tensor), -1)])
        elif step.change == "patches":
            tensor = tensor[:, 1:].contiguous()
        return tensor

    def _check(self, tensor: torch.Tensor, handle: Handle, verb: str) -> torch.Tensor:
        # The extremes are NaN if any value is; much faster than isfinite, and without its temporary tensors
        if not self.allow_nonfinite and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ConversionError(f"{handle.place} {verb} NaN or infinite values; --allow-nonfinite keeps them.")
        return tensor

    def _new(self, step: Step) -> torch.Tensor:
        """A weight that the source has not, initialised as a new model's, the same each time."""
        module, _, name = step.target.removeprefix("model.").partition(".")
        key = f"{module}.{name.split('.')[0]}" if module == "vision_remember" else module
        if self._module[0] != key:
            self._module = (key, self._initialised(key))
        return self._module[1][step.target]

    def _initialised(self, key: str) -> dict[str, torch.Tensor]:
        config = self.plan.config
        with torch.device("meta"):
            model = LlavaVrForConditionalGeneration(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(key.partition(".")[2] or 0))
            if key == "image_newline":
                size = config.text_config.hidden_size
                return {"model.image_newline": torch.randn(size) / math.sqrt(size)}
            is_projector = key == "multi_modal_projector"
            module = (PROJECTORS[config.projector_type] if is_projector else VisionRemember)(config)
            module.apply(model._init_weights)
        return {f"model.{key}.{name}": tensor.detach() for name, tensor in module.state_dict().items()}
