"""Peak memory and time of `convert_weights.py` on a synthetic 2B checkpoint, beside a plain copy of the same bytes.

    python -m benchmarks.conversion
    python -m benchmarks.conversion --format bin --rounds 1 --folder /var/tmp

The checkpoint has LLaVA's research layout and true dimensions (CLIP-ViT-L/14-336, Qwen2-1.5B), random bfloat16 weights
in shards of 1 GB; 11 GB of disk are needed. Copy and conversion take turns, in the page cache; the best round counts.
Linux only. The bound is what the converter promises: one output shard, the largest tensor and 1 GiB.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.common import SHARD, write_shards
from llava_vr import LlavaVrConfig, LlavaVrForConditionalGeneration


GIB = 2**30
CHILD = """
import sys
from llava_vr.convert_weights import main
code = main(sys.argv[1:])
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
sys.exit(code)
"""


def research_name(name: str) -> str:
    """The name that LLaVA's research code gives a tensor of ours."""
    for ours, theirs in (
        ("model.language_model.", "model."),
        ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def write_checkpoint(folder: Path, suffix: str) -> int:
    """Writes the checkpoint and returns the bytes of its largest tensor."""
    config = LlavaVrConfig(projector_type="mlp", projector_downsample=1, remember_layers=[])
    with torch.device("meta"):
        state = LlavaVrForConditionalGeneration(config).state_dict()
    state.pop("lm_head.weight")
    write_shards({research_name(name): tensor.shape for name, tensor in state.items()}, folder, suffix)
    flat = config.text_config.to_dict() | {
        "model_type": "llava_qwen",
        "architectures": ["LlavaQwenForCausalLM"],
        "tie_word_embeddings": True,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    }
    (folder / "config.json").write_text(json.dumps(flat))
    vocabulary = {token: i for i, token in enumerate(["<image>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=["<image>"]).save_pretrained(folder)
    return max(2 * tensor.numel() for tensor in state.values())


def run_conversion(source: Path, output: Path) -> tuple[float, int]:
    """Seconds that the conversion itself reports, and the process' peak resident bytes, imports included."""
    command = [
        sys.executable,
        "-c",
        CHILD,
        str(source),
        str(output),
        "--max-shard-size",
        f"{SHARD // 10**6}MB",
        "--overwrite",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    report, kilobytes = done.stdout.strip().rsplit("\n", 1)
    return float(report.rsplit("(", 1)[1].removesuffix(" s)")), int(kilobytes) * 1024


def run_copy(source: Path, output: Path) -> float:
    """Seconds of a plain copy of the folder."""
    shutil.rmtree(output, ignore_errors=True)
    start = time.perf_counter()
    shutil.copytree(source, output)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=["safetensors", "bin"], default="safetensors")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source = Path(folder) / "source"
        source.mkdir()
        largest = write_checkpoint(source, arguments.format)
        size = sum(path.stat().st_size for path in source.iterdir())
        copies, conversions, peaks = [], [], []
        for _ in range(arguments.rounds):
            copies.append(run_copy(source, Path(folder) / "copy"))
            seconds, peak = run_conversion(source, Path(folder) / "out")
            conversions.append(seconds)
            peaks.append(peak)
    bound = SHARD + largest + GIB
    print(f"checkpoint     {size / 1e9:.2f} GB of {arguments.format}, largest tensor {largest / 1e9:.2f} GB")
    print(f"copy           {min(copies):.1f} s  ({', '.join(f'{s:.1f}' for s in copies)})")
    print(f"conversion     {min(conversions):.1f} s  ({', '.join(f'{s:.1f}' for s in conversions)})")
    print(f"ratio          {min(conversions) / min(copies):.2f}")
    print(f"peak resident  {max(peaks) / GIB:.2f} GiB, bound {bound / GIB:.2f} GiB")


if __name__ == "__main__":
    main()
