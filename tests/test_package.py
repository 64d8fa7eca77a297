"""The folder as the Hub's users meet it: Auto classes, the Hub's own snippets, saved copies, README and example."""

import argparse
import functools
import http.server
import importlib.metadata
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import HfArgumentParser

from llava_vr import __version__


ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "examples" / "receipt.png"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(params=["root", "tiny"])
def folder(request):
    """The root's own checkpoint, and a tiny one with tiles."""
    return ROOT if request.param == "root" else request.getfixturevalue("package")


@pytest.fixture
def run(tmp_path):
    """`run(code, *arguments)`: Python code in a process that knows nothing of this one; its output."""

    def run(code: str, *arguments, cwd: Path = tmp_path) -> str:
        env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
        env |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        command = [sys.executable, *([] if code.endswith(".py") else ["-c"]), code, *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-5000:]
        return done.stdout

    return run


@pytest.fixture(scope="module")
def picture_url():
    """The example's picture at an http address of this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(PICTURE.parent))
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{PICTURE.name}"
    server.shutdown()


AUTO_CLASSES = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

folder = sys.argv[1]
for auto in (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor):
    found = type(auto.from_pretrained(folder, trust_remote_code=True))
    assert found.__module__.startswith("transformers_modules."), found
    print(found.__name__)
model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert len(tokenizer) <= model.config.text_config.vocab_size
assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
assert model.generation_config.pad_token_id is not None
"""


@pytest.mark.common
def test_auto_classes(run, folder):
    names = ["LlavaVrConfig", "LlavaVrModel", "LlavaVrForConditionalGeneration", "LlavaVrProcessor"]
    assert run(AUTO_CLASSES, folder).split() == names


REFUSED = """
import sys
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

for auto in (AutoConfig, AutoModelForImageTextToText, AutoProcessor):
    try:
        auto.from_pretrained(sys.argv[1], trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
        print("refused")
"""


@pytest.mark.common
def test_refused_without_trust_remote_code(run, folder):
    assert run(REFUSED, folder).split() == ["refused"] * 3


# As the Hub prints them on the page of an image-text-to-text model with custom code; only the names are filled in
HUB_SNIPPETS = {
    "pipeline": """
# Use a pipeline as a high-level helper
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="MODEL", trust_remote_code=True)
messages = [
    {
        "role": "user",
        "content": [
            {"type": "image", "url": "IMAGE"},
            {"type": "text", "text": "What animal is on the candy?"}
        ]
    },
]
pipe(text=messages)
""",
    "direct": """
# Load model directly
from transformers import AutoProcessor, AutoModelForImageTextToText

processor = AutoProcessor.from_pretrained("MODEL", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("MODEL", trust_remote_code=True)
messages = [
    {
        "role": "user",
        "content": [
            {"type": "image", "url": "IMAGE"},
            {"type": "text", "text": "What animal is on the candy?"}
        ]
    },
]
inputs = processor.apply_chat_template(
	messages,
	add_generation_prompt=True,
	tokenize=True,
	return_dict=True,
	return_tensors="pt",
).to(model.device)

outputs = model.generate(**inputs, max_new_tokens=40)
print(processor.decode(outputs[0][inputs["input_ids"].shape[-1]:]))
""",
    "model alone": """
# Load model directly
from transformers import AutoModel
model = AutoModel.from_pretrained("MODEL", trust_remote_code=True, dtype="auto")
""",
}


@pytest.mark.common
@pytest.mark.parametrize("snippet", HUB_SNIPPETS)
def test_hub_snippets(run, folder, picture_url, snippet):
    run(HUB_SNIPPETS[snippet].replace("MODEL", str(folder)).replace("IMAGE", picture_url))


SAVE = """
import sys
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, picture, copy, step = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "image", "image": picture}, {"type": "text", "text": "how much is it?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    logits = model(**inputs).logits
if step == "save":
    model.save_pretrained(copy)
    processor.save_pretrained(copy)
    torch.save(logits, copy + ".pt")
else:
    assert torch.equal(logits, torch.load(copy + ".pt"))
"""


