"""recipes/: the scripts run from beginning to end on tiny parts, and the configurations say what they are named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "llava_vr_2b"


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
@pytest.mark.parametrize("machines", [1, 2])
def test_accelerate_configurations(kind, machines):
    name = f"{kind.lower()}_{'2x8' if machines == 2 else '8'}.yaml"
    config = yaml.safe_load((RECIPE / "accelerate" / name).read_text())
    assert config["num_machines"] == machines and config["num_processes"] == 8 * machines
    assert config["mixed_precision"] == "bf16"
    assert config["distributed_type"] == ("MULTI_GPU" if kind == "DDP" else "FSDP")
    assert kind == "DDP" or config["fsdp_config"]["fsdp_version"] == 2


def test_total_batches():
    for gpus in (8, 16):
        script = f". {RECIPE}/settings.sh; echo $((STAGE1_BATCH * STAGE1_ACCUMULATE * GPUS)) $((STAGE2_BATCH * " \
            "STAGE2_ACCUMULATE * GPUS))"  # fmt: skip
        env = {**os.environ, "GPUS": str(gpus)}
        assert subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True).stdout == "256 128\n"


@pytest.mark.common
def test_the_budget_counts_the_default_model():
    done = subprocess.run(
        [sys.executable, "-m", "recipes.llava_vr_2b.budget"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() in (RECIPE / "README.md").read_text(encoding="utf-8")


@pytest.mark.common
@pytest.mark.skipif(not (ROOT / "model.safetensors").is_file(), reason="the folder holds no tokenizer")
def test_the_recipe_on_tiny_parts(tmp_path):
    """Convert, prepare, both stages on two processes, evaluation at three numbers of tokens, the table."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "WORK": str(tmp_path / "work"), "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [ROOT / "recipes" / "smoke" / "run.sh"], env=env, cwd=ROOT, capture_output=True, text=True, timeout=360
    )
    assert done.returncode == 0, done.stderr[-5000:]
    (ROOT / "questions.parquet").unlink()
    run = tmp_path / "work" / "modules"
    for stage in ("stage1", "stage2"):
        log = json.loads((run / stage / "log.json").read_text())
        losses = [entry["loss"] for entry in log if "loss" in entry]
        assert len(losses) == 12 and losses[-1] < losses[0] and any("eval_loss" in entry for entry in log)
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("| the lab's questions |")]
    assert [cell.strip() for cell in row.split("|")[-4:]] == ["0", "0", "0", ""]
    config = json.loads((run / "stage2" / "config.json").read_text())
    assert config["remember_layers"] == [0, 1] and config["projector_downsample_choices"] == [1, 2, 4]
