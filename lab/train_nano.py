"""Stage two: projector, decoder and Vision Remember modules learn to answer, over the frozen tower of stage one.

    python -m lab.train_nano --tower lab/runs/tower --output lab/runs/nano        # about an hour on two cores
    python -m lab.train_nano --tower lab/runs/tower --output lab/runs/nano --steps 100

The output is a complete checkpoint folder with processor and code.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import Trainer, TrainingArguments

from lab.arms import Arm, make_model
from lab.dialogues import Dialogues
from lab.drawing import Turn, generator
from lab.muon import MuonAdamW
from lab.nano import make_processor, receipt_texts, save
from lab.receipts import KINDS, Row, ask, draw_receipt


TRAIN_SEED, CHECK_SEED = 11, 12
LEARNING_RATE = 2e-3
BATCH, TURNS = 32, 8
READING_STEPS, PRICING_STEP, MIXING_STEP = 750, 1250, 1750  # what the dialogues practise changes here
LOOKS = [kind for kind in KINDS if kind != "transcribe"]


def draw_dialogue(rng: np.random.Generator, rows: tuple[Row, ...], step: int) -> list[Turn]:
    """Several turns about one picture: look-ups, and a transcription before, among or after them.

    Answers after a transcription can be copied from it, so what comes first is what is practised on the picture:
    reading at first, then a mix, then prices by their item (the last to be found), and in the end some of every kind.
    """
    if step >= MIXING_STEP:
        kinds = rng.permutation(LOOKS + ["item", "no item"])
        turns, first = [ask(rng, rows, kind) for kind in kinds], rng.random() < 0.15
        place = 0 if first else len(turns)
    elif step >= PRICING_STEP and rng.random() < 0.6:  # every row once, and half as many items that are not there
        prices = [ask(rng, (row,), "price") for row in rows]
        prices += [ask(rng, rows, "no item") for _ in range(len(rows) // 2)]
        turns = [prices[i] for i in rng.permutation(len(prices))]
        turns += draw_looks(rng, rows, TURNS - len(turns), present=3)
        place = len(turns)
    else:
        reading = step < READING_STEPS
        turns = draw_looks(rng, rows, TURNS, present=1 if reading else 3)
        place = 0 if rng.random() < (0.5 if reading else 0.25) else int(rng.integers(1, TURNS + 1))
    return turns[:place] + [ask(rng, rows, "transcribe")] + turns[place:]


def draw_looks(rng: np.random.Generator, rows: tuple[Row, ...], count: int, present: float) -> list[Turn]:
    """Look-ups of random kinds, those of things that are there `present` times as often as each of the others."""
    weights = np.array([present if kind in ("price", "item") else 1 for kind in LOOKS])
    return [ask(rng, rows, LOOKS[i]) for i in rng.choice(len(LOOKS), count, p=weights / weights.sum())]


def draw_turns(seed: int, index: int) -> tuple[Image.Image, list[Turn]]:
    """A price list and a dialogue about it."""
    rng = generator(seed, index)
    receipt = draw_receipt(rng)
    return receipt.image, draw_dialogue(rng, receipt.rows, step=index // BATCH)


def main() -> None:
    """Train, then write the checkpoint folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", type=Path, required=True, help="folder that lab.train_tower wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model, its log and checkpoints")
    parser.add_argument("--steps", type=int, default=2650, help="batches of 32 dialogues (default 2650)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    args = parser.parse_args()
    processor = make_processor(receipt_texts())
    model = make_model(Arm("avg_pool", 3, "ours"), args.tower, processor.tokenizer, TRAIN_SEED)
    train = Dialogues(processor, partial(draw_turns, TRAIN_SEED), args.steps * BATCH)
    training = TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=64,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": args.steps // 4},
        warmup_steps=150,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=True,
        seed=TRAIN_SEED,
        train_sampling_strategy="sequential",
        logging_steps=25,
        eval_strategy="steps",
        eval_steps=250,
        save_steps=250,
        save_total_limit=1,
        remove_unused_columns=False,
        prediction_loss_only=True,
        dataloader_num_workers=1,
        report_to="none",
    )
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=Dialogues(processor, partial(draw_turns, CHECK_SEED), 256),
        data_collator=train.collate,
        optimizers=(MuonAdamW(model, LEARNING_RATE), None),
    )
    trainer.train(resume_from_checkpoint=args.resume)
    save(model, processor, args.output)
    Path(args.output, "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))


if __name__ == "__main__":
    main()