@pytest.mark.common
def test_a_saved_copy_stands_alone(run, folder, tmp_path):
    copy = tmp_path / "copy"
    run(SAVE, folder, PICTURE, copy, "save")
    assert {f"{name}_llava_vr.py" for name in ("configuration", "modeling", "processing")} <= set(os.listdir(copy))
    run(SAVE, copy, PICTURE, copy, "compare")
    names = ["LlavaVrConfig", "LlavaVrModel", "LlavaVrForConditionalGeneration", "LlavaVrProcessor"]
    assert run(AUTO_CLASSES, copy).split() == names


def test_the_checkpoint_tells_nothing_of_where_it_was_made():
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.findall(r'"(?:/|[A-Z]:\\|\.\./)[^"]*"', text), f"{name} holds a path"


def test_the_checkpoint_leaves_lengths_and_caching_to_its_caller():
    """A harness sets `max_length`, which a `max_new_tokens` of the checkpoint would beat without a word."""
    assert not {"max_length", "max_new_tokens"} & json.loads((ROOT / "generation_config.json").read_text()).keys()
    assert "use_cache" not in json.loads((ROOT / "config.json").read_text())


PAGES = {"README.md": README} | {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"))
}


def blocks(page: str, language: str) -> list[str]:
    """A page's blocks of code of a language, but those with a line `<!-- not run: why -->` before them."""
    found = re.findall(r"^(<!-- not run: [^\n]+ -->\n)?```(\w+)\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    return [code for marked, name, code in found if name == language and not marked]


@pytest.mark.common
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_of_the_documents(run, tmp_path, page):
    """A page's blocks in their order, after the first of README.md, in a folder that looks like this one."""
    home = tmp_path / "home"
    home.mkdir()
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name != "fine-tuned":
            (home / entry.name).symlink_to(entry)
    script = tmp_path / "page.py"
    code = blocks("README.md", "python")[: None if page == "README.md" else 1]
    script.write_text("\n".join(code if page == "README.md" else code + blocks(page, "python")), encoding="utf-8")
    run(str(script), cwd=home)
    if page == "README.md":
        assert (home / "fine-tuned" / "collator_llava_vr.py").is_file()
        assert "| trained | vision tower, " in (home / "fine-tuned" / "README.md").read_text(encoding="utf-8")


ANSWERS = """
import json
import sys

for picture, question in json.loads(sys.argv[1]):
    inputs = encode([chat(question, picture)])
    sequences = model.generate(**inputs, max_new_tokens=100)
    (answer,) = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(answer.replace("\\n", " / "))
"""


def samples(number: int) -> list[tuple[str, str, str]]:
    """The pictures, questions and answers of one of the README's tables of samples."""
    rows = re.findall(r"(\| !\[.*\|\n)(.*\|\n)(.*\|\n)", README)[number]
    pictures, questions, answers = ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows)
    pictures = [re.fullmatch(r"!\[.+\]\((.+)\)", picture)[1] for picture in pictures]
    return list(zip(pictures, questions, (re.match("`(.+?)`", answer)[1] for answer in answers)))


@pytest.mark.common
def test_answers_of_the_readme(run):
    """The model's answers are those of the table of samples, of the command, and of the metadata."""
    asked = [(picture, question) for picture, question, _ in samples(0)]
    asked += re.findall(r'examples/ask\.py (examples/receipt\.png) "([^"]+)"', README)
    expected = [answer for *_, answer in samples(0)] + re.findall(r"nano checkpoint answers (\d+)", README)
    widget = ModelCard(README).data.widget
    asked += [(example["src"], example["text"]) for example in widget]
    expected += [example["output"]["text"] for example in widget]
    assert len(asked) == len(expected) > 8
    assert run(blocks("README.md", "python")[0] + ANSWERS, json.dumps(asked), cwd=ROOT).splitlines()[1:] == expected


def test_scores_in_the_metadata_are_those_of_the_result_files():
    exact = json.loads((ROOT / "lab" / "results" / "nano_held_out.json").read_text())["exact"]
    found = [result.metric_value for result in ModelCard(README).data.eval_results]
    assert found == [round(100 * domain["all"], 1) for domain in exact.values()]


READER = {  # a row of the README's table: the domain, and its types of questions
    "Transcribe the image.": ("print lines", ("transcribe",)),
    "What does the first line say?": ("print lines", ("first", "last", "number")),
    "How much is the tea?": ("print receipts", ("price",)),
    "What is the total?": ("print receipts", ("total",)),
    "What costs 4.20?": ("print receipts", ("item",)),
    "Which is the cheapest?": ("print receipts", ("cheapest", "dearest")),
    "What is the weight of Ann?": ("print tables", ("cell",)),
    "Which has the highest weight?": ("print tables", ("highest", "lowest")),
    "What is the value of May?": ("print charts", ("value",)),
    "Which is the lowest?": ("print charts", ("highest", "lowest")),
}


