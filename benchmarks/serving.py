"""64 requests to vLLM, compiled, beside `generate` in one batch of 64: each about its own picture, pictures included.

The calls take turns in one run; vLLM computes in its own process. No cache of prefixes or of pictures is on, so every
round encodes every picture. Both give the same answers, which is checked first. It needs the environment of vLLM
(docs/serving.md); on two cores it takes about four minutes.

    python -m benchmarks.serving
"""

import os
import time
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
from lab.evaluate import answer, draw_cases, encode


ROOT = Path(__file__).resolve().parents[1]
MAX_TOKENS = 64  # of `lab.evaluate.answer`


def main() -> None:
    parser = new_parser(__doc__)
    add_device_options(parser)
    parser.add_argument("--model", default=str(ROOT), help="checkpoint folder (default: the root's)")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    import vllm

    start, dtype = time.perf_counter(), dtype_of(args)
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, dtype=dtype)
    model = model.to(args.device).eval()
    cases = list(draw_cases(99, args.requests, False, ("receipt",)))
    cases = cases[:: len(cases) // args.requests][: args.requests]  # a picture each
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
    prompts = []
    for case in cases:
        content = [{"type": "image", "image": case.image}, {"type": "text", "text": case.turn.question}]
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompts.append({"prompt": text, "multi_modal_data": {"image": case.image}})

    def serve() -> list[str]:
        return [output.outputs[0].text for output in engine.generate(prompts, greedy, use_tqdm=False)]

    def generate() -> list[str]:
        return answer(model, processor, encode(model, processor, cases))

    served, generated = serve(), generate()
    equal = sum(a == b for a, b in zip(served, generated))
    if equal < 0.95 * len(cases):  # in bfloat16 two tokens may be as likely
        raise SystemExit(f"Only {equal} of {len(cases)} answers are equal: the two do not do the same work.")
    times = compare(interleave({"ours": serve, "generate": generate}, args.rounds, title="rounds"))
    result = {
        **head(args.scale, args.device, dtype=str(dtype).removeprefix("torch."), vllm=vllm.__version__),
        "requests": len(cases),
        "equal_answers": equal,
        "times": times,
        "seconds": time.perf_counter() - start,
    }
    rows = [
        [name, *(show(row[key]) for key in ("ms", "ours_over")), f"{1000 * len(cases) / row['ms'][0]:.3g}"]
        for name, row in times.items()
    ]
    header = ["engine", f"{len(cases)} requests (ms)", "vLLM's time over its own", "requests a second"]
    path = args.results / args.device.type / "serving.json"
    write_json(path, result)
    write_table(path.with_suffix(".md"), "Serving", result, markdown_table(header, rows))


if __name__ == "__main__":
    main()
