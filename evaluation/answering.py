"""A model that answers chats in batches: what the harnesses' adapters and distillation share."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin


SAMPLING = ("temperature", "top_p", "top_k")


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    chats: Sequence[Sequence[Mapping[str, Any]]],
    projector_downsample: int | None = None,
    max_new_tokens: int = 1024,
    do_sample: bool = False,
    **options: Any,
) -> list[str]:
    """The model's answers to chats that end with a question, greedy if not said otherwise; their image parts hold the
    pictures. Other options are those of the model's `generate`."""
    inputs = processor.apply_chat_template(
        list(chats),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left", "projector_downsample": projector_downsample},
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=do_sample, **options)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class Answerer:
    """
    Args:
        pretrained: folder or Hub name.
        revision: of the Hub's repository.
        dtype: such as "bfloat16"; "auto" for that of the weights.
        device: such as "cuda:1"; a GPU if there is one.
        projector_downsample: s, one of the model's choices; its own if not given.
        attn_implementation: such as "eager"; the model's default if not given.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        projector_downsample: int | None = None,
        attn_implementation: str | None = None,
    ):
        options = {"revision": revision or "main", "trust_remote_code": True}
        self.processor = AutoProcessor.from_pretrained(pretrained, **options)
        self.model = AutoModelForImageTextToText.from_pretrained(
            pretrained, dtype=dtype, attn_implementation=attn_implementation, **options
        )
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model.to(self.device).eval()
        self.projector_downsample = projector_downsample

    def answer(
        self,
        chats: Sequence[Sequence[dict[str, Any]]],
        max_new_tokens: int = 1024,
        until: str | Sequence[str] = (),
        do_sample: bool | None = None,
        num_beams: int = 1,
        **sampling: Any,
    ) -> list[str]:
        """
        The model's answers to chats whose image parts hold their pictures, greedy unless a temperature is given.

        Args:
            max_new_tokens: tokens of an answer, at most.
            until: texts at which an answer ends; they are not part of it.
            do_sample: whether to draw tokens; by default, if the temperature is above 0.
            sampling: `temperature`, `top_p` and `top_k`; others are refused.

        Raises:
            ValueError: an argument of generation that is not one of these.
        """
        if unknown := sampling.keys() - set(SAMPLING):
            raise ValueError(f"generation arguments {sorted(unknown)} are not supported: leave them out of gen_kwargs.")
        stops = [text for text in ([until] if isinstance(until, str) else until or []) if text]
        sampled = bool(sampling.get("temperature")) if do_sample is None else do_sample
        options = {key: value for key, value in sampling.items() if sampled and value is not None}
        if stops:
            options |= {"stop_strings": stops, "tokenizer": self.processor.tokenizer}
        said = generate(
            self.model,
            self.processor,
            chats,
            self.projector_downsample,
            max_new_tokens,
            sampled,
            num_beams=num_beams,
            **options,
        )
        return [_cut(text, stops) for text in said]


def _cut(text: str, stops: Sequence[str]) -> str:
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
