"""A compressed model that learns from itself at s = 1: what is trained, batches, loss, and how alike both answer.

Only what does not run at s = 1 is trained: the modules, and an MLP that the projector has for s > 1 alone, at first a
copy of the other. So the teacher stays as it was. With LoRA on the decoder the adapter is off in the teacher's pass.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import Trainer

from llava_vr.collator_llava_vr import LlavaVrCollator
from llava_vr.evaluation.answering import generate

from .answers import Rows, answer_in_turn, fill
from .parts import add_lora


STUDENT_PARTS = ("projector", "modules", "lora")


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
    """The model with these of `STUDENT_PARTS` trainable, which do not run at s = 1; PEFT wraps it for LoRA."""
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
