"""Writes the tensors of a plan as safetensors."""

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from tqdm import tqdm

from .plan import Plan, TensorBuilder
from .readers import ConversionError, close_files, reading


def write_weights(plan: Plan, folder: Path, max_shard_size: int | str, allow_nonfinite: bool, progress: bool | None):
    """Writes shards, of which one at a time is in memory, and an index if there are several.

    Args:
        max_shard_size: bytes, or a text such as "5GB".
        progress: whether to show a bar; None for where a person looks on.

    Raises:
        ConversionError: a tensor is not finite, the size is none, or the disk is too small.
    """
    free = shutil.disk_usage(folder).free
    if plan.num_bytes > free:
        raise ConversionError(f"OUTPUT: no space left: {plan.num_bytes / 1e9:.3f} GB needed, {free / 1e9:.3f} GB free.")
    steps, builder = {step.target: step for step in plan.steps}, TensorBuilder(plan, allow_nonfinite)
    with reading(f"--max-shard-size {max_shard_size!r}"):
        split = split_state_dict_into_shards_factory(
            steps,
            get_storage_size=lambda step: step.num_bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    disable = None if progress is None else not progress
    with tqdm(total=plan.num_bytes, unit="B", unit_scale=True, desc="converting", disable=disable) as bar:

        def build(target: str) -> torch.Tensor:
            bar.update(steps[target].num_bytes)
            return builder.build(steps[target])

        for name, targets in split.filename_to_tensors.items():
            try:
                save_file({target: build(target) for target in targets}, folder / name, metadata={"format": "pt"})
            finally:
                close_files()
    if split.is_sharded:
        parameters = sum(step.num_bytes // step.dtype.itemsize for step in plan.steps)
        index = {"metadata": {"total_parameters": parameters, **split.metadata}, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
