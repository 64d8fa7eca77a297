"""examples/distill.py: what is trained, the teacher that stays, the loss, answers, resuming, evaluation, errors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, TrainingArguments

from llava_vr import LlavaVrCollator, LlavaVrForConditionalGeneration, LlavaVrProcessor
from llava_vr.evaluation.answering import generate
from llava_vr.training.answers import Rows, fill, key_of, open_turns, read_answers, write_answers
from llava_vr.training.distillation import (
    STUDENT_PARTS,
    DistillationCollator,
    Distiller,
    as_teacher,
    compare,
    set_parts,
    untie_projector,
)


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import distill  # noqa: E402


CHOICES = [2, 1, 4]
GENERATE = "llava_vr.training.answers.generate"
OPTIONS = ["--dtype", "float32", "--use_cpu", "true", "--max-new-tokens", "6", "--answer-batch-size", "2"]
OPTIONS += ["--per_device_train_batch_size", "2", "--learning_rate", "0.01", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def save_compressed(tmp_path_factory, tiny_config, make_model, processor_for):
    """`save_compressed(**fields)`: the folder of a model as of `--compress`, of random weights, none of them zero."""

    def save(**fields) -> Path:
        folder = tmp_path_factory.mktemp("compressed")
        config = tiny_config(**{"projector_downsample_choices": CHOICES, **fields})
        make_model(config).save_pretrained(folder)
        processor_for(config).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def compressed(save_compressed):
    return save_compressed()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of five pictures, two of them below, and a file that is none."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    (folder / "more").mkdir()
    for name in ("a.png", "b.jpg", "c.png", "more/d.png", "more/e.png"):
        Image.fromarray(rng.integers(0, 256, (*rng.integers(20, 90, 2), 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def run(compressed, photos):
    """`run(output, *options)`: the script's main function on the tiny model and the photos."""

    def call(output: Path | None, *options, model: Path = compressed, source=("--images", photos)):
        output = ["--output", output] if output else []
        distill.main(list(map(str, [model, *source, *output, *OPTIONS, *options])))

    return call


def load(folder: Path) -> LlavaVrForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()


def logits(model, row, downsample):
    """Of one row, and its labels: the reference that everything is compared with."""
    processor = LlavaVrProcessor.from_pretrained(model.config._name_or_path)
    batch = LlavaVrCollator(processor, projector_downsample=downsample)([row])
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True)
    return outputs, batch["labels"][0]


@pytest.fixture(scope="module")
def chats(photos):
    """A row for each photo with answers of different lengths; the second has two turns."""
    rows = []
    for i, name in enumerate(("a.png", "b.jpg", "more/d.png")):
        content = [{"type": "image", "image": str(photos / name)}, {"type": "text", "text": f"question {i}?"}]
        turns = [("user", content), ("assistant", "plum" * (i + 1))] + [("user", "and?"), ("assistant", "no")] * (
            i == 1
        )
        rows.append({"id": name, "messages": [{"role": role, "content": text} for role, text in turns]})
    return rows


# --------------------------------------------------------------------------------------------- what changes, what stays


