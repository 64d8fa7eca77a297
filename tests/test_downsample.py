"""The number of tokens is the caller's choice: in processor, chat template, pipeline, collator and command line."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from llava_vr import LlavaVrCollator


ROOT = Path(__file__).parents[1]
CHOICES = [1, 2, 4]
WIDE, SMALL = np.zeros((40, 90, 3), np.uint8), np.full((20, 33, 3), 200, np.uint8)


def chat(*images):
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def config(tiny_config):
    return tiny_config(projector_downsample_choices=CHOICES)


@pytest.fixture(scope="module")
def processor(config, processor_for):
    return processor_for(config)


@pytest.fixture(scope="module")
def folder(config, make_model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("choosing")
    make_model(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def placeholders(inputs, processor):
    return int((torch.as_tensor(inputs["input_ids"]) == processor.image_token_id).sum())


@pytest.mark.parametrize("asked", [1, 2, 4, [4, 1], [2, 2], None])
def test_processor_counts_what_the_model_packs(config, processor, make_model, asked):
    inputs = processor([WIDE, SMALL], "<image> and <image>", projector_downsample=asked, return_tensors="pt")
    if asked is None:
        assert "image_downsamples" not in inputs
    else:
        assert inputs["image_downsamples"].tolist() == ([asked] * 2 if isinstance(asked, int) else asked)
    inputs.pop("input_ids"), inputs.pop("attention_mask")
    features = make_model(config).get_image_features(**inputs)
    sizes = [image.shape[:2] for image in (WIDE, SMALL)]
    counts = processor._get_num_multimodal_tokens(sizes, projector_downsample=asked).num_image_tokens
    assert [len(image) for image in features.pooler_output] == counts


def test_chat_template_takes_it(processor):
    def tokens(**options):
        return processor.apply_chat_template(
            chat(WIDE), tokenize=True, return_dict=True, return_tensors="pt", **options
        )

    few, many = (tokens(processor_kwargs={"projector_downsample": s}) for s in (4, 1))
    layout = processor.image_layout
    assert placeholders(few, processor) == layout.num_tokens((40, 90), 4)
    assert placeholders(many, processor) == layout.num_tokens((40, 90), 1)
    assert placeholders(tokens(), processor) == layout.num_tokens((40, 90), 2)


@pytest.mark.parametrize("asked", [3, 0, 2.0, [2.0], True, [1, 2], [1, 3]])
def test_what_is_no_choice_is_refused(processor, asked):
    with pytest.raises(ValueError, match=r"projector_downsample must be one of \[1, 2, 4\].*found"):
        processor(WIDE, "<image>", projector_downsample=asked)


@pytest.mark.parametrize("asked", [np.int64(4), torch.tensor(4), np.array([4])], ids=["numpy", "tensor", "array"])
def test_integers_of_any_kind(processor, asked):
    assert processor(WIDE, "<image>", projector_downsample=asked)["image_downsamples"].tolist() == [4]
    options = {"projector_downsample": asked}
    assert processor(WIDE, "<image>", images_kwargs=options)["image_downsamples"].tolist() == [4]


def test_without_choices_only_the_configured_one(tiny_config, processor_for):
    processor = processor_for(tiny_config())
    assert processor(WIDE, "<image>", projector_downsample=2)["image_downsamples"].tolist() == [2]
    with pytest.raises(ValueError, match=r"one of \[2\]"):
        processor(WIDE, "<image>", projector_downsample=4)


def test_saved_processor_keeps_its_choices(folder):
    assert AutoProcessor.from_pretrained(folder, trust_remote_code=True).projector_downsample_choices == CHOICES


def test_pipeline(folder, processor):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    answers = []
    for s in CHOICES:
        options = {"projector_downsample": s}
        inputs = processor.apply_chat_template(
            chat(WIDE),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=options,
        )
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        found = pipe(
            text=chat(WIDE),
            return_full_text=False,
            generate_kwargs={"max_new_tokens": 5, "do_sample": False},
            processor_kwargs=options,
        )
        assert found[0]["generated_text"] == processor.decode(expected, skip_special_tokens=True)
        answers.append(expected.tolist())
    assert len({tuple(answer) for answer in answers}) > 1  # tokens that differ in number answer differently


# ------------------------------------------------------------------------------------------------------ collator


def rows(count):
    return [
        {"messages": chat(WIDE, SMALL) + [{"role": "assistant", "content": "A plum."}], "id": i} for i in range(count)
    ]


def test_collator_takes_one_for_all(processor):
    collator = LlavaVrCollator(processor, projector_downsample=4)
    batch = collator(rows(2))
    assert batch["image_downsamples"].tolist() == [4] * 4
    layout = processor.image_layout
    expected = 2 * (layout.num_tokens((40, 90), 4) + layout.num_tokens((20, 33), 4))
    assert placeholders(batch, processor) == expected


def test_collator_chooses_for_each_row(processor, config, make_model):
    collator = LlavaVrCollator(processor, projector_downsample="random", seed=1)
    batch = collator(rows(12))
    chosen = batch["image_downsamples"].tolist()
    assert chosen[::2] == chosen[1::2] and set(chosen) == set(CHOICES)
    same = LlavaVrCollator(processor, projector_downsample="random", seed=1)
    assert same(rows(12))["image_downsamples"].tolist() == chosen
    assert same(rows(12))["image_downsamples"].tolist() != chosen
    model = make_model(config).train()
    model(**batch).loss.backward()
    assert all(p.grad.any() for p in model.model.vision_remember.parameters())


def test_workers_choose_differently(processor):
    collator = LlavaVrCollator(processor, projector_downsample="random")
    collator(rows(1))  # what the main process drew is not theirs
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(rows(24), batch_size=12, num_workers=2, collate_fn=collator)
    batches = [batch["image_downsamples"].tolist() for _ in range(2) for batch in loader]
    assert all(a != b for a, b in itertools.combinations(batches, 2))  # of both workers, in both epochs


def test_fits_counts_the_most_tokens(processor):
    row = rows(1)[0]
    length = len(LlavaVrCollator(processor).encode(row, 0, 1)["input_ids"])
    for limit, fits in ((length, True), (length - 1, False)):
        assert LlavaVrCollator(processor, limit, projector_downsample="random").fits(row) == fits


def test_collator_names_the_choices(processor):
    with pytest.raises(ValueError, match=r"projector_downsample must be one of \[1, 2, 4\] or 'random', found 3"):
        LlavaVrCollator(processor, projector_downsample=3)


@pytest.mark.common
def test_ask_takes_it():
    def ask(*options):
        command = [sys.executable, ROOT / "examples/ask.py", ROOT / "examples/receipt.png", "how much is the salad?"]
        return subprocess.run([*command, *options], capture_output=True, text=True)

    assert ask("--downsample", "2").stdout == "89\n"
    refused = ask("--downsample", "5")
    assert refused.returncode == 2 and "projector_downsample must be one of" in refused.stderr
