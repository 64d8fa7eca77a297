"""The configuration: defaults, round trips, refusals; and the layout, against its peers and real packing."""

import copy
import itertools
import random

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import CLIPConfig, CLIPVisionConfig, LlamaConfig, LlavaNextProcessor, LlavaOnevisionProcessor

from llava_vr import LlavaVrConfig
from llava_vr.configuration_llava_vr import PROJECTOR_OPTIONS, ImageLayout, tokens_per_side
from llava_vr.modeling_llava_vr import pack_tiles


NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_PINPOINTS = [[336 * rows, 336 * columns] for rows in range(1, 7) for columns in range(1, 7)]
EDGES = [1, 2, 3, 27, 335, 336, 337, 671, 672, 1008, 1999, 2000]
SIDES = [1, 2, 3, 5, 12, 24]  # tokens per side of a tile: those of s = 24, 12, 8, 5, 2 and 1 on a grid of 24


def image_sizes(count, seed=0):
    """Every pair of edge sizes, then random ones from 1 to 2000 pixels a side, half of them extreme in aspect."""
    generator = random.Random(seed)
    uniform = ((generator.randint(1, 2000), generator.randint(1, 2000)) for _ in range(count // 2))
    extreme = ((int(2000 ** generator.random()), int(2000 ** generator.random())) for _ in range(count - count // 2))
    return [*itertools.product(EDGES, EDGES), *uniform, *extreme]


# ------------------------------------------------------------------------------------------------ fields


@pytest.mark.parametrize(
    "field, value",
    {
        "model_type": "llava_vr",
        "image_token_id": 151646,
        "projector_type": "avg_pool",
        "projector_downsample": 2,
        "projector_hidden_act": "gelu",
        "projector_kwargs": {},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "remember_feature_layers": [13, 18, 23],
        "remember_layers": [0, 7, 14, 21],
        "remember_hidden_size": 1024,
        "remember_num_heads": 16,
        "remember_num_key_value_heads": 2,
        "remember_window": None,
        "window_size": 2,
        "memory_size": 3 * 1024,
        "feature_grid": 24,
        "image_aspect_ratio": "anyres",
        "image_merge_type": "spatial_unpad",
        "image_separator_ids": None,
        "image_grid_pinpoints": NEXT_PINPOINTS,
        "tie_word_embeddings": True,
    }.items(),
)
def test_default(field, value):
    assert getattr(LlavaVrConfig(), field) == value


def test_default_vision_tower_and_decoder():
    config = LlavaVrConfig()
    vision, text = config.vision_config, config.text_config
    assert (vision.model_type, vision.hidden_size, vision.num_hidden_layers) == ("clip_vision_model", 1024, 24)
    assert (vision.image_size, vision.patch_size, vision.intermediate_size) == (336, 14, 4096)
    assert (text.model_type, text.hidden_size, text.num_hidden_layers) == ("qwen2", 1536, 28)
    assert (text.num_attention_heads, text.num_key_value_heads, text.vocab_size) == (12, 2, 151936)


@pytest.mark.parametrize("depth, layers", [(24, [13, 18, 23]), (12, [6, 9, 12]), (2, [1, 2]), (1, [1])])
def test_default_feature_layers_follow_the_towers_depth(tiny_config, depth, layers):
    assert tiny_config(vision={"num_hidden_layers": depth}).remember_feature_layers == layers


@pytest.mark.parametrize("depth, layers", [(28, [0, 7, 14, 21]), (6, [0, 1, 3, 4]), (2, [0, 1]), (1, [0])])
def test_default_remember_layers_follow_the_decoders_depth(tiny_config, depth, layers):
    assert tiny_config(text={"num_hidden_layers": depth}).remember_layers == layers


@pytest.mark.parametrize(
    "projector_type, width, options",
    [
        ("tokenpacker", 32, {"feature_layers": [1, 1, 2, 2], "num_heads": 1}),
        ("tokenpacker", 256, {"feature_layers": [1, 1, 2, 2], "num_heads": 2}),
        ("resampler", 256, {"depth": 2, "num_heads": 2}),
        (
            "c_abstractor",
            64,
            {
                "hidden_size": 64,
                "depth": 3,
                "mlp_depth": 2,
                "position_embedding": True,
                "pre_norm": False,
                "end_tokens": 0,
            },
        ),
    ],
)
def test_default_projector_options_follow_the_towers_size(tiny_config, projector_type, width, options):
    config = tiny_config(vision={"hidden_size": width}, projector_type=projector_type)
    assert config.projector_kwargs == options


def test_given_projector_options_are_kept_and_not_changed(tiny_config):
    given = {"num_heads": 4}
    config = tiny_config(projector_type="resampler", projector_kwargs=given)
    assert config.projector_kwargs == {"depth": 2, "num_heads": 4}
    assert given == {"num_heads": 4} and PROJECTOR_OPTIONS["resampler"]["num_heads"] is None


def test_default_pinpoints_follow_the_tile(tiny_config):
    pinpoints = tiny_config(vision={"image_size": 48}).image_grid_pinpoints
    assert pinpoints == [[side // 7 for side in pair] for pair in NEXT_PINPOINTS]


@pytest.mark.parametrize("text, given, tied", [(True, None, True), (False, None, False), (True, False, False)])
def test_tie_word_embeddings(tiny_config, text, given, tied):
    assert tiny_config(text={"tie_word_embeddings": text}, tie_word_embeddings=given).tie_word_embeddings is tied


def test_window_size(tiny_config):
    assert tiny_config(projector_downsample=3).window_size == 3
    assert tiny_config(remember_window=4).window_size == 4


@pytest.mark.parametrize("patches, tokens, window", [(24, 16, 2), (16, 12, 2), (5, 3, 3), (7, 3, 3), (24, 7, 5)])
def test_a_fraction_s_window_holds_the_largest_region(tiny_config, patches, tokens, window):
    """Regions of `nn.AdaptiveAvgPool2d`, written out: 5 patches to 3 tokens are [0, 2), [1, 4) and [3, 5)."""
    config = tiny_config(
        vision={"image_size": 8 * patches}, projector_type="c_abstractor", projector_downsample=patches / tokens
    )
    assert config.window_size == window and config.image_layout.tokens_per_side == tokens
    regions = [(i * patches // tokens, -(-(i + 1) * patches // tokens)) for i in range(tokens)]
    assert max(end - start for start, end in regions) == window


def test_tokens_per_side_of_every_fraction():
    assert all(tokens_per_side(patches, patches / t) == t for patches in range(1, 100) for t in range(1, patches + 1))
    assert tokens_per_side(16, 1.33333) == 12


def test_image_token_index_is_an_alias():
    config = LlavaVrConfig(image_token_index=7)
    assert config.image_token_id == config.image_token_index == 7
    config.image_token_index = 8
    assert config.to_dict()["image_token_id"] == 8 and "image_token_index" not in config.to_dict()


# ------------------------------------------------------------------------------------------------ round trips

VARIANTS = [
    {},
    {"family": "siglip", "image_aspect_ratio": "anyres_max_4", "remember_window": 3},
    {"projector_type": "tokenpacker", "projector_downsample": 3, "remember_feature_layers": [-1]},
    {"projector_type": "c_abstractor", "projector_kwargs": {"end_tokens": 2}, "image_aspect_ratio": "pad"},
    {"projector_type": "mlp", "projector_downsample": 1, "remember_layers": [], "image_merge_type": "flat"},
    {"projector_type": "c_abstractor", "projector_downsample": 4 / 3, "image_merge_type": "spatial"},
    {"image_merge_type": "slices", "image_separator_ids": [0, 261]},
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_round_trip_of_dict_and_file(tiny_config, tmp_path, overrides):
    config = tiny_config(**overrides)
    config.save_pretrained(tmp_path)
    for copied in (
        LlavaVrConfig.from_dict(config.to_dict()),
        LlavaVrConfig.from_pretrained(tmp_path),
        copy.deepcopy(config),
    ):
        assert copied.to_dict() == config.to_dict()
        assert type(copied.vision_config) is type(config.vision_config)
        assert type(copied.text_config) is type(config.text_config)
        assert copied.image_layout == config.image_layout


def test_sub_configurations_as_dicts():
    config = LlavaVrConfig(
        vision_config={"model_type": "siglip_vision_model", "hidden_size": 32}, text_config={"model_type": "llama"}
    )
    assert (config.vision_config.model_type, config.vision_config.hidden_size) == ("siglip_vision_model", 32)
    assert config.text_config.model_type == "llama"


def test_loads_a_llava_next_configuration(tiny_config):
    values = {"vision_feature_layer": -1, "image_token_index": 5, "image_seq_length": 576}
    config = LlavaVrConfig.from_dict(
        {**values, "vision_config": {}, "projector_type": "mlp", "projector_downsample": 1, "remember_layers": []}
    )
    assert (config.vision_feature_layer, config.image_token_id, config.image_seq_length) == (-1, 5, 576)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"projector_type": "conv"}, "projector_type must be one of mlp, avg_pool, .* found 'conv'"),
        ({"projector_hidden_act": "gulp"}, "projector_hidden_act must be one of .*gelu.* found 'gulp'"),
        ({"projector_type": "mlp"}, "projector_downsample must be 1 with projector_type mlp.* found 2"),
        ({"projector_downsample": 1}, "projector_downsample must be from 2 to 4 .* found 1; 1 goes with mlp"),
        ({"projector_downsample": 5}, "projector_downsample must be from 2 to 4 .* found 5"),
        ({"projector_downsample": 0}, "projector_downsample must be from 2 to 4 .* found 0"),
        ({"projector_downsample": 1.5}, "projector_downsample must be a whole number with .* avg_pool, found 1.5"),
        *(
            (
                {"projector_type": "c_abstractor", "projector_downsample": s},
                rf"projector_downsample must be whole, or 4 \(the grid's side\) divided by .* found {s}",
            )
            for s in (1.5, 1.0, 0.5, 4.5, 1.34, float("nan"))
        ),
        (
            {"projector_type": "c_abstractor", "projector_downsample": 4 / 3, "remember_window": 1},
            "remember_window must be null or at least 2, a region's side with projector_downsample 1.33",
        ),
        ({"vision_feature_layer": 3}, "vision_feature_layer has 3, .* 3 hidden states: use -3 to 2"),
        ({"vision_feature_layer": -4}, "vision_feature_layer has -4"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy must be one of default, full"),
        ({"remember_feature_layers": [1, 3]}, "remember_feature_layers has 3, .* use -3 to 2"),
        ({"remember_feature_layers": []}, r"remember_feature_layers must name .* or remember_layers be \[\]"),
        ({"remember_layers": [2]}, r"remember_layers must be different decoder layers from 0 to 1.* found \[2\]"),
        ({"remember_layers": [-1]}, "remember_layers must be different decoder layers from 0 to 1"),
        ({"remember_layers": [0, 0]}, "remember_layers must be different"),
        ({"remember_num_heads": 3}, "remember_num_heads must divide remember_hidden_size 16, found 3"),
        ({"remember_num_heads": 0}, "remember_num_heads must divide remember_hidden_size 16, found 0"),
        ({"remember_num_key_value_heads": 0}, "remember_num_key_value_heads must divide remember_num_heads 2, found 0"),
        ({"remember_num_key_value_heads": 4}, "remember_num_key_value_heads must divide remember_num_heads 2, found 4"),
        ({"remember_hidden_size": 0}, "remember_num_heads must divide remember_hidden_size 0"),
        ({"remember_window": 0}, "remember_window must be null or at least 2, .* projector_downsample 2; found 0"),
        ({"remember_window": 1}, "remember_window must be null or at least 2, .* projector_downsample 2; found 1"),
        ({"image_token_id": -200}, "image_token_id must be .* 0 or more, found -200"),
        ({"image_aspect_ratio": "wide"}, "image_aspect_ratio must be anyres, anyres_max_N .* found 'wide'"),
        ({"image_aspect_ratio": "anyres_max_0"}, "image_aspect_ratio must be"),
        ({"image_aspect_ratio": "anyres_max_"}, "image_aspect_ratio must be"),
        ({"image_aspect_ratio": "anyres_max_²"}, "image_aspect_ratio must be"),
        (
            {"image_merge_type": "unpad"},
            "image_merge_type must be one of spatial_unpad, spatial, flat, slices, found 'unpad'",
        ),
        (
            {"image_aspect_ratio": "anyres_max_2", "image_merge_type": "flat"},
            "image_merge_type must be spatial_unpad with anyres_max_2, found 'flat'",
        ),
        (
            {"image_aspect_ratio": "pad", "image_merge_type": "slices", "image_separator_ids": [0, 1]},
            "image_aspect_ratio must be anyres with image_merge_type slices, found 'pad'",
        ),
        ({"image_merge_type": "slices"}, "image_separator_ids must be two token ids with .* slices .* found None"),
        ({"image_separator_ids": [0, 1]}, r"image_separator_ids must be .* null otherwise; found \[0, 1\] with spat"),
        *(
            (
                {"image_merge_type": "slices", "image_separator_ids": ids},
                "image_separator_ids must be two token ids from 0 to 261",
            )
            for ids in ([0], [0, 1, 2], [0, 262], [-1, 0])
        ),
        ({"image_grid_pinpoints": [[32, 48]]}, r"image_grid_pinpoints .* multiples of the tile, 32 .* \[32, 48\]"),
        ({"image_grid_pinpoints": [[0, 32]]}, "image_grid_pinpoints must be"),
        ({"image_grid_pinpoints": [[32, 32, 32]]}, "image_grid_pinpoints must be"),
        ({"image_grid_pinpoints": [32, 64]}, "image_grid_pinpoints must be .* found 32"),
        ({"image_grid_pinpoints": [["32", "64"]]}, "image_grid_pinpoints must be"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints must not be empty with image_aspect_ratio 'anyres'"),
        ({"projector_kwargs": {"depth": 2}}, r"projector_kwargs has \['depth'\], but avg_pool has the options \[\]"),
        (
            {"projector_type": "resampler", "projector_kwargs": {"mlp": 1}},
            r"projector_kwargs has \['mlp'\], but resampler has the options \['depth', 'num_heads'\]",
        ),
        (
            {"projector_type": "tokenpacker", "projector_kwargs": {"num_heads": 5}},
            r"projector_kwargs\['num_heads'\] must divide vision_config.hidden_size 32, found 5",
        ),
        (
            {"projector_type": "tokenpacker", "projector_kwargs": {"feature_layers": [9]}},
            r"projector_kwargs\['feature_layers'\] has 9",
        ),
        (
            {"projector_type": "tokenpacker", "projector_kwargs": {"feature_layers": []}},
            r"projector_kwargs\['feature_layers'\] must name a hidden state",
        ),
        (
            {"projector_type": "tokenpacker", "projector_kwargs": {"feature_layers": 2}},
            r"projector_kwargs\['feature_layers'\] must be a list",
        ),
        (
            {"projector_type": "resampler", "projector_kwargs": {"num_heads": 0}},
            r"projector_kwargs\['num_heads'\] must be an integer of at least 1, found 0",
        ),
        (
            {"projector_type": "resampler", "projector_kwargs": {"depth": -1}},
            r"projector_kwargs\['depth'\] must be an integer of at least 0, found -1",
        ),
        (
            {"projector_type": "c_abstractor", "projector_kwargs": {"mlp_depth": 0}},
            r"projector_kwargs\['mlp_depth'\] must be an integer of at least 1, found 0",
        ),
        (
            {"projector_type": "c_abstractor", "projector_kwargs": {"hidden_size": "64"}},
            r"projector_kwargs\['hidden_size'\] must be an integer of at least 1, found '64'",
        ),
        (
            {"projector_type": "c_abstractor", "projector_kwargs": {"end_tokens": 2}},
            r"projector_kwargs\['end_tokens'\] needs one tile, or image_merge_type flat or slices",
        ),
        ({"vision": {"patch_size": 64}}, r"vision_config.patch_size \(64\) must not exceed .*image_size \(32\)"),
        ({"vision": {"patch_size": 0}}, "vision_config.patch_size must be a positive integer, found 0"),
        ({"vision": {"image_size": 0}}, "vision_config.image_size must be a positive integer, found 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_impossible_configuration_is_refused(tiny_config, overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**overrides)


@pytest.mark.parametrize(
    "field, config, message",
    [
        ("vision_config", CLIPConfig(), r"vision_config.image_size must be .* \(model_type 'clip'\)"),
        ("vision_config", LlamaConfig(), r"vision_config.image_size must be .* \(model_type 'llama'\)"),
        ("vision_config", {"model_type": "eagle"}, "vision_config.model_type must be .* found 'eagle'"),
        ("text_config", CLIPVisionConfig(), r"text_config.vocab_size must be .* \(model_type 'clip_vision_model'\)"),
        ("text_config", {"model_type": "gpt9"}, "text_config.model_type must be .* found 'gpt9'"),
    ],
)
def test_sub_configuration_of_the_wrong_kind_is_refused(field, config, message):
    with pytest.raises(ValueError, match=message):
        LlavaVrConfig(**{field: config})


@pytest.mark.parametrize(
    "field, value",
    [
        ("projector_downsample", "2"),
        ("image_separator_ids", ["\n", ","]),
        ("projector_kwargs", [1]),
        ("vision_feature_layer", "last"),
        ("remember_feature_layers", ["1"]),
        ("remember_layers", 3),
        ("remember_window", "wide"),
        ("image_token_id", "<image>"),
        ("image_grid_pinpoints", "anyres"),
        ("vision_config", "clip"),
    ],
)
def test_value_of_the_wrong_type_is_refused(field, value):
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=field):
        LlavaVrConfig(**{field: value})


# ------------------------------------------------------------------------------------------------ layout


def layout_for(side, pinpoints, merge_type="spatial_unpad", max_tiles=None, end_tokens=0):
    return ImageLayout(336, side, pinpoints, merge_type, max_tiles, end_tokens)


@pytest.mark.parametrize("image_size, downsample, side", [(336, 2, 12), (336, 5, 5), (384, 3, 9), (32, 3, 1)])
def test_tokens_per_side_rounds_up(tiny_config, image_size, downsample, side):
    config = tiny_config(
        vision={"image_size": image_size, "patch_size": 14}, projector_downsample=min(downsample, image_size // 14)
    )
    assert config.image_layout.tokens_per_side == side


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
    layout = layout_for(12, NEXT_PINPOINTS)
    assert (layout.num_tiles(size), layout.num_tokens(size)) == (tiles, tokens)


@pytest.mark.parametrize("merge_type, tokens", [("spatial", 5 * 144), ("flat", 5 * 144)])
def test_num_tokens_without_unpadding(merge_type, tokens):
    assert layout_for(12, NEXT_PINPOINTS, merge_type).num_tokens((500, 672)) == tokens


@pytest.mark.parametrize(
    "size, tokens",
    [((336, 336), 144 + 1), ((336, 672), 3 * 145), ((1008, 672), 7 * 145), ((1, 1), 144 + 1)],
)
def test_num_tokens_of_slices(size, tokens):
    """A separator after each tile; the base tile counts where there is more than one other."""
    assert layout_for(12, ONEVISION_PINPOINTS, "slices").num_tokens(size) == tokens
    assert layout_for(12, ONEVISION_PINPOINTS, "slices", end_tokens=2).num_tokens(size) == tokens // 145 * 147
    assert layout_for(12, [], "slices").num_tokens(size) == 144


def test_num_tokens_of_one_tile():
    assert layout_for(12, []).num_tokens((500, 672)) == 144
    assert layout_for(12, [], end_tokens=3).num_tokens((500, 672)) == 147
    assert layout_for(12, NEXT_PINPOINTS, "flat", end_tokens=3).num_tokens((500, 672)) == 5 * 147


def test_num_tokens_of_a_limit():
    unlimited, limited = (layout_for(12, ONEVISION_PINPOINTS, max_tiles=n) for n in (None, 4))
    assert unlimited.num_tokens((2000, 2000)) == 144 + 72 * 73
    assert limited.num_tokens((2000, 2000)) == 144 + 24 * 25  # 4 tiles' worth: 24 x 24
    assert limited.num_tokens((600, 600)) == unlimited.num_tokens((600, 600))


@pytest.mark.parametrize("pinpoints", [NEXT_PINPOINTS, ONEVISION_PINPOINTS], ids=["next", "onevision"])
@pytest.mark.parametrize("side", SIDES)
def test_num_tokens_equals_llava_next(side, pinpoints):
    peer = object.__new__(LlavaNextProcessor)
    peer.image_processor = type("ImageProcessor", (), {"image_grid_pinpoints": pinpoints})
    peer.patch_size, peer.num_additional_image_tokens = 336 // side, 0
    layout = layout_for(side, pinpoints)
    for size in image_sizes(4000, seed=side):
        assert layout.num_tokens(size) == peer._get_number_of_features(*size, 336, 336), size


@pytest.mark.parametrize("max_tiles", [1, 2, 4, 9])
@pytest.mark.parametrize("side", SIDES[2:])
def test_num_tokens_equals_llava_onevision(side, max_tiles):
    peer = object.__new__(LlavaOnevisionProcessor)
    peer.image_processor = type("ImageProcessor", (), {"image_grid_pinpoints": ONEVISION_PINPOINTS})
    peer.num_image_tokens, peer.vision_aspect_ratio = side**2, f"anyres_max_{max_tiles}"
    layout = layout_for(side, ONEVISION_PINPOINTS, max_tiles=max_tiles)
    sizes = [
        size
        for size in image_sizes(1000, seed=side)
        # LLaVA-OneVision rounds a thin grid down to no row, and fails
        if 1 not in layout.resample(*(part.stop - part.start for part in layout.unpad(size)))
    ]
    assert len(sizes) > 400
    for size in sizes:
        assert layout.num_tokens(size) == peer._get_number_of_features(*size, 336, 336), size


@pytest.mark.parametrize(
    "merge_type, max_tiles, end_tokens",
    [
        *(("spatial_unpad", max_tiles, 0) for max_tiles in (None, 1, 2, 4, 9)),
        ("spatial", None, 0),
        ("flat", None, 0),
        ("flat", None, 3),
        ("slices", None, 0),
        ("slices", None, 3),
    ],
)
@pytest.mark.parametrize("side", SIDES)
def test_num_tokens_equals_what_the_model_packs(side, merge_type, max_tiles, end_tokens):
    separators = torch.zeros(2, 1) if merge_type == "slices" else torch.zeros(1)
    for pinpoints in (NEXT_PINPOINTS, ONEVISION_PINPOINTS):
        layout = layout_for(side, pinpoints, merge_type, max_tiles, end_tokens)
        tiles = torch.zeros(37, layout.tokens_per_tile, 1)
        for size in image_sizes(600, seed=side):
            packed = pack_tiles(tiles[: layout.num_tiles(size)], layout, size, separators)
            assert len(packed) == layout.num_tokens(size), size


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1)])
def test_a_thin_grid_keeps_a_row_and_a_column(size):
    layout = layout_for(1, [[336, 2016], [2016, 336]], max_tiles=1)
    assert layout.unpad(size) and min(layout.resample(1, 6)) == 1
    assert len(pack_tiles(torch.zeros(7, 1, 1), layout, size, torch.zeros(1))) == layout.num_tokens(size) > 1
