"""The processor: every mode end to end, parity with transformers, inputs of every kind, and refusals."""

import base64
import functools
import http.server
import importlib.util
import io
import json
import logging
import shutil
import socket
import threading
import zlib

import numpy as np
import pytest
import torch
import transformers
from packaging import version
from PIL import Image, ImageOps
from transformers import AutoProcessor, LlavaNextProcessor, LlavaProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from llava_vr import LlavaVrForConditionalGeneration, LlavaVrProcessor, images_llava_vr


MODES = {
    "anyres": {},
    "anyres_max_2": {"image_aspect_ratio": "anyres_max_2"},
    "spatial": {"image_merge_type": "spatial"},
    "flat": {"image_merge_type": "flat"},
    "grid_not_divided": {"projector_downsample": 3, "vision": {"image_size": 40}},
    "three_patches_a_side": {"projector_type": "c_abstractor", "projector_downsample": 3},
    "slices": {
        "image_merge_type": "slices",
        "image_separator_ids": [7, 8],
        "image_grid_pinpoints": [[32, 32], [32, 96], [96, 32], [64, 64]],
    },
    "pad": {"image_aspect_ratio": "pad"},
    "square": {"image_aspect_ratio": "square"},
    "siglip_square": {"family": "siglip", "image_aspect_ratio": "square"},
}
SIZES = [(32, 32), (40, 90), (100, 20), (70, 65), (1, 1), (3, 200)]  # (height, width)
ONE_TILE = ("pad", "square")


def random_image(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def channels_first(image):
    return np.array(image).transpose(2, 0, 1)


@pytest.fixture(params=["pil", "torchvision"])
def backend(request):
    if request.param == "torchvision" and importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    return request.param


@pytest.fixture
def processor(tiny_config, processor_for, backend):
    return processor_for(tiny_config(), backend)


@pytest.fixture
def pixels_of(processor):
    """The pixel values of one image, in whatever form it is given."""
    return lambda image, **kwargs: processor(images=image, return_tensors="pt", **kwargs)["pixel_values"]


# ------------------------------------------------------------------------------------------------ modes


@pytest.mark.parametrize("mode", MODES)
def test_placeholders_are_as_many_as_the_models_vision_tokens(tiny_config, processor_for, backend, mode):
    config = tiny_config(**MODES[mode])
    processor, model = processor_for(config, backend), LlavaVrForConditionalGeneration(config)
    images = [random_image(*size) for size in SIZES]
    text = ["a<image>", "b<image>c<image>", "", "<image>" * 3]
    inputs = processor(images=images, text=text, padding=True, return_tensors="pt")

    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    counts = [len(tokens) for tokens in features.pooler_output]
    assert counts == processor._get_num_multimodal_tokens(image_sizes=SIZES)["num_image_tokens"]
    assert [processor.replace_image_token(inputs, i) for i in range(6)] == ["<image>" * n for n in counts]
    by_row = [counts[0], counts[1] + counts[2], 0, sum(counts[3:])]
    assert (inputs["input_ids"] == config.image_token_id).sum(1).tolist() == by_row
    assert inputs["image_sizes"].tolist() == [list(size) for size in SIZES]
    assert processor.image_layout == config.image_layout
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_shapes(tiny_config, processor_for, backend, mode):
    config = tiny_config(**MODES[mode])
    side = config.vision_config.image_size
    pixels = processor_for(config, backend)(images=[random_image(70, 65)] * 2, return_tensors="pt")["pixel_values"]
    assert pixels.shape == ((2, 3, side, side) if "square" in mode or mode == "pad" else (2, 5, 3, side, side))


@pytest.mark.parametrize("mode", ["anyres", "pad", "slices", "three_patches_a_side"])
def test_save_and_reload(tiny_config, processor_for, tmp_path, mode, backend):
    config = tiny_config(**MODES[mode])
    processor = processor_for(config, backend)
    processor.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "processor_config.json").read_text())
    for name in ("image_aspect_ratio", "image_merge_type", "projector_downsample"):
        assert values[name] == getattr(config, name)
    assert values["patch_size"] == 8
    loaded = LlavaVrProcessor.from_pretrained(tmp_path, backend=backend)
    assert loaded.to_dict() == {k: v for k, v in processor.to_dict().items() if k != "auto_map"}
    assert loaded.chat_template == processor.chat_template
    inputs = {"images": [random_image(40, 90)], "text": "<image>hi", "return_tensors": "pt"}
    for key, value in processor(**inputs).items():
        assert torch.equal(loaded(**inputs)[key], value)


