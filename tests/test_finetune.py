"""examples/finetune.py and what it builds on: stages, PEFT, checkpoints, resuming, other trainers, bad data."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_vr import LlavaVrCollator
from llava_vr.card_llava_vr import PARTS
from llava_vr.training import load_rows


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "finetune.py"
WHOLE = ("vision_tower", "multi_modal_projector", "image_newline", "vision_remember", "language_model", "lm_head")
TRAINED = {
    "projector": WHOLE[1:3],
    "projector+remember": WHOLE[1:4],
    "lora": ("multi_modal_projector", "vision_remember", "language_model"),
    "full": WHOLE,
}


@pytest.fixture(scope="module")
def finetune():
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve rows: without an image, with one and with two, in turn."""
    folder, lines = tmp_path_factory.mktemp("data"), []
    rng = np.random.default_rng(0)
    for i in range(12):
        names = [f"{i}-{j}.png" for j in range(i % 3)]
        for name in names:
            size = (*rng.integers(20, 90, 2), 3)
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / name)
        content = [{"type": "image"} for _ in names] + [{"type": "text", "text": f"question {i}?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"answer {i}"}]
        lines.append(json.dumps({"messages": messages, "images": names}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder / "train.jsonl"


@pytest.fixture
def train(finetune, package, data, monkeypatch):
    """`train(output, *options)`: the script's main function, on the tiny package."""

    def run(output: Path, *options, source: Path = data, model: Path = package):
        options = ["--per_device_train_batch_size", 4, "--learning_rate", 0.01, "--use_cpu", "true", *options]
        command = [SCRIPT, source, "--output", output, "--model", model, *options]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        finetune.main()

    return run


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()


def batch_of(folder, data):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    rows = [json.loads(line) for line in data.read_text().splitlines()[:3]]
    return LlavaVrCollator(processor, image_folder=data.parent)(rows)


@pytest.mark.parametrize("stage", [stage for stage in TRAINED if stage != "lora"])
def test_a_stage_trains_its_parts(train, package, tmp_path, capsys, stage):
    train(tmp_path / "out", "--stage", stage, "--max_steps", 2, "--save_steps", 1)
    before, after = load(package).state_dict(), load(tmp_path / "out" / "checkpoint-2").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {part for part in WHOLE if any(part in name for name in changed)} == set(TRAINED[stage])
    printed = capsys.readouterr().out
    sizes = {name: value.numel() for name, value in before.items() if "position_ids" not in name}
    for part in WHOLE:
        size = sum(size for name, size in sizes.items() if part in name)
        read = sum(size for name, size in sizes.items() if part in name and "post_layernorm" not in name)
        assert f"| {part} | {read if part in TRAINED[stage] else 0:,} | {size:,} |" in printed
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        names = {path.name for path in folder.iterdir()}
        assert {f"{name}_llava_vr.py" for name in ("configuration", "modeling", "processing")} <= names
        AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| trained | {', '.join(PARTS[part] for part in TRAINED[stage])} |" in card
    assert all(torch.equal(value, after[name]) for name, value in load(tmp_path / "out").state_dict().items())


FRESH = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

torch.set_num_threads(1)
base, adapter, case = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=True)
model = PeftModel.from_pretrained(model, adapter).eval()
inputs, logits, answers, prompt = torch.load(case)
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, logits)
assert torch.equal(model.generate(**prompt, max_new_tokens=8, do_sample=False), answers)
"""


@pytest.mark.common
@pytest.mark.parametrize("kind", ["llama", "siglip and qwen2"])
def test_lora_is_saved_reloaded_and_merged(finetune, package, tiny_config, make_model, data, tmp_path, kind):
    peft = pytest.importorskip("peft")
    base = package
    if kind != "llama":
        base = tmp_path / "base"
        make_model(tiny_config("siglip")).save_pretrained(base)
    model = finetune.set_stage(load(base), "lora", rank=4).eval()
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(adapted) == 21 and all("language_model.layers" in name for name in adapted)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:  # as if it were trained
            parameter.data += 0.05 * torch.randn_like(parameter)
    inputs = {key: value for key, value in batch_of(package, data).items() if key != "labels"}
    prompt = {key: inputs[key][:1, :12] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**inputs).logits
    answers = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        assert not torch.allclose(logits, load(base)(**inputs).logits, atol=1e-2)

    model.save_pretrained(tmp_path / "adapter")
    torch.save((inputs, logits, answers, prompt), tmp_path / "case.pt")
    arguments = [base, tmp_path / "adapter", tmp_path / "case.pt"]
    done = subprocess.run([sys.executable, "-c", FRESH, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    merged = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "merged")(**inputs).logits, logits, rtol=0, atol=1e-5)


def test_the_lora_stage(train, package, data, tmp_path, capsys):
    train(tmp_path / "out", "--stage", "lora", "--rank", 2, "--merge", tmp_path / "merged", "--max_steps", 2)
    merged, before = load(tmp_path / "merged").state_dict(), load(package).state_dict()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert {part for part in WHOLE if any(part in name for name in changed)} == set(TRAINED["lora"])
    sizes = {part: sum(v.numel() for name, v in before.items() if part in name) for part in TRAINED["lora"]}
    printed = capsys.readouterr().out
    for part in ("multi_modal_projector", "vision_remember"):
        assert f"| {part} | {sizes[part]:,} | {sizes[part]:,} |" in printed
    lora = sum(2 * sum(value.shape) for name, value in before.items() if re.search("language_model.*_proj", name))
    assert f"| language_model | {lora:,} | {sizes['language_model'] + lora:,} |" in printed
    peft = pytest.importorskip("peft")
    adapted, inputs = peft.PeftModel.from_pretrained(load(package), tmp_path / "out"), batch_of(package, data)
    with torch.no_grad():
        expected = load(tmp_path / "merged")(**inputs).logits
        torch.testing.assert_close(adapted.eval()(**inputs).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", ["full", "lora"])
def test_resumed_training_goes_on_as_if_never_interrupted(train, tmp_path, stage):
    options = ["--stage", stage, "--max_steps", 6, "--save_steps", 2, "--logging_steps", 1, "--save_total_limit", 9]
    train(tmp_path / "whole", *options)
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")  # all that is left
    train(tmp_path / "resumed", *options, "--resume")

    def losses(name):
        return [entry["loss"] for entry in json.loads((tmp_path / name / "log.json").read_text()) if "loss" in entry]

    assert len(set(losses("whole"))) == 6
    assert losses("resumed") == losses("whole")


def test_quantized_stages(train, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    train(tmp_path / "out", "--stage", "lora", "--quantize", "nf4", "--max_steps", 2)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    with pytest.raises(SystemExit):
        train(tmp_path / "no", "--stage", "full", "--quantize", "nf4")
    assert "cannot be trained" in capsys.readouterr().err


def test_bad_data_is_named(train, data, tmp_path, capsys):
    lines = data.read_text().splitlines()
    bad = data.parent / "bad.jsonl"
    bad.write_text("\n".join([*lines[:2], lines[1].replace("1-0.png", "gone.png")]))
    with pytest.raises(ValueError, match=r"\(id 'bad.jsonl:3'\): .*gone.png"):
        train(tmp_path / "out", "--max_steps", 1, source=bad)
    bad.write_text("\n".join([*lines[:2], "{"]))
    for options, message in (
        ([], "bad.jsonl, line 3 is no JSON object"),
        (["--prepare", tmp_path / "prepared"], "bad.jsonl, line 3 is no JSON object"),
        (["--weights", 1, 2], "weights must be positive, one for each of 1 sources"),
        (["--hold-out", 12], "12 of 12 rows cannot be held out"),
        (["--lerning_rate", 1e-4], "--lerning_rate"),
        (["--learning-rates", "vision_tower=nan"], "'vision_tower=nan' is not PART=RATE"),
        (["--model", tmp_path / "none"], "none"),
    ):
        with pytest.raises(SystemExit):
            train(tmp_path / "out", *options, source=data if options[:1] in (["--weights"], ["--hold-out"]) else bad)
        assert message in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(ValueError, match=r"'train.jsonl:\d+'\) has \d+ tokens.*max_length is 10"):
        train(tmp_path / "out", "--max_steps", 1, "--max-length", 10)


def test_unicode_line_separators_are_kept(finetune, tmp_path):
    rows = [
        {"id": str(i), "messages": [{"role": "user", "content": f"a{mark}b"}]} for i, mark in enumerate("\u2028\x85")
    ]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8", newline="")
    assert load_rows(str(tmp_path / "rows.jsonl")) == rows


def test_long_rows_are_left_out(train, data, tmp_path, capsys):
    lines = data.read_text().splitlines()
    long = data.parent / "long.jsonl"
    long.write_text("\n".join([*lines, lines[1].replace("question", "question" * 100)]))
    train(tmp_path / "out", "--max_steps", 1, "--max-length", 500, "--too-long", "drop", source=long)
    assert "1 of 13 rows" in capsys.readouterr().out


def test_a_frozen_everything_is_refused(train, tmp_path, capsys):
    frozen = ("multi_modal_projector", "image_newline")
    with pytest.raises(SystemExit):
        train(tmp_path / "out", "--stage", "projector", "--freeze", *frozen)
    assert "leaves nothing to train" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train(tmp_path / "out", "--merge", tmp_path / "merged")
    assert "--merge goes with --stage lora" in capsys.readouterr().err


def test_a_dataset(train, finetune, data, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"id": str(i), **json.loads(line)} for i, line in enumerate(data.read_text().splitlines())]
    for row in rows:
        row["images"] = [str(data.parent / name) for name in row["images"]]
        for message in row["messages"]:  # a column holds one type
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
    dataset = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    dataset.save_to_disk(tmp_path / "dataset")
    for name, source in {"file": data, "dataset": tmp_path / "dataset"}.items():
        train(tmp_path / name, "--max_steps", 3, "--logging_steps", 1, source=source)
    log = {name: json.loads((tmp_path / name / "log.json").read_text()) for name in ("file", "dataset")}
    assert [entry.get("loss") for entry in log["file"]] == [entry.get("loss") for entry in log["dataset"]]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """200 of LLaVA's rows, every fourth of them without an image; the file."""
    folder, rows, rng = tmp_path_factory.mktemp("llava"), [], np.random.default_rng(0)
    for i in range(200):
        question, answer = f"question {i}?", f"answer {i}" * (1 + i % 7)
        row = {"id": str(i), "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        if i % 4:
            row["image"], row["conversations"][0]["value"] = f"{i}.png", f"<image>\n{question}"
            Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def losses(folder) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]


EPOCH = ("--per_device_train_batch_size", 20, "--num_train_epochs", 1, "--logging_steps", 1)


@pytest.mark.common
def test_broken_pictures_do_not_end_a_run(train, llava, tmp_path, capsys):
    rows = json.loads(llava.read_text())
    for i in (5, 50, 150):
        rows[i]["image"] = "gone.png"
    (llava.parent / "broken.json").write_text(json.dumps(rows))
    options = {"source": llava.parent / "broken.json"}
    train(tmp_path / "out", *EPOCH, "--stage", "projector", "--on-error", "skip", **options)
    assert len(losses(tmp_path / "out")) == 10
    named = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in named) == ["150", "5", "50"]
    assert all("gone.png" in row["error"] for row in named)
    assert "3 rows were skipped: " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"\(id '(5|50|150)'\): .*gone.png"):
        train(tmp_path / "raised", *EPOCH, "--stage", "projector", **options)


