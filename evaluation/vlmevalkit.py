"""VLMEvalKit's class for checkpoints of this package; `evaluation.run_vlmevalkit` registers it."""

from typing import Any

from vlmeval.vlm.base import BaseModel

from .answering import Answerer


class LlavaVr(BaseModel):
    """
    Args:
        max_new_tokens: tokens of an answer, at most.
        options: see `Answerer`.
    """

    INTERLEAVE = True
    allowed_types = ["text", "image"]

    def __init__(self, pretrained: str, max_new_tokens: int = 1024, **options: Any):
        super().__init__()
        self.answerer, self.max_new_tokens = Answerer(pretrained, **options), max_new_tokens

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to one message of texts and paths of images, as VLMEvalKit gives it."""
        content = [{"type": part["type"], part["type"]: part["value"]} for part in message]
        return self.answerer.answer([[{"role": "user", "content": content}]], self.max_new_tokens)[0]
