"""What Vision Remember costs in training: steps per second and peak memory of each stage of examples/finetune.py, with
the modules and without; and how long a step waits for its data with two workers.

One tile of 336 x 336 pixels becomes 144 vision tokens (4-to-1), four modules stand in the decoder, weights are random.
The tower is frozen. The two models, of shared weights, take turns on the same batch. Memory is the peak of a process of
its own that trains for two steps. What is measured is skipped, so a command that was cut off goes on.

    python -m benchmarks.training                           # a small model, minutes on two cores
    python -m benchmarks.training --scale full --steps 5    # a decoder of 0.5B dimensions
"""

import copy
import multiprocessing
import re
import runpy
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionConfig, Qwen2Config

from benchmarks.common import add_device_option, begin, head, markdown_table, new_parser, write_json, write_table
from llava_vr import LlavaVrCollator, LlavaVrConfig, LlavaVrForConditionalGeneration, LlavaVrProcessor


ROOT = Path(__file__).resolve().parents[1]
STAGES = ("projector", "projector+remember", "lora", "full")
SIZES = {  # of the decoder (see NAMES), of the tower, width of the modules
    "small": ((256, 1024, 8, 4, 4), (128, 512, 6, 4), 128),
    "full": ((896, 4864, 24, 14, 2), (1024, 4096, 24, 16), 512),
}
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


class Chats(Dataset):
    """Pictures of noise, each with a question and an answer of forty words."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        pixels = np.random.default_rng(index).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        content = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": "What is it?"}]
        answer = {"role": "assistant", "content": "bread " * 40}
        return {"messages": [{"role": "user", "content": content}, answer]}


def make_config(size: str, layers: list[int] | None) -> LlavaVrConfig:
    text, vision, width = SIZES[size]
    return LlavaVrConfig(
        vision_config=CLIPVisionConfig(**dict(zip(NAMES, vision)), image_size=336, patch_size=14),
        text_config=Qwen2Config(**dict(zip(NAMES, text)), vocab_size=151936 if size == "full" else 1024),
        image_token_id=make_tokenizer().convert_tokens_to_ids("<image>"),
        image_aspect_ratio="square",
        image_merge_type="flat",
        projector_downsample=2,
        remember_layers=layers,
        remember_hidden_size=width,
        remember_num_heads=8,
    )


def make_tokenizer():
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)


def make_collator() -> LlavaVrCollator:
    tile = {"height": 336, "width": 336}
    processor = LlavaVrProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=tile),
        make_tokenizer(),
        chat_template=(ROOT / "chat_template.jinja").read_text(encoding="utf-8"),
        patch_size=14,
        projector_downsample=2,
        image_aspect_ratio="square",
        image_merge_type="flat",
    )
    return LlavaVrCollator(processor, max_length=2048)


class Training:
    """A model of one stage and its optimizer; calling it takes a step."""

    def __init__(self, size: str, stage: str, layers: list[int] | None, device: torch.device):
        torch.manual_seed(0)
        model = LlavaVrForConditionalGeneration(make_config(size, layers))
        set_stage = runpy.run_path(str(ROOT / "examples" / "finetune.py"))["set_stage"]
        self.model, self.device = set_stage(model, stage, frozen=("vision_tower",)).to(device).train(), device
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def without_modules(self, size: str) -> "Training":
        """The same weights and the same optimizer without the modules: two models of 0.5B would not fit."""
        twin, trained = copy.copy(self), getattr(self.model, "get_base_model", lambda: self.model)()
        with torch.device("meta"):
            twin.model = LlavaVrForConditionalGeneration(make_config(size, [])).train()
        for part in ("vision_tower", "multi_modal_projector", "language_model"):
            setattr(twin.model.model, part, getattr(trained.model, part))
        twin.model.lm_head = trained.lm_head
        return twin

    def __call__(self, batch: dict[str, torch.Tensor]) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        batch = {key: value.to(self.device) for key, value in batch.items()}
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def peak_bytes(size: str, stage: str, layers: list[int] | None, device: torch.device, batch_size: int) -> int:
    """Run in a process of its own: its peak memory, of the GPU if there is one."""
    training, batch = Training(size, stage, layers, device), make_collator()([Chats(1)[0]] * batch_size)
    for _ in range(2):
        training(batch)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()  # not getrusage, which begins with the parent's peak
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])


def in_a_process(function, *arguments):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(stage: str, args) -> dict:
    """Peak memory of both models, and their steps in turn, after one to warm up."""
    variants = {"with": None, "without": []}
    memory = {
        name: in_a_process(peak_bytes, args.scale, stage, layers, args.device, args.batch_size)
        for name, layers in variants.items()
    }
    trainings = {"with": Training(args.scale, stage, None, args.device)}
    trainings["without"] = trainings["with"].without_modules(args.scale)
    batch = make_collator()([Chats(args.batch_size)[i] for i in range(args.batch_size)])
    seconds = {name: [] for name in variants}
    for step in tqdm(range(args.steps + 1), desc=stage):
        for name in variants if step % 2 else reversed(variants):
            duration = trainings[name](batch)
            if step:
                seconds[name].append(duration)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "stage": stage,
        "steps_per_second": {name: 1 / value for name, value in medians.items()},
        "time_ratio": medians["with"] / medians["without"],
        "peak_bytes": memory,
        "memory_ratio": memory["with"] / memory["without"],
    }


def waiting_share(args) -> float:
    """The share of a training's time that passes before its next batch is there, with two workers."""
    training = Training(args.scale, "full", None, args.device)
    chats = Chats((args.steps + 2) * args.batch_size)
    loader = iter(DataLoader(chats, args.batch_size, collate_fn=make_collator(), num_workers=2))
    for _ in range(2):  # the workers start, the model warms up
        training(next(loader))
    waited = worked = 0.0
    for _ in tqdm(range(args.steps), desc="two workers"):
        start = time.perf_counter()
        batch = next(loader)
        waited += time.perf_counter() - start
        worked += training(batch)
    return waited / (waited + worked)


def main() -> None:
    parser = new_parser(__doc__)
    add_device_option(parser)
    parser.add_argument("--stages", choices=STAGES, nargs="+", default=STAGES, help="default: all four")
    parser.add_argument("--steps", type=int, default=15, help="of each model and stage (default 15)")
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()
    path = args.results / args.device.type / "training.json"
    settings = head(args.scale, args.device, batch_size=args.batch_size, steps=args.steps)
    settings["modules_after_layers"] = make_config(args.scale, None).remember_layers
    result = begin(path, settings, stages=[], waiting_share=None, seconds=0)
    for stage in args.stages:
        if stage not in [run["stage"] for run in result["stages"]]:
            start = time.perf_counter()
            result["stages"].append(in_a_process(measure, stage, args))
            result["seconds"] += time.perf_counter() - start
            write_json(path, result)
    if result["waiting_share"] is None:
        result["waiting_share"] = waiting_share(args)
        write_json(path, result)
    rows = [
        [
            run["stage"],
            ", ".join(f"{run['steps_per_second'][name]:.2f}" for name in ("without", "with")),
            f"{run['time_ratio']:.3f}",
            f"{run['memory_ratio']:.3f}",
        ]
        for run in result["stages"]
    ]
    table = markdown_table(
        ["stage", "steps a second, without and with", "time, with / without", "peak memory, with / without"], rows
    )
    waiting = f"Waiting for data with two workers: {result['waiting_share']:.1%} of the time.\n"
    write_table(path.with_suffix(".md"), "Training", result, table, waiting)


if __name__ == "__main__":
    main()
