"""From a checkpoint on disk to a LLaVA-VR folder ready for the Hub.

    python convert_weights.py SOURCE OUTPUT [options]

`convert` is the same as a function. What is read, and how, is in the package `conversion`.
"""

import argparse
import contextlib
import importlib.util
import signal
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


if __name__ == "__main__":  # while libraries are imported, Ctrl-C ends the process without a traceback
    _interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
if importlib.util.find_spec("llava_vr") is None:  # not installed: this folder is the package
    _root = Path(__file__).resolve().parent
    _spec = importlib.util.spec_from_file_location("llava_vr", _root / "__init__.py")
    sys.modules["llava_vr"] = _package = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_package)

import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from llava_vr import LlavaVrConfig
from llava_vr.conversion.companions import (
    add_image_token,
    chat_template,
    generation_config,
    load_tokenizer,
    make_processor,
    separator_ids,
    write_companions,
)
from llava_vr.conversion.mapping import parse_maps
from llava_vr.conversion.output import check_apart, check_output, replace_folder
from llava_vr.conversion.plan import Plan, check_config, make_plan
from llava_vr.conversion.readers import ConversionError, reading
from llava_vr.conversion.sources import Options, Source, detect_source, parse_fields
from llava_vr.conversion.templates import STYLES
from llava_vr.conversion.tower import cut_tower
from llava_vr.conversion.verify import verify as verify_folder
from llava_vr.conversion.writer import write_weights


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EXAMPLES = """examples:
  a research checkpoint of LLaVA, TokenPacker or MobileVLM, or one of transformers' llava, llava_next, llava_onevision:
    python convert_weights.py llava-v1.6-mistral-7b out
  the same, with new Vision Remember modules to train:
    python convert_weights.py llava-v1.6-mistral-7b out --remember-layers 0 8 16 24
  a stage-1 projector, or a LoRA adapter of LLaVA's research code:
    python convert_weights.py llava-lora out --base-model vicuna-7b-v1.5 --vision-tower clip-vit-large-patch14-336
  a LoRA adapter of a model of this kind, which the adapter names:
    python convert_weights.py adapter out
  a new model from a language model and a vision tower:
    python convert_weights.py Qwen2-1.5B out --vision-tower siglip-so400m-patch14-384 --projector avg_pool \\
      --remember-layers 0 7 14 21
  the same model with a choice of 1, 4 or 16 patches to an image token (s = 1, 2, 4); 1 gives the source's logits:
    python convert_weights.py granite-vision-3.3-2b out --compress 2 4
  what would be done:
    python convert_weights.py llava-v1.5-7b out --dry-run
"""


@dataclass
class Result:
    """What a conversion did: the plan, the folder (None for a dry run), seconds, and what `verify` saw."""

    plan: Plan
    source: Source
    output: Path | None
    seconds: float
    verified: str | None = None
    url: str | None = None

    def summary(self) -> str:
        """A closing summary for people."""
        lines, config = [f"{self.source.kind}: {self.plan.summary()}"], self.plan.config
        if choices := config.projector_downsample_choices:
            layers = ", ".join(map(str, config.remember_layers)) or "none"
            lines.append(
                f"s, patches per side of a token's region: {', '.join(map(str, choices))}; by default "
                f"{config.projector_downsample}; Vision Remember modules after decoder layers: {layers}"
            )
        if self.verified:
            lines.append(f"verified: {self.verified}")
        lines.append(f"{self.output or 'dry run, nothing written'} ({self.seconds:.1f} s)")
        return "\n".join(lines + ([self.url] if self.url else []))