def test_package_loads_with_auto_processor(package):
    processor = AutoProcessor.from_pretrained(package, trust_remote_code=True)
    assert type(processor).__name__ == "LlavaVrProcessor" and type(processor) is not LlavaVrProcessor
    assert (processor(images=random_image(64, 64), text="<image>", return_tensors="pt")["input_ids"] == 3).all()


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["image_processor"]["image_grid_pinpoints"].reverse(),  # another tiling where two tie
        lambda values: values.update(projector_downsample=4),
        lambda values: values.update(image_merge_type="flat"),
        lambda values: values["image_processor"].update(crop_size={"height": 16, "width": 16}),
    ],
    ids=["image_grid_pinpoints in another order", "projector_downsample", "image_merge_type", "size of a tile"],
)
def test_a_processor_that_tiles_unlike_the_model_beside_it_is_refused(package, tmp_path, change):
    shutil.copytree(package, tmp_path / "package")
    LlavaVrProcessor.from_pretrained(tmp_path / "package")
    edit_json(tmp_path / "package" / "processor_config.json", change)
    with pytest.raises(ValueError, match="config.json must have the same image_grid_pinpoints in the same order"):
        LlavaVrProcessor.from_pretrained(tmp_path / "package")
    (tmp_path / "package" / "config.json").unlink()
    LlavaVrProcessor.from_pretrained(tmp_path / "package")


@pytest.mark.parametrize("limit, expected", [(10**30, 2048), (100, 100)])
def test_the_decoders_context_is_a_limit(package, tmp_path, limit, expected):
    shutil.copytree(package, tmp_path / "package")
    edit_json(tmp_path / "package" / "tokenizer_config.json", lambda values: values.update(model_max_length=limit))
    processor = AutoProcessor.from_pretrained(tmp_path / "package", trust_remote_code=True)
    assert len(processor(text="a" * expected)["input_ids"][0]) == expected
    with pytest.raises(ValueError, match=f"text has {expected + 1} tokens"):
        processor(text="a" * (expected + 1))


# ------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("size", [*SIZES, (33, 900), (500, 332)])
def test_pixels_equal_llava_next(tiny_config, processor_for, backend, size):
    ours = processor_for(tiny_config(), backend)
    theirs = LlavaNextProcessor(
        ours.image_processor, ours.tokenizer, patch_size=16, vision_feature_select_strategy="full"
    )
    inputs = {"images": random_image(*size), "text": "a<image>b", "return_tensors": "pt"}
    expected, found = theirs(**inputs), ours(**inputs)
    assert set(found) == set(expected)
    for key in expected:
        assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize("mode", ["pad", "square", "siglip_square"])
def test_pixels_equal_llava(tiny_config, processor_for, backend, mode):
    ours = processor_for(tiny_config(**MODES[mode]), backend)
    theirs = LlavaProcessor(ours.image_processor, ours.tokenizer, patch_size=16, vision_feature_select_strategy="full")
    inputs = {"images": [random_image(*size) for size in SIZES[:4]], "text": ["<image>"] * 4, "return_tensors": "pt"}
    expected, found = theirs(**inputs), ours(**inputs)
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert torch.equal(found["input_ids"], expected["input_ids"])


@pytest.mark.parametrize("size", SIZES)
def test_pixels_of_slices_are_the_layouts(tiny_config, processor_for, backend, size):
    processor, image = processor_for(tiny_config(**MODES["slices"]), backend), random_image(*size)
    found = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
    pixels = (torch.from_numpy(channels_first(image)) / 255).double()
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    expected = processor.image_layout.cut_tiles((pixels - mean) / std)[None]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    in_unit_range = processor(images=pixels, text="<image>", return_tensors="pt", do_rescale=False)["pixel_values"]
    torch.testing.assert_close(in_unit_range, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["anyres", "pad", "square", "siglip_square"])
