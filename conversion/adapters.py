"""LoRA adapters as PEFT saves them: what they add to the weights of their base, and what takes these weights' place."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .readers import ConversionError, Handle, open_file, read_json, reading


# What PEFT and trainers put around names
WRAPPER = r"^(?:base_model\.model\.)?(?:model\.(?=(?:model|lm_head)\.))?|(?<=\.)base_layer\."
LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?")
# Settings that say how an adapter was trained, or that are in its tensors; any other that is set is refused
SETTINGS = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "bias", "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "init_lora_weights", "eva_config", "megatron_core", "qalora_group_size"),
    *("fan_in_fan_out", "ensure_weight_tying"),  # of layers of GPT-2, which is not read; of tied weights, see `plan`
}
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base's weights, too


@dataclass(frozen=True)
class LowRank:
    """An update of a weight: `scale` times B A, as a convolution where A is one, transposed for an embedding."""

    a: Handle
    b: Handle
    scale: float
    is_embedding: bool

    def shape(self) -> tuple[int, ...]:
        """That of the weight which it is for."""
        (out, rank), (rank_too, *rest) = self.b.shape[:2], self.a.shape
        if rank != rank_too or any(size != 1 for size in self.b.shape[2:]):
            raise ConversionError(f"{self.a.place} {list(self.a.shape)} does not fit its B {list(self.b.shape)}.")
        return (*rest, out) if self.is_embedding else (out, *rest)

    def delta(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """What is added to the weight, in float32."""
        update = self.scale * (b.float().flatten(1) @ a.float().flatten(1))
        return update.T.contiguous() if self.is_embedding else update.view(self.shape())


@dataclass
class Adapter:
    """An adapter's tensors: low-rank updates by the name of the weight, and whole tensors that replace the base's."""

    folder: Path
    base: str | None  # `base_model_name_or_path`
    updates: dict[str, LowRank]
    whole: list[Handle]

    def find_base(self) -> Path:
        """The folder of the model that it was trained on, if it is on this machine.

        Raises:
            ConversionError: it is not.
        """
        for path in (Path(self.base).expanduser(), self.folder / self.base) if self.base else ():
            if (path / "config.json").is_file() and not path.samefile(self.folder):
                return path
        raise ConversionError(
            f"SOURCE {self.folder} is a LoRA adapter, and its base_model_name_or_path {self.base!r} is no folder with "
            "config.json here: pass the model that it was trained on as --base-model."
        )


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder.

    Raises:
        ConversionError: it is none of LoRA's, or of a kind that is not merged.
    """
    settings = read_json(folder / "adapter_config.json")
    with reading(f"{folder}: adapter_config.json"):
        _check_settings(settings)
    files = [folder / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
    handles = list(open_file(next((path for path in files if path.is_file()), files[0])).handles.values())
    if (folder / "non_lora_trainables.bin").is_file():
        handles += open_file(folder / "non_lora_trainables.bin").handles.values()
    pairs: dict[str, dict[str, Handle]] = {}
    embeddings, whole = set(), []
    for handle in handles:
        name = re.sub(WRAPPER, "", handle.name)
        if match := LOW_RANK.fullmatch(name):
            pairs.setdefault(match["module"], {})[match["side"]] = handle
            embeddings |= {match["module"]} if match["embedding"] else set()
        elif "lora_" in name:
            raise ConversionError(f"{handle.place} is not merged: merge the adapter with PEFT.")
        else:
            whole.append(handle)
    updates = {}
    for module, pair in pairs.items():
        if len(pair) < 2:
            raise ConversionError(f"{next(iter(pair.values())).place} has no {'B' if 'A' in pair else 'A'} beside it.")
        with reading(f"{folder}: adapter_config.json"):
            scale = _scale(settings, module, pair["A"].shape[0])
        updates[f"{module}.weight"] = LowRank(pair["A"], pair["B"], scale, module in embeddings)
    return Adapter(folder, settings.get("base_model_name_or_path"), updates, whole)


def _check_settings(settings: dict[str, Any]):
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA" or not settings.get("r") or "lora_alpha" not in settings:
        raise ConversionError(f"adapter_config.json: peft_type {kind!r}: only LoRA with r and lora_alpha is merged.")
    for name, value in settings.items():
        if name not in SETTINGS and value:
            raise ConversionError(f"adapter_config.json: {name} {json.dumps(value)} is not merged: merge it with PEFT.")
    if settings.get("init_lora_weights") not in PLAIN_INITS:
        raise ConversionError(
            f"adapter_config.json: init_lora_weights {settings['init_lora_weights']!r} changes the base's weights: "
            "merge it with PEFT."
        )


def _scale(settings: dict[str, Any], module: str, rank: int) -> float:
    """PEFT's factor of a module's update; of the patterns of `alpha_pattern` that fit its name, the first counts."""
    alphas = settings.get("alpha_pattern") or {}
    fitting = (alpha for pattern, alpha in alphas.items() if re.match(rf"(.*\.)?({pattern})$", module))
    alpha = next(fitting, settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