def convert(
    source: str | Path,
    output: str | Path,
    *,
    vision_tower: str | Path | None = None,
    base_model: str | Path | None = None,
    remember_layers: Sequence[int] | None = None,
    remember_feature_layers: Sequence[int] | None = None,
    projector: str | None = None,
    compress: Sequence[int] = (),
    fields: Sequence[str] = (),
    conversation: str | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    maps: Sequence[str] = (),
    dry_run: bool = False,
    verify: bool = False,
    push_to_hub: str | None = None,
    private: bool = True,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: bool | None = None,
) -> Result:
    """Converts a checkpoint to a folder that `from_pretrained(output, trust_remote_code=True)` loads.

    Args:
        source: a folder, or a repository of the Hub; what it is is told by its content.
        output: the folder to write; it appears at the end, complete, or not at all.
        vision_tower: folder of the vision tower, for a source without its weights or its configuration.
        base_model: folder of the model that an artefact was trained on, or of a tokenizer for a source without one.
        remember_layers: decoder layers after which Vision Remember modules stand; those that the source lacks are new.
            None for the source's.
        remember_feature_layers: the tower's hidden states that are the memory; None for the source's or the default.
        projector: the projector of a model from parts, or one to take the source's place.
        compress: values of s, the first of them the default, beside 1, at which the result gives the source's logits:
            a projector mlp becomes avg_pool with the same weights, and modules stand evenly spaced in the decoder, or
            after `remember_layers`.
        fields: "FIELD=VALUE" texts for other fields of the configuration.
        conversation: style of the chat template; None to tell it from the source.
        dtype: "float32", "float16" or "bfloat16"; None keeps each tensor's own.
        max_shard_size: bytes, or a text such as "5GB".
        maps: "REGEX=REPLACEMENT" texts for the names of the source's tensors, applied in turn.
        dry_run: only plan.
        verify: load the result, run fixed inputs, compare with what transformers makes of the source's files.
        push_to_hub: repository to upload the result to.
        private: whether that repository is made private.
        overwrite: whether an `output` that a conversion wrote may be replaced.
        allow_nonfinite: whether NaN and infinite weights are kept.
        progress: whether to show a bar; None for where a person looks on.

    Raises:
        ConversionError: what is wrong, in one line; nothing was changed.
    """
    start = time.perf_counter()
    with reading(f"OUTPUT {output}"):
        output = Path(output).expanduser().resolve()
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ConversionError(f"--dtype {dtype!r}: one of {', '.join(DTYPES)}.")
    options = Options(
        vision_tower=None if vision_tower is None else str(vision_tower),
        base_model=None if base_model is None else str(base_model),
        remember_layers=None if remember_layers is None else list(remember_layers),
        remember_feature_layers=None if remember_feature_layers is None else list(remember_feature_layers),
        projector=projector,
        compress=list(compress),
        fields=parse_fields(fields),
        maps=parse_maps(maps),
    )
    if not dry_run:
        check_output(output, overwrite)
    with reading(f"SOURCE {source}: config.json"):
        detected = detect_source(str(source), options)
    if not dry_run:
        check_apart(output, detected.folders)
    detected.conversation = conversation or detected.conversation
    with reading(f"SOURCE {source}"):
        tokenizer = load_tokenizer(detected)
        image_token, image_token_id = add_image_token(tokenizer, detected.image_token_id)
        if detected.config.get("image_merge_type") == "slices" and "image_separator_ids" not in detected.config:
            detected.config["image_separator_ids"] = separator_ids(tokenizer)
        config = _configure(detected, image_token_id, options)
        template, style = chat_template(detected, tokenizer, image_token, f"{source} {base_model or ''}")
        with reading(f"SOURCE {source}: image processor"):
            processor = make_processor(detected, config, tokenizer, image_token, template)
        with reading(f"SOURCE {source}: generation_config.json"):
            generation = generation_config(detected, tokenizer, image_token_id)
        plan = make_plan(detected, config, options.maps, DTYPES.get(dtype, dtype) if dtype else None)
    if dry_run:
        return Result(plan, detected, None, time.perf_counter() - start)

    verified = None
    with replace_folder(output, overwrite) as folder:
        write_weights(plan, folder, max_shard_size, allow_nonfinite, progress)
        write_companions(folder, detected, plan, processor, generation, style)
        if verify:
            verified = verify_folder(folder, detected, plan)
    url = _push(output, push_to_hub, private) if push_to_hub else None
    return Result(plan, detected, output, time.perf_counter() - start, verified, url)


