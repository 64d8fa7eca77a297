"""Teaches a compressed LLaVA-VR model to answer with few image tokens as it does with all of them, without labels.

The teacher is the model itself at s = 1, where every patch is a token and no Vision Remember module runs: the LLaVA
that `convert_weights.py --compress` started from. The student is the same model at its other choices of s, one drawn
for each row. Only what does not run at s = 1 is trained: the modules, and an MLP that the projector has for s > 1
alone, at first a copy of the other. So the teacher stays as it was, and the result at s = 1 is the source, bit for bit.
With LoRA on the decoder the adapter is off in the teacher's pass; merged, the result differs from the source at s = 1.

The loss is the KL divergence from teacher to student on the tokens of the answers. Questions without an answer are
first answered by the teacher, greedily; OUTPUT/answers-*.jsonl keeps what it said, and nothing is asked twice. Any
option that is not listed below goes to transformers' TrainingArguments: --num_train_epochs 1, --learning_rate 1e-3, ...
"""

import argparse
import contextlib
import copy
import glob
import json
import random
import textwrap
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Trainer,
    set_seed,
)

from llava_vr import LlavaVrCollator
from llava_vr.evaluation.answering import generate
from llava_vr.training import add_lora, end_together, folder_of, open_sources, table, training_arguments


EXAMPLES = """examples:
  python examples/distill.py compressed --images photos/ --output trained
  python examples/distill.py compressed --images "scans/*.png" --questions questions.txt --output trained --resume
  python examples/distill.py compressed --data chats.jsonl --output trained --labels 0.5 --max_steps 2000
  python examples/distill.py compressed --images photos/ --output trained --eval held-out-photos/
  python examples/distill.py trained --eval held-out-photos/
  accelerate launch --num_processes 8 examples/distill.py compressed --images photos/ --output trained
"""
QUESTIONS = (
    "Describe the image in detail.",
    "What does the image show? Answer in one sentence.",
    "Write out all text that can be read in the image.",
    "What is the largest text in the image?",
    "Which numbers can be read in the image, and what do they stand for?",
    "List the objects in the image, each with its place and colour.",
    "What is in the upper half of the image, and what in the lower half?",
    "What is in the background?",
    "What small details are easily overlooked in the image?",
    "How many people are in the image, and what are they doing?",
    "Where was the image probably made, and what tells you so?",
    "If the image holds a table, a chart or a form, what does it say? Otherwise, what is its subject?",
)
PARTS = ("projector", "modules", "lora")


# ----------------------------------------------------------------------------------------------- rows and their answers


def image_rows(sources: Sequence[str], questions: Sequence[str], per_image: int, seed: int) -> list[dict[str, Any]]:
    """A chat of unanswered questions about each image of these files, folders and patterns."""
    endings, paths = Image.registered_extensions(), []
    for source in sources:
        found = Path(source).rglob("*") if Path(source).is_dir() else map(Path, glob.glob(source, recursive=True))
        paths += sorted(path for path in found if path.suffix.lower() in endings)
    if not paths:
        raise ValueError(f"there is no image in {', '.join(sources)}.")
    rows = []
    for path in map(str, dict.fromkeys(paths)):
        asked = random.Random(f"{seed} {path}").sample(questions, min(per_image, len(questions)))
        first = [{"type": "image", "image": path}, {"type": "text", "text": asked[0]}]
        messages = [{"role": "user", "content": content} for content in (first, *asked[1:])]
        rows.append({"id": path, "messages": messages})
    return rows