def test_torchvision_is_close_to_pil(tiny_config, processor_for, mode):
    pytest.importorskip("torchvision")
    config, image = tiny_config(**MODES[mode]), random_image(70, 65)
    inputs = {"images": image, "text": "<image>", "return_tensors": "pt"}
    pil, tv = (processor_for(config, backend)(**inputs) for backend in ("pil", "torchvision"))
    assert torch.equal(pil["input_ids"], tv["input_ids"]) and torch.equal(pil["image_sizes"], tv["image_sizes"])
    assert (pil["pixel_values"] - tv["pixel_values"]).abs().max() < 0.05  # a step of 8 bits is about 0.015


# ------------------------------------------------------------------------------------------------ texts and batches


def test_text_only(processor):
    inputs = processor(text=["hello", "ho"], padding=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert processor.batch_decode(inputs["input_ids"], skip_special_tokens=True) == ["hello", "ho"]


@pytest.mark.parametrize("images", [None, [], [[], []]])
def test_no_images_at_all(processor, images):
    inputs = processor(images=images, text=["a", "b"])
    assert set(inputs) == {"input_ids", "attention_mask"} and len(inputs["input_ids"]) == 2


@pytest.mark.parametrize("mode", ["anyres", *ONE_TILE])
def test_images_only(tiny_config, processor_for, backend, mode):
    processor = processor_for(tiny_config(**MODES[mode]), backend)
    inputs = processor(images=random_image(40, 90), return_tensors="pt")
    assert set(inputs) == {"pixel_values", "image_sizes"} and inputs["image_sizes"].tolist() == [[40, 90]]


@pytest.mark.parametrize("nested", [[[0], [], [1, 2]], [0, [], [1, 2]], [0, 1, 2], ([0], (), (1, 2))], ids=str)
def test_nested_images_are_those_of_a_flat_list(processor, nested):
    images = [random_image(*size) for size in SIZES[:3]]

    def fill(part):
        return [fill(item) for item in part] if isinstance(part, (list, tuple)) else images[part]

    text = ["<image>", "no image", "<image><image>"]
    expected = processor(images=images, text=text, padding=True, return_tensors="pt")
    found = processor(images=fill(nested), text=text, padding=True, return_tensors="pt")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side(processor, side):
    processor.tokenizer.padding_side = side
    images = [random_image(64, 64), random_image(32, 64)]
    inputs = processor(images=images, text=["<image>a", "<image>b"], padding=True, return_tensors="pt")
    alone = processor(images=images[1], text="<image>b", return_tensors="pt")
    length = alone["input_ids"].shape[1]
    kept = slice(-length, None) if side == "left" else slice(0, length)
    assert length < inputs["input_ids"].shape[1] and inputs["attention_mask"][1].sum() == length
    assert torch.equal(inputs["input_ids"][1, kept], alone["input_ids"][0]) and inputs["attention_mask"][1, kept].all()


def test_kwargs_as_pipelines_pass_them(processor):
    image = random_image(40, 90)
    plain = processor(images=image, text=["<image>a"], padding=True, return_tensors="pt", do_rescale=False)
    nested = processor(
        images=image,
        text=["<image>a"],
        videos=None,
        audio=None,
        text_kwargs={"padding": True},
        images_kwargs={"do_rescale": False},
        common_kwargs={"return_tensors": "pt"},
    )
    assert all(torch.equal(nested[key], plain[key]) for key in plain)
    assert not torch.equal(
        plain["pixel_values"], processor(images=image, text="<image>a", return_tensors="pt")["pixel_values"]
    )


@pytest.mark.parametrize("mode", ["anyres", "square"])
def test_model_input_names(tiny_config, processor_for, mode):
    processor = processor_for(tiny_config(**MODES[mode]))
    assert set(processor.model_input_names) == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}


# ------------------------------------------------------------------------------------------------ chat template


def chat(*content, answer="yes"):
    answer = [{"type": "text", "text": answer}]
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]


