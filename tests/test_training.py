"""training/: sources of rows, LLaVA's rows as chats, lengths, prepared data, streams, rows that are skipped, rates."""

import itertools
import json
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments

from llava_vr import LlavaVrCollator
from llava_vr.training import (
    PARTS,
    EncodedRows,
    EncodedStream,
    HubStream,
    LlavaVrTrainer,
    SkippedRows,
    draw_order,
    hold_out,
    load_rows,
    open_sources,
    part_of,
    prepare,
    to_chat,
)


TURNS = {
    "image first": ("<image>\nWhat is it?", ["image", "What is it?"]),
    "image last": ("What is it?\n<image>", ["image", "What is it?"]),
    "no newline": ("<image>What is it?", ["image", "What is it?"]),
    "image alone": ("<image>", ["image"]),
    "two images": ("<image>\n<image>\nWhich is older?", ["image", "image", "Which is older?"]),
    "images in their places": (
        "First: <image>\nSecond: <image>\nAnd?",
        ["First: ", "image", "Second: ", "image", "And?"],
    ),
    "text alone": ("What is\nit?", ["What is\nit?"]),
}


@pytest.mark.parametrize("case", TURNS)
def test_a_turn_of_llava(case):
    value, expected = TURNS[case]
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "A plum."}]
    chat = to_chat({"id": 7, "image": "plum.png", "conversations": turns, "source": "web"})
    question, answer = chat["messages"]
    assert (question["role"], answer["role"]) == ("user", "assistant")
    assert answer["content"] == [{"type": "text", "text": "A plum."}]
    assert [part.get("text", part["type"]) for part in question["content"]] == expected
    assert chat["images"] == ["plum.png"] and chat["id"] == 7


def test_images_of_llava():
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Why?"}]
    for image, expected in ({}, []), ({"image": None}, []), ({"image": ""}, []), ({"image": ["a", "b"]}, ["a", "b"]):
        chat = to_chat({"conversations": turns, **image})
        assert chat["images"] == expected and chat["messages"][0]["role"] == "system"
    assert to_chat({"conversations": turns, "image": {"bytes": b"x", "path": None}})["images"] == [
        {"bytes": b"x", "path": None}
    ]
    for turn in ({"from": "bot", "value": "x"}, {"from": "gpt", "value": None}, "x"):
        with pytest.raises(ValueError, match="a turn must be"):
            to_chat({"conversations": [turn]})
    chat = {"messages": [], "images": []}
    assert to_chat(chat) == chat


@pytest.fixture(scope="module")
def processor(package):
    return AutoProcessor.from_pretrained(package, trust_remote_code=True)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A folder of 200 of LLaVA's rows, as a list, lines, parquet with the images inside, and more; and the rows."""
    folder, rows, rng = tmp_path_factory.mktemp("llava"), [], np.random.default_rng(0)
    for i in range(200):
        turns = [{"from": "human", "value": f"question {i}?"}, {"from": "gpt", "value": f"answer {i}" * (1 + i % 5)}]
        row = {"id": str(i), "conversations": turns}
        if i % 4:
            row["image"], turns[0]["value"] = f"{i}.png", f"<image>\nquestion {i}?"
            size = (*rng.integers(20, 90, 2), 3)
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(row)
    (folder / "list.json").write_text(json.dumps(rows, indent=1))
    lines = "\n".join(map(json.dumps, rows))
    (folder / "lines.jsonl").write_text(lines)
    datasets = pytest.importorskip("datasets")
    inside = [{**row, "image": str(folder / row["image"]) if "image" in row else None} for row in rows]
    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    features = datasets.Features(
        {"id": datasets.Value("string"), "image": datasets.Image(), "conversations": datasets.List(turn)}
    )
    dataset = datasets.Dataset.from_list(inside, features)
    dataset.save_to_disk(folder / "dataset")
    (folder / "parquet").mkdir()
    for part in range(2):
        half = dataset.select(range(100 * part, 100 * part + 100))
        half.to_parquet(folder / "parquet" / f"{part}.parquet", batch_size=30)
    return folder, rows


def encoded(source, processor, **options):
    rows = EncodedRows(open_sources([str(source)], processor, **options))
    return [rows[i] for i in range(len(rows))]


def assert_same(found: list, expected: list):
    assert len(found) == len(expected)
    for row, other in zip(found, expected):
        assert row.keys() == other.keys()
        assert all(torch.equal(row[key], other[key]) for key in row)


