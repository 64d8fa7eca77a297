"""A trained uncompressed model gets fewer image tokens without labels: what does Vision Remember keep of its answers?

    python -m lab.distill                                   # all rows of the table, seed by seed; hours
    python -m lab.distill --rows modules-4 pooling-4 --seeds 1
    python -m lab.distill --list                            # what there is to do

The source is the nano checkpoint with an mlp projector and no modules, trained for a while with every patch a token. It
answers questions about new pictures; `examples/distill.py` trains the compressed models on these answers. What is done
is skipped, and what was interrupted goes on. `python -m lab.report` writes the table into lab/RESULTS.md.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Subset
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutput

from lab.data.dense_labels import CANVAS
from lab.data.samples import draw_dialogue, draw_sample
from lab.evaluate import draw_cases, encode, measure
from lab.export_nano import save
from lab.nano import use_eager
from lab.train_vlm import ROOT, Dialogues
from lab.training import describe_machine, read_config, train
from llava_vr import LlavaVrCollator, LlavaVrConfig, LlavaVrForConditionalGeneration, LlavaVrProcessor
from llava_vr.training.answers import Rows, write_answers
from llava_vr.training.distillation import DistillationCollator, Distiller, answer_outputs, set_parts


RESULTS = Path(__file__).parent / "results" / "distill"
CONFIG = read_config("distill")


class StoredTeacher(Distiller):
    """The teacher's logits come with the batch: all students have the same, and a CPU computes them once."""

    def teach(self, model, inputs):
        return inputs.pop("teacher_logits"), []


class StoredTeacherCollator(DistillationCollator):
    """As its base, with the teacher's logits in place of its inputs; a row is encoded once for all epochs."""

    def __init__(self, processor: LlavaVrProcessor, seed: int, logits: dict[str, torch.Tensor]):
        super().__init__(processor, seed)
        self.logits, encoded, encode = logits, {}, self.student.encode

        def look_up(row: dict[str, Any], index: int, downsample: int) -> dict[str, torch.Tensor]:
            key = row["id"], downsample
            if key not in encoded:
                encoded[key] = encode(row, index, downsample)
            return encoded[key]

        self.student.encode = look_up

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        logits = torch.cat([self.logits[row["id"]] for row in rows])
        return {**self.student_batch(rows), "teacher_logits": logits.float()}


@dataclass(frozen=True)
class Student:
    """A compressed model.

    Args:
        downsamples: its choices of s beside 1.
        parts: what is trained, of `STUDENT_PARTS`.
    """

    downsamples: tuple[int, ...]
    parts: tuple[str, ...] = ("projector", "modules")


STUDENTS = {
    "modules-4": Student((4,)),
    "pooling-4": Student((4,), ("projector",)),
    "modules-2": Student((2,)),
    "modules-2-4": Student((2, 4)),
    "pooling-2": Student((2,), ("projector",)),
}
CONTROLS = ("source", "shifted", "untrained", "shrunk")  # without training, and so without a seed


def derive(
    model: LlavaVrForConditionalGeneration, state: dict[str, torch.Tensor] | None = None, seed: int = 0, **fields: Any
) -> LlavaVrForConditionalGeneration:
    """A model with other fields of the configuration: the weights that both have are taken over, others are new."""
    torch.manual_seed(seed)
    derived = LlavaVrForConditionalGeneration(LlavaVrConfig.from_dict({**model.config.to_dict(), **fields}))
    derived.load_state_dict(model.state_dict() if state is None else state, strict=False)
    derived.generation_config = model.generation_config
    use_eager(derived)
    return derived.requires_grad_(True).eval()


def processor_for(model: LlavaVrForConditionalGeneration) -> LlavaVrProcessor:
    """The nano checkpoint's processor, with the pictures' size and the numbers of tokens of a model."""
    processor, side = LlavaVrProcessor.from_pretrained(ROOT), model.config.vision_config.image_size
    processor.projector_downsample = model.config.projector_downsample
    processor.projector_downsample_choices = model.config.projector_downsample_choices
    processor.image_processor.size = processor.image_processor.crop_size = {"height": side, "width": side}
    return processor


