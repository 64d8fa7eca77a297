"""VLMEvalKit's command with a checkpoint of this package registered as the model `llava-vr`.

    python -m evaluation.run_vlmevalkit pretrained=CHECKPOINT,dtype=bfloat16 --data TextVQA_VAL --work-dir results

In several processes: torchrun --nproc_per_node 8 -m evaluation.run_vlmevalkit ...
"""

import argparse
import runpy
import sys
from functools import partial


def main() -> None:
    """Register the class and run VLMEvalKit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model_args", help="of evaluation.vlmevalkit.LlavaVr, as in pretrained=.,projector_downsample=2"
    )
    parser.add_argument("options", nargs=argparse.REMAINDER, help="those of VLMEvalKit's run.py")
    args = parser.parse_args()
    if not all("=" in pair for pair in args.model_args.split(",")):
        parser.error(f"{args.model_args!r} is not NAME=VALUE,NAME=VALUE, as in pretrained=.,dtype=bfloat16")

    from vlmeval.config import supported_VLM

    from .vlmevalkit import LlavaVr

    options = dict(pair.split("=", 1) for pair in args.model_args.split(","))
    options = {name: int(value) if value.isdecimal() else value for name, value in options.items()}
    supported_VLM["llava-vr"] = partial(LlavaVr, **options)
    sys.argv = [sys.argv[0], *args.options, "--model", "llava-vr"]
    runpy.run_module("vlmeval.run", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