def test_what_runs_at_1_stays_as_it_was(run, compressed, chats, tmp_path, capsys):
    run(tmp_path / "out", "--max_steps", 3)
    source, trained = load(compressed), load(tmp_path / "out")
    assert trained.config.projector_kwargs == {"pooled_mlp": True}
    before, after = source.state_dict(), trained.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if "vision_remember" not in name)
    new = {name for name in after if name not in before}
    assert new == {name for name in after if "multi_modal_projector.pooled_mlp." in name}
    for name in after:
        if "pooled_mlp" in name or "vision_remember" in name:
            assert not torch.equal(after[name], before[name.replace("pooled_mlp.", "")]), name
    for row in chats:
        assert torch.equal(logits(trained, row, 1)[0].logits, logits(source, row, 1)[0].logits)
        assert not torch.allclose(logits(trained, row, 2)[0].logits, logits(source, row, 2)[0].logits, atol=1e-2)
    printed = capsys.readouterr().out
    for part in ("multi_modal_projector", "vision_remember", "language_model"):
        size = sum(p.numel() for name, p in trained.named_parameters() if part in name)
        expected = {"multi_modal_projector": size // 2, "vision_remember": size, "language_model": 0}[part]
        assert f"| {part} | {expected:,} | {size:,} |" in printed
    LlavaVrProcessor.from_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| trained | projector, Vision Remember modules |" in card and compressed.name in card


@pytest.mark.parametrize(("parts", "trained"), [(["modules"], {"vision_remember"}), (["projector"], {"pooled_mlp"})])
def test_one_part_alone(compressed, parts, trained):
    model = set_parts(load(compressed), parts)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {name for name, _ in model.named_parameters() if any(part in name for part in trained)}


def test_an_untied_projector_changes_nothing_yet(compressed, chats):
    source, model = load(compressed), load(compressed)
    untie_projector(model)
    projector = model.model.multi_modal_projector
    untie_projector(model)
    assert model.model.multi_modal_projector is projector
    for downsample in CHOICES:
        for row in chats:
            assert torch.equal(logits(model, row, downsample)[0].logits, logits(source, row, downsample)[0].logits)


def test_bf16(run, compressed, save_compressed, tmp_path):
    source = tmp_path / "source"
    load(compressed).to(torch.bfloat16).save_pretrained(source)
    LlavaVrProcessor.from_pretrained(compressed).save_pretrained(source)
    run(tmp_path / "out", "--max_steps", 2, "--dtype", "bfloat16", "--bf16", "true", model=source)
    before, after = load(source).state_dict(), load(tmp_path / "out").state_dict()
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert all(torch.equal(value, after[name]) for name, value in before.items() if "vision_remember" not in name)
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def test_lora(run, compressed, chats, tmp_path):
    pytest.importorskip("peft")
    source, model = load(compressed), load(compressed)
    model = set_parts(model, STUDENT_PARTS, rank=2)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    expected = logits(source, chats[0], 1)[0].logits
    assert not torch.allclose(logits(model, chats[0], 1)[0].logits, expected, atol=1e-2)
    with as_teacher(model):
        assert torch.equal(logits(model, chats[0], 1)[0].logits, expected)
    run(
        tmp_path / "out",
        "--train",
        *STUDENT_PARTS,
        "--rank",
        2,
        "--max_steps",
        2,
        "--eval",
        chats_file(tmp_path, chats),
    )
    before, after = source.state_dict(), load(tmp_path / "out").state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {name.split(".")[1] for name in changed} == {"language_model", "vision_remember"}
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["1"]["kl"] > 0  # the teacher is the source, the student has the adapter


# ------------------------------------------------------------------------------------------------------------- the loss


def test_collator_gives_teacher_and_student_the_same_answers(compressed, chats):
    processor = LlavaVrProcessor.from_pretrained(compressed)
    collator, chosen = DistillationCollator(processor, seed=3), []
    for n in range(20):
        rows = [{**row, "id": f"{n} {row['id']}"} for row in chats]
        batch = collator(rows)
        chosen += batch["image_downsamples"].tolist()
        assert batch["teacher"]["image_downsamples"].tolist() == [1] * len(rows)
        for ours, theirs in zip(batch["labels"], batch["teacher"]["labels"]):
            assert torch.equal(ours[ours != -100], theirs[theirs != -100])
        again = DistillationCollator(processor, seed=3)(rows)  # as a run that is resumed has it
        assert torch.equal(again["image_downsamples"], batch["image_downsamples"])
        assert torch.equal(batch["pixel_values"], LlavaVrCollator(processor)(chats)["pixel_values"])
    assert set(chosen) == {2, 4}


@pytest.mark.parametrize("weights", [{}, {"temperature": 2.0}, {"hidden_states": 0.5}, {"labels": 0.3}], ids=str)
def test_loss_is_that_of_the_equations(compressed, chats, tmp_path, weights):
    model = load(compressed)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    batch = DistillationCollator(LlavaVrProcessor.from_pretrained(compressed), seed=1)(chats)
    found = Distiller(model, arguments, **weights).compute_loss(model.train(), batch)

    assert model.training and found.requires_grad
    model.eval()
    temperature, loss, tokens = weights.get("temperature", 1.0), 0.0, 0
    for row, downsample in zip(chats, batch["image_downsamples"].tolist()):
        (teacher, at_1), (student, at_s) = logits(model, row, 1), logits(model, row, downsample)
        places = [(at != -100).nonzero().flatten().tolist() for at in (at_1, at_s)]
        for i, j in zip(*places, strict=True):  # of the answer's tokens; what predicts them stands before
            p, q = (outputs.logits[0, k - 1].double() / temperature for outputs, k in ((teacher, i), (student, j)))
            p, q = p.softmax(-1), q.softmax(-1)
            loss += temperature**2 * float((p * (p / q).log()).sum())
            loss += weights.get("labels", 0.0) * -float(student.logits[0, j - 1].double().log_softmax(-1)[at_s[j]])
            layers = list(zip(teacher.hidden_states[1:], student.hidden_states[1:]))
            cosines = [float(torch.cosine_similarity(a[0, i - 1], b[0, j - 1], dim=0)) for a, b in layers]
            loss += weights.get("hidden_states", 0.0) * (1 - sum(cosines) / len(cosines))
            tokens += 1
    assert float(found) == pytest.approx(loss / tokens, rel=1e-4)


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]


