"""The checkpoint answers alike under the oldest supported transformers and under the one installed here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
OLDEST = "5.18.0"


def run(*arguments, **env) -> subprocess.CompletedProcess:
    command = [ROOT / "tests" / "compat" / "run", *map(str, arguments)]
    env = {**os.environ, "PYTHON": sys.executable, **env}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)


def test_oldest_is_the_one_that_setup_asks_for():
    requirement = f"transformers>={OLDEST.removesuffix('.0')}\n"
    assert requirement in (ROOT / "setup.cfg").read_text(encoding="utf-8")


@pytest.mark.common
def test_oldest_and_newest_answer_alike():
    done = run(OLDEST, "newest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("compat: 2 of 2 versions agree\n")


@pytest.mark.common
def test_a_difference_is_told(package, tmp_path):
    """With another reference the comparison fails: it does look."""
    reference = tmp_path / "reference.json"
    script = str(ROOT / "tests" / "compat" / "compat.py")
    subprocess.run([sys.executable, script, package, "--reference", reference, "--write"], check=True, timeout=600)
    assert run("--package", package, "--reference", reference, "newest").returncode == 0
    text = reference.read_text(encoding="utf-8")
    reference.write_text(text.replace('"pipeline": "', '"pipeline": "another '), encoding="utf-8")
    done = run("--package", package, "--reference", reference, "newest")
    assert done.returncode == 1
    assert "pipeline: found" in done.stdout + done.stderr
    assert done.stdout.endswith("compat: 0 of 1 versions agree\n")
