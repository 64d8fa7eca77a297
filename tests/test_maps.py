"""Maps of what the modules attend to: a module that looks at one patch, and a picture that shows where it is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from llava_vr import (
    LlavaVrForConditionalGeneration,
    LlavaVrProcessor,
    answer_maps,
    draw_map,
    remember_maps,
)
from llava_vr.layout_llava_vr import cut_windows
from llava_vr.maps_llava_vr import HEAT, _to_patches


ROOT = Path(__file__).parents[1]
RECEIPT = ROOT / "examples" / "receipt.png"
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
ONE_TILE = {"image_merge_type": "flat"}
SLICES = {"image_merge_type": "slices", "image_separator_ids": [60, 70], "image_grid_pinpoints": [[32, 32], *PINPOINTS]}
LAYOUTS = {  # fields of the configuration; sizes of pictures as (height, width)
    "pad": ({"image_aspect_ratio": "pad", **ONE_TILE}, [(128, 128), (80, 128), (130, 61)]),
    "square, cropped": ({"image_aspect_ratio": "square", **ONE_TILE}, [(96, 96), (96, 160), (201, 100)]),
    "square, stretched": ({"family": "siglip", "image_aspect_ratio": "square", **ONE_TILE}, [(96, 160), (201, 100)]),
    "spatial_unpad": ({"image_grid_pinpoints": PINPOINTS}, [(128, 128), (100, 190), (190, 100), (60, 250)]),
    "spatial": ({"image_grid_pinpoints": PINPOINTS, "image_merge_type": "spatial"}, [(100, 190)]),
    "flat": ({"image_grid_pinpoints": PINPOINTS, "image_merge_type": "flat"}, [(100, 190)]),
    "slices": (SLICES, [(100, 190), (128, 60), (40, 40)]),
    "resampled": ({"image_grid_pinpoints": PINPOINTS, "image_aspect_ratio": "anyres_max_1"}, [(128, 128), (100, 190)]),
}
CASES = [(name, size) for name, (_, sizes) in LAYOUTS.items() for size in sizes if name != "resampled"]


class Ones(nn.Module):
    """Stands for a query that is the same for every token."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, states):
        return torch.ones(*states.shape[:-1], self.width)


class OnePatch(Ones):
    """Stands for keys of which one, that of patch `place` of tile `tile`, stands out."""

    def __init__(self, width: int, tile: int, place: int):
        super().__init__(width)
        self.tile, self.place = tile, place

    def forward(self, memory):
        keys = torch.zeros(*memory.shape[:-1], self.width)
        keys[self.tile, self.place] = 100
        return keys


@pytest.fixture
def case(request, tiny_config, make_model, processor_for):
    """`(model, processor, inputs, picture)` of a picture of noise with one layout; s = 2, windows of 4 x 4."""
    name, size = request.param
    config = tiny_config(remember_layers=[0, 1], **LAYOUTS[name][0])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    processor = processor_for(config)
    return make_model(config), processor, processor(picture, "<image>what?", return_tensors="pt"), picture


def look_at(model: nn.Module, layer: int, tile: int, place: int):
    """Lets a module look at one patch wherever a window holds it."""
    module = model.model.vision_remember[str(layer)]
    module.query = Ones(model.config.remember_hidden_size)
    module.key = OnePatch(model.config.key_value_size, tile, place)


def attend(model: nn.Module, inputs: dict) -> object:
    with torch.no_grad():
        return model(**inputs, output_remember_attentions=True)


def processed(processor, colours: np.ndarray) -> torch.Tensor:
    """The tiles `(tiles, 3, side, side)` of a picture of these colours `(height, width)`, as multiples of white."""

    def tiles(values: np.ndarray) -> torch.Tensor:
        picture = Image.fromarray(np.uint8(255 * values)).convert("RGB")
        return processor(picture, "<image>", return_tensors="pt")["pixel_values"].flatten(0, -4)

    black, white = tiles(np.zeros_like(colours)), tiles(np.ones_like(colours))
    return (tiles(colours) - black) / (white - black).max()  # padding is 0