def open_turns(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Which messages are questions that no answer follows."""
    roles = [message["role"] for message in messages] + [None]
    return [i for i, role in enumerate(roles) if role == "user" and roles[i + 1] != "assistant"]


def fill(messages: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[Mapping[str, Any]]:
    """The messages with these answers after the first questions that have none."""
    filled, before = [], 0
    for i, answer in zip(open_turns(messages), answers):
        filled += [*messages[before : i + 1], {"role": "assistant", "content": answer}]
        before = i + 1
    return filled + list(messages[before:])


def parts_of(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def key_of(row: Mapping[str, Any]) -> str:
    """A row's id and its open questions: what an answer of the teacher is kept under."""
    texts = [[part.get("text") for part in parts_of(row["messages"][i])] for i in open_turns(row["messages"])]
    return json.dumps([row["id"], texts], ensure_ascii=False)


class Rows(Dataset):
    """
    Chats with images, as rows for `LlavaVrCollator`, each with an `id`. Those without an image, where teacher and
    student are the same, are left out.

    Args:
        rows: a source of `open_sources`, or those of `image_rows`.
        answers: the teacher's, by `key_of` the row. If given, rows that an answer is missing of or empty in are left
            out, too.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], answers: Mapping[str, list[str]] | None = None):
        self.rows, self.answers = rows, answers or {}
        self.kept = [i for i in range(len(rows)) if self._has_image(rows[i].get("messages") or [])]
        if not self.kept:
            raise ValueError("no row has an image: without one, teacher and student are the same.")
        if answers is not None:
            self.kept = [i for n, i in enumerate(self.kept) if self._is_answered(self[n]["messages"])]
        if not self.kept:
            raise ValueError(
                "the teacher, the model at s = 1, answers nothing: is the chat template the one that the source was "
                "trained with, and does the source itself answer?"
            )

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[self.kept[index]]
        row = {**row, "id": str(row.get("id") or self.kept[index])}
        answers = self.answers.get(key_of(row), ()) if self.answers else ()
        return {**row, "messages": fill(row["messages"], answers)}

    @staticmethod
    def _has_image(messages: Sequence[Mapping[str, Any]]) -> bool:
        return any(part.get("type") == "image" for message in messages for part in parts_of(message))

    @staticmethod
    def _is_answered(messages: Sequence[Mapping[str, Any]]) -> bool:
        return not open_turns(messages) and all(m["content"] for m in messages if m["role"] == "assistant")


def answer_in_turn(model, processor, chats: list, max_new_tokens: int) -> list[list[str]]:
    """The teacher's answers to the open questions of each chat, each asked after the answers before it."""
    answers: list[list[str]] = [[] for _ in chats]
    while True:
        filled = [fill(chat, said) for chat, said in zip(chats, answers)]
        waiting = {i: turns[0] for i, chat in enumerate(filled) if (turns := open_turns(chat))}
        if not waiting:
            return answers
        prompts = [filled[i][: turn + 1] for i, turn in waiting.items()]
        for i, said in zip(waiting, generate(model, processor, prompts, 1, max_new_tokens)):
            answers[i].append(said)


def read_answers(folder: Path) -> dict[str, list[str]]:
    """The teacher's answers that a folder holds, by `key_of` the row."""
    answers = {}
    for path in folder.glob("answers-*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line that was cut off when a run was ended
                answers |= {(said := json.loads(line))["row"]: said["answers"]}
    return answers


def write_answers(
    model, processor, rows: Rows, collator: LlavaVrCollator, folder: Path, batch_size: int, max_new_tokens: int
) -> dict[str, list[str]]:
    """
    The teacher's answers to all open questions of the rows, by `key_of` the row.

    Every row is a line of JSON in FOLDER/answers-PROCESS.jsonl as soon as it is answered, and is not asked again. Each
    process answers its share.
    """
    state, done = PartialState(), read_answers(folder)
    share = (rows[i] for i in range(state.process_index, len(rows), state.num_processes))
    todo = [row for row in share if open_turns(row["messages"]) and key_of(row) not in done]
    state.wait_for_everyone()  # all have read
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"answers-{state.process_index}.jsonl", "a", encoding="utf-8") as file:
        file.write("\n" * bool(todo))  # ends a line that was cut off
        progress = tqdm(total=len(todo), desc="the teacher answers", unit="row", disable=not state.is_main_process)
        for first in range(0, len(todo), batch_size):
            batch = todo[first : first + batch_size]
            try:
                chats = [collator.messages(row) for row in batch]
                answers = answer_in_turn(model, processor, chats, max_new_tokens)
            except (OSError, ValueError) as error:
                raise ValueError(f"one of the rows {', '.join(row['id'] for row in batch)}: {error}") from error
            for row, said in zip(batch, answers):
                file.write(json.dumps({"row": key_of(row), "answers": said}, ensure_ascii=False) + "\n")
            file.flush()
            progress.update(len(batch))
        progress.close()
    state.wait_for_everyone()
    return read_answers(folder)


# ------------------------------------------------------------------------------------------------------------- training


def check_model(model, parts: Sequence[str]):
    """Refuses a model that has no teacher, no student, or nothing to train."""
    choices = model.config.downsamples
    if 1 not in choices or len(choices) < 2:
        raise ValueError(
            f"projector_downsample_choices allow s = {choices}: needed are 1, for the teacher, and larger ones. "
            "convert_weights.py MODEL OUTPUT --compress 2 4 makes them."
        )
    if "modules" in parts and not model.config.remember_layers:
        raise ValueError(
            "remember_layers is []: the model has no Vision Remember modules to train. convert_weights.py MODEL OUTPUT "
            "--remember-layers 0 8 16 24 adds some; or pass --train projector."
        )
    if list(parts) == ["projector"] and "pooled_mlp" not in model.model.multi_modal_projector.options:
        raise ValueError(
            f"projector_type {model.config.projector_type}: this projector runs at s = 1, so training it would change "
            "the teacher. Pass --train modules, or use avg_pool, as convert_weights.py --compress does."
        )


def untie_projector(model):
    """Gives means of regions an MLP of their own, `pooled_mlp`, at first a copy, so that s = 1 keeps the one it has."""
    projector = model.model.multi_modal_projector
    if "pooled_mlp" not in projector.options or projector.pooled_mlp is not None:
        return
    model.config.projector_kwargs["pooled_mlp"] = True
    weights = projector.state_dict()
    untied = type(projector)(model.config).to(projector.linear_1.weight)
    untied.load_state_dict(weights | {f"pooled_mlp.{name}": weight for name, weight in weights.items()})
    model.model.multi_modal_projector = untied


def set_parts(model, parts: Sequence[str], rank: int = 16):
    """The model with these of `PARTS` trainable, nothing of which runs at s = 1; with LoRA, it is wrapped by PEFT."""
    trained = []
    if "projector" in parts:
        untie_projector(model)
        trained += ["multi_modal_projector.pooled_mlp"] * bool(model.config.projector_kwargs.get("pooled_mlp"))
    if "modules" in parts:
        trained += [f"vision_remember.{layer}" for layer in model.config.remember_layers]
    model.requires_grad_(False)
    if "lora" in parts:
        return add_lora(model, rank, trained)
    for name in trained:
        model.model.get_submodule(name).requires_grad_(True)
    return model


class DistillationCollator:
    """
    Batches for the student, each row's images at one of the choices of s above 1, and, as `teacher`, the same rows at
    s = 1, without the pixels, which are the same.

    Args:
        seed: of the choices, which follow from it and the ids of the batch's rows: a run that is resumed has the same.
        options: of both collators.
    """

    def __init__(self, processor, seed: int = 0, **options):
        student, self.seed = copy.copy(processor), seed
        student.projector_downsample_choices = [s for s in processor.projector_downsample_choices if s > 1]
        self.student = LlavaVrCollator(student, projector_downsample="random", **options)
        self.teacher = LlavaVrCollator(processor, projector_downsample=1, **options)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        teacher, pixels = self.teacher(rows), ("pixel_values", "image_sizes")
        teacher = {name: value for name, value in teacher.items() if name not in pixels}
        return {**self.student_batch(rows), "teacher": teacher}

    def student_batch(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        self.student.seed = f"{self.seed} {[row['id'] for row in rows]}"
        return self.student(rows)


def answer_outputs(
    model, batch: Mapping[str, torch.Tensor], hidden_states: bool = False
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """
    What the model says where the next token is one of an answer, row after row: alike for every s.

    Returns:
        The labels `(tokens,)`, the logits `(tokens, vocabulary)`, and the hidden states after each decoder layer,
        `(tokens, hidden_size)` each, if asked for.
    """
    labels = batch["labels"][:, 1:]
    kept = (labels != -100).any(0).nonzero().squeeze(-1)  # the columns that hold any
    labels = labels[:, kept]
    chosen = labels != -100  # (rows, columns)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "teacher")}
    outputs = model(**inputs, logits_to_keep=kept, output_hidden_states=hidden_states, use_cache=False)
    states = [states[:, kept][chosen] for states in outputs.hidden_states[1:]] if hidden_states else []
    return labels[chosen], outputs.logits[chosen].float(), states


@contextlib.contextmanager
def as_teacher(model):
    """The model as it was before training, for images at s = 1: without its adapter, without dropout or gradients."""
    training, adapter_off = model.training, getattr(model, "disable_adapter", contextlib.nullcontext)
    model.eval()
    with adapter_off(), torch.no_grad():
        yield
    model.train(training)


def divergence(teacher: torch.Tensor, student: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher || student) of logits `(tokens, vocabulary)` at a temperature, times its square, summed."""
    log_teacher, log_student = ((logits / temperature).log_softmax(-1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)


class Distiller(Trainer):
    """
    A Trainer of a model that is its own teacher, on batches of `DistillationCollator`.

    Args:
        temperature: of both distributions.
        hidden_states: weight of one minus the cosine of the hidden states of the answers, the mean of all layers.
        labels: weight of the cross-entropy with the answers' tokens.
    """

    def __init__(self, *args, temperature: float = 1.0, hidden_states: float = 0.0, labels: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature, self.hidden_states, self.labels = temperature, hidden_states, labels

    def teach(self, model, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The teacher's logits and, if they count, hidden states, as `answer_outputs` has them."""
        images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
        with as_teacher(self.accelerator.unwrap_model(model)):
            return answer_outputs(model, inputs["teacher"] | images, self.hidden_states > 0)[1:]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        teacher, teacher_states = self.teach(model, inputs)
        labels, student, states = answer_outputs(model, inputs, self.hidden_states > 0)
        loss = divergence(teacher, student, self.temperature)
        if self.hidden_states:
            pairs = zip(teacher_states, states)
            distances = [(1 - F.cosine_similarity(a.float(), b.float(), dim=-1)).sum() for a, b in pairs]
            loss = loss + self.hidden_states * sum(distances) / len(distances)
        if self.labels:
            loss = loss + self.labels * F.cross_entropy(student, labels, reduction="sum")
        if num_items_in_batch is None:
            return loss / len(labels)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss * processes / num_items_in_batch


# ----------------------------------------------------------------------------------------------------------- evaluation


def compare(
    model, processor, rows: Rows, collator: LlavaVrCollator, batch_size: int, max_new_tokens: int
) -> dict[int, dict[str, float]]:
    """
    How the model answers at each s, compared with the teacher.

    Args:
        rows: whose questions are asked, each after the teacher's answers to those before it; their own answers are not
            used.
        collator: finds the rows' pictures.

    Returns:
        For each s: `image_tokens`, of an image on average; `exact`, the share of greedy answers that are the teacher's
        to the letter; `top1`, the share of the tokens of the teacher's answers where both rank the same token first;
        `kl`, from teacher to student at these tokens, in nats.
    """
    model.eval()
    state, choices, found = PartialState(), sorted(model.config.downsamples), []
    share = range(state.process_index, len(rows), state.num_processes)
    collators = {s: LlavaVrCollator(processor, collator.max_length, projector_downsample=s) for s in choices}
    for first in tqdm(range(0, len(share), batch_size), desc="evaluation", disable=not state.is_main_process):
        chats = [collator.messages(rows[i]) for i in share[first : first + batch_size]]
        chats = [[message for message in chat if message["role"] != "assistant"] for chat in chats]
        batches = {}
        with as_teacher(model):
            chats = [fill(*pair) for pair in zip(chats, answer_in_turn(model, processor, chats, max_new_tokens))]
            for s, collator_at in collators.items():
                batch = collator_at([{"messages": chat} for chat in chats])
                batches[s] = {name: value.to(model.device) for name, value in batch.items()}
            _, teacher, _ = answer_outputs(model, batches[1])
        places = [(chat, i) for chat in chats for i, message in enumerate(chat) if message["role"] == "assistant"]
        prompts, answers = [chat[:i] for chat, i in places], [chat[i]["content"] for chat, i in places]
        for s, batch in batches.items():
            said = generate(model, processor, prompts, s, max_new_tokens)
            with torch.no_grad():
                _, student, _ = answer_outputs(model, batch)
            counts = {
                "image_tokens": int((batch["input_ids"] == model.config.image_token_id).sum()),
                "images": len(batch["pixel_values"]),
                "exact": sum(ours == theirs for ours, theirs in zip(said, answers)),
                "answers": len(answers),
                "top1": int((student.argmax(-1) == teacher.argmax(-1)).sum()),
                "kl": float(divergence(teacher, student)),
                "tokens": len(student),
            }
            found.append((s, counts))
    totals = {s: Counter() for s in choices}
    for s, counts in gather_object(found):
        totals[s].update(counts)
    units = {"image_tokens": "images", "exact": "answers", "top1": "tokens", "kl": "tokens"}
    return {s: {name: total[name] / total[unit] for name, unit in units.items()} for s, total in totals.items()}


def comparison_table(found: Mapping[int, Mapping[str, float]]) -> str:
    """What `compare` found, as Markdown."""
    lines = [
        "| s | image tokens | exact match with the teacher | same top token | KL (nats a token) |",
        "|---|---|---|---|---|",
    ]
    for s, row in found.items():
        lines.append(f"| {s} | {row['image_tokens']:.0f} | {row['exact']:.1%} | {row['top1']:.1%} | {row['kl']:.4f} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None):
    """The parser, its options and Trainer's."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("model", help="folder or Hub name of a model with choices of s, 1 among them: of convert_weights.py --compress")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--images", nargs="+", help="folders, files or patterns of images, to ask questions about")
    source.add_argument("--data", help="chats as examples/finetune.py takes them; open questions go to the teacher")
    add("--output", help="folder for the model, its checkpoints, log.json and the teacher's answers")
    add("--questions", help="file with a question a line to draw from, with --images (default: a built-in list)")
    add("--questions-per-image", type=int, default=3, help="of one chat about each image (default: 3)")
    add("--max-new-tokens", type=int, default=256, help="longest answer, in tokens (default: 256)")
    add("--answer-batch-size", type=int, default=8, help="chats that are answered at a time (default: 8)")
    add(
        "--train", choices=PARTS, nargs="+", default=["projector", "modules"], help="parts (default: projector modules)"
    )
    add("--rank", type=int, default=16, help="of the LoRA matrices (default: 16)")
    add("--temperature", type=float, default=1.0, help="of the KL divergence (default: 1)")
    add("--hidden-states", type=float, default=0.0, help="weight of the hidden states' distance (default: 0)")
    add("--labels", type=float, default=0.0, help="weight of the cross-entropy with the answers (default: 0)")
    add("--dtype", default="bfloat16", help="of the weights (default: bfloat16; those trained are float32 meanwhile)")
    add("--max-length", type=int, help="most tokens of a chat at s = 1 (default: the decoder's context)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add("--eval", nargs="+", help="images or a file of chats to compare student and teacher on, after training if any")
    args, others = parser.parse_known_args(arguments)
    if not (args.images or args.data or args.eval):
        parser.error("nothing to do: give --images or --data to train on, or --eval")
    if (args.images or args.data) and not args.output:
        parser.error("--output: where shall the trained model go?")
    defaults = {
        "output_dir": args.output,
        "report_to": "none",
        "logging_steps": 10,
        "save_total_limit": 1,
        "bf16": args.dtype == "bfloat16",
        "use_cpu": not torch.accelerator.is_available(),
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "use_cache": True,  # in the configuration that is saved
    }
    return parser, args, training_arguments(parser, defaults, others)


def read_rows(args: argparse.Namespace, processor, seed: int) -> tuple[Rows | None, Rows | None]:
    """What to train on and what to evaluate on."""
    questions = QUESTIONS
    if args.questions:
        lines = Path(args.questions).read_text(encoding="utf-8").splitlines()
        questions = [line.strip() for line in lines if line.strip()]
        if not questions:
            raise ValueError(f"{args.questions} holds no question: write one a line.")

    def read(images: Sequence[str] | None, data: str | None) -> Rows | None:
        if data:
            return Rows(open_sources([data], processor)[0])
        return Rows(image_rows(images, questions, args.questions_per_image, seed)) if images else None

    evaluation = args.eval or []
    are_chats = len(evaluation) == 1 and Path(evaluation[0]).suffix in (".json", ".jsonl")
    return read(args.images, args.data), read(None, evaluation[0]) if are_chats else read(evaluation, None)


def train(model, processor, rows: Rows, collator: DistillationCollator, args: argparse.Namespace, training):
    """The model, trained, in the dtype that it had; with LoRA, with its adapter."""
    dtype = model.dtype
    model = set_parts(model, args.train, args.rank)
    if training.bf16 or training.fp16:
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # of a norm: slower, not wrong
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer = Distiller(
        model=model,
        args=training,
        train_dataset=rows,
        data_collator=collator,
        processing_class=processor,
        temperature=args.temperature,
        hidden_states=args.hidden_states,
        labels=args.labels,
    )
    if trainer.is_world_process_zero():
        print(table(model))
    trainer.train(resume_from_checkpoint=args.resume)
    if trainer.is_world_process_zero():
        Path(args.output, "log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).to(dtype)


def main(arguments: Sequence[str] | None = None):
    parser, args, training = parse(arguments)
    set_seed(training.seed)
    sizes = {"batch_size": args.answer_batch_size, "max_new_tokens": args.max_new_tokens}
    try:
        processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, dtype=args.dtype)
        check_model(model, args.train if args.images or args.data else [])
        model.to(training.device)
        context = getattr(model.config.text_config, "max_position_embeddings", None)
        limit = args.max_length or context or processor.tokenizer.model_max_length
        folder = args.data and folder_of(args.data)
        collator = DistillationCollator(processor, training.seed, max_length=limit, image_folder=folder)
        rows, held_out = read_rows(args, processor, training.seed)
        if rows is not None:
            answers = write_answers(model, processor, rows, collator.teacher, Path(args.output), **sizes)
            answered = Rows(rows.rows, answers)
            if training.process_index == 0 and len(answered) < len(rows):
                print(f"{len(rows) - len(answered)} of {len(rows)} rows are left out: the teacher answers nothing")
    except (OSError, ValueError) as error:
        parser.error(textwrap.shorten(str(error), 1000))

    if rows is not None:
        model = train(model, processor, answered, collator, args, training)
    if held_out is not None:
        folder = folder_of(args.eval[0]) if Path(args.eval[0]).is_file() else None
        pictures = LlavaVrCollator(processor, limit, image_folder=folder)
        found = compare(model, processor, held_out, pictures, **sizes)
        if training.process_index == 0:
            print(comparison_table(found))
            if args.output:
                Path(args.output, "evaluation.json").write_text(json.dumps(found, indent=1) + "\n")
    if rows is not None and training.process_index == 0:
        if "lora" in args.train:
            model = model.merge_and_unload()
        model.save_pretrained(args.output)
        processor.save_pretrained(args.output)
    end_together()


if __name__ == "__main__":
    main()