def test_chat_template(processor):
    image = random_image(40, 90)
    messages = chat({"type": "image", "image": image}, {"type": "text", "text": "red?"})
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    expected = processor(images=image, text="<|user|><image>red?<|assistant|>yes</s>", return_tensors="pt")
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)


def test_assistant_tokens_mask_of_a_batch(processor):
    one = chat({"type": "image", "image": random_image(40, 90)}, {"type": "text", "text": "red?"})
    two = chat({"type": "text", "text": "and"}, *[{"type": "image", "image": random_image(32, 32)}] * 2, answer="no no")
    arguments = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    arguments["processor_kwargs"] = {"padding": True, "return_tensors": "pt"}
    if version.parse(transformers.__version__) < version.parse("5.18"):
        with pytest.raises(ValueError, match="return_assistant_tokens_mask with images needs transformers 5.18"):
            processor.apply_chat_template([one, two], **arguments)
        return
    inputs = processor.apply_chat_template([one, two], **arguments)
    masks = torch.as_tensor(inputs["assistant_masks"])
    assert masks.shape == inputs["input_ids"].shape
    answers = [processor.decode(ids[mask.bool()]) for ids, mask in zip(inputs["input_ids"], masks)]
    assert answers == ["yes</s>", "no no</s>"]


@pytest.mark.parametrize("content", ["an <image> here", [{"type": "text", "text": "an <image> here"}]])
@pytest.mark.parametrize("wrap", [list, tuple, lambda messages: [messages], lambda messages: (tuple(messages),)])
def test_literal_image_token_in_a_message_is_refused(processor, content, wrap):
    with pytest.raises(ValueError, match="text holds '<image>'.*{'type': 'image'.*sanitize_control_tokens=True"):
        processor.apply_chat_template(wrap([{"role": "user", "content": content}]))


def test_literal_image_token_can_be_kept_as_text(processor):
    if not hasattr(processor.tokenizer, "_mark_chat_inputs"):
        pytest.skip("this transformers has no sanitize_control_tokens")
    content = [{"type": "text", "text": "an <image>"}, {"type": "image", "image": random_image(32, 64)}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], sanitize_control_tokens=True, tokenize=True, return_dict=True
    )
    ids = inputs["input_ids"][0]
    assert ids.count(3) == processor.image_layout.num_tokens((32, 64), processor.projector_downsample)
    assert processor.tokenizer.decode(ids[: ids.index(3)]) == "<|user|>an <image>"


@pytest.mark.parametrize(
    "options", [{}, {"sanitize_control_tokens": True, "tokenize": True}], ids=["plain", "sanitized"]
)
@pytest.mark.parametrize(
    "conversation, message",
    [
        ([{"role": "user", "content": ["hi"]}], "A part of a message's content must be .* found 'hi'"),
        (
            [[{"role": "user", "content": [{"text": "hi"}]}]],
            "A part of a message's content must be .* found {'text': 'hi'}",
        ),
        (["hi"], "A message must be {'role': ..., 'content': ...}, found 'hi'"),
        ("hi", "A message must be .* found 'h'"),
    ],
)
def test_malformed_chat_is_refused(processor, conversation, message, options):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(conversation, **options)


@pytest.fixture
def warnings_of(processor, monkeypatch):
    """`warnings_of(text)`: what the processor warns of a text with one image."""
    found = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda logger, text: found.append(text))

    def warnings_of(text):
        found.clear()
        processor(images=random_image(32, 32), text=text)
        return list(found)

    return warnings_of


def test_raw_text_without_the_templates_markers_is_warned_of(processor, warnings_of):
    (warning,) = warnings_of("<image>how much?")
    assert "none of ['<|user|>', '<|assistant|>']" in warning and "processor.apply_chat_template" in warning
    assert warnings_of(["text alone", "<image>how much?"])
    assert not warnings_of("<|user|><image>how much?<|assistant|>")
    assert not warnings_of("<image>how much?<|assistant|>")
    content = [{"type": "image"}, {"type": "text", "text": "how much?"}]
    assert not warnings_of(processor.apply_chat_template([{"role": "user", "content": content}]))


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for part in messages[0].content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}",
        "{{ raise_exception('no system message') }}",
    ],
    ids=["none", "without markers", "not for such a chat"],
)
def test_no_warning_where_the_template_has_no_markers(processor, warnings_of, template):
    processor.chat_template = template
    assert not warnings_of("<image>how much?")