@pytest.mark.parametrize("case", CASES, indirect=True, ids=str)
def test_a_patch_that_is_looked_at_is_found_in_the_picture(case):
    """The map, as a picture of its own, is processed to a tile that is white at this patch and black at the others."""
    model, processor, inputs, picture = case
    tiles = inputs["pixel_values"].flatten(0, -4)
    grid, places = (tiles.shape[-1] // 8, 8), (5, 10)  # of 4 x 4 patches
    for tile, place in [(tile, place) for tile in range(len(tiles)) for place in places]:
        look_at(model, 0, tile, place)
        outputs = attend(model, inputs)
        tokens = outputs.remember_attentions[0].mean(1).amax(-1) > 0.99  # whose windows hold the patch
        found = remember_maps(outputs, inputs, model, tokens, processor)[0][0]
        if not found.any():  # it is padding
            continue
        assert found.shape == picture.size[::-1]
        shown = processed(processor, found > found.max() / 2)[tile, 0].unflatten(1, grid).unflatten(0, grid)
        shown = shown.mean((1, 3)).flatten()
        visible = float(found.sum() / tokens.sum())
        assert shown[place].item() == pytest.approx(visible, abs=0.2), shown
        shown[place] = 0
        assert shown.abs().max() < 0.3, shown


@pytest.mark.parametrize("case", [("pad", (128, 128))], indirect=True, ids=str)
@pytest.mark.parametrize("place, windows", [(0, 1), (1, 2), (5, 4)])
def test_windows_that_overlap_add_up(case, place, windows):
    """Windows of 4 x 4 patches begin at -1 and 1: an inner patch is in four of them, one in the corner in one."""
    model, _, inputs, _ = case
    look_at(model, 0, 0, place)
    outputs = attend(model, inputs)
    tokens = outputs.remember_attentions[0].mean(1).amax(-1) > 0.99
    found = remember_maps(outputs, inputs, model, tokens)[0][0]
    expected = np.zeros((128, 128), dtype=np.float32)
    row, column = 32 * (place // 4), 32 * (place % 4)
    expected[row : row + 32, column : column + 32] = windows / 32**2
    np.testing.assert_allclose(found, expected, atol=1e-7)


FULL = [("pad", (128, 128)), ("spatial_unpad", (128, 128)), ("resampled", (128, 128)), ("slices", (128, 128))]


@pytest.mark.parametrize("case", FULL, indirect=True, ids=str)
def test_nothing_is_lost_of_a_picture_without_padding(case):
    model, _, inputs, _ = case
    outputs = attend(model, inputs)
    (maps,) = remember_maps(outputs, inputs, model)
    assert list(maps) == [0, 1]
    for found, weights in zip(maps.values(), outputs.remember_attentions):
        assert found.sum() == pytest.approx(weights.mean(1).sum().item(), rel=1e-4)


@pytest.mark.parametrize("case", FULL, indirect=True, ids=str)
def test_the_way_back_is_that_of_the_memory(case):
    """The weight of a patch is that of the rows of a memory in which this patch alone is 1, resampled or not."""
    model, _, inputs, _ = case
    base, outputs = model.model, attend(model, inputs)
    layout, (size,) = base.config.image_layout, inputs["image_sizes"].tolist()
    weights = torch.stack([weights.mean(1) for weights in outputs.remember_attentions])
    found = _to_patches(weights, base, layout, size, 2)
    grid = torch.zeros(layout.num_tiles(size), 4, 4, 2)
    grid[..., 1] = 1  # presence, as the model has it
    for tile, row, column in [(0, 0, 0), (0, 1, 2), (len(grid) - 1, 3, 1), (len(grid) - 1, 2, 2)]:
        grid[..., 0] = 0
        grid[tile, row, column, 0] = 1
        packed = layout.pack(cut_windows(grid, 2, 4).flatten(2), size, torch.zeros(2, 32)).unflatten(1, (16, 2))
        rows = packed[..., 0] / packed[..., 1].clamp(min=1e-6)
        torch.testing.assert_close((weights * rows).sum((1, 2)), found[:, tile, row, column], rtol=1e-5, atol=1e-6)


def test_images_of_a_batch_have_the_maps_that_they_have_alone(tiny_config, make_model, make_inputs):
    config = tiny_config(projector_type="avg_pool", projector_downsample_choices=[1, 2, 4], remember_layers=[0, 1])
    model = make_model(config)
    inputs = make_inputs(config, [[7, (40, 70, 4), 8, (64, 64, 1)], [9, (90, 30, 2)]], padding_side="left")
    together = remember_maps(attend(model, inputs), inputs, model)
    assert not any(found.any() for found in together[1].values())  # s = 1: nothing to look at again
    for i, text in ((0, 7), (2, 9)):
        size, s = inputs["image_sizes"][i].tolist(), inputs["image_downsamples"][i].item()
        alone = make_inputs(config, [[text, (*size, s)]])
        alone["pixel_values"] = inputs["pixel_values"][i : i + 1]
        (maps,) = remember_maps(attend(model, alone), alone, model)
        for layer, found in maps.items():
            np.testing.assert_allclose(together[i][layer], found, atol=1e-6)


def test_weights_by_module(tiny_config, make_model, make_inputs):
    config = tiny_config(remember_layers=[0, 1])
    model, inputs = make_model(config), make_inputs(config, [[7, (40, 70)]])
    outputs = attend(model, inputs)
    count = len(outputs.image_hidden_states)
    (whole,), (by_module,) = (
        remember_maps(outputs, inputs, model, tokens)
        for tokens in (None, torch.tensor([[2.0], [0.0]]).expand(2, count))
    )
    np.testing.assert_allclose(by_module[0], 2 * whole[0], rtol=1e-5)
    assert not by_module[1].any()


def test_answer_maps_weigh_tokens_by_the_attention_of_the_answer(tiny_config, make_model, make_inputs):
    config = tiny_config(remember_layers=[0, 1])
    model, inputs = make_model(config), make_inputs(config, [[7, (40, 70), 8], [9, 10, (64, 64)]], padding_side="left")
    model.set_attn_implementation("sdpa")
    sequences = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    found = answer_maps(sequences, inputs, model)
    assert model.model.language_model.config._attn_implementation == "sdpa"

    model.set_attn_implementation("eager")
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
    full = {**inputs, "input_ids": sequences, "attention_mask": mask}
    with torch.no_grad():
        outputs = model(**full, output_attentions=True, output_remember_attentions=True)
    weights = torch.zeros(2, len(outputs.image_hidden_states))
    for module in range(2):
        token = 0
        for row, position in (sequences == config.image_token_id).nonzero().tolist():
            paid = [
                layer[row, head, query, position].item()
                for layer in outputs.attentions[module + 1 :]
                for head in range(config.text_config.num_attention_heads)
                for query in range(sequences.shape[1] - 4, sequences.shape[1] - 1)
            ]
            weights[module, token] = sum(paid) / len(paid)
            token += 1
    for image, expected in zip(found, remember_maps(outputs, full, model, weights)):
        for layer in (0, 1):
            np.testing.assert_allclose(image[layer], expected[layer], rtol=1e-4, atol=1e-8)


def test_errors_say_what_is_missing(tiny_config, make_model, make_inputs):
    config = tiny_config(remember_layers=[0])
    model, inputs = make_model(config), make_inputs(config, [[7, (40, 70)]])
    with torch.no_grad(), pytest.raises(ValueError, match="output_remember_attentions=True"):
        remember_maps(model(**inputs), inputs, model)
    with pytest.raises(ValueError, match="pass the inputs"):
        remember_maps(attend(model, inputs), make_inputs(config, [[7, (64, 64)]]), model)
    config = tiny_config(remember_layers=[0], image_aspect_ratio="square", image_merge_type="flat")
    model, inputs = make_model(config), make_inputs(config, [[7, (40, 70)]])
    with pytest.raises(ValueError, match="processor"):
        remember_maps(attend(model, inputs), inputs, model)
    with pytest.raises(ValueError, match="attention must be"):
        draw_map(Image.new("RGB", (4, 3)), np.zeros((4, 3)))


def test_draw_map_leaves_what_nothing_looked_at():
    attention = np.zeros((3, 4))
    attention[1, 2] = 5
    drawn = np.asarray(draw_map(Image.new("RGB", (4, 3), "blue"), attention, opacity=1))
    assert tuple(drawn[1, 2]) == tuple(HEAT[-1])
    drawn = drawn.copy()
    drawn[1, 2] = (0, 0, 255)
    assert (drawn == (0, 0, 255)).all()


LINES = ("fish", "onion", "salad", "pasta", "jam")  # of the price list, 54 pixels each, from pixel 13 on


@pytest.mark.parametrize("name", LINES)
def test_the_nano_checkpoint_looks_at_the_line_that_it_is_asked_about(name):
    processor = LlavaVrProcessor.from_pretrained(ROOT, trust_remote_code=True)
    model = LlavaVrForConditionalGeneration.from_pretrained(ROOT)
    content = [{"type": "image", "image": RECEIPT}, {"type": "text", "text": f"how much is the {name}?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    sequences = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    (maps,) = answer_maps(sequences, inputs, model)
    rows = sum(found.sum(1) for found in maps.values())[13:283]
    assert LINES[rows.reshape(5, 54).sum(1).argmax()] == name
