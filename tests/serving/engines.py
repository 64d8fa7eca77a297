"""Requests, what transformers answers to them, and what a vLLM engine in this process does."""

import os
from dataclasses import dataclass
from pathlib import Path


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that a test reaches the engine's scheduler and its model
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from lab.evaluate import draw_cases


ROOT = Path(__file__).parents[2]
RECEIPT = ROOT / "examples" / "receipt.png"
TOLERANCE = 5e-5  # of a log-probability, in float32
MAX_TOKENS = 24


@dataclass(frozen=True)
class Request:
    """A chat of one turn; `downsample` is the s of all its images, None for the model's own."""

    question: str
    images: tuple[Image.Image, ...] = ()
    downsample: int | None = None

    @property
    def messages(self) -> list[dict]:
        parts = [{"type": "image", "image": image} for image in self.images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.question}]}]


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    log_probabilities: torch.Tensor
    prompt_tokens: int


def draw_requests() -> list[Request]:
    """50: four questions about each of ten drawn pictures and the receipt, two and three pictures, none."""
    cases = list(draw_cases(99, 10, False, ("receipt",)))
    kinds = len(cases) // 10
    pictures = [cases[kinds * i].image for i in range(10)]
    single = [Request(case.turn.question, (case.image,)) for i, case in enumerate(cases) if i % kinds < 4]
    questions = ("how much is the salad?", "what costs 12?", "how many items are there?", "Transcribe the image.")
    receipt = [Request(question, (Image.open(RECEIPT).convert("RGB"),)) for question in questions]
    several = [Request(questions[0], tuple(pictures[i : i + count])) for i in (0, 5) for count in (2, 3)]
    return [*single, *receipt, *several, Request("hello"), Request("what costs 12?")]


class Transformers:
    """Greedy answers of `generate`, one request at a time."""

    def __init__(self, folder: str | Path):
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        self.model = model.eval()

    @torch.no_grad()
    def answer(self, request: Request) -> Answer:
        inputs = self.processor.apply_chat_template(
            request.messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"projector_downsample": request.downsample} if request.images else {},
        )
        prompt = inputs["input_ids"].shape[1]
        greedy = {"do_sample": False, "max_new_tokens": MAX_TOKENS, "output_scores": True}
        output = self.model.generate(**inputs, **greedy, return_dict_in_generate=True)
        tokens = output.sequences[0, prompt:].tolist()
        scores = torch.cat(output.scores).log_softmax(-1)
        return Answer(tokens, scores[range(len(tokens)), tokens], prompt)


class Engine:
    """vLLM's answers, all requests at once."""

    def __init__(self, folder: str | Path, **options):
        from vllm import LLM

        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        self.llm = LLM(
            str(folder),
            **{
                "trust_remote_code": True,
                "dtype": "float32",
                "block_size": 32,
                "max_num_seqs": 16,
                "disable_log_stats": True,
                **options,
            },
        )
        self.core = self.llm.llm_engine.engine_core.engine_core

    def close(self):
        from vllm.distributed import cleanup_dist_env_and_memory

        self.core.shutdown()
        del self.llm, self.core
        cleanup_dist_env_and_memory()

    @property
    def model(self):
        return self.llm.apply_model(lambda model: model)[0]

    def set_chunk(self, tokens: int):
        """The most tokens that a step takes of one prompt; 0 for no limit."""
        self.core.scheduler.scheduler_config.long_prefill_token_threshold = tokens

    def forget(self):
        """Empties the cache of prefixes and the caches of images."""
        assert self.llm.reset_prefix_cache()
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def outputs(self, requests: list[Request], **options):
        from vllm import SamplingParams

        prompts = []
        for request in requests:
            text = self.processor.apply_chat_template(request.messages, add_generation_prompt=True, tokenize=False)
            prompt = {"prompt": text}
            if request.images:
                prompt["multi_modal_data"] = {"image": list(request.images)}
            if request.downsample is not None:
                prompt["mm_processor_kwargs"] = {"projector_downsample": request.downsample}
            prompts.append(prompt)
        greedy = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=0)
        return self.llm.generate(prompts, greedy, use_tqdm=False, **options)

    def answers(self, requests: list[Request], **options) -> list[Answer]:
        return [
            Answer(
                list(output.outputs[0].token_ids),
                torch.tensor([step[token].logprob for step, token in zip(found.logprobs, found.token_ids)]),
                len(output.prompt_token_ids),
            )
            for output in self.outputs(requests, **options)
            for found in output.outputs
        ]


def count_equal(found: list[Answer], expected: list[Answer]) -> int:
    """How many have the same tokens, log-probabilities within the tolerance, and as many tokens in the prompt."""
    return sum(
        a.tokens == b.tokens
        and a.prompt_tokens == b.prompt_tokens
        and (a.log_probabilities - b.log_probabilities).abs().max().item() <= TOLERANCE
        for a, b in zip(found, expected, strict=True)
    )
