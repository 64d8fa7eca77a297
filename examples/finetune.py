"""Fine-tunes a LLaVA-VR model on chats with images.

The data are files of JSON lines, JSON lists or parquet files, globs or folders of them, folders that --prepare or
`datasets` wrote, or names of datasets on the Hub. A row is as below, or as LLaVA's ("conversations", "image"):

  {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": "A plum."}],
   "images": ["plum.png"]}

Relative paths of images begin at the source's folder. The loss is taken on what the assistant says. Any option that is
not listed below goes to transformers' TrainingArguments: --learning_rate 1e-4, --num_train_epochs 3, --bf16 true, ...
"""

import argparse
import copy
import json
import math
import textwrap
from pathlib import Path

from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    TrainingArguments,
    set_seed,
)

from llava_vr import LlavaVrCollator
from llava_vr.card_llava_vr import trained_parts, write_card
from llava_vr.training import (
    PARTS,
    EncodedRows,
    EncodedStream,
    HubStream,
    LlavaVrTrainer,
    SkippedRows,
    add_lora,
    draw_order,
    end_together,
    freeze_unread,
    hold_out,
    is_remote,
    open_sources,
    part_of,
    prepare,
    table,
    training_arguments,
)


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = """examples:
  python examples/finetune.py train.jsonl --output fine-tuned --stage full --num_train_epochs 3
  python examples/finetune.py train.jsonl --output adapter --stage lora --merge merged --learning_rate 2e-4
  python examples/finetune.py train.jsonl --output adapter --stage lora --quantize nf4 --gradient_checkpointing true
  python examples/finetune.py train.jsonl --output fine-tuned --eval check.jsonl --eval_strategy epoch --resume
  python examples/finetune.py llava.json --image-folder images --prepare prepared --processes 8
  python examples/finetune.py prepared --output fine-tuned --train_sampling_strategy group_by_length --on-error skip
  python examples/finetune.py llava.json charts.parquet --weights 1 2 --output fine-tuned --hold-out 500
  python examples/finetune.py captions --streaming --max_steps 4000 --stage projector --prompt plain --output stage1
  python examples/finetune.py prepared --output fine-tuned --learning-rates vision_tower=2e-6 vision_remember=1e-4
  accelerate launch --config_file examples/accelerate_fsdp2.yaml examples/finetune.py train.jsonl --output fine-tuned
"""
PLAIN = """{%- macro render(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}{%- for part in content -%}{{- 'IMAGE' if part.type == 'image' else part.text -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- render(message.content) + '\\n' -}}{%- endgeneration -%}
{%- else -%}
{%- for part in message.content if part.type == 'image' -%}{{- 'IMAGE' -}}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""
STAGES = {  # the parts that are trained
    "projector": ("multi_modal_projector", "image_newline"),
    "projector+remember": ("multi_modal_projector", "image_newline", "vision_remember"),
    "lora": ("multi_modal_projector", "vision_remember"),  # PEFT saves whole modules; image_newline is a parameter
    "full": PARTS,
}
QUANTIZATIONS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def set_stage(model, stage: str, frozen: tuple[str, ...] = (), rank: int = 16):
    """The model with the stage's parts trainable, less the frozen ones; with LoRA, it is wrapped by PEFT."""
    trained = set(STAGES[stage]) - set(frozen)
    if stage == "lora":
        modules = [f"vision_remember.{layer}" for layer in model.config.remember_layers]  # PEFT takes no ModuleDict
        model = add_lora(model, rank, ["multi_modal_projector", *modules])
        trained.add("language_model")
    for name, parameter in model.named_parameters():
        whole = stage != "lora" or "lora_" in name or "modules_to_save" in name
        parameter.requires_grad_(part_of(name) in trained and whole and parameter.is_floating_point())
    if "vision_tower" in trained:
        freeze_unread(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"Stage {stage!r} without {', '.join(frozen)} leaves nothing to train: freeze fewer parts.")
    return model


def part_rate(text: str) -> tuple[str, float]:
    """A part and its learning rate, of PART=RATE."""
    part, _, rate = text.partition("=")
    if part not in PARTS:
        raise argparse.ArgumentTypeError(f"{part!r} is no part: one of {', '.join(PARTS)}")
    try:
        if 0 <= float(rate) < math.inf:
            return part, float(rate)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not PART=RATE, as in vision_tower=2e-6")


def load_data(args, processor, training: TrainingArguments, skipped: SkippedRows | None) -> tuple:
    """The datasets of training and, or None, of evaluation."""
    options = {"max_length": args.max_length, "image_folder": args.image_folder}

    def without_long(rows: EncodedRows, name: str) -> EncodedRows:
        if args.too_long == "raise":
            return rows
        kept = rows.lengths <= args.max_length
        if training.process_index == 0:
            print(f"{len(rows) - kept.sum()} of {len(rows)} rows of {name} are too long and left out")
        return EncodedRows(rows.sources, rows.order[kept], skipped)

    evaluation = None
    if args.eval:
        held = open_sources([args.eval], processor, **options)
        evaluation = without_long(EncodedRows(held, None, skipped), args.eval)
    if args.streaming and is_remote(args.data[0]):
        if len(args.data) > 1 or args.weights or args.hold_out:
            raise ValueError(f"{args.data[0]} is streamed alone: without other data, --weights or --hold-out.")
        collator = LlavaVrCollator(processor, **options)
        share = (training.process_index, training.world_size, training.seed)
        return HubStream(args.data[0], collator, *share, skipped), evaluation
    sources = open_sources(args.data, processor, **options)
    order = draw_order([len(source.rows) for source in sources], args.weights, training.seed)
    if args.hold_out:
        order, held = hold_out(order, args.hold_out, training.seed)
        evaluation = without_long(EncodedRows(sources, held, skipped), "those held out")
    rows = without_long(EncodedRows(sources, order, skipped), ", ".join(args.data))
    if args.streaming:
        rows = EncodedStream(rows, training.process_index, training.world_size, training.seed)
    return rows, evaluation


