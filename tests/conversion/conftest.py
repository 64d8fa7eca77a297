"""Folders that the converter's tests begin with."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from builders import make_clip, make_llava, write_weights


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C works, here and in subprocesses, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def save_tokenizer(tokenizer):
    def save(folder: Path, without_image: bool = False):
        if not without_image:
            tokenizer.save_pretrained(folder)
            return
        tokenizer.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            text = (folder / name).read_text()
            content = json.loads(text)
            if name == "tokenizer.json":
                content["model"]["vocab"]["picture"] = content["model"]["vocab"].pop("<image>")
                content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<image>"]
            content.pop("additional_special_tokens", None)
            content.pop("extra_special_tokens", None)
            content.pop("added_tokens_decoder", None)
            (folder / name).write_text(json.dumps(content))
        (folder / "special_tokens_map.json").unlink(missing_ok=True)

    return save


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    make_clip().save_pretrained(folder)
    return folder


@pytest.fixture
def llava(tmp_path, clip_folder, save_tokenizer):
    """`llava()` saves a research checkpoint; keywords replace, add or (None) remove tensors."""
    source = make_llava(image_aspect_ratio="pad", mm_vision_tower=str(clip_folder))

    def save(changes=(), shards=1, suffix="safetensors"):
        tensors = source.tensors(False) | dict(changes)
        folder = tmp_path / "source"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(source.config))
        write_weights({k: v for k, v in tensors.items() if v is not None}, folder, shards, suffix)
        save_tokenizer(folder)
        return folder

    return save