@pytest.fixture(scope="module")
def expected(llava, processor):
    """What the collator makes of the rows, written out as chats."""
    folder, rows = llava
    chats = []
    for row in rows:
        question, answer = row["conversations"]
        text = {"type": "text", "text": question["value"].removeprefix("<image>\n")}
        content = [{"type": "image", "image": str(folder / row["image"])}, text] if "image" in row else [text]
        chats.append(
            {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer["value"]}]}
        )
    collator = LlavaVrCollator(processor)
    return [collator.encode(chat) for chat in chats]


@pytest.mark.parametrize("name", ["list.json", "lines.jsonl", "parquet", "parquet/*.parquet", "dataset"])
def test_the_same_rows_of_every_kind_of_source(llava, processor, expected, name):
    assert_same(encoded(llava[0] / name, processor), expected)


def test_relative_paths_begin_at_the_image_folder(llava, processor, expected, tmp_path):
    rows = llava[1][:5]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert_same(encoded(tmp_path / "rows.json", processor, image_folder=llava[0]), expected[:5])
    with pytest.raises(ValueError, match=r"row 1 \(id '1'\): images\[0\] cannot be read: '1.png' is no file"):
        encoded(tmp_path / "rows.json", processor)


@pytest.mark.common
@pytest.mark.parametrize("processes", [1, 2])
def test_prepared_rows_equal_their_source(llava, processor, expected, tmp_path, processes):
    for name in ("list.json", "parquet"):
        sources = open_sources([str(llava[0] / name)] * 2, processor)
        assert prepare(sources, tmp_path / name, processes) == 400
        assert_same(encoded(tmp_path / name, processor), expected * 2)
        rows = EncodedRows(open_sources([str(tmp_path / name)], processor))
        assert rows.lengths.tolist() == [len(row["input_ids"]) for row in expected * 2]
        assert list(rows.sources[0].rows)[0]["id"] == "0" and len(rows) == 400
    with pytest.raises(ValueError, match="holds prepared data already"):
        prepare(sources, tmp_path / name)


def test_prepared_lengths_hold_for_one_prompt(llava, package, tmp_path):
    processor = AutoProcessor.from_pretrained(package, trust_remote_code=True)
    prepare(open_sources([str(llava[0] / "list.json")], processor), tmp_path)
    processor.chat_template += "!"
    with pytest.raises(ValueError, match="prepared with another tokenizer, chat template"):
        _ = EncodedRows(open_sources([str(tmp_path)], processor)).lengths


@pytest.mark.parametrize("layout", ["anyres", "slices", "square"])
def test_lengths_need_no_pixels(tiny_config, processor_for, llava, tmp_path, monkeypatch, layout):
    options = {"image_merge_type": "slices", "image_separator_ids": [60, 70]} if layout == "slices" else {}
    aspect = {} if layout != "square" else {"image_aspect_ratio": "square", "image_merge_type": "flat"}
    processor = processor_for(tiny_config(**options, **aspect))
    folder, rows = llava
    turned = Image.new("RGB", (90, 30))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    chats = [to_chat(row) for row in rows[:40]]
    chats += [{**chats[1], "images": [str(tmp_path / "turned.jpg")]}]
    chats += [{**chats[1], "images": [np.zeros((30, 90, 3), np.uint8)]}, {**chats[1], "images": [turned]}]
    collator = LlavaVrCollator(processor, image_folder=folder)
    expected = [len(collator.encode(chat)["input_ids"]) for chat in chats]

    def decode(self):
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    assert [collator.length(chat) for chat in chats] == expected


def test_lengths_where_the_tokenizer_adds_tokens(tiny_config, processor_for):
    """A beginning that the tokenizer adds counts, and none is added to one that the template wrote."""
    from tokenizers.processors import TemplateProcessing

    chat = {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]}
    for template in ("", "<s>"):
        processor = processor_for(tiny_config())
        processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        processor.chat_template = template + processor.chat_template
        collator = LlavaVrCollator(processor)
        assert collator.length(chat) == len(collator.encode(chat)["input_ids"])
        assert collator.encode(chat)["input_ids"].tolist().count(1) == 1


