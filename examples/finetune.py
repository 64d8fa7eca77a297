"""Fine-tunes a LLaVA-VR model on chats with images.

The data is a file of JSON lines, or the name or folder of a dataset of `datasets`. A row is

  {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": "A plum."}],
   "images": ["plum.png"]}

Relative paths of images begin at the file's folder. The loss is taken on what the assistant says. Any option that is
not listed below goes to transformers' TrainingArguments: --learning_rate 1e-4, --num_train_epochs 3, --bf16 true, ...
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from llava_vr import LlavaVrCollator


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = """examples:
  python examples/finetune.py train.jsonl --output fine-tuned --stage full --num_train_epochs 3
  python examples/finetune.py train.jsonl --output adapter --stage lora --merge merged --learning_rate 2e-4
  python examples/finetune.py train.jsonl --output adapter --stage lora --quantize nf4 --gradient_checkpointing true
  python examples/finetune.py train.jsonl --output fine-tuned --eval check.jsonl --eval_strategy epoch --resume
  accelerate launch --config_file examples/accelerate_fsdp2.yaml examples/finetune.py train.jsonl --output fine-tuned
"""
PARTS = ("vision_tower", "multi_modal_projector", "image_newline", "vision_remember", "language_model", "lm_head")
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


def load_rows(source: str, split: str = "train"):
    """The rows of a file of JSON lines, each named by its line unless it has an `id`; or those of a dataset."""
    path = Path(source)
    if path.is_file():
        rows = []
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    rows.append({"id": f"{path.name}:{number}", **json.loads(line)})
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{path}, line {number} is no JSON object: {error}") from None
        return rows
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{source} is no file; for a dataset, `pip install datasets` first.") from None
    return datasets.load_from_disk(source) if path.is_dir() else datasets.load_dataset(source, split=split)


def add_lora(model, rank: int, trained_whole: list[str]):
    """LoRA on every linear layer of the decoder, beside modules that are trained whole."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=r".*language_model\.layers\..*_proj",
        modules_to_save=trained_whole,
    )
    return get_peft_model(model, config)


def part_of(name: str) -> str:
    return next(part for part in PARTS if part in name)


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
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"Stage {stage!r} without {', '.join(frozen)} leaves nothing to train: freeze fewer parts.")
    return model


def table(model) -> str:
    """Trainable and all parameters by part, as Markdown."""
    total, trainable = Counter(), Counter()
    for name, parameter in model.named_parameters():
        if "original_module" not in name:  # the copy that PEFT keeps of a module that it trains
            size = getattr(parameter, "quant_state", parameter).shape.numel()  # 4-bit weights are packed
            total[part_of(name)] += size
            trainable[part_of(name)] += size * parameter.requires_grad
    rows = [f"| {part} | {trainable[part]:,} | {total[part]:,} |" for part in PARTS if part in total]
    rows.append(f"| all | {trainable.total():,} | {total.total():,} |")
    return "\n".join(["| part | trainable | parameters |", "|---|---:|---:|", *rows])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data", help="a file of JSON lines, or a dataset of `datasets`")
    parser.add_argument("--output", required=True, help="folder for the model, its checkpoints and log.json")
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub name to begin with (default: this one)")
    parser.add_argument("--stage", choices=STAGES, default="full", help="what is trained (default: full)")
    parser.add_argument("--freeze", choices=PARTS, nargs="+", default=[], help="parts that are not, all the same")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA matrices (default: 16)")
    parser.add_argument("--merge", help="with LoRA: also write the merged model to this folder")
    parser.add_argument("--quantize", choices=QUANTIZATIONS, help="load the decoder so (QLoRA with --stage lora)")
    parser.add_argument("--dtype", default="float32", help="of weights that are not quantized (default: float32)")
    parser.add_argument("--eval", help="data to take a loss on, see --eval_strategy; paths begin as those of the first")
    parser.add_argument("--max-length", type=int, help="most tokens of a row (default: the decoder's context)")
    parser.add_argument("--too-long", choices=["raise", "drop"], default="raise", help="what becomes of longer rows")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    args, others = parser.parse_known_args()
    defaults = ["--output_dir", args.output, "--report_to", "none", "--logging_steps", "10", "--save_total_limit", "1"]
    (training,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses([*defaults, *others])
    training.remove_unused_columns, training.prediction_loss_only = False, True
    if training.n_gpu > 1:
        parser.error("several GPUs in one process would part the images from their rows: use accelerate launch")
    if args.merge and args.stage != "lora":
        parser.error("--merge goes with --stage lora")
    if args.quantize and args.stage == "full":
        parser.error("quantized weights cannot be trained: --quantize goes with --stage lora, or with modules alone")
    set_seed(training.seed)

    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(
        args.model, trust_remote_code=True, dtype=args.dtype, quantization_config=QUANTIZATIONS.get(args.quantize)
    )
    context = getattr(model.config.text_config, "max_position_embeddings", None) or processor.tokenizer.model_max_length
    folder = Path(args.data).parent if Path(args.data).is_file() else None
    collator = LlavaVrCollator(processor, args.max_length or context, args.too_long, folder)
    data = {}
    for source in filter(None, (args.data, args.eval)):
        rows = load_rows(source)
        if args.too_long == "drop":  # beforehand, so that every batch is full
            kept = [i for i, row in enumerate(tqdm(rows, desc=f"lengths of {source}")) if collator.fits(row, i)]
            print(f"{len(rows) - len(kept)} of {len(rows)} rows of {source} are too long and left out")
            rows = [rows[i] for i in kept]
        data[source] = rows
    try:
        model = set_stage(model, args.stage, args.freeze, args.rank)
    except ValueError as error:
        parser.error(str(error))
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=data[args.data],
        eval_dataset=data.get(args.eval),
        data_collator=collator,
        processing_class=processor,
    )
    if trainer.is_world_process_zero():
        print(table(model))
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        Path(args.output, "log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
        if args.merge:
            trainer.accelerator.unwrap_model(model).merge_and_unload().save_pretrained(args.merge)
            processor.save_pretrained(args.merge)


if __name__ == "__main__":
    main()