# ------------------------------------------------------------------------------------------------ kinds of image


@pytest.mark.parametrize("height, width", [(1, 1), (1, 4000), (4000, 1), (3, 50), (50, 3), (3, 3), (1, 3), (2, 4)])
def test_thin_picture_equals_its_channels_first_array(pixels_of, height, width):
    image = random_image(height, width)
    assert torch.equal(pixels_of(image), pixels_of(channels_first(image)))


@pytest.mark.parametrize("size", [(1, 50), (4, 50), (40, 90), (50, 4), (50, 1)])
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_array_with_channels_last_or_first_equals_the_picture(pixels_of, size, kind):
    image = random_image(*size)
    for array in (np.array(image), channels_first(image)):
        assert torch.equal(pixels_of(kind(array)), pixels_of(image))


FLOATS = [np.float16, np.float32, np.float64, torch.bfloat16, torch.float16, torch.float32]


def as_type(array, dtype):
    return torch.tensor(array).to(dtype) if isinstance(dtype, torch.dtype) else array.astype(dtype)


@pytest.mark.parametrize("dtype", [np.int64, torch.int32, *FLOATS], ids=str)
def test_values_from_0_to_255(pixels_of, dtype):
    image = random_image(40, 90)
    assert torch.equal(pixels_of(as_type(channels_first(image), dtype)), pixels_of(image))


@pytest.mark.parametrize("dtype", [dtype for dtype in FLOATS if dtype != torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"return_tensors": "pt"},
        {"return_tensors": "pt", "do_rescale": False},
        {"common_kwargs": {"return_tensors": "pt"}, "images_kwargs": {"do_rescale": False}},
    ],
    ids=["plain", "do_rescale", "images_kwargs"],
)
@pytest.mark.parametrize("mode", ["anyres", "anyres_max_2", "slices", "pad", "square", "siglip_square"])
def test_floats_from_0_to_1(tiny_config, processor_for, backend, mode, options, dtype):
    """As of torchvision's ToTensor; also beside a picture, and beside floats from 0 to 255."""
    processor, image = processor_for(tiny_config(**MODES[mode]), backend), random_image(40, 90)
    expected = processor(images=[image] * 3, return_tensors="pt")["pixel_values"]
    tensor = as_type(channels_first(image) / 255, dtype)
    images = [tensor, image, channels_first(image).astype(np.float32)]
    assert torch.equal(processor(images=images, **options)["pixel_values"], expected)