@pytest.mark.common
def test_prepared_data_train_as_their_source(train, llava, package, tmp_path, capsys):
    prepared, options = tmp_path / "prepared", [*EPOCH, "--max_steps", 3, "--hold-out", 20, "--eval_strategy", "steps"]
    train(tmp_path / "no", "--prepare", prepared, "--processes", 2, source=llava)
    assert "200 rows in" in capsys.readouterr().out and not (tmp_path / "no").exists()
    options += ["--eval_steps", 3, "--train_sampling_strategy", "group_by_length", "--learning-rates"]
    options += ["vision_tower=2e-6", "vision_remember=1e-4"]
    for name, source in {"source": llava, "prepared": prepared}.items():
        train(tmp_path / name, *options, source=source)
    printed = capsys.readouterr().out
    assert printed.count(" | 2e-06 |") == printed.count(" | 0.0001 |") == 2 and " | 0.01 |" in printed
    assert losses(tmp_path / "source") == losses(tmp_path / "prepared")
    assert any("eval_loss" in entry for entry in json.loads((tmp_path / "prepared" / "log.json").read_text()))
    train(tmp_path / "dropped", *EPOCH, "--max_steps", 1, "--max-length", 80, "--too-long", "drop", source=prepared)
    (dropped,) = re.findall(r"(\d+) of 200 rows of .* are too long", capsys.readouterr().out)
    assert 0 < int(dropped) < 150


