"""Two processes on the CPU: DDP, FSDP2, tensor parallel and Trainer compute what one does, whoever holds the images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llava_vr import LlavaVrCollator


pytestmark = pytest.mark.common
RANKS = Path(__file__).parent / "ranks.py"
TIME_LIMIT = 240  # a hang is a failure
IMAGE, TEXT = [9, (40, 90), 10, 11], [5, 6, 7, 8, 20, 21]
BATCHES = {  # the rows of both ranks
    "images on one rank": ([IMAGE, TEXT], [TEXT[::-1], TEXT[:3]]),
    "images on the other": ([TEXT], [[(64, 64), 12, (20, 33), 13]]),
    "images on both": ([IMAGE], [[12, (33, 64), 13, 14], TEXT]),
    "no image": ([TEXT], [TEXT[::-1]]),
    "one rank without modules": ([[9, (40, 90, 1), 10, 11]], [[12, (33, 64, 4), 13, (20, 33), 14], TEXT]),
}


@pytest.fixture
def ranks(tmp_path):
    """`ranks(kind, model, case, processes=2)`: what processes of tests/ranks.py make of the case."""

    def run(kind: str, model, case: dict, processes: int = 2) -> dict:
        model.save_pretrained(tmp_path)
        torch.save(case, tmp_path / "case.pt")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*command, RANKS, kind, tmp_path], env=env, capture_output=True, text=True, timeout=TIME_LIMIT
        )
        assert done.returncode == 0, done.stderr[-5000:]
        return torch.load(tmp_path / "result.pt")

    return run


def with_labels(inputs: dict) -> dict:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return {**inputs, "labels": labels, "num_items_in_batch": (labels[:, 1:] != -100).sum()}


def split(inputs: dict, rows: tuple[list, list]) -> list[dict]:
    """The inputs of both ranks, of a batch of the rows of both. The mean of their losses is that of the batch."""
    parts, row, image = [], 0, 0
    for rank in rows:
        images = sum(isinstance(part, tuple) for r in rank for part in r)
        part = {key: inputs[key][row : row + len(rank)] for key in ("input_ids", "attention_mask", "labels")}
        if images:
            names = {"pixel_values", "image_sizes", "image_downsamples"} & inputs.keys()
            part |= {key: inputs[key][image : image + images] for key in names}
        parts.append({**part, "num_items_in_batch": inputs["num_items_in_batch"] / 2})
        row, image = row + len(rank), image + images
    return parts


def train_alone(model, inputs: dict, frozen: bool) -> dict:
    model.train()
    model.model.vision_tower.requires_grad_(not frozen)
    optimizer, steps = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(2):
        loss = model(**inputs).loss
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        steps.append({"loss": loss.detach(), "grads": grads})
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return {"steps": steps, "evaluation": model.eval()(**inputs).loss}


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen tower", "whole model"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_training_equals_one_process(tiny_config, make_model, make_inputs, ranks, tmp_path, kind, frozen):
    config = tiny_config(projector_downsample_choices=[1, 2, 4])
    batches = [with_labels(make_inputs(config, [*first, *second])) for first, second in BATCHES.values()]
    parts = [split(inputs, rows) for inputs, rows in zip(batches, BATCHES.values())]
    results = ranks(kind, make_model(config), {"batches": parts, "frozen": frozen})
    for name, inputs, found in zip(BATCHES, batches, results):
        expected = train_alone(make_model(config), inputs, frozen)
        for ours, alone in zip(found["steps"], expected["steps"]):
            torch.testing.assert_close(ours["loss"], alone["loss"], rtol=0, atol=1e-5, msg=name)
            assert set(alone["grads"]) <= set(ours["grads"])
            for key, grad in ours["grads"].items():  # None alone, where nothing depends on it, is zero here
                other = alone["grads"].get(key, torch.zeros_like(grad))
                torch.testing.assert_close(grad, other, rtol=0, atol=1e-5, msg=f"{name}: {key}")
        torch.testing.assert_close(found["evaluation"], expected["evaluation"], rtol=0, atol=1e-5, msg=name)
    assert (tmp_path / kind / "modeling_llava_vr.py").is_file()
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / kind, trust_remote_code=True)
    with torch.no_grad():
        loss = saved(**batches[-1]).loss
    torch.testing.assert_close(loss, expected["evaluation"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_tensor_parallel_equals_one_process(tiny_config, make_model, make_inputs, ranks, family):
    config = tiny_config(family)
    model = make_model(config)
    inputs = make_inputs(config, [IMAGE, TEXT, [(64, 64), 12, (20, 33), 13]])
    prompt = make_inputs(config, [IMAGE, TEXT], padding_side="left")
    found = ranks("tp", model, {"inputs": inputs, "prompt": prompt})
    assert any("language_model.layers.0.self_attn.q_proj" in name for name in found["sharded"])
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(**inputs).logits, rtol=0, atol=1e-5)
    assert torch.equal(found["answers"], model.generate(**prompt, max_new_tokens=8, do_sample=False))


def chat(text: str, *sizes: tuple[int, int]) -> dict:
    content = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": text[::-1]}]
    return {"messages": messages, "images": [torch.arange(3 * h * w).view(3, h, w) % 251 for h, w in sizes]}


CHATS = {
    "mixed": [
        *(chat("one", (40, 90)), chat("two", (20, 33), (64, 64))),  # a batch with images on one process ...
        *(chat("nothing to see"), chat("nor here")),  # ... and a batch without on the other
        *(chat("again", (33, 64)), chat("no more")),
        chat("one left over"),
    ],
    "text only": [chat("hello"), chat("a longer text"), chat("good bye")],
}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("rows", CHATS)
def test_trainer_evaluates_and_predicts(tiny_config, make_model, processor_for, ranks, tmp_path, rows, processes):
    config, rows = tiny_config(), CHATS[rows]
    model, processor = make_model(config), processor_for(config)
    processor.save_pretrained(tmp_path)
    found = ranks("predict", model, {"rows": rows}, processes)
    batches = [LlavaVrCollator(processor)([row]) for row in rows]
    assert found["metrics"]["rows"] == len(rows)
    assert found["metrics"]["labels"] == sum(int((batch["labels"] != -100).sum()) for batch in batches)
    for batch, logits, labels in zip(batches, found["logits"], found["labels"], strict=True):
        length = batch["labels"].shape[1]
        assert torch.equal(labels[:length], batch["labels"][0]) and (labels[length:] == -100).all()
        with torch.no_grad():
            expected = model(**batch).logits[0]
        torch.testing.assert_close(logits[:length], expected, rtol=0, atol=1e-5)
