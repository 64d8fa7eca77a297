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
import glob
import json
import random
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from llava_vr import LlavaVrCollator
from llava_vr.card_llava_vr import trained_parts, write_card
from llava_vr.training import end_together, folder_of, open_sources, table, training_arguments
from llava_vr.training.answers import Rows, write_answers
from llava_vr.training.distillation import (
    STUDENT_PARTS,
    DistillationCollator,
    Distiller,
    check_model,
    compare,
    set_parts,
)


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
    parts = ["projector", "modules"]
    add("--train", choices=STUDENT_PARTS, nargs="+", default=parts, help="parts (default: projector modules)")
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
        parts = trained_parts(model)
        if "lora" in args.train:
            model = model.merge_and_unload()
        model.save_pretrained(args.output)
        processor.save_pretrained(args.output)
        write_card(args.output, model, parts)
    end_together()


if __name__ == "__main__":
    main()