def test_the_plain_prompt(train, finetune, llava, package, tmp_path):
    """The images, then what the assistant says and a newline; the model keeps its own chat template."""
    train(tmp_path / "out", *EPOCH, "--max_steps", 1, "--stage", "projector", "--prompt", "plain", source=llava)
    saved, own = (
        AutoProcessor.from_pretrained(folder, trust_remote_code=True) for folder in (tmp_path / "out", package)
    )
    assert saved.chat_template == own.chat_template
    own.chat_template = finetune.PLAIN.replace("IMAGE", own.image_token)
    content = [{"type": "image", "image": str(llava.parent / "1.png")}, {"type": "text", "text": "What is it?"}]
    for answer in ("A plum.", [{"type": "text", "text": "A plum."}]):
        row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}
        encoded = LlavaVrCollator(own).encode(row)
        learned = encoded["labels"] != -100
        assert own.tokenizer.decode(encoded["input_ids"][learned]) == "A plum.\n"
        assert set(encoded["input_ids"][~learned].tolist()) == {own.image_token_id}


@pytest.mark.common
def test_a_streamed_run(train, llava, tmp_path, capsys):
    train(tmp_path / "out", *EPOCH, "--streaming", "--max_steps", 12, "--save_steps", 6, source=llava)
    whole = losses(tmp_path / "out")
    assert len(whole) == 12
    for options, match in (
        ([], "--streaming goes with --max_steps"),
        (["--max_steps", 2, "--too-long", "drop"], "a stream knows no lengths"),
        (["--max_steps", 2, "--eval", llava, "--hold-out", 3], "exclude each other"),
        (["--learning-rates", "vision_tower"], "is not PART=RATE"),
        (["--learning-rates", "tower=1e-5"], "'tower' is no part"),
    ):
        with pytest.raises(SystemExit):
            train(tmp_path / "no", "--streaming", *options, source=llava)
        assert match in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train(tmp_path / "no", "--stage", "projector", "--learning-rates", "lm_head=1e-5", source=llava)
    assert "names lm_head, which --stage projector does not train" in capsys.readouterr().err


