"""Regions and windows of a tile, and tiles of an image: counting and packing, against loops and transformers."""

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor, LlavaOnevisionProcessor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from llava_vr.layout_llava_vr import LAYOUTS, ImageLayout, cut_windows, make_layout, tokens_per_side, window_size


NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_PINPOINTS = [[336 * rows, 336 * columns] for rows in range(1, 7) for columns in range(1, 7)]
PINPOINTS = pytest.mark.parametrize("pinpoints", [NEXT_PINPOINTS, ONEVISION_PINPOINTS], ids=["next", "onevision"])
EDGES = [1, 2, 3, 27, 335, 336, 337, 671, 672, 1008, 1999, 2000]
DOWNSAMPLES = [1, 2, 3, 4, 5, 24]
TILES = 2


def image_sizes(count, seed=0):
    """Every pair of edge sizes, then random ones from 1 to 2000 pixels a side, half of them extreme in aspect."""
    generator = random.Random(seed)
    uniform = ((generator.randint(1, 2000), generator.randint(1, 2000)) for _ in range(count // 2))
    extreme = ((int(2000 ** generator.random()), int(2000 ** generator.random())) for _ in range(count - count // 2))
    return [*itertools.product(EDGES, EDGES), *uniform, *extreme]


def layout_for(merge_type="spatial_unpad", pinpoints=NEXT_PINPOINTS, ratio="anyres", patch_size=14):
    return make_layout(ratio, merge_type, 336, patch_size, pinpoints)


def make_tiles(layout, size, downsample, features=1):
    return torch.randn(layout.num_tiles(size), tokens_per_side(layout.grid_size, downsample) ** 2, features)


# -------------------------------------------------------------------------------------------------- regions and windows


@pytest.mark.parametrize("grid_size, downsample, side", [(24, 2, 12), (24, 5, 5), (27, 3, 9), (2, 3, 1), (7, 1, 7)])
def test_tokens_per_side_rounds_up(grid_size, downsample, side):
    assert tokens_per_side(grid_size, downsample) == side


@pytest.mark.parametrize("downsample", range(1, 25))
@pytest.mark.parametrize("ratio", [1, 1.0, 1.1, 4 / 3, 1.5, 5 / 3, 2, 2.0, 7 / 3, 3.0, 10.0])
def test_window_is_the_smallest_that_is_centred_and_has_the_ratio(ratio, downsample):
    centred = itertools.count(downsample, 2)
    assert window_size(downsample, ratio) == next(w for w in centred if w / downsample >= ratio - 1e-6)


@pytest.mark.parametrize("downsample", [1, 2, 3, 4])
@pytest.mark.parametrize("grid_size", [1, 2, 3, 4, 5, 7, 8, 12])
def test_cut_windows_equals_loops(grid_size, downsample):
    grid = torch.randn(TILES, grid_size, grid_size, 3)
    for margin in (0, 1, 2, 3):
        window, expected = downsample + 2 * margin, []
        for top in range(-margin, grid_size - margin, downsample):
            for left in range(-margin, grid_size - margin, downsample):
                for row in range(top, top + window):
                    for column in range(left, left + window):
                        inside = 0 <= row < grid_size and 0 <= column < grid_size
                        expected.append(grid[:, row, column] if inside else torch.zeros(TILES, 3))
        expected = torch.stack(expected, dim=1).view(TILES, math.ceil(grid_size / downsample) ** 2, window**2, 3)
        assert torch.equal(cut_windows(grid, downsample, window), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cut_windows_gives_each_feature_the_gradient_of_every_window_that_holds_it(dtype):
    grid = torch.randn(1, 5, 5, 2, dtype=dtype, requires_grad=True)
    windows = cut_windows(grid, downsample=2, window=4)
    assert windows.dtype == dtype
    windows.sum().backward()
    along = torch.tensor([1, 2, 2, 2, 2])  # windows that hold a patch, along one side: they start at -1, 1 and 3
    assert torch.equal(grid.grad[0, :, :, 0], torch.outer(along, along).to(dtype))


# ------------------------------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize(
    "size, tiles, tokens",
    [  # 12 x 12 tokens a tile, by hand: the base tile, then rows * (columns + 1) of the unpadded grid
        ((672, 672), 5, 144 + 24 * 25),
        ((336, 336), 3, 144 + 12 * 13),
        ((336, 672), 3, 144 + 12 * 25),
        ((672, 336), 3, 144 + 24 * 13),
        ((500, 672), 5, 144 + 18 * 25),  # int(500 * 24 / 672) = 17 rows: 3 go above and below, 18 stay
        ((1, 2000), 3, 144),  # not one row of tokens is left
    ],
)
def test_num_tokens_by_hand(size, tiles, tokens):
    layout = layout_for()
    assert (layout.num_tiles(size), layout.num_tokens(size, 2)) == (tiles, tokens)


@pytest.mark.parametrize("merge_type", ["spatial", "flat"])
def test_num_tokens_without_unpadding(merge_type):
    assert layout_for(merge_type).num_tokens((500, 672), 2) == 5 * 144


@pytest.mark.parametrize(
    "size, tiles", [((336, 336), 1), ((336, 672), 3), ((1008, 672), 7), ((1, 1), 1), ((400, 400), 5), ((2000, 1), 7)]
)
def test_num_tokens_of_slices(size, tiles):
    """A separator after each tile; there is a base tile where there is more than one other."""
    layout = layout_for("slices", ONEVISION_PINPOINTS)
    assert (layout.num_tiles(size), layout.num_tokens(size, 2)) == (tiles, tiles * 145)


@pytest.mark.parametrize("ratio", ["pad", "square"])
@pytest.mark.parametrize("merge_type", ["spatial_unpad", "spatial", "flat"])
def test_num_tokens_of_one_tile(merge_type, ratio):
    layout = layout_for(merge_type, ratio=ratio)
    assert (layout.num_tiles((500, 672)), layout.num_tokens((500, 672), 2)) == (1, 144)


def test_num_tokens_of_a_limit():
    unlimited, limited = (layout_for(pinpoints=ONEVISION_PINPOINTS, ratio=r) for r in ("anyres", "anyres_max_4"))
    assert unlimited.num_tokens((2000, 2000), 2) == 144 + 72 * 73
    assert limited.num_tokens((2000, 2000), 2) == 144 + 24 * 25  # 4 tiles' worth: 24 x 24
    assert limited.num_tokens((600, 600), 2) == unlimited.num_tokens((600, 600), 2)


@PINPOINTS
@pytest.mark.parametrize("downsample", DOWNSAMPLES)
def test_num_tokens_equals_llava_next(downsample, pinpoints):
    layout, side = layout_for(pinpoints=pinpoints), tokens_per_side(24, downsample)
    peer = object.__new__(LlavaNextProcessor)
    peer.image_processor = SimpleNamespace(image_grid_pinpoints=pinpoints)
    peer.patch_size, peer.num_additional_image_tokens = 336 // side, 0
    for size in image_sizes(2000, seed=downsample):
        assert layout.num_tokens(size, downsample) == peer._get_number_of_features(*size, 336, 336), size


@pytest.mark.parametrize("max_tiles", [1, 2, 4, 9])
@pytest.mark.parametrize("downsample", [1, 2, 3, 4])
def test_num_tokens_equals_llava_onevision(downsample, max_tiles):
    layout, side = layout_for(pinpoints=ONEVISION_PINPOINTS, ratio=f"anyres_max_{max_tiles}"), 24 // downsample
    peer = object.__new__(LlavaOnevisionProcessor)
    peer.image_processor = SimpleNamespace(image_grid_pinpoints=ONEVISION_PINPOINTS)
    peer.num_image_tokens, peer.vision_aspect_ratio = side**2, f"anyres_max_{max_tiles}"
    compared = 0
    for size in image_sizes(1000, seed=side):
        rows, columns = layout.tiling(size)
        unpadded = layout.unpad(rows * side, columns * side, size)
        if 1 not in layout.resample(*(part.stop - part.start for part in unpadded), side):
            # LLaVA-OneVision rounds a thin grid down to no row, and fails
            assert layout.num_tokens(size, downsample) == peer._get_number_of_features(*size, 336, 336), size
            compared += 1
    assert compared > 400


@pytest.mark.parametrize("patch_size", [14, 12, 48])  # 24, 28 and 7 patches a side: full regions and others
@pytest.mark.parametrize("downsample", [1, 2, 3, 4])
@pytest.mark.parametrize("merge_type", LAYOUTS)
def test_num_tokens_equals_what_is_packed(merge_type, downsample, patch_size):
    side, separators = math.ceil(336 // patch_size / downsample), torch.randn(2, 3)
    ratios = ["anyres", *(f"anyres_max_{n}" for n in (1, 4))] if merge_type == "spatial_unpad" else ["anyres"]
    for pinpoints, ratio in itertools.product((NEXT_PINPOINTS, ONEVISION_PINPOINTS), ratios):
        layout = layout_for(merge_type, pinpoints, ratio, patch_size)
        for size in image_sizes(100, seed=downsample):
            tiles = make_tiles(layout, size, downsample, features=3)
            packed = layout.pack(tiles, size, separators)
            assert packed.shape == (layout.num_tokens(size, downsample), 3), size
            if merge_type != "spatial_unpad":
                others = math.prod(layout.tiling(size))
                tokens = {"slices": (others + (others > 1)) * (side**2 + 1)}.get(merge_type, (others + 1) * side**2)
                assert len(packed) == tokens, size


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1)])
def test_a_thin_grid_keeps_a_row_and_a_column(size):
    layout = layout_for(pinpoints=[[336, 2016], [2016, 336]], ratio="anyres_max_1")
    assert min(layout.resample(1, 6, tokens=1)) == 1
    packed = layout.pack(torch.zeros(7, 1, 1), size, torch.zeros(1, 1))
    assert len(packed) == layout.num_tokens(size, 24) > 1


# -------------------------------------------------------------------------------------------------------------- packing


SIZES = [(672, 672), (336, 336), (500, 672), (672, 500), (100, 900), (900, 100), (1, 2000), (2000, 1)]


def peer_model(model_class, layout, side):
    vision = SimpleNamespace(image_size=336, patch_size=336 // side)
    config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=[list(pair) for pair in layout.pinpoints])
    return SimpleNamespace(config=config, pack=model_class.pack_image_features)


@PINPOINTS
@pytest.mark.parametrize("downsample", [1, 2, 3, 4])
def test_spatial_unpad_equals_llava_next(downsample, pinpoints):
    layout, newline = layout_for(pinpoints=pinpoints), torch.randn(3)
    peer = peer_model(LlavaNextModel, layout, 24 // downsample)
    for size in SIZES:
        tiles = make_tiles(layout, size, downsample, features=3)
        (expected,), _ = peer.pack(peer, [tiles], torch.tensor([size]), "full", newline)
        assert torch.equal(layout.pack(tiles, size, newline[None]), expected)


@pytest.mark.parametrize("max_tiles", [1, 2, 9])
@pytest.mark.parametrize("downsample", [1, 2, 3, 4])
def test_a_limit_equals_llava_onevision(downsample, max_tiles):
    ratio, newline = f"anyres_max_{max_tiles}", torch.randn(3)
    layout = layout_for(pinpoints=ONEVISION_PINPOINTS, ratio=ratio)
    peer = peer_model(LlavaOnevisionModel, layout, 24 // downsample)
    for size in [*SIZES[:4], (1500, 2000)]:
        tiles = make_tiles(layout, size, downsample, features=3)
        (expected,), _ = peer.pack(peer, [tiles], torch.tensor([size]), newline, ratio)
        torch.testing.assert_close(layout.pack(tiles, size, newline[None]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("merge_type", ["spatial", "flat", "slices"])
def test_tokens_stand_in_their_order(merge_type, size):
    """Tokens are numbered; "," and "\\n" are -1 and -2."""
    layout = layout_for(merge_type, ONEVISION_PINPOINTS)
    (rows, columns), side = layout.tiling(size), 2
    tiles = torch.arange(layout.num_tiles(size) * side**2).view(-1, side**2, 1)
    numbers = tiles.view(-1, side, side).tolist()
    base = [n for line in numbers[0] for n in line]
    if merge_type == "spatial":
        expected = base + [
            n
            for row in range(rows)
            for line in range(side)
            for column in range(columns)
            for n in numbers[1 + row * columns + column][line]
        ]
    elif merge_type == "flat":
        expected = list(range(tiles.numel()))
    else:
        expected = []
        for row in range(rows):
            for column in range(columns):
                tile = numbers[(rows * columns > 1) + row * columns + column]
                expected += [n for line in tile for n in line] + [-1 if column < columns - 1 else -2]
        expected += [*base, -2] if rows * columns > 1 else []
    assert layout.pack(tiles, size, torch.tensor([[-1], [-2]])).flatten().tolist() == expected


def test_one_tile_is_packed_as_it_is():
    tiles = torch.randn(1, 144, 3)
    assert torch.equal(ImageLayout(336, 24).pack(tiles, None, None), tiles[0])


# -------------------------------------------------------------------------------------------------- TokenPacker's tiles


MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PICTURES = [  # (height, width): small and large, of every aspect up to 1 to 12
    *((40, 40), (40, 90), (90, 40), (100, 101), (150, 200), (200, 150), (224, 224), (240, 320), (300, 100), (100, 300)),
    *((335, 337), (336, 336), (337, 335), (336, 672), (672, 336), (240, 340), (476, 475), (400, 400), (426, 640)),
    *((480, 640), (640, 480), (500, 375), (500, 333), (612, 612), (700, 70), (70, 700), (720, 1280), (1280, 720)),
    *((768, 1024), (1024, 768), (1008, 1008), (900, 300), (300, 900), (1080, 810), (1200, 100), (100, 1200)),
    *((1500, 1000), (1111, 777), (1344, 1344), (1754, 1240)),
]


def slice_pinpoints(patch_num):
    """At most `patch_num` tiles, and nine in a line."""
    sides = range(1, patch_num + 1)
    tilings = [(r, c) for r in sides for c in sides if r * c <= patch_num and (min(r, c) > 1 or r + c <= 10)]
    return [[336 * rows, 336 * columns] for rows, columns in tilings]


def expected_tiling(height, width, pinpoints):
    """TokenPacker's choice in its own precision, float32, from the smallest tiling up.

    The share of a tiling that the image covers once it is resized to fit, and a tenth of the intersection over union of
    the tiling and the image at 1.4 times its size.
    """
    tilings = torch.tensor(sorted(pinpoints, key=math.prod), dtype=torch.float32)  # (tilings, 2)
    image, areas = torch.tensor([height, width], dtype=torch.float32), tilings.prod(1)
    fitted = torch.round(image * (tilings / image).min(1, keepdim=True).values)
    enlarged = image * 1.4
    intersection = torch.minimum(tilings, enlarged).prod(1)
    union = areas + enlarged.prod() - intersection
    chosen = tilings[torch.argmax(fitted.prod(1) / areas + 0.1 * intersection / union)]
    return tuple((chosen / 336).int().tolist())


def expected_tiles(pixels, pinpoints):
    """The tiles of a picture (3, height, width) of 0 to 255, the base tile last, as TokenPacker's code makes them."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    image = (torch.from_numpy(pixels) / 255 - mean) / std
    height, width = image.shape[1:]
    rows, columns = expected_tiling(height, width, pinpoints)

    def place(picture, max_height, max_width):
        if max_height / height <= max_width / width:
            size = max_height, min(max_width, round(width * (max_height / height)))
        else:
            size = min(max_height, round(height * (max_width / width))), max_width
        canvas = torch.zeros(3, max_height, max_width)
        canvas[:, : size[0], : size[1]] = F.interpolate(picture[None], size=size, mode="bilinear")[0]
        return canvas

    whole = place(image, 336 * rows, 336 * columns)
    tiles = [
        whole[:, 336 * row : 336 * row + 336, 336 * column : 336 * column + 336]
        for row in range(rows)
        for column in range(columns)
    ]
    return torch.stack(tiles + [place(whole, 336, 336)] * (len(tiles) > 1))


@pytest.mark.parametrize("patch_num", [9, 16, 25])
def test_tilings_are_token_packers(patch_num):
    pinpoints = slice_pinpoints(patch_num)
    layout = layout_for("slices", pinpoints)
    assert len(PICTURES) == len(set(PICTURES)) == 40
    for size in [*PICTURES, *image_sizes(2000, seed=patch_num)]:
        assert layout.tiling(size) == expected_tiling(*size, pinpoints), size


@pytest.mark.common
@pytest.mark.parametrize("patch_num", [9, 25])
def test_tiles_are_token_packers(patch_num):
    """Within 1e-5, of values between -1.8 and 2.2; a step of 8 bits is 0.015."""
    pinpoints = slice_pinpoints(patch_num)
    layout, generator = layout_for("slices", pinpoints), np.random.default_rng(patch_num)
    size = {"shortest_edge": 336}
    image_processor = LlavaNextImageProcessorPil(size=size, crop_size=336, image_grid_pinpoints=pinpoints)
    for height, width in PICTURES:
        pixels = generator.integers(0, 256, (3, height, width), dtype=np.uint8)
        expected = expected_tiles(pixels, pinpoints)
        found = layout.process([pixels], image_processor, return_tensors="pt")["pixel_values"][0]
        assert found.shape == expected.shape == (layout.num_tiles((height, width)), 3, 336, 336)
        torch.testing.assert_close(found.roll(-1, 0), expected, rtol=0, atol=1e-5)


def test_tiles_of_several_pictures():
    """Each as by itself, filled up with empty tiles; the fields of the image processor count, and arguments before."""
    layout = layout_for("slices", slice_pinpoints(9))
    options = {"size": {"shortest_edge": 336}, "crop_size": 336, "image_grid_pinpoints": slice_pinpoints(9)}
    image_processor = LlavaNextImageProcessorPil(**options, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    images = [np.full((3, *size), 51, dtype=np.uint8) for size in ((300, 300), (300, 650))]
    found = layout.process(images, image_processor)["pixel_values"]
    assert isinstance(found, np.ndarray) and found.shape == (2, 3, 3, 336, 336)
    assert np.allclose(found[0, 0], (0.2 - 0.5) / 0.25, atol=1e-6) and not found[0, 1:].any()
    assert np.array_equal(found[1], layout.process(images[1:], image_processor)["pixel_values"][0])
    raw = layout.process(images[:1], image_processor, return_tensors="pt", do_rescale=False, do_normalize=False)
    assert torch.allclose(raw["pixel_values"], torch.tensor(51.0))


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1, 1)])
def test_a_thin_picture_keeps_a_pixel(size):
    layout = layout_for("slices", slice_pinpoints(9))
    tiles = layout.cut_tiles(torch.ones(3, *size))
    assert len(tiles) == layout.num_tiles(size) and (tiles.flatten(1).max(1).values > 0).sum() > len(tiles) // 2