def _configure(source: Source, image_token_id: int, options: Options) -> LlavaVrConfig:
    """The configuration, with the vocabulary of the source's embeddings, grown if the placeholder lies beyond it."""
    rows = check_config(source, options.maps)
    if image_token_id >= rows:
        rows = -(-(image_token_id + 1) // 64) * 64
    source.text_config.vocab_size = rows
    config = LlavaVrConfig(**source.config, image_token_id=image_token_id)
    cut_tower(config, source.parts)
    return config


def _push(folder: Path, repository: str, private: bool) -> str:
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConversionError(f"--push-to-hub {repository}: {reason}; the result is in {folder}.") from None
    return f"https://huggingface.co/{repository}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_weights.py",
        description="From a research or transformers checkpoint to a LLaVA-VR folder ready for the Hub.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder or Hub repository of the checkpoint")
    add("output", metavar="OUTPUT", help="folder to write")
    add("--vision-tower", metavar="DIR", help="vision tower, where the source lacks its weights or configuration")
    add("--base-model", metavar="DIR", help="model that an artefact was trained on, or a tokenizer that SOURCE lacks")
    add("--remember-layers", metavar="LAYER", type=int, nargs="*", help="modules after these decoder layers; new ones "
        "change nothing until trained; no value for none")  # fmt: skip
    add("--remember-feature-layers", metavar="STATE", type=int, nargs="+", help="hidden states that are the memory")
    add("--projector", metavar="TYPE", help="projector of a model from parts, or in the place of the source's")
    add("--compress", metavar="S", type=int, nargs="+", default=[], help="S x S patches become one image token: a "
        "choice of 1 (the source) and these, the first by default; with new modules, evenly spaced")  # fmt: skip
    add("--set", metavar="FIELD=VALUE", action="append", default=[], dest="fields", help="another field of the "
        "configuration, such as remember_window_ratio=1.0; repeatable")  # fmt: skip
    add("--conversation", metavar="STYLE", choices=STYLES, help=f"chat template: {', '.join(STYLES)}")
    add("--dtype", choices=DTYPES, help="dtype of all weights; each tensor's own by default")
    add("--max-shard-size", metavar="SIZE", default="5GB", help="such as 5GB or 500MB (default: 5GB)")
    add("--map", metavar="REGEX=REPLACEMENT", action="append", default=[], dest="maps", help="renames tensors of the "
        "source before they are matched; repeatable")  # fmt: skip
    add("--dry-run", action="store_true", help="print what would become of each tensor, write nothing")
    add("--verify", action="store_true", help="load the result, compare it with the source in transformers' classes")
    add("--push-to-hub", metavar="ID", help="upload the result to this repository")
    add("--public", action="store_false", dest="private", help="make that repository public (default: private)")
    add("--overwrite", action="store_true", help="replace an OUTPUT that a conversion wrote")
    add("--allow-nonfinite", action="store_true", help="keep NaN and infinite weights")
    add("--traceback", action="store_true", help="raise an error as it is, instead of one line")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0, or one line on stderr and 2, or 130 where it is interrupted."""
    options = vars(_parser().parse_args(arguments))
    source, traceback = options.pop("source"), options.pop("traceback")
    try:
        with _quiet():
            result = convert(source, options.pop("output"), **options)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if traceback:
            raise
        reason = str(error)
        if not isinstance(error, (ConversionError, OSError)):
            reason = f"SOURCE {source}: {type(error).__name__}: {reason} (--traceback shows where)"
        return _fail(reason, 2)
    if result.output is None:
        print("\n".join(result.plan.lines()))
    print(result.summary())
    return 0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of libraries, which would stand beside the one line of an error."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _fail(reason: str, code: int) -> int:
    print(f"convert_weights.py: error: {textwrap.shorten(reason, 1000)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _interrupt)
    sys.exit(main())