def test_weights_and_rows_held_out():
    order = draw_order([10, 6], [2, 0.5])
    counts = Counter(order.tolist())
    assert [counts[i] for i in range(10)] == [2] * 10 and sum(counts[i] for i in range(10, 16)) == 3
    assert order.tolist() == draw_order([10, 6], [2, 0.5]).tolist()
    assert draw_order([3, 2]).tolist() == [0, 1, 2, 3, 4]
    train, held = hold_out(order, 4)
    assert len(held) == len(set(held)) == 4 and set(held) | set(train) == set(order) and not set(held) & set(train)
    for weights in ([1], [1, 0], [1, -1]):
        with pytest.raises(ValueError, match="weights must be positive, one for each of 2 sources"):
            draw_order([3, 2], weights)
    with pytest.raises(ValueError, match="none would be left"):
        hold_out(order, 13)


BAD = {
    "no JSON list": ("list.json", '[{"a": 1}', "list.json is no JSON list"),
    "no JSON object": ("rows.json", "[{}, 3]", "rows.json, row 2 is no JSON object"),
    "no JSON line": ("rows.jsonl", '{"a": 1}\n3', "rows.jsonl, line 2 is no JSON object"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(tmp_path, case):
    name, text, match = BAD[case]
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=match):
        load_rows(tmp_path / name)


def test_json_needs_no_other_library(llava, monkeypatch):
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    assert load_rows(llava[0] / "list.json") == load_rows(llava[0] / "lines.jsonl") == llava[1]
    with pytest.raises(ValueError, match="parquet is no JSON: `pip install pyarrow`"):
        load_rows(llava[0] / "parquet")
    with pytest.raises(ValueError, match="no/such is no file or folder .*`pip install datasets`"):
        load_rows("no/such")


def break_pictures(llava, tmp_path, broken: dict[int, str]):
    """The rows with pictures that are missing, no picture at all, or cut off in their pixels."""
    folder, rows = llava
    rows = json.loads(json.dumps(rows))
    for row in rows:
        if "image" in row:
            row["image"] = str(folder / row["image"])
    for i, how in broken.items():
        rows[i]["image"] = str(tmp_path / f"{i}.png")
        data = (folder / f"{i}.png").read_bytes()
        content = {"missing": None, "empty": b"", "cut": data[: len(data) // 2]}[how]
        if content is not None:
            (tmp_path / f"{i}.png").write_bytes(content)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path / "rows.json"


BROKEN = {5: "missing", 50: "empty", 150: "cut"}


def test_broken_rows_are_replaced_and_named(llava, processor, expected, tmp_path):
    source, skipped = break_pictures(llava, tmp_path, BROKEN), SkippedRows(tmp_path / "out" / "skipped.jsonl")
    rows = EncodedRows(open_sources([str(source)], processor), skipped=skipped)
    replaced = [expected[i + (i in BROKEN)] for i in range(200)]
    assert_same([rows[i] for i in range(200)], replaced)
    assert skipped.names() == ["5", "50", "150"]
    assert "5.png" in skipped.path.read_text().splitlines()[0]
    rows = EncodedRows(rows.sources)
    with pytest.raises(ValueError, match=r"row 50 \(id '50'\): images\[0\] cannot be read"):
        rows[50]


def test_too_many_broken_rows_stop(llava, processor, tmp_path):
    source = break_pictures(llava, tmp_path, {i: "empty" for i in range(1, 200, 4)})
    rows = EncodedRows(open_sources([str(source)], processor), skipped=SkippedRows(tmp_path / "skipped.jsonl"))
    with pytest.raises(ValueError, match=r"10 of \d\d rows cannot be used, more than 1%: .*skipped.jsonl names them"):
        for i in range(200):
            rows[i]


def test_prepare_checks_every_row(llava, processor, tmp_path):
    source = break_pictures(llava, tmp_path, BROKEN)
    with pytest.raises(ValueError, match=r"row 5 \(id '5'\): images\[0\] cannot be read"):
        prepare(open_sources([str(source)], processor), tmp_path / "raised")
    skipped = SkippedRows(tmp_path / "skipped.jsonl")
    assert prepare(open_sources([str(source)], processor), tmp_path / "out", 2, skipped) == 198
    assert skipped.names() == ["5", "50"]  # of a picture that is cut off, the size can be read


def identify(rows) -> list[bytes]:
    return [row["input_ids"].numpy().tobytes() for row in rows]


def first_pass(datasets, workers: int, share: int, collate) -> list:
    """What each process reads of a stream, up to its share of one pass."""
    found = []
    for dataset in datasets:
        batches = iter(DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=collate))
        found += [row for _ in range(share // 4) for row in next(batches)]
    return found


@pytest.mark.common
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["list.json", "parquet"])
def test_streams_of_two_processes(llava, processor, expected, name, workers):
    """Text-only rows mixed in, no row twice in a pass, all of them in one that is whole, another order in the next."""
    rows = EncodedRows(open_sources([str(llava[0] / name)], processor))
    streams = [EncodedStream(rows, rank, 2) for rank in range(2)]
    found = identify(first_pass(streams, workers, 96, list))
    assert len(set(found)) == len(found) == 192 and set(found) < set(identify(expected))
    whole = iter(EncodedStream(rows))
    passes = [identify(next(whole) for _ in range(200)) for _ in range(2)]
    assert set(passes[0]) == set(passes[1]) == set(identify(expected)) and passes[0] != passes[1]
    with pytest.raises(ValueError, match="200 rows cannot be streamed to 300"):
        next(iter(EncodedStream(rows, 0, 300)))


def test_a_stream_leaves_broken_rows_out(llava, processor, expected, tmp_path):
    skipped = SkippedRows(tmp_path / "skipped.jsonl")
    rows = EncodedRows(open_sources([str(break_pictures(llava, tmp_path, BROKEN))], processor), skipped=skipped)
    stream = iter(EncodedStream(rows))
    found = identify(next(stream) for _ in range(197))
    assert set(found) == set(identify(row for i, row in enumerate(expected) if i not in BROKEN))


@pytest.mark.common
def test_a_stream_of_the_hub(llava, processor, expected):
    """`datasets` reads a folder as it reads the Hub."""
    collator, name = LlavaVrCollator(processor), str(llava[0] / "parquet")
    found = [identify(itertools.islice(HubStream(name, collator, rank, 2), 100)) for rank in range(2)]
    assert sorted(found[0] + found[1]) == sorted(identify(expected))


def test_learning_rates_of_parts(package, processor, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(package, trust_remote_code=True)
    model.model.language_model.requires_grad_(False)
    rates = {"vision_tower": 2e-6, "vision_remember": 1e-4}
    arguments = TrainingArguments(str(tmp_path), learning_rate=1e-5, weight_decay=0.1, use_cpu=True, report_to="none")
    trainer = LlavaVrTrainer(model=model, args=arguments, learning_rates=rates)
    groups = trainer.create_optimizer().param_groups
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(trained)
    decayed = trainer.get_decay_parameter_names(model)
    for name, parameter in trained.items():
        group = found[id(parameter)]
        assert group["lr"] == rates.get(part_of(name), 1e-5)
        assert group["weight_decay"] == (0.1 if name in decayed else 0.0)
    assert {part_of(name) for name in trained} == set(PARTS) - {"language_model"}


@pytest.mark.slow
def test_558_thousand_prepared_rows(tmp_path, processor):
    """Opened in under 2 s, with under 0.2 GiB more in a process. Takes a minute:
    python -m pytest tests/test_training.py -m slow -k 558 -s"""
    import pyarrow as pa

    from llava_vr.training.prepare import BATCH, _schema
    from llava_vr.training.sources import fingerprint

    count, generator = 558_000, np.random.default_rng(0)
    words = [f"word{i}" for i in range(1000)]
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, _schema()) as writer:
        for first in range(0, count, BATCH):
            rows = []
            for i in range(first, min(first + BATCH, count)):
                text = " ".join(words[j] for j in generator.integers(0, 1000, 12))
                content = [[{"type": "image"}], [{"type": "text", "text": text}]]
                messages = [{"role": role, "content": parts} for role, parts in zip(("user", "assistant"), content)]
                row = {"id": str(i), "messages": messages, "images": [{"path": f"/data/00453/00453{i}.jpg"}]}
                rows.append({**row, "length": int(generator.integers(100, 800))})
            writer.write_batch(pa.RecordBatch.from_pylist(rows, _schema()))
    info = {"rows": count, "batch": BATCH, "fingerprint": fingerprint(processor)}
    (tmp_path / "info.json").write_text(json.dumps(info))

    def resident() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 2**30

    before, start = resident(), time.perf_counter()
    source = open_sources([str(tmp_path)], processor)[0]
    lengths = source.lengths()
    opened = time.perf_counter() - start
    for i in generator.permutation(count)[:2000]:
        assert source[int(i)]["id"] == str(i)
    added = resident() - before
    print(f"\n{len(lengths):,} rows opened in {opened:.2f} s; {added:.3f} GiB more after 2,000 rows at random")
    assert len(lengths) == count and opened < 2 and added < 0.2
