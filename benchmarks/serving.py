"""64 requests to vLLM, compiled, beside `generate` in one batch of 64: each about its own picture, pictures included.

Three loads: questions of all types about price lists, most of which have an answer of a few tokens; transcriptions of
price lists, of up to 20 tokens; transcriptions of tables, of up to 44. The calls take turns in one run; vLLM computes
in its own process. No cache of prefixes or of pictures is on, so every round encodes every picture. Both give the same
answers, which is checked first. It needs the environment of vLLM (docs/serving.md).

    python -m benchmarks.serving
"""

import os
import time
from functools import partial
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

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
from lab.evaluate import Case, answer, draw_cases, encode


ROOT = Path(__file__).resolve().parents[1]
LOADS = ("price lists, all types", "price lists, transcribed", "tables, transcribed")
MAX_TOKENS = 64  # of `lab.evaluate.answer`


def main() -> None:
    parser = new_parser(__doc__)
    add_device_options(parser)
    parser.add_argument("--model", default=str(ROOT), help="checkpoint folder (default: the root's)")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{os.cpu_count() - 1}")  # else one core only schedules
    import vllm

    start, dtype = time.perf_counter(), dtype_of(args)
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, dtype=dtype)
    model = model.to(args.device).eval()
    drawn = {name: list(draw_cases(99, args.requests, False, (name,))) for name in ("receipt", "table")}
    kinds = len(drawn["receipt"]) // args.requests
    loads = {LOADS[0]: [drawn["receipt"][kinds * i + i % kinds] for i in range(args.requests)]}
    for title, name in zip(LOADS[1:], drawn):
        loads[title] = [case for case in drawn[name] if case.turn.question_type == "transcribe"]
    engine = vllm.LLM(
        args.model,
        trust_remote_code=True,
        dtype=dtype,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        max_num_seqs=args.requests,
        **({"gpu_memory_utilization": 0.5} if args.device.type == "cuda" else {}),
    )
    greedy = vllm.SamplingParams(temperature=0, max_tokens=MAX_TOKENS)

    def prompt(case: Case) -> dict:
        content = [{"type": "image", "image": case.image}, {"type": "text", "text": case.turn.question}]
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return {"prompt": text, "multi_modal_data": {"image": case.image}}

    def serve(cases: list[Case]) -> list[str]:
        return [output.outputs[0].text for output in engine.generate(list(map(prompt, cases)), greedy, use_tqdm=False)]

    def generate(cases: list[Case]) -> list[str]:
        return answer(model, processor, encode(model, processor, cases))

    times, equal = {}, {}
    for load, cases in loads.items():
        equal[load] = sum(a == b for a, b in zip(serve(cases), generate(cases)))
        if equal[load] < 0.95 * len(cases):  # in bfloat16 two tokens may be as likely
            raise SystemExit(f"Only {equal[load]} of {len(cases)} answers are equal: the two do not do the same work.")
        calls = {"ours": partial(serve, cases), "generate": partial(generate, cases)}
        times[load] = compare(interleave(calls, args.rounds, title=load))
    result = {
        **head(args.scale, args.device, dtype=str(dtype).removeprefix("torch."), vllm=vllm.__version__),
        "requests": args.requests,
        "equal_answers": equal,
        "times": times,
        "seconds": time.perf_counter() - start,
    }
    rows = [
        [load, name, *(show(row[key]) for key in ("ms", "ours_over")), f"{1000 * args.requests / row['ms'][0]:.3g}"]
        for load, by_engine in times.items()
        for name, row in by_engine.items()
    ]
    header = ["questions", "engine", f"{args.requests} requests (ms)", "vLLM's time over its own", "requests a second"]
    path = args.results / args.device.type / "serving.json"
    write_json(path, result)
    write_table(path.with_suffix(".md"), "Serving", result, markdown_table(header, rows))


if __name__ == "__main__":
    main()
