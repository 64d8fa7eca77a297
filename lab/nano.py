"""What every model of the lab has around it: tokenizer, chat template, processor, the decoder's configuration."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlavaImageProcessorPil, PreTrainedTokenizerFast

from lab.data.dense_labels import CANVAS
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
CHAT_TEMPLATE = Path(__file__).parents[1].joinpath("chat_template.jinja").read_text(encoding="utf-8")  # the root's


def make_tokenizer(texts: Iterable[str], least: int = 8) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: what occurs at least so often is one token, digits stand alone, anything else is spelled.

    There are no merges, so made-up words and random letters are always the same tokens: their characters. A digit keeps
    the space before it: what is read in "tea 42" after "tea" is then the number and not a space, and the decoder learns
    much earlier to find a number by its name.
    """
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" ?[0-9]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    words = sorted(word for word, count in counts.items() if count >= least)
    entries = dict.fromkeys((*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words))
    backend = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, [], ignore_merges=True))
    backend.pre_tokenizer, backend.decoder = splitter, decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def make_decoder_config(tokenizer: PreTrainedTokenizerFast, sizes: dict[str, Any]) -> LlamaConfig:
    """A Llama decoder of these sizes for the tokenizer's texts, its head tied to its embeddings."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )


def use_eager(model: LlavaVrForConditionalGeneration):
    """Attention without sdpa, whose backward pass on a CPU is slow."""
    for part in (model.model.vision_tower, model.model.language_model):
        part.set_attn_implementation("eager")


def prepare(
    model: LlavaVrForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> LlavaVrForConditionalGeneration:
    """The model, ready to train on a CPU and to answer: an answer never holds a placeholder."""
    use_eager(model)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        suppress_tokens=[model.config.image_token_id],
    )
    return model


def make_processor(
    texts: Iterable[str],
    downsample: int = 3,
    choices: Sequence[int] | None = None,
    side: int = CANVAS,
    patch_size: int = 8,
) -> LlavaVrProcessor:
    """One square picture of `side` x `side` pixels, a vision token for each downsample x downsample patches of it."""
    image_processor = LlavaImageProcessorPil(
        do_pad=True,
        size={"height": side, "width": side},
        do_center_crop=False,
        crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaVrProcessor(
        image_processor,
        make_tokenizer(texts),
        chat_template=CHAT_TEMPLATE,
        patch_size=patch_size,
        projector_downsample=downsample,
        projector_downsample_choices=choices and list(choices),
        image_aspect_ratio="pad",
        image_merge_type="flat",
    )
