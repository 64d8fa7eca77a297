"""LLaVA-VR from the command line: `llava-vr COMMAND`, or `python -m llava_vr COMMAND`."""

import argparse
import os
import runpy
import subprocess
import sys
from pathlib import Path

from llava_vr import __version__


ROOT = Path(__file__).resolve().parent
COMMANDS = {  # the module or script that it runs, the extra that this needs, and what it does
    "ask": ("llava_vr.examples.ask", None, "ask about pictures"),
    "convert": ("llava_vr.convert_weights", None, "make a LLaVA-VR folder of a checkpoint, or compress a LLaVA"),
    "finetune": ("llava_vr.examples.finetune", "finetuning", "train on chats with pictures"),
    "distill": ("llava_vr.examples.distill", "finetuning", "train a compressed model on its uncompressed self"),
    "evaluate": ("lab.evaluate", "lab", "exact match on drawn pictures"),
    "serve": ("examples/serve.sh", "vllm", "an OpenAI server, with vLLM's options"),
    "demo": ("llava_vr.app", "demo", "the demo, in a browser"),
}
EXAMPLES = """examples:
  python -m llava_vr ask examples/receipt.png "how much is the salad?"
  python -m llava_vr convert llava-v1.6-mistral-7b out --dry-run
  python -m llava_vr demo
"""


def exists(target: str) -> bool:
    """Whether a script or module of this repository is here; what it imports may be missing."""
    path = ROOT / target if target.endswith(".sh") else ROOT.joinpath(*target.removeprefix("llava_vr.").split("."))
    return path.is_file() or path.with_suffix(".py").is_file()


def run(target: str, name: str, arguments: list[str]):
    """Runs a module as `python -m` does, or a shell script with this Python."""
    if target.endswith(".sh"):
        environment = {**os.environ, "PYTHON": sys.executable}
        sys.exit(subprocess.call(["bash", ROOT / target, *arguments], env=environment))
    sys.argv = [name, *arguments]
    runpy.run_module(target, run_name="__main__")


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

    target, extra, _ = COMMANDS[args.command]
    sys.path.append(str(ROOT))  # of a clone, for lab
    try:
        if not exists(target):
            parser.error(f"{args.command} is not in this installation: run it in a clone of the repository")
        run(target, f"llava-vr {args.command}", args.arguments)
    except ModuleNotFoundError as error:
        if extra is None:
            raise
        parser.error(f'{args.command} needs {error.name}: pip install ".[{extra}]" in a clone of the repository')


if __name__ == "__main__":
    main()
