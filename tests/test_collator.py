"""The collator: what is learned, which image belongs to which row, and rows that cannot be used."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from llava_vr import LlavaVrCollator


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def turn(role: str, *parts) -> dict:
    """A message of texts and pictures; None is an image part that takes the row's next image."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    for part, given in zip(content, parts):
        if isinstance(given, Image.Image):
            part["image"] = given
    return {"role": role, "content": content}


def chat(*parts, answer: str = "yes", **row) -> dict:
    return {"messages": [turn("user", *parts), {"role": "assistant", "content": answer}], **row}


MIXED = [
    {
        "messages": [
            turn("user", "first ", None, " and ", None),
            turn("assistant", "one"),
            turn("user", "then ", picture(2, 90, 33)),
            turn("assistant", "two, three"),
        ],
        "images": [picture(0), picture(1, 64, 64)],
    },
    chat("no picture at all", answer="none"),
    chat(picture(3, 20, 50), "what?", answer="a plum"),
]
SAID = ["one</s>two, three</s>", "none</s>", "a plum</s>"]


@pytest.fixture(scope="module", params=["anyres", "square"])
def config(request, tiny_config):
    return tiny_config(projector_kwargs={}, image_aspect_ratio=request.param, image_merge_type="flat")


@pytest.fixture(scope="module")
def processor(config, processor_for):
    return processor_for(config)


def test_labels_are_what_the_assistant_says(processor):
    batch = LlavaVrCollator(processor)(MIXED)
    said = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert said == SAID
    learned = batch["labels"] != -100
    assert torch.equal(batch["labels"][learned], batch["input_ids"][learned])
    assert not learned[batch["attention_mask"] == 0].any()


def test_one_batch_equals_its_rows(processor):
    """Ids, padding and images of a mixed batch are those of the processor alone, row after row."""
    batch = LlavaVrCollator(processor)(MIXED)
    expected = [
        processor.apply_chat_template(
            [
                turn("user", "first ", picture(0), " and ", picture(1, 64, 64)),
                *MIXED[0]["messages"][1:],
            ],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ),
        *(
            processor.apply_chat_template(row["messages"], tokenize=True, return_dict=True, return_tensors="pt")
            for row in MIXED[1:]
        ),
    ]
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], expected):
        assert ids[mask.bool()].tolist() == row["input_ids"][0].tolist()
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert (ids[mask == 0] == processor.tokenizer.pad_token_id).all()
    images = [image for row in expected if "pixel_values" in row for image in row["pixel_values"]]
    assert len(batch["pixel_values"]) == len(images) == 4
    for image, alone in zip(batch["pixel_values"], images):
        assert torch.equal(image[: len(alone)], alone) and not image[len(alone) :].any()
    assert batch["image_sizes"].tolist() == [[30, 40], [64, 64], [33, 90], [50, 20]]


def test_the_loss_of_a_batch_is_that_of_its_rows(config, processor, make_model):
    model, collator = make_model(config), LlavaVrCollator(processor)
    with torch.no_grad():
        together = model(**collator(MIXED)).loss
        alone = [model(**collator([row])).loss for row in MIXED]
    counts = [int((collator([row])["labels"] != -100).sum()) for row in MIXED]
    expected = sum(loss * count for loss, count in zip(alone, counts)) / sum(counts)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-5)


def test_rows_without_images_and_with_gaps(processor):
    """Text alone gives no pixels; the None that `datasets` puts where a key is missing is as if it were not there."""
    collator = LlavaVrCollator(processor)
    batch = collator([chat("a"), chat("bc", images=None), chat("d", images=[])])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    gaps = [{"type": "image", "text": None, "image": None}, {"type": "text", "text": "what?", "image": None}]
    row = {"messages": [{"role": "user", "content": gaps}, {"role": "assistant", "content": "a plum"}]}
    row["images"] = [picture(3, 20, 50)]
    for key, value in collator([MIXED[2]]).items():
        assert torch.equal(collator([row])[key], value)