def test_do_rescale_of_the_image_processor_itself(processor):
    image = random_image(40, 90)
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    processor.image_processor.do_rescale = False
    tensor = torch.tensor(channels_first(image)) / 255
    assert torch.equal(processor(images=tensor, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_bool_is_black_and_white(pixels_of, kind):
    mask = np.array(random_image(40, 90).convert("L")) > 127
    assert torch.equal(pixels_of(kind(mask)), pixels_of(Image.fromarray(mask)))


def test_float_round_off_and_black(pixels_of):
    image = random_image(40, 90)
    array = channels_first(image) / 255
    assert torch.equal(pixels_of(array * (1 + 1e-6) - 1e-7), pixels_of(image))
    for dtype in (np.uint8, np.float32):
        assert torch.equal(pixels_of(np.zeros((40, 90), dtype)), pixels_of(Image.new("RGB", (90, 40))))
    assert torch.equal(pixels_of(np.ones((40, 90), np.uint8)), pixels_of(Image.new("RGB", (90, 40), (1, 1, 1))))


def test_array_of_which_the_layout_is_said(pixels_of):
    image = random_image(3, 50)  # (3, 50, 3) could be either
    last, first = np.array(image), channels_first(image)
    assert torch.equal(pixels_of(last, input_data_format="channels_last"), pixels_of(image))
    assert torch.equal(pixels_of(last, images_kwargs={"input_data_format": "channels_last"}), pixels_of(image))
    assert torch.equal(pixels_of(first, input_data_format="channels_first"), pixels_of(image))
    assert torch.equal(pixels_of(image, input_data_format="channels_last"), pixels_of(image))


@pytest.mark.parametrize("shape", [(40, 90), (1, 40, 90), (40, 90, 1)])
def test_grey_array_is_repeated(pixels_of, shape):
    grey = random_image(40, 90).convert("L")
    assert torch.equal(pixels_of(np.array(grey).reshape(shape)), pixels_of(grey.convert("RGB")))


def test_stack_of_images(pixels_of):
    images = [random_image(40, 90, seed) for seed in range(2)]
    stack = np.stack([np.array(image) for image in images])
    assert torch.equal(pixels_of(stack), pixels_of(images))
    assert torch.equal(pixels_of(torch.from_numpy(stack)), pixels_of(images))


def test_path_and_base64(pixels_of, tmp_path):
    image, path = random_image(8, 8), tmp_path / "image.png"
    image.save(path)
    text = base64.b64encode(path.read_bytes()).decode()
    for source in (path, str(path), text, f"data:image/png;base64,{text}"):
        assert torch.equal(pixels_of(source), pixels_of(image))


def test_url(pixels_of, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    image = random_image(40, 90)
    image.save(tmp_path / "image.png")
    handler = functools.partial(SilentHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert torch.equal(pixels_of(f"{url}/image.png"), pixels_of(image))
        with pytest.raises(ValueError, match=r"images\[0\] cannot be read"):
            pixels_of(f"{url}/nowhere.png")
        server.shutdown()


def test_url_that_never_answers(pixels_of, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert images_llava_vr.URL_TIMEOUT == 10
    monkeypatch.setattr(images_llava_vr, "URL_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/image.png"
        with pytest.raises(ValueError, match=rf"images\[0\] cannot be read: '{url}' gave no picture: .*timed out"):
            pixels_of(url)


class SilentHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_transparency_is_on_white_from_every_source(pixels_of, tmp_path):
    image, path = Image.new("RGBA", (40, 40), (200, 0, 0, 0)), tmp_path / "clear.png"
    image.save(path)
    uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    for source in (image, path, uri):
        assert torch.equal(pixels_of(source), pixels_of(Image.new("RGB", (40, 40), "white")))


def half_transparent(mode):
    """A picture of random colours; transparent on the left half, with colours of its own underneath."""
    alpha = Image.new("L", (40, 40), 255)
    alpha.paste(0, (0, 0, 20, 40))
    image = random_image(40, 40)
    image.putalpha(alpha)
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa"])
def test_alpha_is_on_white(pixels_of, mode):
    image = half_transparent(mode)
    expected = image.convert("RGBA").convert("RGB")
    expected.paste((255, 255, 255), (0, 0, 20, 40))
    assert torch.equal(pixels_of(image), pixels_of(expected))


def test_palette_with_transparency_is_on_white(pixels_of, tmp_path):
    image = Image.new("P", (40, 40), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 20, 40))
    image.save(tmp_path / "clear.png", transparency=0)
    expected = Image.new("RGB", (40, 40), (0, 0, 255))
    expected.paste((255, 255, 255), (0, 0, 20, 40))
    assert Image.open(tmp_path / "clear.png").mode == "P"
    assert torch.equal(pixels_of(tmp_path / "clear.png"), pixels_of(expected))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_equal_their_rgb(pixels_of, mode):
    image = random_image(40, 90).convert(mode)
    assert torch.equal(pixels_of(image), pixels_of(image.convert("RGB")))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bits_are_scaled_to_8(pixels_of, dtype, tmp_path):
    grey = np.array(random_image(40, 90).convert("L"))
    image = Image.fromarray(grey.astype(dtype) * 257)
    assert image.mode in ("I;16", "I")
    assert torch.equal(pixels_of(image), pixels_of(Image.fromarray(grey)))
    image.save(tmp_path / "deep.tiff")
    assert torch.equal(pixels_of(tmp_path / "deep.tiff"), pixels_of(Image.fromarray(grey)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(processor, orientation, tmp_path):
    image = random_image(40, 90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    assert upright.size == ((90, 40) if orientation < 5 else (40, 90))
    turned, expected = (
        processor(images=source, text="<image>", return_tensors="pt") for source in (tmp_path / "turned.png", upright)
    )
    assert all(torch.equal(turned[key], expected[key]) for key in expected)


def test_photo_with_previews_is_its_first_frame(pixels_of, tmp_path):
    photo = random_image(40, 90)
    photo.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[random_image(20, 45)])
    opened = Image.open(tmp_path / "photo.jpg")
    assert opened.format == "MPO" and opened.n_frames == 2
    assert torch.equal(pixels_of(tmp_path / "photo.jpg"), pixels_of(opened.convert("RGB")))


def test_gif_of_one_frame(pixels_of, tmp_path):
    random_image(40, 90).save(tmp_path / "still.gif")
    assert torch.equal(pixels_of(tmp_path / "still.gif"), pixels_of(Image.open(tmp_path / "still.gif").convert("RGB")))


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "text, images, message",
    [
        ("<image><image>", 1, "should be the same as the number of images: found 2 and 1"),
        ("<image>", 2, "should be the same as the number of images: found 1 and 2"),
        ("none", 1, "should be the same as the number of images: found 0 and 1"),
        ("<image>", 0, "should be the same as the number of images: found 1 and 0"),
    ],
)
def test_as_many_images_as_placeholders(processor, text, images, message):
    ways = "as in '<image>What is this.'; or give apply_chat_template, or a pipeline as its text, messages: .*'image'"
    with pytest.raises(ValueError, match=f"{message}.*{ways}"):
        processor(images=[random_image(32, 32)] * images or None, text=text)


@pytest.mark.parametrize("text", [[3], [["a", "b"]], [None]])
def test_text_of_the_wrong_type_is_refused(processor, text):
    with pytest.raises(ValueError, match="text must be a string or a list of strings"):
        processor(text=text)


def test_each_text_has_its_own_images(processor):
    one, two = [random_image(32, 32)], [random_image(32, 32)] * 2
    with pytest.raises(ValueError, match=r"text\[0\] has 1 <image> but images\[0\] has 2 images"):
        processor(images=[two, one], text=["<image>", "<image><image>"])


def test_truncation_into_an_image_is_refused(processor):
    with pytest.raises(ValueError, match="(?i)mismatch.*image"):
        processor(images=random_image(64, 64), text="<image>hello", truncation=True, max_length=10)


def truncated_jpeg(folder):
    data = io.BytesIO()
    random_image(200, 200).save(data, "JPEG")
    (folder / "cut.jpg").write_bytes(data.getvalue()[:5000])
    return folder / "cut.jpg"


def text_file(folder):
    (folder / "note.txt").write_text("no image")
    return str(folder / "note.txt")


def animated_gif(folder):
    random_image(32, 32).save(
        folder / "moving.gif", save_all=True, append_images=[random_image(32, 32, seed=1), random_image(32, 32, seed=2)]
    )
    return folder / "moving.gif"


def decompression_bomb(folder):
    """A PNG of a few bytes whose header claims 60,000 x 60,000 pixels."""
    data = io.BytesIO()
    Image.new("RGB", (1, 1)).save(data, "PNG")
    header = bytearray(data.getvalue())
    header[16:24] = (60000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(header)
    return folder / "bomb.png"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: str(folder / "nowhere.png"), "nowhere.png' is no file that exists, no URL and no base64"),
        (text_file, "cannot identify image file"),
        (lambda folder: folder, "Is a directory"),
        (truncated_jpeg, "image file is truncated"),
        (decompression_bomb, "exceeds limit"),
        (animated_gif, r"it has 3 frames: pass one of them, as in `image.seek\(0\)"),
        (lambda folder: Image.new("RGB", (0, 5)), "it is 0 x 5 pixels"),
        (lambda folder: Image.new("F", (5, 5)), "floating-point numbers: scale them to 0 to 255"),
        (lambda folder: Image.new("I", (5, 5), 70000), "32-bit pixels exceed 0 to 65535"),
        (lambda folder: np.full((5, 5, 3), np.nan), "NaN or infinite"),
        (lambda folder: torch.full((3, 5, 5), torch.inf), "NaN or infinite"),
        (lambda folder: np.zeros((0, 5, 3)), r"its shape is \(0, 5, 3\): an image is \(3, height, width\)"),
        (lambda folder: np.zeros((5, 5, 4)), r"its shape is \(5, 5, 4\)"),
        (lambda folder: torch.zeros(5), r"its shape is \(5,\)"),
        (lambda folder: np.array([["a", "b"]]), "its type is <U1: pixels are numbers"),
        (lambda folder: np.full((5, 5), 256), "its values are from 256 to 256: pixels are from 0 to 255"),
        (lambda folder: np.full((5, 5), 65535, np.uint16), "its values are from 65535 to 65535"),
        (
            lambda folder: torch.linspace(-2, 2, 75).view(3, 5, 5),
            "from -2 to 2: .* floats, from 0 to 1, before they are",
        ),
        (lambda folder: torch.linspace(0, 1.1, 75).view(3, 5, 5), "its values are from 0 to 1.1: "),
        (lambda folder: 3, "int is not a type of image: pass a PIL image, an array, a path or a URL"),
        (lambda folder: None, "NoneType is not a type of image"),
        (lambda folder: b"bytes", "bytes is not a type of image"),
        (lambda folder: {"path": "a.png"}, "'a.png' is no file that exists"),
    ],
)
def test_unreadable_image_is_named_by_its_number(processor, tmp_path, make, message):
    images = [random_image(32, 32), make(tmp_path)]
    with pytest.raises(ValueError, match=rf"images\[1\] cannot be read: .*{message}"):
        processor(images=images, text="<image><image>")
    with pytest.raises(ValueError, match=r"images\[1\] cannot be read"):
        processor(images=[images[:1], images[1:]], text=["<image>", "<image>"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_token": "<picture>"}, "image_token '<picture>' is not a token of the tokenizer: add it"),
        ({"image_aspect_ratio": "wide"}, "image_aspect_ratio must be anyres.* found 'wide'"),
        ({"image_aspect_ratio": "anyres_max_x"}, "image_aspect_ratio must be anyres.* found 'anyres_max_x'"),
        ({"image_merge_type": "unpad"}, "image_merge_type must be one of spatial_unpad.* found 'unpad'"),
        (
            {"image_aspect_ratio": "anyres_max_2", "image_merge_type": "flat"},
            "image_merge_type must be spatial_unpad with anyres_max_2",
        ),
        (
            {"image_aspect_ratio": "square", "image_merge_type": "slices"},
            "image_aspect_ratio must be anyres with image_merge_type slices",
        ),
    ],
)
def test_impossible_processor_is_refused(processor, options, message):
    with pytest.raises(ValueError, match=message):
        LlavaVrProcessor(processor.image_processor, processor.tokenizer, **options)


def test_tiles_need_an_image_processor_that_makes_them(tiny_config, processor_for, backend):
    square = processor_for(tiny_config(**MODES["square"]), backend)
    with pytest.raises(ValueError, match="'anyres' needs .* image_grid_pinpoints.* found CLIPImageProcessor"):
        LlavaVrProcessor(square.image_processor, square.tokenizer, image_aspect_ratio="anyres")
    assert LlavaVrProcessor(square.image_processor, square.tokenizer).image_aspect_ratio == "square"


@pytest.mark.parametrize("images", [None, [random_image(40, 90)]], ids=["text only", "with an image"])
def test_a_text_beyond_the_context_is_refused(tiny_config, processor_for, images):
    processor = processor_for(tiny_config())
    processor.tokenizer.model_max_length = 100
    text = "<image>" * (images is not None) + "a" * 100
    if images is None:
        assert len(processor(text=text)["input_ids"][0]) == 100
        text += "a"
    with pytest.raises(ValueError, match="model_max_length is 100"):
        processor(text=text, images=images)


@pytest.mark.parametrize("content", [3, {"type": "text", "text": "hi"}])
def test_content_that_is_neither_text_nor_parts_is_refused(tiny_config, processor_for, content):
    with pytest.raises(ValueError, match="content must be a text or a list of parts"):
        processor_for(tiny_config()).apply_chat_template([{"role": "user", "content": content}])
