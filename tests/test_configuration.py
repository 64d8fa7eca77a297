"""The configuration: defaults, round trips, refusals."""

import copy

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import CLIPConfig, CLIPVisionConfig, LlamaConfig

from llava_vr import LlavaVrConfig
from llava_vr.projectors_llava_vr import PROJECTORS


NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


# ------------------------------------------------------------------------------------------------ fields


@pytest.mark.parametrize(
    "field, value",
    {
        "model_type": "llava_vr",
        "image_token_id": 151646,
        "projector_type": "avg_pool",
        "projector_downsample": 2,
        "projector_downsample_choices": None,
        "projector_hidden_act": "gelu",
        "projector_kwargs": {"pooled_mlp": False},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "remember_feature_layers": [13, 18, 23],
        "remember_layers": [0, 7, 14, 21],
        "remember_hidden_size": 1024,
        "remember_num_heads": 16,
        "remember_num_key_value_heads": 2,
        "remember_window_ratio": 2.0,
        "memory_size": 3 * 1024,
        "key_value_size": 2 * 64,
        "feature_grid": 24,
        "feature_layers": [-2],
        "feature_size": 1024,
        "downsamples": [2],
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


@pytest.mark.parametrize("depth, layers", [(28, [0, 7, 14, 21]), (6, [0, 1, 3, 4]), (4, [0, 1, 2]), (2, [0]), (1, [])])
def test_default_remember_layers_follow_the_decoders_depth(tiny_config, depth, layers):
    """Never the last, after which no text token could see the update."""
    assert tiny_config(text={"num_hidden_layers": depth}).remember_layers == layers


@pytest.mark.parametrize(
    "projector_type, width, options",
    [
        ("tokenpacker", 32, {"feature_layers": [2, 2, 3, 3], "num_heads": 1}),
        ("tokenpacker", 256, {"feature_layers": [2, 2, 3, 3], "num_heads": 2}),
        ("resampler", 256, {"depth": 2, "num_heads": 2}),
        (
            "c_abstractor",
            64,
            {"hidden_size": 64, "depth": 3, "mlp_depth": 2, "position_embedding": True, "pre_norm": False},
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
    assert given == {"num_heads": 4} and PROJECTORS["resampler"].options["num_heads"] is None


def test_default_pinpoints_follow_the_tile(tiny_config):
    pinpoints = tiny_config(vision={"image_size": 48}).image_grid_pinpoints
    assert pinpoints == [[side // 7 for side in pair] for pair in NEXT_PINPOINTS]


@pytest.mark.parametrize("text, given, tied", [(True, None, True), (False, None, False), (True, False, False)])
def test_tie_word_embeddings(tiny_config, text, given, tied):
    assert tiny_config(text={"tie_word_embeddings": text}, tie_word_embeddings=given).tie_word_embeddings is tied


@pytest.mark.parametrize(
    "ratio, windows",
    [(1.0, [1, 2, 3, 4]), (1.5, [3, 4, 5, 6]), (2, [3, 4, 7, 8]), (2.0, [3, 4, 7, 8]), (7 / 3, [3, 6, 7, 10])],
)
def test_window_size(tiny_config, ratio, windows):
    """At least the ratio, and centred: more than the region by an even number of patches."""
    config = tiny_config(projector_type="mlp", projector_downsample=1, remember_window_ratio=ratio)
    assert [config.window_size(s) for s in (1, 2, 3, 4)] == windows
    choices = tiny_config(projector_downsample_choices=[1, 2, 3, 4], remember_window_ratio=ratio)
    assert [choices.window_size(s) for s in choices.downsamples] == [0, *windows[1:]]  # no module runs where s is 1


def test_several_feature_layers_are_joined(tiny_config):
    config = tiny_config(vision_feature_layer=[1, -1])
    assert (config.feature_layers, config.feature_size) == ([1, -1], 64)


def test_image_token_index_is_an_alias():
    config = LlavaVrConfig(image_token_index=7)
    assert config.image_token_id == config.image_token_index == 7
    config.image_token_index = 8
    assert config.to_dict()["image_token_id"] == 8 and "image_token_index" not in config.to_dict()


# ------------------------------------------------------------------------------------------------ round trips

VARIANTS = [
    {},
    {"family": "siglip", "image_aspect_ratio": "anyres_max_4", "remember_window_ratio": 1.5},
    {"projector_type": "tokenpacker", "projector_downsample": 3, "remember_feature_layers": [-1]},
    {"projector_type": "c_abstractor", "projector_kwargs": {"pre_norm": True}, "image_aspect_ratio": "pad"},
    {"projector_type": "mlp", "projector_downsample": 1, "remember_layers": [], "image_merge_type": "flat"},
    {"projector_downsample_choices": [4, 1, 2], "image_merge_type": "spatial"},
    {"vision_feature_layer": [1, -1]},
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
        assert copied.image_layout == config.image_layout and copied.downsamples == config.downsamples


def test_sub_configurations_as_dicts():
    vision, text = {"model_type": "siglip_vision_model", "hidden_size": 32}, {"model_type": "llama"}
    config = LlavaVrConfig(vision_config=vision, text_config=text, image_token_id=31999)
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
        ({"projector_type": "mlp"}, "projector_downsample must be 1 with projector_type mlp.* found 2"),
        *(
            (
                {"projector_downsample": s},
                r"projector_downsample must be from 2 to 4 \(the grid's side\) with projector_type avg_pool, "
                f"found {s}; 1 goes with mlp, and as one of projector_downsample_choices",
            )
            for s in (-1, 0, 1, 5)
        ),
        *(
            (
                {"projector_downsample_choices": choices},
                r"projector_downsample_choices must be different integers from 1 to 4 \(the grid's side\), among them "
                rf"projector_downsample 2; found \[{str(choices)[1:-1]}\]",
            )
            for choices in ([], [1, 4], [2, 2], [0, 2], [2, 5])
        ),
        *(
            (
                {"projector_type": name, "projector_downsample": s, "projector_downsample_choices": [s]},
                f"projector_downsample_choices must be null with projector_type {name}, whose weights depend on the "
                "downsampling; choices go with avg_pool, ldpv2, c_abstractor, tokenpacker",
            )
            for name, s in (("mlp", 1), ("pixel_shuffle", 2), ("resampler", 2))
        ),
        ({"vision_feature_layer": 4}, "vision_feature_layer has 4, .* 4 hidden states: use -4 to 3"),
        ({"vision_feature_layer": -5}, "vision_feature_layer has -5"),
        ({"vision_feature_layer": [1, 4]}, "vision_feature_layer has 4, .* use -4 to 3"),
        ({"vision_feature_layer": []}, r"vision_feature_layer must be .* at least one .* found \[\]"),
        ({"remember_feature_layers": [1, 4]}, "remember_feature_layers has 4, .* use -4 to 3"),
        ({"remember_feature_layers": []}, r"remember_feature_layers must name .* or remember_layers be \[\]"),
        *(
            (
                {"remember_layers": [layer]},
                r"remember_layers must be different decoder layers from 0 to 1, or \[\] for none; after the last, 2, "
                rf"no text token could see the update. Found \[{layer}\]",
            )
            for layer in (2, 3)
        ),
        ({"remember_layers": [-1]}, "remember_layers must be different decoder layers from 0 to 1"),
        ({"remember_layers": [0, 0]}, "remember_layers must be different"),
        ({"remember_num_heads": 3}, "remember_num_heads must divide remember_hidden_size 16, found 3"),
        ({"remember_num_heads": 0}, "remember_num_heads must divide remember_hidden_size 16, found 0"),
        ({"remember_num_key_value_heads": 0}, "remember_num_key_value_heads must divide remember_num_heads 2, found 0"),
        ({"remember_num_key_value_heads": 4}, "remember_num_key_value_heads must divide remember_num_heads 2, found 4"),
        ({"remember_hidden_size": 0}, "remember_num_heads must divide remember_hidden_size 0"),
        *(
            ({"remember_window_ratio": ratio}, f"remember_window_ratio must be 1.0 or more, found {ratio}")
            for ratio in (0, 0.5, -1.0, float("nan"), float("inf"))
        ),
        *(
            ({"image_token_id": i}, f"image_token_id must be .*, from 0 to 261 .text_config.vocab_size - 1., found {i}")
            for i in (-200, 262)
        ),
        ({"image_aspect_ratio": "wide"}, "image_aspect_ratio must be anyres, anyres_max_N .* found 'wide'"),
        ({"image_aspect_ratio": "anyres_max_0"}, "image_aspect_ratio must be"),
        ({"image_aspect_ratio": "anyres_max_"}, "image_aspect_ratio must be"),
        ({"image_aspect_ratio": "anyres_max_²"}, "image_aspect_ratio must be"),
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
        (
            {"projector_kwargs": {"depth": 2}},
            r"projector_kwargs has \['depth'\], but avg_pool has the options \['pooled_mlp'\]",
        ),
        (
            {"projector_type": "resampler", "projector_kwargs": {"mlp": 1}},
            r"projector_kwargs has \['mlp'\], but resampler has the options \['depth', 'num_heads'\]",
        ),
        (
            {"projector_type": "tokenpacker", "projector_kwargs": {"num_heads": 5}},
            r"projector_kwargs\['num_heads'\] must divide the features' width 32, found 5",
        ),
        (
            {"projector_type": "tokenpacker", "projector_kwargs": {"feature_layers": [9]}},
            r"projector_kwargs\['feature_layers'\] has 9",
        ),
        (
            {"projector_type": "tokenpacker", "projector_kwargs": {"feature_layers": []}},
            r"projector_kwargs\['feature_layers'\] must be .* at least one .* found \[\]",
        ),
        (
            {"projector_type": "tokenpacker", "projector_kwargs": {"feature_layers": 2}},
            r"projector_kwargs\['feature_layers'\] must be a list .* found 2",
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
            r"projector_kwargs has \['end_tokens'\], but c_abstractor has the options \['depth', .*\]",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_impossible_configuration_is_refused(tiny_config, overrides, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config(**overrides)


@pytest.mark.parametrize("side, field", [("vision", "patch_size"), ("vision", "image_size"), ("text", "hidden_size")])
def test_sub_configuration_without_a_size_is_refused(tiny_config, side, field):
    with pytest.raises(ValueError, match=f"{side}_config.{field} must be a positive integer, found 0"):
        tiny_config(**{side: {field: 0}})


def test_a_patch_larger_than_the_tile_is_refused(tiny_config):
    with pytest.raises(ValueError, match=r"vision_config.patch_size \(64\) must not exceed .*image_size \(32\)"):
        tiny_config(vision={"patch_size": 64})


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
        ("projector_type", "conv"),
        ("projector_downsample", "2"),
        ("projector_downsample", 1.5),  # Honeybee's regions that overlap
        ("projector_downsample_choices", [2, "4"]),
        ("projector_downsample_choices", 2),
        ("projector_hidden_act", "gulp"),
        ("projector_kwargs", [1]),
        ("vision_feature_layer", "last"),
        ("vision_feature_layer", [1, "last"]),
        ("vision_feature_select_strategy", "cls"),
        ("remember_feature_layers", ["1"]),
        ("remember_layers", 3),
        ("remember_window_ratio", "wide"),
        ("image_token_id", "<image>"),
        ("image_separator_ids", ["\n", ","]),
        ("image_aspect_ratio", 1),
        ("image_merge_type", "unpad"),
        ("image_grid_pinpoints", "anyres"),
        ("vision_config", "clip"),
    ],
)
def test_value_of_the_wrong_type_is_refused(field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{field}'") as error:
        LlavaVrConfig(**{field: value})
    assert str(value) in str(error.value)


@pytest.mark.parametrize("field, value", [("remember_window", 7), ("remember_window", None), ("window_bias", True)])
def test_fields_of_an_earlier_design_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is gone: convert the folder"):
        LlavaVrConfig.from_dict({**LlavaVrConfig().to_dict(), field: value})