def tokens_at(downsample: int) -> int:
    """Image tokens at this s."""
    return (CANVAS // 8 // downsample) ** 2


def draw(seed: int, turns: int, index: int) -> tuple[Image.Image, list]:
    rng, domain, picture = draw_sample(seed, index, CONFIG["shares"])
    return picture.image, draw_dialogue(rng, domain, picture, turns)


def get_source(folder: Path, deadline: float | None) -> LlavaVrForConditionalGeneration | None:
    """The uncompressed model: tower, projector and decoder of the nano checkpoint, trained on. None if time was up."""
    if (folder / "config.json").is_file():
        return derive(LlavaVrForConditionalGeneration.from_pretrained(folder))
    nano, settings = LlavaVrForConditionalGeneration.from_pretrained(ROOT), CONFIG["source"]
    fields = {"projector_type": "mlp", "projector_downsample": 1, "projector_downsample_choices": None}
    model = derive(nano, **fields, projector_kwargs=None, remember_layers=[])
    model.model.vision_tower.requires_grad_(False)
    length = settings["max_steps"] * settings["per_device_train_batch_size"]
    data = Dialogues(processor_for(model), partial(draw, CONFIG["source_seed"], 6), length)
    checkpoints = folder.with_name("source-checkpoints")
    if train(model, data, checkpoints, settings, CONFIG["source_seed"], deadline, data_collator=data.collate) is None:
        return None
    save(model, processor_for(model), folder)
    return derive(model)  # without Trainer's autocast


def get_rows(source: LlavaVrForConditionalGeneration, folder: Path) -> Rows:
    """New pictures and, to questions about them, the source's own answers; those that were drawn are not kept."""
    settings, rows = CONFIG["pictures"], []
    for index in tqdm(range(settings["count"]), desc="pictures"):
        image, turns = draw(settings["seed"], 1, index)
        turns = turns[:1] + turns[1:][-1:]  # a look-up and, where there is one, a transcription
        picture = {"type": "image", "image": image.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)}
        first, *others = (turn.question for turn in turns)
        contents = ([picture, {"type": "text", "text": first}], *others)
        rows.append({"id": str(index), "messages": [{"role": "user", "content": content} for content in contents]})
    processor, sizes = processor_for(source), {"batch_size": 64, "max_new_tokens": 64}
    return Rows(rows, write_answers(source, processor, Rows(rows), LlavaVrCollator(processor), folder, **sizes))


@torch.inference_mode()
def get_logits(source: LlavaVrForConditionalGeneration, rows: Rows, path: Path) -> dict[str, torch.Tensor]:
    """The source's logits at the tokens of its answers, `(tokens, vocabulary)` by the row's id."""
    if path.is_file():
        return load_file(path)
    collator, logits = LlavaVrCollator(processor_for(source)), {}
    for first in tqdm(range(0, len(rows), 16), desc="the teacher's logits"):
        chats = [rows[i] for i in range(first, min(first + 16, len(rows)))]
        batch = collator(chats)
        _, found, _ = answer_outputs(source, batch)
        counts = (batch["labels"][:, 1:] != -100).sum(1).tolist()
        logits |= {chat["id"]: part.half().clone() for chat, part in zip(chats, found.split(counts))}
    save_file(logits, path)
    return logits


def compress(
    source: LlavaVrForConditionalGeneration, downsamples: Sequence[int], seed: int, modules: bool = True
) -> LlavaVrForConditionalGeneration:
    """As `convert_weights.py --compress`: the projector's weights are kept, modules are new."""
    fields = {**CONFIG["compress"], "projector_type": "avg_pool", "projector_downsample": downsamples[0]}
    fields["projector_downsample_choices"] = [1, *downsamples]
    return derive(source, seed=seed, **(fields if modules else fields | {"remember_layers": []}))


