"""Loading the 2B model beside reading its file, and processing of images beside transformers' own processor.

    python -m benchmarks.loading                       # the sibling of 0.5B dimensions: 2 GB of disk
    python -m benchmarks.loading --scale full          # the 2B model: 5 GB of disk

A checkpoint of random bfloat16 weights is written once, in shards. Then two take turns, in the page cache: a fresh
process calls `from_pretrained` and touches every page of the weights, which safetensors maps and does not copy; and the
files are read through a buffer. Peak memory is the highest resident memory above that after the imports. Linux only.
Images are noise of several sizes; both processors hold the same image processor and tokenizer.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

from benchmarks.common import (
    compare,
    head,
    interleave,
    markdown_table,
    new_parser,
    show,
    spread,
    write_json,
    write_shards,
    write_table,
)
from benchmarks.prefill import SIBLING
from lab.nano import make_tokenizer
from llava_vr import LlavaVrConfig, LlavaVrForConditionalGeneration, LlavaVrProcessor


BUFFER = 2**24  # bytes
CHILD = """
import json
import sys
import time
from pathlib import Path

import torch
from llava_vr import LlavaVrForConditionalGeneration


def resident(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])


before, start = resident("VmRSS"), time.perf_counter()
model = LlavaVrForConditionalGeneration.from_pretrained(sys.argv[1], dtype="auto")
for parameter in model.parameters():
    parameter.detach().view(torch.uint8).flatten()[::4096].sum()
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak_bytes": resident("VmHWM") - before}))
"""
SIZES = ((336, 336), (640, 480), (480, 640), (1280, 720), (1024, 1024), (600, 1800))  # of images, width and height


@dataclass(frozen=True)
class Scale:
    """
    Args:
        rounds: fresh processes of each kind.
        repetitions: of the images.
        config: fields of the configuration, where they are not the 2B model's.
    """

    rounds: int
    repetitions: int = 20
    config: dict[str, Any] = field(default_factory=dict)


SCALES = {"small": Scale(20, config=SIBLING), "full": Scale(20)}


def write_checkpoint(folder: Path, config: LlavaVrConfig) -> None:
    with torch.device("meta"):
        state = LlavaVrForConditionalGeneration(config).state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    write_shards({name: tensor.shape for name, tensor in state.items()}, folder)
    config.architectures, config.dtype = ["LlavaVrForConditionalGeneration"], torch.bfloat16
    config.save_pretrained(folder)


def load(folder: Path) -> dict[str, float]:
    """What `CHILD` reports."""
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def read(folder: Path) -> float:
    """Seconds for all files of weights, through one buffer."""
    buffer, start = bytearray(BUFFER), time.perf_counter()
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def measure_loading(scale: Scale) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, LlavaVrConfig(**scale.config))
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        read(folder)
        rounds = [(load(folder), read(folder)) for _ in tqdm(range(scale.rounds), desc="loading")]
    seconds = {
        "load": [loaded["seconds"] for loaded, _ in rounds],
        "read": [read_seconds for _, read_seconds in rounds],
    }
    peaks = [loaded["peak_bytes"] / size for loaded, _ in rounds]
    return {"file_bytes": size, "peak_over_file": spread(peaks), **compare(seconds, "load")}


def measure_images(scale: Scale) -> dict[str, Any]:
    """Milliseconds for all images of `SIZES`, one after the other, and images a second."""
    rng, tokenizer = np.random.default_rng(0), make_tokenizer(["What is in the picture?"])
    tokenizer.model_max_length = 2**16
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]
    pinpoints = LlavaVrConfig().image_grid_pinpoints
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, image_grid_pinpoints=pinpoints
    )
    theirs = LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processors = {"ours": LlavaVrProcessor(image_processor, tokenizer), "transformers": theirs}

    def process(processor) -> None:
        for image in images:
            processor(images=image, text="<image>What is in the picture?", return_tensors="pt")

    calls = {name: lambda processor=processor: process(processor) for name, processor in processors.items()}
    times = compare(interleave(calls, scale.repetitions, title="images"))
    for row in times.values():
        row["images_a_second"] = float(f"{1000 * len(images) / row['ms'][0]:.4g}")
    return times


def tables(result: dict[str, Any]) -> list[str]:
    loading, images = result["loading"], result["images"]
    header = ["what", "time (ms)", "loading over it", "peak memory over the file"]
    rows = [
        ["from_pretrained, every page touched", show(loading["load"]["ms"]), "", show(loading["peak_over_file"])],
        ["reading the files", show(loading["read"]["ms"]), show(loading["read"]["ours_over"]), ""],
    ]
    first = f"A checkpoint of {loading['file_bytes'] / 1e9:.2f} GB:\n\n{markdown_table(header, rows)}"
    header = ["processor", f"time for {len(SIZES)} images (ms)", "ours over it", "images a second"]
    rows = [
        [name, show(row["ms"]), show(row["ours_over"]), f"{row['images_a_second']:g}"] for name, row in images.items()
    ]
    return [first, f"Image processing:\n\n{markdown_table(header, rows)}"]


def main() -> None:
    args = new_parser(__doc__).parse_args()
    scale, folder = SCALES[args.scale], args.results / "cpu"
    start, settings = time.monotonic(), head(args.scale, torch.device("cpu"))
    result = {**settings, "loading": measure_loading(scale), "images": measure_images(scale)}
    result["seconds"] = round(time.monotonic() - start)
    write_json(folder / "loading.json", result)
    write_table(folder / "loading.md", "Loading and images", result, *tables(result))


if __name__ == "__main__":
    main()