def test_training_lowers_the_loss(run, chats, tmp_path):
    run(tmp_path / "out", "--max_steps", 30, source=("--data", chats_file(tmp_path, chats)))
    found = losses(tmp_path / "out")
    assert np.mean(found[-5:]) < 0.7 * np.mean(found[:5])


def test_resumed_training_goes_on_as_if_never_interrupted(run, tmp_path):
    options = ["--max_steps", 6, "--save_steps", 2, "--save_total_limit", 9]
    run(tmp_path / "whole", *options)
    (tmp_path / "resumed").mkdir()
    for name in ("checkpoint-2", "answers-0.jsonl"):  # all that is left
        copy = shutil.copytree if name.startswith("checkpoint") else shutil.copy
        copy(tmp_path / "whole" / name, tmp_path / "resumed" / name)
    run(tmp_path / "resumed", *options, "--resume")
    assert len(set(losses(tmp_path / "whole"))) == 6
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    states = [load(tmp_path / name).state_dict() for name in ("whole", "resumed")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.common
def test_two_processes_train_as_one(save_compressed, photos, tmp_path):
    """With one choice for the student: s is drawn in each process by itself."""
    model = save_compressed(projector_downsample_choices=[1, 2])
    common = [ROOT / "examples" / "distill.py", model, "--images", photos, *OPTIONS[:6], "--learning_rate", "0.01"]
    common += ["--max_steps", "3", "--logging_steps", "1", "--dataloader_drop_last", "true"]
    common += ["--train_sampling_strategy", "sequential"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name, launcher, size in (("one", [], 4), ("two", ["-m", "torch.distributed.run", "--nproc_per_node", "2"], 2)):
        command = [
            sys.executable,
            *launcher,
            *common,
            "--output",
            tmp_path / name,
            "--per_device_train_batch_size",
            size,
        ]
        done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    answers = [read_answers(tmp_path / name) for name in ("one", "two")]
    assert answers[0] == answers[1] and len(list((tmp_path / "two").glob("answers-*.jsonl"))) == 2


# -------------------------------------------------------------------------------------------------- answers and sources


def chats_file(folder: Path, rows: list[dict]) -> Path:
    path = folder / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_image_rows(photos):
    rows = distill.image_rows([str(photos)], distill.QUESTIONS, 3, seed=0)
    names = sorted(str(photos / name) for name in ("a.png", "b.jpg", "c.png", "more/d.png", "more/e.png"))
    assert sorted(row["id"] for row in rows) == names
    for row in rows:
        first, *others = (message["content"] for message in row["messages"])
        assert first[0] == {"type": "image", "image": row["id"]}
        assert len({first[1]["text"], *others} & set(distill.QUESTIONS)) == 3
    assert rows == distill.image_rows([str(photos)], distill.QUESTIONS, 3, seed=0)
    assert rows != distill.image_rows([str(photos)], distill.QUESTIONS, 3, seed=1)
    some = distill.image_rows([str(photos / "*.png"), str(photos / "b.jpg")], ["what?"], 3, seed=0)
    assert [Path(row["id"]).name for row in some] == ["a.png", "c.png", "b.jpg"]
    assert all(len(row["messages"]) == 1 for row in some)


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def test_answers_take_the_places_of_those_missing():
    chat = [{"role": "system", "content": "s"}, user("1"), user("2"), said("b"), user("3"), user("4")]
    assert open_turns(chat) == [1, 4, 5]
    assert fill(chat, []) == chat
    filled = fill(chat, ["a", "c"])
    assert filled == [*chat[:2], said("a"), *chat[2:5], said("c"), chat[5]]
    assert open_turns(filled) == [7]


def test_teacher_answers_what_is_open_and_nothing_twice(compressed, chats, tmp_path, monkeypatch):
    model, processor = load(compressed), LlavaVrProcessor.from_pretrained(compressed)
    collator = DistillationCollator(processor).teacher
    unanswered = [{**row, "messages": [m for m in row["messages"] if m["role"] == "user"]} for row in chats[:2]]
    rows = Rows([*unanswered, chats[2], {"messages": [user("no image"), said("left out")]}])
    assert len(rows) == 3
    options = {"collator": collator, "folder": tmp_path, "batch_size": 2, "max_new_tokens": 5}
    answers = write_answers(model, processor, rows, **options)
    assert list(answers) == [key_of(row) for row in unanswered]
    for row, found in zip(unanswered, answers.values()):
        chat = row["messages"]
        for turn, answer in enumerate(found):
            prompt = [*fill(chat, found[:turn])[: 2 * turn], chat[turn]]
            assert generate(model, processor, [prompt], 1, 5) == [answer]
        assert len(found) == len(chat)
    complete = Rows(rows.rows, answers)
    assert complete[1]["messages"] == fill(unanswered[1]["messages"], answers[key_of(unanswered[1])])
    assert complete[2]["messages"] == chats[2]["messages"]

    asked = []
    monkeypatch.setattr(
        "llava_vr.training.answers.generate",
        lambda m, p, chats, *a: asked.append(len(chats)) or generate(m, p, chats, *a),
    )
    path = tmp_path / "answers-0.jsonl"
    assert write_answers(model, processor, rows, **options) == answers and not asked
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[1] + lines[2][:-9])  # ended while it wrote the second
    assert write_answers(model, processor, rows, **options) == answers and asked == [1, 1]
    other = Rows([{**unanswered[0], "messages": [*unanswered[0]["messages"], user("more?")]}])
    assert len(write_answers(model, processor, other, **options)) == 3


def test_rows_without_an_answer_are_left_out(chats):
    rows = [{**row, "messages": row["messages"][:1]} for row in chats]
    answers = dict(zip(map(key_of, rows), (["yes"], [""], ["no"])))
    assert [row["id"] for row in Rows(rows, answers)] == ["a.png", "more/d.png"]


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_comparison_is_that_of_each_row_alone(compressed, chats):
    model, processor = load(compressed), LlavaVrProcessor.from_pretrained(compressed)
    rows, collator = Rows(chats), LlavaVrCollator(processor)
    found = compare(model, processor, rows, collator, batch_size=2, max_new_tokens=5)
    assert list(found) == sorted(CHOICES)
    for downsample, row in found.items():
        exact, agree, divergences, tokens = [], [], [], []
        for chat in chats:
            questions, history = [m for m in chat["messages"] if m["role"] == "user"], []
            for question in questions:
                history.append(question)
                at_1, at_s = (generate(model, processor, [history], s, 5)[0] for s in (1, downsample))
                exact.append(at_1 == at_s)
                history.append(said(at_1))
            (teacher, labels_1), (student, labels) = (logits(model, {"messages": history}, s) for s in (1, downsample))
            for i, j in zip((labels_1 != -100).nonzero().flatten(), (labels != -100).nonzero().flatten(), strict=True):
                p, q = teacher.logits[0, i - 1], student.logits[0, j - 1]
                agree.append(bool(p.argmax() == q.argmax()))
                divergences.append(float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()))
            batch = LlavaVrCollator(processor, projector_downsample=downsample)([{"messages": history}])
            tokens.append(int((batch["input_ids"] == model.config.image_token_id).sum()))
        assert row["exact"] == np.mean(exact) and row["top1"] == np.mean(agree)
        assert row["kl"] == pytest.approx(np.mean(divergences), abs=1e-5)
        assert row["image_tokens"] == np.mean(tokens)
    assert found[1]["exact"] == found[1]["top1"] == 1 and found[1]["kl"] == 0