def shrink(source: LlavaVrForConditionalGeneration, factor: int) -> LlavaVrForConditionalGeneration:
    """The source for pictures whose sides are so many times shorter: it has as many tokens as one compressed at that s.

    The positions of the tower are interpolated, as CLIP does for pictures of another size.
    """
    vision, name = source.config.vision_config.to_dict(), "model.vision_tower.embeddings.position_embedding.weight"
    grid, state = source.config.feature_grid, source.state_dict()
    places = state[name][1:].T.unflatten(1, (grid, grid))[None]  # (1, width, g, g), without the CLS token's
    places = F.interpolate(places, size=grid // factor, mode="bicubic", align_corners=False)[0].flatten(1).T
    vision |= {"image_size": vision["image_size"] // factor}
    return derive(source, {**state, name: torch.cat([state[name][:1], places])}, vision_config=vision)


def measure_at(
    model: LlavaVrForConditionalGeneration, processor: LlavaVrProcessor, downsample: int, shift: int = 0
) -> dict[str, dict]:
    """
    What it answers right at this s, in fonts and layouts of training and in those held out.

    Args:
        shift: pixels that pictures are moved to the right; what leaves them comes in at the left.
    """
    right = {}
    for style in ("seen", "held out"):
        cases = draw_cases(CONFIG["test"]["seed"], CONFIG["test"]["count"], style == "held out")
        cases = [replace(case, image=ImageChops.offset(case.image, shift, 0)) for case in cases]
        right[style], _ = measure(model, processor, cases, downsample=downsample)
    return right


def run_once(tower: nn.Module, layers: Sequence[int]):
    """Lets a frozen tower see each picture once: the hidden states at these layers are kept for the next epochs."""
    forward, seen, count = tower.forward, {}, tower.config.num_hidden_layers + 1
    layers = sorted({layer % count for layer in layers})

    def look_up(pixel_values: torch.Tensor, **options: Any) -> BaseModelOutput:
        keys = [hash(picture.cpu().numpy().tobytes()) for picture in pixel_values]
        if new := [i for i, key in enumerate(keys) if key not in seen]:
            states = forward(pixel_values[new], **options).hidden_states
            for place, i in enumerate(new):
                seen[keys[i]] = [states[layer][place].clone() for layer in layers]
        states = [None] * count
        for layer, parts in zip(layers, zip(*(seen[key] for key in keys))):
            states[layer] = torch.stack(parts)
        return BaseModelOutput(hidden_states=tuple(states))

    tower.forward = look_up


@torch.inference_mode()
def equal_at_1(model, source) -> bool:
    """Whether the logits at s = 1 are the source's, bit for bit."""
    cases, processors = list(draw_cases(0, 4, True)), (processor_for(model), processor_for(source))
    logits = [m(**encode(m, p, cases, 1)).logits for m, p in zip((model, source), processors)]
    return torch.equal(*logits)


def run(
    name: str,
    seed: int,
    source: LlavaVrForConditionalGeneration,
    rows: Rows,
    logits: dict[str, torch.Tensor],
    folder: Path,
    deadline: float | None,
) -> dict[str, Any] | None:
    """Trains and measures one student; None if time was up."""
    student, settings = STUDENTS[name], CONFIG["student"]
    model = compress(source, student.downsamples, seed, modules="modules" in student.parts)
    model = set_parts(model, student.parts)
    run_once(model.model.vision_tower, [*model.config.feature_layers, *model.config.remember_feature_layers])
    length, rng = settings["max_steps"] * settings["per_device_train_batch_size"], np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(-(-length // len(rows)))])[:length]
    processor = processor_for(model)
    options = {"data_collator": StoredTeacherCollator(processor, seed, logits), "trainer": StoredTeacher}
    log = train(model, Subset(rows, order), folder, settings, seed, deadline, **options)
    if log is None:
        return None
    start, parameters = time.monotonic(), sum(p.numel() for p in model.parameters() if p.requires_grad)
    model = derive(model)  # without Trainer's autocast
    return {
        "right": {str(s): measure_at(model, processor, s) for s in student.downsamples},
        "equal_at_1": equal_at_1(model, source),
        "parameters": parameters,
        "losses": [[entry["step"], entry["loss"]] for entry in log if "loss" in entry],
        "train_seconds": round(sum(entry["seconds"] for entry in log)),
        "test_seconds": round(time.monotonic() - start),
    }


def run_control(name: str, source: LlavaVrForConditionalGeneration) -> dict[str, Any]:
    """Measures the source itself, on pictures moved by a pixel, with untrained pooling, or on shrunk pictures."""
    if name in ("source", "shifted"):
        return {"right": {"1": measure_at(source, processor_for(source), 1, shift=int(name == "shifted"))}}
    if name == "untrained":
        model = compress(source, (2, 4), 0, modules=False)
        return {"right": {str(s): measure_at(model, processor_for(model), s) for s in (2, 4)}}
    models = {s: shrink(source, s) for s in (2, 4)}
    return {"right": {str(s): measure_at(model, processor_for(model), 1) for s, model in models.items()}}


def jobs(names: Sequence[str] | None, seeds: Sequence[int]) -> list[tuple[str, int]]:
    """What to run: controls, then the table, seed by seed."""
    controls = [(name, 0) for name in CONTROLS if names is None or name in names]
    students = [name for name in STUDENTS if names is None or name in names]
    return controls + [(name, seed) for seed in seeds for name in students]


def main() -> None:
    """Go on with the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*CONTROLS, *STUDENTS]
    parser.add_argument("--rows", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=CONFIG["seeds"], help="of data order and first weights")
    parser.add_argument("--list", action="store_true", help="only say what is done and what is missing")
    parser.add_argument("--minutes", type=float, help="save and stop after this long; the same command goes on")
    parser.add_argument("--runs", type=Path, default=Path("lab/runs/distill"), help="folder for models")
    args = parser.parse_args()
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    paths = {job: RESULTS / f"{job[0]}-{job[1]}.json" for job in jobs(args.rows, args.seeds)}
    if args.list:
        for (name, seed), path in paths.items():
            print("done   " if path.is_file() else "missing", name, seed)
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    missing = [job for job, path in paths.items() if not path.is_file()]
    source, taught = get_source(args.runs / "source", deadline), None
    for name, seed in missing:
        if source is None or (deadline is not None and time.monotonic() > deadline):
            print("time is up: the same command goes on")
            return
        print(f"{name}, seed {seed}", flush=True)
        if name in CONTROLS:
            found = run_control(name, source)
        else:
            if taught is None:
                rows = get_rows(source, args.runs / "source-answers")
                taught = rows, get_logits(source, rows, args.runs / "source-logits.safetensors")
            found = run(name, seed, source, *taught, args.runs / f"{name}-{seed}", deadline)
        if found is not None:
            path = paths[name, seed]
            path.write_text(json.dumps({"row": name, "seed": seed, **found, **describe_machine()}) + "\n")


if __name__ == "__main__":
    main()