@pytest.fixture
def train_together(package, tmp_path):
    """`train_together(output, source, *options)`: the script in two processes."""

    def run(output: Path, source: Path, *options, model: Path = package, script: tuple = (SCRIPT,), **variables):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            2,
            *script,
            source,
        ]
        command += ["--output", output, "--model", model, "--use_cpu", "true", "--logging_steps", 1, *options]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), **variables}
        done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-5000:]

    return run


STAGES = {
    "stage 1": "--stage projector+remember --prompt plain --learning_rate 1e-3",
    "stage 2": "--stage full --learning_rate 1e-3 --learning-rates vision_tower=1e-4 --gradient_checkpointing true "
    "--train_sampling_strategy group_by_length",
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_resume(train, train_together, llava, tmp_path, stage):
    """12 steps of 2.4 epochs, and the last 6 of them once more from the checkpoint between. About a minute each:
    python -m pytest tests/test_finetune.py -m slow -k two_processes"""
    prompt = ["--prompt", "plain"] if stage == "stage 1" else []
    train(tmp_path / "no", "--prepare", tmp_path / "data", *prompt, source=llava)
    options = ["--per_device_train_batch_size", 20, "--max_steps", 12, "--save_steps", 6, "--save_total_limit", 9]
    options += STAGES[stage].split()
    train_together(tmp_path / "whole", tmp_path / "data", *options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")
    train_together(tmp_path / "resumed", tmp_path / "data", *options, "--resume")
    whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / "resumed")
    assert len(set(whole)) == len(resumed) == 12
    np.testing.assert_allclose(resumed, whole, rtol=0, atol=1e-5)


FSDP2 = """
import runpy
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

torch.distributed.init_process_group("gloo")
PartialState._prepare_backend = lambda *args, **options: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
_, *sys.argv = sys.argv
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_two_processes_resume_with_fsdp2(train, train_together, llava, tmp_path):
    """accelerate has FSDP2 for GPUs only, so it is told that the CPUs are some; with the options of its configuration:
    python -m pytest tests/test_finetune.py -m slow -k fsdp2"""
    config = yaml.safe_load((ROOT / "recipes" / "llava_vr_2b" / "accelerate" / "fsdp2_8.yaml").read_text())
    variables = {name.upper(): str(value) for name, value in config["fsdp_config"].items()}
    variables["ACCELERATE_USE_FSDP"] = "true"
    (tmp_path / "fsdp2.py").write_text(FSDP2)
    train(tmp_path / "no", "--prepare", tmp_path / "data", source=llava)
    options = ["--per_device_train_batch_size", 20, "--max_steps", 4, "--save_steps", 2, "--save_total_limit", 9]
    options += STAGES["stage 2"].split()
    sharded = {"script": (tmp_path / "fsdp2.py", SCRIPT), **variables}
    train_together(tmp_path / "ddp", tmp_path / "data", *options)
    train_together(tmp_path / "whole", tmp_path / "data", *options, **sharded)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train_together(tmp_path / "resumed", tmp_path / "data", *options, "--resume", **sharded)
    whole = losses(tmp_path / "whole")
    np.testing.assert_allclose(losses(tmp_path / "resumed"), whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(losses(tmp_path / "ddp"), whole, rtol=0, atol=1e-5)
    assert len(set(whole)) == 4 and load(tmp_path / "whole").config.model_type == "llava_vr"


RECORDED = """
import os
import runpy
import sys

from llava_vr.training import LlavaVrTrainer

_, folder, *sys.argv = sys.argv
step = LlavaVrTrainer.training_step


def training_step(self, model, inputs, *rest):
    with open(f"{folder}/{os.environ['RANK']}.txt", "a") as file:
        file.writelines(text + "\\n" for text in self.processing_class.batch_decode(inputs["input_ids"]))
    return step(self, model, inputs, *rest)


LlavaVrTrainer.training_step = training_step
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_two_processes_stream_parquet(train_together, llava, tmp_path):
    """What reaches the trainer: no row twice, and rows without an image among the others:
    python -m pytest tests/test_finetune.py -m slow -k two_processes_stream"""
    datasets = pytest.importorskip("datasets")
    rows = [{"image": None, **row} for row in json.loads(llava.read_text())]
    for row in rows:
        row["image"] = str(llava.parent / row["image"]) if row["image"] else None
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "0.parquet", batch_size=30)
    (tmp_path / "recorded.py").write_text(RECORDED)
    options = ["--streaming", "--max_steps", 12, "--per_device_train_batch_size", 8, "--dataloader_num_workers", 1]
    script = (tmp_path / "recorded.py", tmp_path, SCRIPT)
    train_together(tmp_path / "out", tmp_path / "parquet", *options, "--stage", "projector", script=script)
    assert len(losses(tmp_path / "out")) == 12
    seen = [re.findall(r"question (\d+)\?", (tmp_path / f"{rank}.txt").read_text()) for rank in range(2)]
    assert [len(ids) for ids in seen] == [96, 96] and len({*seen[0], *seen[1]}) == 192
    assert all(sum(int(i) % 4 == 0 for i in ids) > 10 for ids in seen)  # those without an image