def report(skipped: SkippedRows | None):
    """Prints how many rows were skipped, and where they are named."""
    if skipped is not None and (names := skipped.names()):
        print(f"{len(names)} rows were skipped: {skipped.path} names them")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("data", nargs="+", help="files, globs, folders, datasets")
    add("--output", help="folder for the model, its checkpoints and log.json")
    add("--model", default=str(ROOT), help="folder or Hub name to begin with (default: this one)")
    add("--stage", choices=STAGES, default="full", help="what is trained (default: full)")
    add("--freeze", choices=PARTS, nargs="+", default=[], help="parts that are not, all the same")
    add("--learning-rates", type=part_rate, nargs="+", default=[], metavar="PART=RATE", help="rates of single parts")
    add("--rank", type=int, default=16, help="rank of the LoRA matrices (default: 16)")
    add("--merge", help="with LoRA: also write the merged model to this folder")
    add("--quantize", choices=QUANTIZATIONS, help="load the decoder so (QLoRA with --stage lora)")
    add("--dtype", default="float32", help="of weights that are not quantized (default: float32)")
    add("--prompt", choices=["chat", "plain"], default="chat", help="plain: the images, then what the assistant says")
    add("--image-folder", help="where relative paths of images begin (default: the source's folder)")
    add("--weights", type=float, nargs="+", help="times that an epoch has each source, as in 1 0.5 (default: 1)")
    add("--streaming", action="store_true", help="read the data in order, shuffled a little; needs --max_steps")
    add("--prepare", metavar="OUT", help="check the data, write them and the rows' lengths to this folder, and end")
    add("--processes", type=int, default=1, help="that --prepare uses (default: 1)")
    add("--on-error", choices=["raise", "skip"], default="raise", help="at a row that cannot be used; skip names it in "
        "skipped.jsonl, and raises above 1%%")  # fmt: skip
    add("--eval", help="data to take a loss on, see --eval_strategy")
    add("--hold-out", type=int, default=0, metavar="N", help="the same on N drawn rows, which are not trained on")
    add("--max-length", type=int, help="most tokens of a row (default: the decoder's context)")
    add("--too-long", choices=["raise", "drop"], default="raise", help="what becomes of longer rows")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    return parser


def main():
    parser = make_parser()
    args, others = parser.parse_known_args()
    if args.prepare is None and args.output is None:
        parser.error("--output or --prepare is needed")
    defaults = {
        "output_dir": args.output or args.prepare,
        "report_to": "none",
        "logging_steps": 10,
        "save_total_limit": 1,
        "prediction_loss_only": True,
    }
    training = training_arguments(parser, defaults, others)
    if args.merge and args.stage != "lora":
        parser.error("--merge goes with --stage lora")
    if args.quantize and args.stage == "full":
        parser.error("quantized weights cannot be trained: --quantize goes with --stage lora, or with modules alone")
    if args.eval and args.hold_out:
        parser.error("--eval and --hold-out exclude each other")
    grouped = training.train_sampling_strategy == "group_by_length"
    if args.streaming and training.max_steps <= 0:
        parser.error("a stream has no end: --streaming goes with --max_steps")
    if args.streaming and (args.too_long == "drop" or grouped):
        parser.error("a stream knows no lengths: no --too-long drop (--on-error skip leaves long rows out) or grouping")
    set_seed(training.seed)

    try:
        processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
        prompter = copy.copy(processor)  # the model is saved with its own chat template
        if args.prompt == "plain":
            prompter.chat_template = PLAIN.replace("IMAGE", processor.image_token)
        skipped = SkippedRows(Path(args.prepare or args.output, "skipped.jsonl")) if args.on_error == "skip" else None
        if skipped is not None and training.process_index == 0 and not args.resume:
            skipped.path.unlink(missing_ok=True)
        if args.prepare is not None:
            sources = open_sources(args.data, prompter, args.max_length, args.image_folder)
            print(f"{prepare(sources, args.prepare, args.processes, skipped):,} rows in {args.prepare}")
            return report(skipped)

        model = AutoModelForImageTextToText.from_pretrained(
            args.model, trust_remote_code=True, dtype=args.dtype, quantization_config=QUANTIZATIONS.get(args.quantize)
        )
        text = model.config.text_config
        context = getattr(text, "max_position_embeddings", None) or processor.tokenizer.model_max_length
        args.max_length = args.max_length or context
        train, evaluation = load_data(args, prompter, training, skipped)
        model = set_stage(model, args.stage, args.freeze, args.rank)
    except (OSError, ValueError) as error:
        parser.error(textwrap.shorten(str(error), 1000))
    rates = dict(args.learning_rates)
    trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    if idle := set(rates) - trained:
        parser.error(f"--learning-rates names {', '.join(idle)}, which --stage {args.stage} does not train")
    trainer = LlavaVrTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=LlavaVrCollator(prompter).pad,
        processing_class=processor,
        learning_rates=rates,
    )
    if trainer.is_world_process_zero():
        print(table(model, training.learning_rate, rates))
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        Path(args.output, "log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
        model = trainer.accelerator.unwrap_model(model)
        parts = trained_parts(model)
        write_card(args.output, model, parts)
        if args.merge:
            merged = model.merge_and_unload()
            merged.save_pretrained(args.merge)
            write_card(args.merge, merged, parts)
            processor.save_pretrained(args.merge)
        report(skipped)
    end_together()


if __name__ == "__main__":
    main()
