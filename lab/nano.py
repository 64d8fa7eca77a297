"""What every model of the lab has around it: tokenizer, chat template, processor, and the folder it is saved to."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaImageProcessorPil, PreTrainedTokenizerFast

from lab.drawing import CANVAS, generator
from lab.receipts import KINDS, ask, draw_rows
from llava_vr import LlavaVrForConditionalGeneration, LlavaVrProcessor


PAD, END, SYSTEM, USER, ASSISTANT, IMAGE = SPECIAL_TOKENS = (
    "<|pad|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<image>",
)
MAX_LENGTH = 512
CHAT_TEMPLATE = """{%- macro render(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for part in content -%}{{- '<image>' if part.type == 'image' else part.text -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|' + message.role + '|>' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- render(message.content) + '<|end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- render(message.content) + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def receipt_texts(seed: int = 0) -> Iterator[str]:
    """What the nano model's tokenizer is trained on: 3,000 price lists' questions and answers."""
    for index in range(3000):
        rng = generator(seed, index)
        rows = draw_rows(rng)
        turns = [ask(rng, rows, kind) for kind in KINDS]
        yield from (turn.question for turn in turns)
        yield from (turn.answer for turn in turns)


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: any text can be written, the lab's own words are one token, digits stand alone."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=40,  # leaves made-up words in pieces
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def make_processor(texts: Iterable[str], downsample: int = 3) -> LlavaVrProcessor:
    """One square picture of 96 x 96 pixels, a vision token for each downsample x downsample patches of it."""
    image_processor = LlavaImageProcessorPil(
        do_pad=True,
        size={"height": CANVAS, "width": CANVAS},
        do_center_crop=False,
        crop_size={"height": CANVAS, "width": CANVAS},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaVrProcessor(
        image_processor,
        make_tokenizer(texts),
        chat_template=CHAT_TEMPLATE,
        patch_size=8,
        projector_downsample=downsample,
        image_aspect_ratio="pad",
        image_merge_type="flat",
    )


def save(model: LlavaVrForConditionalGeneration, processor: LlavaVrProcessor, folder: Path) -> None:
    """Write the whole checkpoint folder: weights, configuration, processor and code."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "modeling_llava_vr.LlavaVrModel"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