def test_figures_of_the_reader_are_those_of_its_result_files():
    results = [json.loads((ROOT / "lab" / "results" / f"reader{s}.json").read_text()) for s in ("", "_s2")]
    for question, (domain, types) in READER.items():
        shares = [sum(result["exact"][domain][name] for name in types) / len(types) for result in results]
        assert re.search(rf"^\| {re.escape(question)}.*\| {shares[0]:.0%} \| {shares[1]:.0%} \|$", README, re.MULTILINE)
    characters = [result["characters"]["print lines"] for result in results]
    assert f"{characters[0]:.0%} and {characters[1]:.0%} of the characters" in README
    reader, nano = (
        json.loads((ROOT / "lab/results" / f"{name}_plain.json").read_text()) for name in ("reader", "nano")
    )
    assert f"Of {reader['questions']} questions about ten plain pictures" in README
    assert f"it answers {reader['right']} right and nano {nano['right']}" in README
    for result in (reader, nano):
        assert result["questions"] == 28 and len(result["wrong"]) == 28 - result["right"]


@pytest.mark.common
def test_the_reader_answers_from_its_subfolder_and_from_a_copy(run, tmp_path):
    code = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor

root, copy, picture, question = sys.argv[1:]
for name, options in ((root, {"subfolder": "reader"}), (copy, {})):
    model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True, **options)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True, **options)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    ).to(model.dtype)
    new = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]
    print(model.dtype, processor.decode(new, skip_special_tokens=True))
    model.save_pretrained(copy)
    processor.save_pretrained(copy)
"""
    for picture, question, answer in samples(1):
        said = run(code, ROOT, tmp_path / "copy", ROOT / picture, question).splitlines()
        assert said == [f"torch.float32 {answer}"] * 2


@pytest.mark.parametrize("page", PAGES)
def test_documents_name_what_exists(page):
    names = re.findall(r"\]\((?!http)([^)#]+)", PAGES[page])
    assert not [name for name in names if not (ROOT / page).parent.joinpath(name).exists()]
    names = [part for row in re.findall(r"^\| `([^`]+)` \|", PAGES[page], re.MULTILINE) for part in row.split()[:1]]
    names = [name for name in names if name.endswith((".py", "/")) and "_" in name]
    assert not [name for name in names if not (ROOT / name).exists()]


def test_git_ignores_what_the_documents_write():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    written = {"/fine-tuned/", "/tickets/", "/lab/runs/", "/map-*.png", "/compressed/", "/trained/"}
    assert written <= set(ignored)


SCRIPTS = [ROOT / "convert_weights.py", *ROOT.glob("docs/*.py"), *ROOT.glob("examples/*.py")]
MODULES = [path for folder in ("lab", "benchmarks", "evaluation") for path in (ROOT / folder).glob("*.py")]
COMMAND_LINES = sorted(path.relative_to(ROOT).as_posix() for path in SCRIPTS) + sorted(
    f"{path.parent.name}.{path.stem}" for path in MODULES if "__main__" in path.read_text(encoding="utf-8")
)


class Parsed(Exception):
    """A script has parsed its command line."""


@pytest.fixture
def start(monkeypatch):
    """`start(name, *arguments)`: runs a script or module in this process up to where its command line is parsed."""

    def stop_after(owner: type, method: str):
        parse = getattr(owner, method)

        def parse_and_stop(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        monkeypatch.setattr(owner, method, parse_and_stop)

    stop_after(argparse.ArgumentParser, "parse_args")
    stop_after(HfArgumentParser, "parse_args_into_dataclasses")
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(ROOT)

    def start(name: str, *arguments: str):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.syspath_prepend(ROOT / Path(name).parent)  # as Python does for a script
        run = runpy.run_path if name.endswith(".py") else runpy.run_module
        run(name, run_name="__main__")

    return start


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_help_has_examples_that_can_be_pasted(start, capsys, name):
    with pytest.raises(SystemExit, match="0"):
        start(name, "--help")
    text = capsys.readouterr().out.replace("\\\n", "")  # long commands go on in the next line
    commands = re.findall(r"^ *((?:python|accelerate launch) .*)$", text, re.MULTILINE)
    assert commands
    for words in (shlex.split(command, comments=True) for command in commands):
        assert all(Path(word).exists() for word in words if word.startswith("examples/"))
        with pytest.raises(Parsed):
            start(name, *words[words.index(name) + 1 :])


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_documents_can_be_pasted(start, page):
    """Each command of a script of this repository is parsed by it, and each file of examples/ that it names exists."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", "").splitlines()
    for words in (shlex.split(line, comments=True) for line in lines):
        name = next((word for word in words if word in COMMAND_LINES), None)
        if name is None or "&&" in words or words[0] not in ("python", "torchrun", "accelerate"):
            continue
        assert all(Path(word).exists() for word in words if word.startswith("examples/"))
        with pytest.raises(Parsed):
            start(name, *words[words.index(name) + 1 :])


