"""The folder as the Hub's users meet it: Auto classes, the Hub's own snippets, saved copies, README and example."""

import argparse
import functools
import http.server
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from transformers import HfArgumentParser


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


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_readme_python(run, tmp_path):
    """The code blocks in their order, in one process, in a folder that looks like this one."""
    home = tmp_path / "home"
    home.mkdir()
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name != "fine-tuned":
            (home / entry.name).symlink_to(entry)
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")), encoding="utf-8")
    run(str(script), cwd=home)
    assert (home / "fine-tuned" / "modeling_llava_vr.py").is_file()


def test_readme_answer(run):
    """The command of README.md prints the answer beside it, which is on the picture."""
    (question,) = re.findall(r'examples/ask\.py examples/receipt\.png "([^"]+)"', README)
    (answer,) = re.findall(r"^\| !\[.*\]\(examples/receipt\.png\) \| `(.*)` \|$", README, re.MULTILINE)
    assert run(str(ROOT / "examples" / "ask.py"), PICTURE, question) == f"{answer}\n"


def test_readme_names_what_exists():
    names = re.findall(r"\]\((?!http)([^)]+)\)", README)
    names += [part for row in re.findall(r"^\| `([^`]+)` \|", README, re.MULTILINE) for part in row.split()[:1]]
    names = [name for name in names if "/" in name or name.endswith(".py")]
    assert names and not [name for name in names if not (ROOT / name).exists()]


def test_readme_is_complete():
    assert not re.findall(r"\[\[\w+\]\]", README), "numbers still to be measured"


def test_git_ignores_what_the_documents_write():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"/fine-tuned/", "/tickets/", "/lab/runs/", "/compressed/", "/trained/"} <= set(ignored)


SCRIPTS = [ROOT / "convert_weights.py", *ROOT.glob("docs/*.py"), *ROOT.glob("examples/*.py")]
MODULES = [path for folder in ("lab", "benchmarks") for path in (ROOT / folder).glob("*.py")]
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


def test_ask_names_a_bad_picture(package, tmp_path):
    command = [sys.executable, ROOT / "examples" / "ask.py", "no.png", "what?", "--model", package]
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "no.png" in done.stderr and "Traceback" not in done.stderr
