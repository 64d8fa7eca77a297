"""transformers' own common tests, on the root checkpoint and on another kind of model: see common_suite/README.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging import version

from llava_vr import LlavaVrForConditionalGeneration


ROOT = Path(__file__).parents[1]
MINIMUM = 192 if version.parse(transformers.__version__) >= version.parse("5.23") else 170  # older suites are shorter

pytestmark = pytest.mark.common


def run(package: Path):
    command = [ROOT / "tests" / "common_suite" / "run.sh", package]
    done = subprocess.run(
        command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=3000
    )
    found = re.search(r"common suite: (\d+) passed, (\d+) failed, (\d+) skipped\n\Z", done.stdout)
    assert found, done.stdout[-5000:] + done.stderr[-5000:]
    passed, failed, _ = map(int, found.groups())
    assert failed == 0 and done.returncode == 0, done.stdout[-20000:]
    assert passed >= MINIMUM, found.group()


def test_root():
    run(ROOT)


@pytest.mark.slow
def test_siglip_and_qwen2_with_tiles(tiny_config, processor_for, tmp_path):
    config = tiny_config("siglip")
    config.auto_map = {"AutoModel": "modeling_llava_vr.LlavaVrModel"}  # the other classes write themselves
    torch.manual_seed(0)
    LlavaVrForConditionalGeneration(config).save_pretrained(tmp_path)
    processor_for(config).save_pretrained(tmp_path)
    run(tmp_path)
