"""Regions and windows of a tile, and tiles of an image: counting and packing, against loops and transformers."""

import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaNextProcessor, LlavaOnevisionProcessor
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
    "size, tokens",
    [((336, 336), 144 + 1), ((336, 672), 3 * 145), ((1008, 672), 7 * 145), ((1, 1), 144 + 1)],
)
def test_num_tokens_of_slices(size, tokens):
    """A separator after each tile; the base tile counts where there is more than one other."""
    assert layout_for("slices", ONEVISION_PINPOINTS).num_tokens(size, 2) == tokens


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
                tile = numbers[1 + row * columns + column]
                expected += [n for line in tile for n in line] + [-1 if column < columns - 1 else -2]
        expected += [*base, -2] if rows * columns > 1 else []
    assert layout.pack(tiles, size, torch.tensor([[-1], [-2]])).flatten().tolist() == expected


def test_one_tile_is_packed_as_it_is():
    tiles = torch.randn(1, 144, 3)
    assert torch.equal(ImageLayout(336, 24).pack(tiles, None, None), tiles[0])
