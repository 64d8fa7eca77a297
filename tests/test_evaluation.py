"""evaluation/: adapters of harnesses give the lab's answers, obey their limits, and fill the table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.evaluate import draw_cases, measure


ROOT = Path(__file__).parents[1]
STUBS = ROOT / "tests" / "stubs"
CASES = list(draw_cases(99, 1, True))

pytestmark = pytest.mark.skipif(not (ROOT / "model.safetensors").is_file(), reason="the folder holds no checkpoint")


@pytest.fixture(scope="module")
def answerer():
    from llava_vr.evaluation.answering import Answerer

    return Answerer(str(ROOT), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def answers(answerer):
    """What lab.evaluate hears, by s."""

    def ask(downsample: int | None) -> list[str]:
        right, misses = measure(answerer.model, answerer.processor, CASES, downsample=downsample)
        said = {id(case): text for case, text in misses}
        return [said.get(id(case), case.turn.answer) for case in CASES]

    return {downsample: ask(downsample) for downsample in (2, 3, 4)}


def chats(cases):
    content = [[{"type": "image", "image": case.image}, {"type": "text", "text": case.turn.question}] for case in cases]
    return [[{"role": "user", "content": parts}] for parts in content]


def test_answers_end_where_they_are_told(answerer, answers):
    chat = chats([case for case, said in zip(CASES, answers[3]) if len(said) > 12][:2])
    whole = answerer.answer(chat, 64)
    stop = whole[0][5:7]
    assert answerer.answer(chat, 64, until=[stop, ""])[0] == whole[0][: whole[0].index(stop)]
    assert answerer.answer(chat, 64, until=stop)[0] == whole[0][: whole[0].index(stop)]
    tokenizer = answerer.processor.tokenizer
    for said, text in zip(answerer.answer(chat, 3), whole):
        assert text.startswith(said) and len(tokenizer(said, add_special_tokens=False)["input_ids"]) <= 3 < len(text)
    assert answerer.answer(chat, 64, temperature=0, top_p=None) == whole
    with pytest.raises(ValueError, match=r"\['top_a'\] are not supported"):
        answerer.answer(chat, 64, top_a=1)


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """`harness(name, processes, *options)`: the stand-in for lmms-eval on the lab's questions; scores and answers."""
    folder = tmp_path_factory.mktemp("harness")
    env = {**os.environ, "PYTHONPATH": f"{STUBS}{os.pathsep}{ROOT}", "HF_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "evaluation.questions", "questions.parquet", "--n", "1"]
    assert "19 questions" in subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True).stdout

    def run(name: str, processes: int, *options: str) -> tuple[dict, list[str]]:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes > 1 else []
        command = [sys.executable, *launch, "-m", "lmms_eval", "--model", "llava_vr", "--tasks", "llava_vr_lab"]
        command += ["--include_path", str(ROOT / "evaluation" / "tasks" / "lmms_eval"), "--batch_size", "7"]
        command += ["--output_path", name, "--device", "cpu", *options]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        results = json.loads((folder / name / "stub_results.json").read_text())["results"]["llava_vr_lab"]
        return results, json.loads((folder / name / "stub_samples.json").read_text())["llava_vr_lab"]

    run.folder = folder
    return run


@pytest.mark.common
def test_lmms_eval_gives_the_labs_answers(harness, answers):
    from llava_vr.evaluation.table import read_results, table

    for downsample in (2, 4):
        found = harness(f"s{downsample}", 1, "--model_args", f"pretrained={ROOT},projector_downsample={downsample}")
        assert found[1] == answers[downsample]
        right = sum(said == case.turn.answer for said, case in zip(answers[downsample], CASES))
        assert found[0]["exact_match,none"] == right / 19
    columns = {name: read_results(harness.folder / name) for name in ("s2", "s4")}
    (row,) = [line for line in table(columns).splitlines() if "the lab's questions" in line]
    expected = [sum(a == c.turn.answer for a, c in zip(answers[s], CASES)) / 0.19 for s in (2, 4)]
    assert row.split("|")[-3:-1] == [f" {share:.4g} " for share in expected]


@pytest.mark.common
def test_lmms_eval_in_two_processes(harness, answers):
    scores, said = harness("two", 2, "--model_args", f"pretrained={ROOT}")
    assert said == answers[3]
    scores, said = harness("short", 1, "--model_args", f"pretrained={ROOT}", "--gen_kwargs", "max_new_tokens=3")
    assert all(whole.startswith(text) for text, whole in zip(said, answers[3])) and said != answers[3]


