"""VLMEvalKit's class for checkpoints of this package, and its command with that class registered as `llava-vr`.

    python -m evaluation.vlmevalkit pretrained=CHECKPOINT,dtype=bfloat16 --data TextVQA_VAL --work-dir results

The first argument is `LlavaVr`'s; the options that follow are those of VLMEvalKit's run.py. In several processes:
torchrun --nproc_per_node 8 -m evaluation.vlmevalkit ...
"""

import runpy
import sys
from functools import partial
from typing import Any

from vlmeval.config import supported_VLM
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


def main() -> None:
    """Register the class and run VLMEvalKit."""
    if len(sys.argv) < 2 or "=" not in sys.argv[1]:
        sys.exit(__doc__)
    options = dict(pair.split("=", 1) for pair in sys.argv.pop(1).split(","))
    options = {name: int(value) if value.isdecimal() else value for name, value in options.items()}
    supported_VLM["llava-vr"] = partial(LlavaVr, **options)
    sys.argv += ["--model", "llava-vr"]
    runpy.run_module("vlmeval.run", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