@pytest.fixture
def ask(package, tmp_path):
    """`ask(*arguments)`: examples/ask.py with the tiny package; its exit code, output and errors."""

    def ask(*arguments: str) -> tuple[int, str, str]:
        command = [sys.executable, ROOT / "examples" / "ask.py", *map(str, arguments), "--model", package]
        env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        return done.returncode, done.stdout, done.stderr

    return ask


@pytest.mark.common
def test_ask_names_a_bad_picture(ask):
    code, out, err = ask("no.png", "what?")
    assert code == 2 and "no.png" in err and "Traceback" not in err and not out


@pytest.mark.common
def test_ask_answers_a_folder_but_for_what_cannot_be_read(ask, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        shutil.copy(PICTURE, folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    code, out, err = ask(folder, PICTURE, "what?", "--json", "--batch-size", 3, "--max-new-tokens", 2)
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["image"] for record in records] == [*(str(folder / f"{i}.png") for i in range(3)), str(PICTURE)]
    assert len({record["answer"] for record in records}) == 1 and records[0]["image_tokens"] > 4
    assert code == 2 and "broken.png" in err and "notes.txt" not in err and "Traceback" not in err


@pytest.mark.common
def test_ask_names_a_choice_that_is_none(ask):
    code, _, err = ask(PICTURE, "what?", "--downsample", 7)
    assert code == 2 and "projector_downsample must be one of [2]" in err and "Traceback" not in err


def test_ask_names_what_is_no_number_or_no_model(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for option, value, reason in (
        ("--batch-size", "0", "must be at least 1"),
        ("--max-new-tokens", "-1", "must be at least 1"),
        ("--model", tmp_path, "--model"),
        ("--subfolder", "none", "--subfolder none: there is no config.json"),
    ):
        monkeypatch.setattr(sys, "argv", ["ask.py", str(PICTURE), "what?", option, str(value)])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(str(ROOT / "examples" / "ask.py"), run_name="__main__")
        err = capsys.readouterr().err
        assert option in err and reason in err.splitlines()[-1]


COMMANDS = runpy.run_path(str(ROOT / "__main__.py"))["COMMANDS"]


@pytest.fixture
def llava_vr(monkeypatch, capsys):
    """`llava_vr(*arguments)`: the command line in this process; its exit code, output and errors."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llava-vr", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("llava_vr", run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return call


def test_help_and_version_of_the_command_line(llava_vr):
    code, text, _ = llava_vr("--help")
    assert code == 0 and all(re.search(rf"^  {name} ", text, re.MULTILINE) for name in COMMANDS)
    assert llava_vr("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("name, option", [("ask", "--json"), ("convert", "--compress"), ("evaluate", "--seen")])
def test_commands_have_their_own_help(llava_vr, name, option):
    code, text, _ = llava_vr(name, "--help")
    assert code == 0 and option in text


def test_a_command_says_what_it_needs(llava_vr, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = llava_vr("demo")
    assert code == 2 and 'pip install ".[demo]"' in err
    code, _, err = llava_vr("tidy")
    assert code == 2 and "ask" in err


def test_the_changelog_has_a_section_for_the_version():
    assert f"## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert importlib.metadata.version("llava-vr") == __version__


def test_ruff_is_the_same_everywhere():
    (pinned,) = re.findall(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"rev: v{pinned} " in (ROOT / ".pre-commit-config.yaml").read_text()