@pytest.mark.parametrize("collator", ["trl's", "ours"])
def test_trl(package, data, tmp_path, collator):
    """SFTTrainer takes the model and the processor as they are."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows = [row for row in rows if row["images"]]
    for row in rows:
        row["images"] = [Image.open(data.parent / name) for name in row["images"]]
        for message in row["messages"]:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
    model, processor = load(package), AutoProcessor.from_pretrained(package, trust_remote_code=True)
    options = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    ours = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    options |= ours if collator == "ours" else {}
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None, **options),
        data_collator=LlavaVrCollator(processor) if collator == "ours" else None,
        processing_class=processor,
        train_dataset=datasets.Dataset.from_list(rows),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.common
@pytest.mark.skipif(not (ROOT / "model.safetensors").is_file(), reason="the folder holds no checkpoint")
def test_the_notebook(tmp_path):
    """The code cells in their order, in one process, started beside the notebook."""
    notebook = json.loads((ROOT / "examples" / "finetune.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    script = tmp_path / "notebook.py"
    script.write_text("\n".join(cells), encoding="utf-8")
    folder = tmp_path / "home" / "examples"  # a folder of its own: a link would be left for the root itself
    folder.mkdir(parents=True)
    for entry in [*ROOT.iterdir(), *SCRIPT.parent.iterdir()]:
        if not entry.name.startswith(".") and entry.name not in ("examples", "fine-tuned"):
            (folder.parent / entry.relative_to(ROOT)).symlink_to(entry)
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, script], env=env, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    assert (folder.parent / "fine-tuned" / "model.safetensors").is_file()