def test_relative_paths_begin_at_the_image_folder(processor, tmp_path, monkeypatch):
    picture(3).save(tmp_path / "a.png")
    expected = LlavaVrCollator(processor)([chat(picture(3), "what?")])
    row = chat(None, "what?", images=["a.png"])
    batch = LlavaVrCollator(processor, image_folder=tmp_path)([row])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    monkeypatch.chdir(tmp_path)
    assert torch.equal(LlavaVrCollator(processor)([row])["pixel_values"], expected["pixel_values"])


def test_it_goes_to_workers_and_leaves_the_processor_alone(processor):
    processor.tokenizer.model_max_length = 30
    try:
        collator = pickle.loads(pickle.dumps(LlavaVrCollator(processor, max_length=500)))
        assert collator(MIXED)["input_ids"].shape[1] > 30
        assert LlavaVrCollator(processor).max_length == processor.tokenizer.model_max_length == 30
    finally:
        processor.tokenizer.model_max_length = 10**30


@pytest.mark.parametrize("eos", ["</s>", None])
def test_a_tokenizer_without_a_pad_token(config, processor_for, make_model, eos):
    processor = processor_for(config)
    model, expected = make_model(config), LlavaVrCollator(processor)(MIXED)
    processor.tokenizer.pad_token, processor.tokenizer.eos_token = None, eos
    batch = LlavaVrCollator(processor)(MIXED)
    kept = expected["attention_mask"].bool()
    assert torch.equal(batch["input_ids"][kept], expected["input_ids"][kept])
    assert (batch["input_ids"][~kept] == (0 if eos is None else 2)).all()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**expected).loss)


BAD = {
    "missing image file": (chat(None, "what?", images=["no/such.png"]), "such.png.*no file that exists"),
    "image part without a picture": (chat(None, "what?"), "1 image parts.*images has 0"),
    "picture without an image part": (chat("what?", images=[picture(0)]), "0 image parts.*images has 1"),
    "image token in the text": (chat("<image> what?"), "text holds '<image>'"),
    "empty conversation": ({"messages": []}, "messages is empty"),
    "no messages": ({"text": "what?"}, "messages is empty or missing"),
    "content that is no part": (
        {"messages": [{"role": "user", "content": ["what?"]}, {"role": "assistant", "content": "yes"}]},
        "content must be .* found 'what.'",
    ),
    "no assistant": ({"messages": [turn("user", "what?")]}, "all labels are masked"),
    "longer than the context": (chat("what?" * 100), "has 5.. tokens.*max_length is 300"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named(processor, case):
    row, match = BAD[case]
    collator = LlavaVrCollator(processor, max_length=300)
    with pytest.raises(ValueError, match=rf"^row 1\b.*{match}"):
        collator([chat("fine"), row])
    with pytest.raises(ValueError, match=rf"^row 0 \(id 'r-7'\).*{match}"):
        collator([{**row, "id": "r-7"}])


def test_a_template_without_markers_is_refused(config, processor_for):
    processor = processor_for(config)
    processor.chat_template = processor.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(ValueError, match=r"^row 0: all labels are masked.*\{% generation %\}"):
        LlavaVrCollator(processor)([chat("what?")])


def test_long_rows_are_dropped_whole(processor):
    long = chat(picture(5), "what?" * 100, answer="long")
    rows = [MIXED[2], long, chat("short")]
    collator = LlavaVrCollator(processor, max_length=300, too_long="drop")
    expected = collator([rows[0], rows[2]])
    for key, value in collator(rows).items():
        assert torch.equal(value, expected[key]), key
    assert [collator.fits(row) for row in rows] == [True, False, True]
    with pytest.raises(ValueError, match="^row 0 has 5.. tokens.*too_long='drop', which needs a row that fits"):
        collator([long])
    edge = len(collator.encode(MIXED[2])["input_ids"])
    assert LlavaVrCollator(processor, max_length=edge).fits(MIXED[2])
    assert not LlavaVrCollator(processor, max_length=edge - 1).fits(MIXED[2])
    with pytest.raises(ValueError, match="too_long must be"):
        LlavaVrCollator(processor, too_long="truncate")
