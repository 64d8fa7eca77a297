"""Malformed sources: one line on stderr that names what is wrong, exit code 2, OUTPUT as it was, within seconds."""

import json
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from builders import GATE, make_clip, make_llava, randomize, theirs, write_weights
from llava_vr.conversion import plan
from llava_vr.convert_weights import convert, main


ROOT = Path(__file__).parents[2]
EMBEDDINGS = "model.embed_tokens.weight"
MANY = 10**9


@pytest.fixture(scope="module")
def good(tmp_path_factory, save_tokenizer):
    """A folder with sources that convert: "research", whose tower is in "clip", "next" of transformers, and "ours"."""
    folder = tmp_path_factory.mktemp("good")
    make_clip().save_pretrained(folder / "clip")
    make_llava(image_aspect_ratio="pad", mm_vision_tower="../clip").save(folder / "research")
    randomize(theirs("llava_next")).save_pretrained(folder / "next")
    for name in ("research", "next"):
        save_tokenizer(folder / name)
    convert(folder / "next", folder / "ours")
    return folder


@pytest.fixture
def refusal(good, tmp_path, capfd):
    """`refusal(change, source)`: a copy of a good source is changed; the one line with which it is refused."""

    def run(change, source: str) -> str:
        shutil.copytree(good, tmp_path / "models")
        change(tmp_path / "models" / source)
        output = tmp_path / "out"
        output.mkdir()
        (output / "config.json").write_text('{"model_type": "llava_vr"}')
        capfd.readouterr()
        start = time.perf_counter()
        assert main([str(tmp_path / "models" / source), str(output), "--overwrite"]) == 2
        assert time.perf_counter() - start < 5
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("convert_weights.py: error: ") and len(lines[0]) < 1100
        assert [path.name for path in output.iterdir()] == ["config.json"]
        assert (output / "config.json").read_text() == '{"model_type": "llava_vr"}'
        assert {path.name for path in tmp_path.iterdir()} == {"models", "out"}
        return lines[0]

    return run


# ---- changes


