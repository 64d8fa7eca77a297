"""lmms-eval's model `llava_vr`, found through the entry point group `lmms_eval.models`.

python -m lmms_eval --model llava_vr --model_args pretrained=CHECKPOINT,dtype=bfloat16 --tasks chartqa --batch_size 16
"""

import os
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from .answering import Answerer


def manifest() -> ModelManifest:
    """What the entry point gives lmms-eval."""
    return ModelManifest(model_id="llava_vr", chat_class_path=f"{__name__}.LlavaVr")


class LlavaVr(lmms):
    """
    Args:
        batch_size: chats that are answered at once.
        device: if not given, the process's own GPU, or the CPU.
        others: see `Answerer`.
    """

    is_simple = False  # it takes chats

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ):
        super().__init__()
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.batch_size = int(batch_size)
        self.answerer = Answerer(pretrained, device=self.accelerator.device if several else device, **options)
        self.device = self.answerer.device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answers, in the order of the requests. Those with equal arguments of generation share batches."""
        answers: list[str] = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: repr(requests[i].args[2]))  # as they come, if they are equal
        progress = tqdm(total=len(requests), desc="answers", disable=self.rank != 0)
        while order:
            generation = requests[order[0]].args[2]
            batch = [i for i in order[: self.batch_size] if requests[i].args[2] == generation]
            order = order[len(batch) :]
            options = {key: value for key, value in generation.items() if key != "image_aspect_ratio"}  # LLaVA's alone
            said = self.answerer.answer([self._chat(requests[i]) for i in batch], **options)
            for i, text in zip(batch, said):
                answers[i] = text
                self.cache_hook.add_partial("generate_until", (requests[i].args[0], generation), text)
            progress.update(len(batch))
        progress.close()
        return answers

    def _chat(self, request: Instance) -> list[dict[str, Any]]:
        _, to_messages, _, number, task, split = request.args
        messages = to_messages(self.task_dict[task][split][number])
        return [{"role": message["role"], "content": list(map(_part, message["content"]))} for message in messages]

    def loglikelihood(self, requests):
        raise NotImplementedError("llava_vr answers questions (generate_until) and gives no likelihoods: take a task "
                                  "that generates.")  # fmt: skip

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("llava_vr takes tasks of one round: take a task that generates in one.")


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] != "image":
        raise ValueError(f"llava_vr takes images and text, found {part['type']!r}: choose another task.")
    return {"type": "image", "image": part["url"]}
