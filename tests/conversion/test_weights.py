"""Files of weights: tensors that do not fit, shards, pickles, dtypes."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from builders import GATE, NAN, refused, write_weights
from llava_vr.convert_weights import convert


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({GATE: None}, ["nothing for tensor", "model.language_model.layers.1.mlp.gate_proj.weight"]),
        ({"lm_head.weight": None}, ["nothing for tensor lm_head.weight", "tie_word_embeddings"]),
        ({"model.layers.1.mlp.extra.weight": torch.ones(2)}, ["model.safetensors", "model.layers.1.mlp.extra.weight"]),
        ({"model.layers.3.mlp.gate_proj.weight": NAN}, ["model.safetensors", "model.layers.3", "unexpected"]),
        ({"optimizer.step": torch.ones(2)}, ["unexpected tensor optimizer.step"]),
        ({GATE: torch.ones(64, 47)}, [f"model.safetensors: tensor {GATE}", "[64, 47]", "[64, 48]"]),
        ({GATE: torch.ones(64, 48, dtype=torch.int8)}, [f"model.safetensors: tensor {GATE}", "int8"]),
        ({GATE: NAN}, [f"model.safetensors: tensor {GATE}", "NaN or infinite", "--allow-nonfinite"]),
        ({GATE: NAN.nan_to_num(float("inf"))}, [f"model.safetensors: tensor {GATE}", "NaN or infinite"]),
        (
            {"model.multi_modal_projector.linear_1.weight": torch.ones(48, 32)},
            ["model.multi_modal_projector.linear_1.weight", "model.mm_projector.0.weight", "both"],
        ),
    ],
    ids=["missing", "no head", "unexpected", "layer", "other", "shape", "dtype", "NaN", "infinite", "two for one"],
)
def test_wrong_tensors(changes, words, llava, capsys):
    line = refused(llava(changes), capsys)
    for word in words:
        assert word in line


def test_nonfinite_weights_may_be_kept(llava, tmp_path):
    convert(llava({GATE: NAN}), tmp_path / "out", allow_nonfinite=True)
    kept = load_file(tmp_path / "out" / "model.safetensors")[GATE.replace("model.", "model.language_model.", 1)]
    assert torch.equal(kept.isnan(), NAN.isnan())


def test_large_finite_weights_are_kept(llava, tmp_path):
    convert(llava({GATE: torch.full((64, 48), 3e38)}), tmp_path / "out")


def test_overflow_of_float16(llava, capsys):
    line = refused(llava({GATE: torch.full((64, 48), 1e6)}), capsys, "--dtype", "float16")
    assert GATE in line and "float16" in line


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_truncated_shard(suffix, llava, capsys):
    folder = llava(shards=3, suffix=suffix)
    shard = next(path for path in sorted(folder.iterdir()) if "00002-of" in path.name)
    shard.write_bytes(shard.read_bytes()[:-100])
    line = refused(folder, capsys)
    assert shard.name in line and "truncated" in line
    shard.write_bytes(b"\x10")
    assert shard.name in refused(folder, capsys)


def test_header_that_is_no_header(llava, capsys):
    folder = llava()
    (folder / "model.safetensors").write_bytes((5).to_bytes(8, "little") + b"hello" * 20)
    assert "model.safetensors" in refused(folder, capsys)


def test_shards_and_index_disagree(llava, capsys):
    folder = llava(shards=3)
    index = folder / "model.safetensors.index.json"
    good, names = (
        json.loads(index.read_text())["weight_map"],
        [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)],
    )

    def write(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))

    write({name: shard for name, shard in good.items() if shard != names[2]})
    assert f"shard {names[2]} is missing from the index" in refused(folder, capsys)
    name = next(name for name, shard in good.items() if shard == names[1])
    write({k: v for k, v in good.items() if k != name})
    line = refused(folder, capsys)
    assert f"{names[1]}: tensor {name} is missing from model.safetensors.index.json" in line
    write(good | {"model.layers.7.weight": names[0]})
    assert f"{names[0]}: tensor model.layers.7.weight" in refused(folder, capsys)
    write(good)
    contents = load_file(folder / names[0])
    save_file(contents | {name: torch.ones(2)}, folder / names[0])
    line = refused(folder, capsys)
    assert name in line and names[0] in line and names[1] in line
    (folder / names[0]).unlink()
    line = refused(folder, capsys)
    assert f"shard {names[0]}" in line and "missing" in line
    index.unlink()
    assert "2 of 3 shards" in refused(folder, capsys)


def test_tensor_twice_in_a_header(llava, capsys):
    folder = llava()
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].decode()
    entry = json.dumps(json.loads(header)[GATE])
    header = header.replace("{", f'{{"{GATE}":{entry},', 1).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert f"model.safetensors: tensor {GATE} stands in it twice" in refused(folder, capsys)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("new_format", [True, False])
def test_nothing_of_a_pickle_is_executed(new_format, llava, tmp_path, capsys):
    folder, trace = llava(), tmp_path / "executed"
    (folder / "model.safetensors").unlink()
    content = {"model.norm.weight": torch.ones(3), "evil": Payload(trace)}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    line = refused(folder, capsys)
    assert "pytorch_model.bin" in line and "mkdir" in line and "safetensors" in line
    assert not trace.exists()


def test_old_format_of_torch_is_read(llava, tmp_path):
    folder = llava()
    convert(folder, tmp_path / "new")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": tensors}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(folder, tmp_path / "old")
    assert (tmp_path / "new/model.safetensors").read_bytes() == (tmp_path / "old/model.safetensors").read_bytes()


def test_shared_and_transposed_tensors_of_a_pickle(llava, tmp_path):
    """A head that is the embeddings themselves, matrices that are parts of one, columns before rows."""
    folder = llava()
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_weights(tensors, folder, 1, "safetensors")
    convert(folder, tmp_path / "plain")
    (folder / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    gate, up = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
    tensors[gate], tensors[up] = torch.cat([tensors[gate], tensors[up]]).split(64)
    tensors["model.norm.weight"] = torch.nn.Parameter(tensors["model.norm.weight"])
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].T.contiguous().T
    torch.save(tensors, folder / "pytorch_model.bin")
    convert(folder, tmp_path / "shared", max_shard_size="1GB")
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (tmp_path / "shared/model.safetensors").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux only")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_no_file_stays_mapped(suffix, llava, tmp_path, capsys):
    convert(llava(suffix=suffix, shards=2), tmp_path / "out", max_shard_size="100KB")
    assert GATE in refused(llava({GATE: NAN}, suffix=suffix), capsys, output=tmp_path / "other")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_dtypes_are_kept_and_wide_ones_come_first(llava, tmp_path):
    """Tensors of two bytes before those of four could leave these at odd places of the file."""
    result = convert(llava({GATE: torch.full((64, 48), 0.5, dtype=torch.bfloat16)}), tmp_path / "out")
    assert result.plan.config.dtype == torch.float32
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    last = max((entry["data_offsets"], entry["dtype"]) for name, entry in header.items() if name != "__metadata__")
    assert last[1] == "BF16" and header["lm_head.weight"]["dtype"] == "F32"
