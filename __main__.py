"""LLaVA-VR from the command line: `llava-vr COMMAND`, or `python -m llava_vr COMMAND`."""

import argparse
import importlib.util
import runpy
import sys
from pathlib import Path

from llava_vr import __version__


COMMANDS = {  # the module that it runs, the extra that this needs, and what it does
    "ask": ("llava_vr.examples.ask", None, "ask about pictures"),
    "convert": ("llava_vr.convert_weights", None, "make a LLaVA-VR folder of a checkpoint, or compress a LLaVA"),
    "distill": (
        "llava_vr.examples.distill",
        "finetuning",
        "train a compressed model, its uncompressed self the teacher",
    ),
    "evaluate": ("lab.evaluate", "lab", "exact match on drawn pictures (in a clone of the repository)"),
    "serve": ("vllm.entrypoints.openai.api_server", "vllm", "an OpenAI server, with vLLM's own options"),
    "demo": ("llava_vr.app", "demo", "the demo, in a browser"),
}
EXAMPLES = """examples:
  python -m llava_vr ask examples/receipt.png "how much is the salad?"
  python -m llava_vr convert llava-v1.6-mistral-7b out --dry-run
  python -m llava_vr serve --model . --trust-remote-code
  python -m llava_vr demo
"""


def main():
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, (_, _, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="llava-vr",
        description=f"{__doc__}\n\ncommands, each with its own --help:\n{commands}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the above")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="what goes to the command")
    args = parser.parse_args()

    module, extra, _ = COMMANDS[args.command]
    sys.path.append(str(Path(__file__).resolve().parent))  # of a clone, for lab
    sys.argv = [f"llava-vr {args.command}", *args.arguments]
    try:
        if importlib.util.find_spec(module) is None:
            parser.error(f"{args.command} is not in this installation: run it in a clone of the repository")
        runpy.run_module(module, run_name="__main__")
    except ModuleNotFoundError as error:
        parser.error(f"{args.command} needs {error.name}: pip install 'llava-vr[{extra}]'")


if __name__ == "__main__":
    main()