@pytest.mark.common
def test_vlmevalkit(answers, tmp_path):
    """The command, with a stand-in for VLMEvalKit."""
    messages = []
    for i, case in enumerate(CASES[:3]):
        case.image.save(tmp_path / f"{i}.png")
        image = {"type": "image", "value": str(tmp_path / f"{i}.png")}
        messages.append([image, {"type": "text", "value": case.turn.question}])
    (tmp_path / "messages.json").write_text(json.dumps(messages))
    env = {**os.environ, "PYTHONPATH": f"{STUBS}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    options = f"pretrained={ROOT},max_new_tokens=64,dtype=float32,device=cpu,projector_downsample=2"
    command = [sys.executable, "-m", "evaluation.run_vlmevalkit", options, "--data", tmp_path / "messages.json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == answers[2][:3]
    done = subprocess.run([*command[:3], "model"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "'model' is not NAME=VALUE" in done.stderr


def test_the_table_of_results(tmp_path, capsys):
    from llava_vr.evaluation.table import main

    main([])
    printed = capsys.readouterr().out
    assert printed in (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    empty = printed.splitlines()
    assert empty[0].endswith("| ours |") and all(line.endswith("|  |") for line in empty[2:])
    for name, score in (("a", 0.5), ("b", 0.25)):
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True)
        results = {"textvqa_val": {"alias": "x", "exact_match,none": score, "exact_match_stderr,none": "N/A"}}
        (folder / "20260101_results.json").write_text(json.dumps({"results": results}))
    (tmp_path / "b" / "model" / "mmbench_en_dev_results.json").write_text("[]")  # answers to be handed in
    main([str(tmp_path / "a"), str(tmp_path / "b")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"| {tmp_path / 'a'} | {tmp_path / 'b'} |")
    assert lines[2].startswith("| TextVQA |") and lines[2].endswith("| 50 | 25 |")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none")])
    assert "holds no result file" in capsys.readouterr().err


VLMEVALKIT = {  # files as VLMEvalKit writes them: percent, shares, points and sums
    "TextVQA_VAL_acc.csv": '"Overall"\n"61.5"\n',
    "ChartQA_TEST_acc.csv": '"test_human","test_augmented","Overall"\n"40.0","60.0","50.0"\n',
    "AI2D_TEST_acc.csv": '"split","Overall","foodChainsWebs"\n"none","0.625","0.5"\n',
    "MMBench_DEV_EN_acc.csv": '"split","Overall","AR"\n"dev","0.5","0.25"\n',
    "MMMU_DEV_VAL_acc.csv": '"split","Overall","Art"\n"dev","0.125","0.5"\n"validation","0.375",""\n',
    "POPE_score.csv": '"split","Overall","acc"\n"adversarial","70.0","1"\n"Overall","80.5","1"\n"random","90.0","1"\n',
    "MME_score.csv": '"perception","reasoning","OCR"\n"1234","250.0","100.0"\n',
    "OCRBench_score.json": '{"Text Recognition": 200, "Final Score": 432, "Final Score Norm": 43.2}',
    "BLINK_acc.csv": '"split","Overall"\n"val","0.5"\n',
}
EXPECTED = {
    "TextVQA": "61.5",
    "ChartQA": "50",
    "AI2D": "62.5",
    "MMBench, English": "50",
    "MMMU": "37.5",
    "POPE": "80.5",
    "MME, perception": "1234",
    "MME, cognition": "250",
    "OCRBench": "432",
}


def test_the_table_of_vlmevalkits_results(tmp_path):
    from llava_vr.evaluation.table import read_results, table

    folder = tmp_path / "llava-vr" / "T20260101_G0"
    folder.mkdir(parents=True)
    for name, text in VLMEVALKIT.items():
        (folder / f"llava-vr_{name}").write_text(text)
    rows = [line.split("|") for line in table({"ours": read_results(tmp_path)}).splitlines()[2:]]
    assert {row[1].strip(): row[-2].strip() for row in rows if row[-2].strip()} == EXPECTED


def test_the_package_brings_the_tasks_and_the_entry_point():
    from configparser import ConfigParser

    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "llava_vr.evaluation.lmms:manifest" in setup["options.entry_points"]["lmms_eval.models"]
    assert {"llava_vr.evaluation", "llava_vr.training"} <= set(setup["options"]["packages"].split())
