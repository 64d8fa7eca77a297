"""What bitsandbytes costs and saves: exact match of a checkpoint as it is, in NF4 and in int8; memory of a 2B model.

The questions are about drawn price lists that training never saw, one of each type about each, in one run. The
memory of weights is counted to the byte from the shapes of `LlavaVrConfig()` on the meta device; the same count stands
beside the bytes that the quantized checkpoint really holds.

    python -m benchmarks.quantization             # about ten minutes on two cores
    python -m benchmarks.quantization --n 20
"""

import math
import time
from pathlib import Path

import bitsandbytes as bnb
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from benchmarks.common import add_device_option, head, markdown_table, new_parser, write_json, write_table
from lab.evaluate import Case, draw_cases, exact_match, measure
from llava_vr import LlavaVrConfig, LlavaVrForConditionalGeneration


ROOT = Path(__file__).resolve().parents[1]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
QUANTIZATIONS = {
    "as it is": None,
    "NF4": BitsAndBytesConfig(**NF4),
    "NF4, double": BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def share_right(model, processor, cases: list[Case], batch_size: int) -> float:
    """Exact match."""
    right, _ = measure(model, processor, cases, batch_size)
    return exact_match(right)["receipt"]["all"]


def counted_bytes(model, kind: str) -> int:
    """Bytes of an unquantized model's weights once its decoder's linear layers are quantized.

    NF4 keeps half a byte a weight, a table of 16 values and a 4-byte scale for each block of 64. With double
    quantization a scale is one byte, and each 256 scales have a 4-byte scale of their own; a table of 256 values and an
    offset are added. int8 keeps a byte a weight and a 4-byte scale for each row.
    """
    quantized, total = set(), 0
    for module in model.model.language_model.modules():
        if isinstance(module, torch.nn.Linear) and kind != "as it is":
            quantized.add(module.weight)
            rows, size = module.weight.shape[0], module.weight.numel()
            if kind == "int8":
                total += size + 4 * rows
            else:
                blocks = math.ceil(size / 64)
                double = blocks + 4 * math.ceil(blocks / 256) + 4 * 256 + 4
                total += math.ceil(size / 2) + 4 * 16 + (double if "double" in kind else 4 * blocks)
    return total + sum(p.numel() * p.element_size() for p in model.parameters() if p not in quantized)


def held_bytes(model) -> int:
    """Bytes of a model's weights and of what bitsandbytes keeps beside them."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors = [state.absmax, state.code]
            if state.nested:
                tensors += [state.state2.absmax, state.state2.code, state.offset]
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            total += (module.weight.SCB if module.weight.SCB is not None else module.state.SCB).nbytes
    return total


def main() -> None:
    parser = new_parser(__doc__)
    add_device_option(parser)
    parser.add_argument("--model", default=str(ROOT), help="checkpoint folder (default: the root's)")
    parser.add_argument("--n", type=int, default=300, help="pictures (default 300, each with seven questions)")
    parser.add_argument("--seed", type=int, default=99, help="stream of test pictures (default 99)")
    parser.add_argument("--batch-size", type=int, default=70)
    args = parser.parse_args()

    start = time.perf_counter()
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    with torch.device("meta"):
        large = LlavaVrForConditionalGeneration(LlavaVrConfig()).to(torch.bfloat16)
    cases = list(draw_cases(args.seed, args.n, False, ("receipt",)))
    runs, plain = {}, None
    for kind, options in QUANTIZATIONS.items():
        model = AutoModelForImageTextToText.from_pretrained(
            args.model, trust_remote_code=True, quantization_config=options, device_map=args.device
        ).eval()
        plain = plain or model
        runs[kind] = {
            "exact": share_right(model, processor, cases, args.batch_size),
            "bytes": held_bytes(model),
            "bytes_counted": counted_bytes(plain, kind),
            "bytes_of_2b": counted_bytes(large, kind),
        }
    result = {
        **head(args.scale, args.device, bitsandbytes=bnb.__version__, pictures=args.n, seed=args.seed),
        "questions": len(cases),
        "parameters_of_2b": sum(parameter.numel() for parameter in large.parameters()),
        "runs": runs,
        "seconds": time.perf_counter() - start,
    }
    rows = [
        [kind, f"{run['exact']:.1%}", f"{run['bytes'] / 2**20:.1f} MiB", f"{run['bytes_of_2b'] / 2**30:.2f} GiB"]
        for kind, run in runs.items()
    ]
    header = ["decoder", "exact match", "weights of the checkpoint", "weights of `LlavaVrConfig()`, the rest in bf16"]
    path = args.results / args.device.type / "quantization.json"
    write_json(path, result)
    write_table(path.with_suffix(".md"), "Quantisation", result, markdown_table(header, rows))


if __name__ == "__main__":
    main()