def test_evaluation_alone(run, chats, tmp_path, capsys):
    run(None, source=("--eval", chats_file(tmp_path, chats)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| s | image tokens | exact match") and [line[2] for line in lines[2:]] == [
        "1",
        "2",
        "4",
    ]
    assert "100.0% | 100.0% | 0.0000 |" in lines[2]


# --------------------------------------------------------------------------------------------------------------- errors


def test_errors_are_one_line(run, save_compressed, compressed, photos, tmp_path, monkeypatch, capsys):
    text = chats_file(tmp_path, [{"messages": [user("no image"), said("yes")]}])
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.txt").write_text("\n")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    without_modules = save_compressed(remember_layers=[])
    other = {"projector_type": "ldpv2", "projector_kwargs": None}
    cases = [
        (
            "projector_downsample_choices allow s = [2]",
            {"model": save_compressed(projector_downsample_choices=None)},
            [],
        ),
        ("remember_layers is []", {"model": without_modules}, []),
        ("this projector runs at s = 1", {"model": save_compressed(**other)}, ["--train", "projector"]),
        ("there is no image in", {"source": ("--images", tmp_path / "empty")}, []),
        ("no row has an image", {"source": ("--data", text)}, []),
        ("holds no question", {}, ["--questions", tmp_path / "none.txt"]),
        ("broken.png", {"source": ("--images", broken)}, []),
        ("--output: where", {"output": None}, []),
        ("nothing to do", {"source": ()}, []),
        ("not used by the HfArgumentParser", {}, ["--colour", "red"]),
        ("no/such/folder", {"model": "no/such/folder"}, []),
    ]
    for message, changed, options in cases:
        with pytest.raises(SystemExit) as error:
            run(changed.pop("output", tmp_path / "out"), *options, **changed)
        last = capsys.readouterr().err.splitlines()[-1]
        assert error.value.code == 2 and message in last and last.count("error:") == 1, (message, last)
    monkeypatch.setattr(
        "llava_vr.training.answers.generate", lambda model, processor, chats, *options: [""] * len(chats)
    )
    with pytest.raises(SystemExit):
        run(tmp_path / "silent")
    assert "answers nothing" in capsys.readouterr().err.splitlines()[-1]


def test_a_model_without_modules_trains_its_projector(run, save_compressed, tmp_path):
    run(tmp_path / "out", "--train", "projector", "--max_steps", 1, model=save_compressed(remember_layers=[]))
    assert load(tmp_path / "out").config.projector_kwargs == {"pooled_mlp": True}