def write(name, content):
    """Writes a file of the source: bytes as they are, anything else as JSON."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / name).write_bytes(content)


def update(name, **values):
    """Sets fields of a JSON file; "a__b" is field b of a."""

    def change(folder):
        content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        for path, value in values.items():
            *outer, last = path.split("__")
            inner = content
            for key in outer:
                inner = inner[key]
            inner[last] = value
        (folder / name).write_text(json.dumps(content))

    return change


def config(**values):
    return update("config.json", **values)


def tower(**values):
    return lambda folder: config(**values)(folder.parent / "clip")


def header(edit):
    """Edits the header of model.safetensors, a dictionary; the result of `edit` may be bytes."""

    def change(folder):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        entries = edit(json.loads(content[8:end]))
        entries = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
        path.write_bytes(len(entries).to_bytes(8, "little") + entries + content[end:])

    return change


def entry(name=GATE, **values):
    return header(lambda entries: entries | {name: entries[name] | values})


def pickled(content):
    """pytorch_model.bin in the place of model.safetensors: bytes as they are, anything else by `torch.save`."""

    def change(folder):
        (folder / "model.safetensors").unlink()
        path = folder / "pytorch_model.bin"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)

    return change


def tensor(make):
    """The source as pytorch_model.bin, with another value for the embeddings."""
    return lambda folder: pickled(load_file(folder / "model.safetensors") | {EMBEDDINGS: make()})(folder)


def sharded(shard=None, index=None):
    """Two shards whose index names another file for one tensor, or is another text."""

    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        write_weights(tensors, folder, 2, "safetensors")
        name = "model.safetensors.index.json"
        content = json.loads((folder / name).read_text())
        content["weight_map"][GATE] = shard
        write(name, content if index is None else index)(folder)

    return change


def rename(name, new):
    return lambda folder: (folder / name).rename(folder / new)


DEEP = b'{"a":' + b"[" * 100_000
CASES = {
    # headers of safetensors
    "header: offsets overlap": (entry(data_offsets=[0, 64 * 48 * 4]), ["model.safetensors", "invalid offset"]),
    "header: end before begin": (entry(data_offsets=[8, 4]), ["model.safetensors", GATE]),
    "header: one offset": (entry(data_offsets=[0]), ["model.safetensors"]),
    "header: negative shape": (entry(shape=[-64, -48]), ["model.safetensors", "-64"]),
    "header: overflowing shape": (entry(shape=[2**63, 2**63]), ["model.safetensors", "overflow"]),
    "header: shape is a text": (entry(shape="64"), ["model.safetensors", '"64"']),
    "header: unknown dtype": (entry(dtype="F7"), ["model.safetensors", "F7"]),
    "header: entry is a number": (header(lambda e: e | {GATE: 5}), ["model.safetensors"]),
    "header: entry lacks fields": (header(lambda e: e | {GATE: {}}), ["model.safetensors"]),
    "header: nested metadata": (header(lambda e: e | {"__metadata__": {"a": [1]}}), ["model.safetensors"]),
    "header: list": (header(lambda e: b"[1]"), ["model.safetensors"]),
    "header: deep": (header(lambda e: DEEP), ["model.safetensors", "recursion"]),
    "header: not UTF-8": (header(lambda e: b'{"\xff":1}'), ["model.safetensors", "UTF-8"]),
    "header: embeddings are flat": (entry(EMBEDDINGS, shape=[262 * 48]), ["embed_tokens.weight", "not a matrix"]),
    "file: empty": (write("model.safetensors", b""), ["model.safetensors", "truncated"]),
    "file: length beyond the end": (write("model.safetensors", b"\xff" * 8 + b"{}"), ["model.safetensors"]),
    # pickled tensors
    "bin: scalar": (tensor(lambda: torch.tensor(1.0)), ["embed_tokens.weight", "not a matrix"]),
    "bin: meta": (tensor(lambda: torch.ones(262, 48, device="meta")), [EMBEDDINGS, "meta"]),
    "bin: sparse": (tensor(lambda: torch.eye(48).to_sparse()), [EMBEDDINGS, "sparse_coo"]),
    "bin: sparse rows": (tensor(lambda: torch.eye(48).to_sparse_csr()), [EMBEDDINGS, "sparse_csr"]),
    "bin: nested": (tensor(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])), [EMBEDDINGS, "plain"]),
    "bin: jagged": (
        tensor(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)),
        [EMBEDDINGS, "jagged"],
    ),
    "bin: quantised": (tensor(lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)), [EMBEDDINGS]),
    "bin: expanded": (tensor(lambda: torch.ones(1, 1).expand(MANY, 48)), [EMBEDDINGS, "plain"]),
    "bin: list of tensors": (tensor(lambda: [torch.ones(2)]), [EMBEDDINGS, "list"]),
    "bin: complex": (tensor(lambda: torch.ones(262, 48, dtype=torch.complex64)), [EMBEDDINGS, "complex64"]),
    "bin: number as name": (pickled({3: torch.ones(2)}), ["pytorch_model.bin", "3"]),
    "bin: within itself": (pickled((lambda d: d.setdefault("model", d))({})), ["pytorch_model.bin", "dict"]),
    "bin: list": (pickled([1]), ["pytorch_model.bin", "list"]),
    "bin: empty": (pickled(b""), ["pytorch_model.bin", "truncated"]),
    "bin: text": (pickled(b"hello"), ["pytorch_model.bin"]),
    "bin: plain pickle": (pickled(pickle.dumps({"a": 1}, 4)), ["pytorch_model.bin", "safetensors"]),
    "bin: cut zip file": (pickled(b"PK\x03\x04" + bytes(100)), ["pytorch_model.bin"]),
    # shards
    "index: absolute path": (sharded("/etc/hostname"), ["model.safetensors.index.json", GATE, "/etc/hostname"]),
    "index: path upwards": (sharded("../ours/model.safetensors"), ["model.safetensors.index.json", GATE, "../ours"]),
    "index: parent": (sharded(".."), ["model.safetensors.index.json", GATE]),
    "index: number as shard": (sharded(5), ["model.safetensors.index.json", GATE, "5"]),
    "index: list as shard": (sharded(["a"]), ["model.safetensors.index.json", GATE]),
    "index: NUL in a shard": (sharded("a\0b"), ["model.safetensors.index.json", GATE]),
    "index: missing shard": (sharded("model-00003-of-00002.safetensors"), ["model-00003-of-00002.safetensors", GATE]),
    "index: deep": (sharded(index=DEEP), ["model.safetensors.index.json", "recursion"]),
    "index: list": (sharded(index=[1]), ["model.safetensors.index.json", "list"]),
    "index: weight_map is a list": (sharded(index={"weight_map": [1]}), ["model.safetensors.index.json", "weight_map"]),
    "shards: a huge number of them": (
        rename("model.safetensors", f"model-00001-of-{'9' * 60}.safetensors"),
        ["1 of 999"],
    ),
    # JSON
    "config.json: deep": (write("config.json", DEEP), ["config.json", "recursion"]),
    "config.json: list": (write("config.json", [1]), ["config.json", "list"]),
    "config.json: not UTF-8": (write("config.json", b"\xff\xfe{}"), ["config.json", "utf-8"]),
    "config.json: a number of 5000 digits": (write("config.json", b'{"a":' + b"1" * 5000 + b"}"), ["config.json"]),
    "config.json: model_type is a list": (config(model_type=["llava"]), ["config.json", "model_type"]),
    # sizes and choices
    "sizes: 1e5 layers": (config(num_hidden_layers=10**5), ["config.json", "num_hidden_layers"]),
    "sizes: 9999 layers": (config(num_hidden_layers=9999), ["text_config.num_hidden_layers is 9999", "27 tensors"]),
    "sizes: width": (config(hidden_size=MANY), [str(MANY)]),
    "sizes: no heads": (config(num_attention_heads=0), ["config.json", "num_attention_heads"]),
    "sizes: heads that do not divide": (config(num_attention_heads=5), ["config.json", "heads (5)"]),
    "sizes: text for a number": (config(num_key_value_heads="2"), ["config.json", "num_key_value_heads"]),
    "sizes: head_dim": (config(head_dim=-4), ["config.json", "head_dim"]),
    "sizes: image": (tower(image_size=MANY), ["image_size", str(MANY), "position_embedding"]),
    "sizes: list for the image": (tower(image_size=[32, 32]), ["config.json", "image_size"]),
    "sizes: no patch": (tower(patch_size=0), ["config.json", "patch_size"]),
    "sizes: tower of 9999 layers": (tower(num_hidden_layers=9999), ["vision_config.num_hidden_layers is 9999"]),
    "sizes: tilings": (
        config(image_aspect_ratio="anyres", image_grid_pinpoints="(1x1),(99999x99999)"),
        ["image_grid_pinpoints"],
    ),
    "choices: hidden_act": (config(hidden_act="swoosh"), ["hidden_act", "'swoosh'"]),
    "choices: hidden_act of the tower": (tower(hidden_act="swoosh"), ["vision_config.hidden_act", "'swoosh'"]),
    "choices: rope_type": (config(rope_scaling={"type": "spiral", "factor": 2}), ["rope_type", "'spiral'"]),
    "choices: rope_scaling is a list": (config(rope_scaling=[1]), ["config.json", "rope_parameters"]),
    "choices: tower of another kind": (tower(model_type="unheard"), ["'unheard'"]),
    "choices: tower is a number": (config(mm_vision_tower=5), ["mm_vision_tower", "5"]),
    # the other files
    "template: not UTF-8": (write("chat_template.jinja", b"\xff image"), ["chat_template.jinja", "utf-8"]),
    "template: deep": (write("chat_template.json", DEEP), ["chat_template.json", "recursion"]),
    "tokenizer: not UTF-8": (write("tokenizer.json", b"\xff"), ["tokenizer", "utf-8"]),
    "tokenizer: other model": (update("tokenizer.json", model=5), ["tokenizer", "ModelUntagged"]),
    "tokenizer: list": (write("tokenizer_config.json", [1]), ["tokenizer", "list"]),
    "pixels: mean is a text": (update("preprocessor_config.json", image_mean="x"), ["image processor"]),
    "pixels: unknown filter": (update("preprocessor_config.json", resample=99), ["image processor", "99"]),
    "pixels: no object": (update("processor_config.json", image_processor=5), ["processor_config.json", "5"]),
    "generation: text": (update("generation_config.json", max_new_tokens="x"), ["generation_config.json"]),
    "generation: ids": (update("generation_config.json", suppress_tokens=5), ["generation_config.json"]),
}
NESTED_CASES = {
    "layers": (config(text_config__num_hidden_layers=9999), ["text_config.num_hidden_layers is 9999"]),
    "image": (config(vision_config__image_size=MANY), ["image_size", "position_embedding"]),
    "hidden_act": (config(text_config__hidden_act="swoosh"), ["text_config.hidden_act 'swoosh'"]),
    "rope_type": (config(text_config__rope_parameters={"rope_type": "spiral"}), ["rope_type 'spiral'"]),
    "heads": (config(text_config__num_attention_heads=0), ["config.json", "num_attention_heads"]),
    "placeholder": (config(image_token_id=-7), ["image_token_id", "-7"]),
    "text_config": (config(text_config=5), ["config.json", "int"]),
    "projector": (config(projector_hidden_act="swoosh"), ["projector_hidden_act", "swoosh"]),
    "pinpoints": (config(image_grid_pinpoints=[[1]]), ["image_grid_pinpoints"]),
}


@pytest.mark.filterwarnings("ignore")  # of torch, about the tensors that are made here
@pytest.mark.parametrize("name", CASES)
def test_malformed_source(name, refusal):
    change, words = CASES[name]
    line = refusal(change, "research")
    assert all(word in line for word in words), line


@pytest.mark.parametrize("source", ["next", "ours"])
@pytest.mark.parametrize("name", NESTED_CASES)
def test_malformed_configuration_with_parts(name, source, refusal):
    change, words = NESTED_CASES[name]
    line = refusal(change, source)
    assert all(word in line for word in words), line


def test_other_malformed_configurations(refusal):
    depth = config(projector_type="c_abstractor", projector_downsample=2, projector_kwargs={"depth": MANY})
    assert "projector_kwargs.depth" in refusal(depth, "ours")


def test_unknown_dtype(refusal):
    assert "'florid16'" in refusal(config(dtype="florid16"), "next")


@pytest.mark.common
def test_as_a_process(good, tmp_path):
    shutil.copytree(good, tmp_path / "models")
    write("config.json", DEEP)(tmp_path / "models" / "research")
    command = [sys.executable, ROOT / "convert_weights.py", tmp_path / "models" / "research", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("convert_weights.py: error: ")
    assert not (tmp_path / "out").exists()


def test_error_that_nobody_foresaw(good, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("a\nsurprise")

    monkeypatch.setattr(plan.TensorBuilder, "build", fail)
    command = [str(good / "research"), str(tmp_path / "out")]
    assert main(command) == 2
    source = f"SOURCE {good / 'research'}: RuntimeError: a surprise (--traceback shows where)"
    assert capsys.readouterr().err == f"convert_weights.py: error: {source}\n"
    with pytest.raises(RuntimeError, match="surprise"):
        main([*command, "--traceback"])
    assert list(tmp_path.iterdir()) == []
