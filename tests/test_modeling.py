"""The model: parity with its peers, the invariants of Vision Remember, numerics, saving and errors."""

import copy
import dataclasses
import json
import logging
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    DynamicCache,
    FalconConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    OPTConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from llava_vr import LlavaVrConfig, LlavaVrForConditionalGeneration
from llava_vr.layout_llava_vr import cut_windows, window_size
from llava_vr.modeling_llava_vr import LlavaVrImageFeatures, VisionRemember
from llava_vr.projectors_llava_vr import PROJECTORS


MIXED = [[5, 6, 7, 8], [9, (40, 90), 10, 11], [(64, 64), 12, (100, 20), 13, (20, 33), 14, 15]]
MIXED_DOWNSAMPLES = [[5, 6, 7, 8], [9, (40, 90, 1), 10, 11], [(64, 64, 4), 12, (100, 20, 3), 13, (20, 33), 14, 15]]
ANY_DOWNSAMPLE = [name for name, projector in PROJECTORS.items() if projector.any_downsample]
DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "smollm3", "phi3")
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}


@pytest.fixture(scope="module")
def config(variant_config):
    return variant_config


@pytest.fixture(scope="module")
def model(config, make_model):
    return make_model(config)


def remember_off(model):
    """The same weights without the modules."""
    config = copy.deepcopy(model.config)
    config.remember_layers = []
    plain = LlavaVrForConditionalGeneration(config).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    return plain


# ------------------------------------------------------------------------------------------------- parity with peers


def check_parity(peer, config, make_inputs, rows, padding_side):
    torch.manual_seed(0)
    peer = peer.eval()
    for parameter in peer.parameters():
        parameter.data.normal_(0, 0.1)
    model = LlavaVrForConditionalGeneration(config).eval()
    model.load_state_dict(peer.state_dict())
    inputs = make_inputs(config, rows, padding_side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        ours, theirs = model(**inputs, labels=labels), peer(**inputs, labels=labels)
    assert theirs.logits.abs().mean() > 1e-2
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("rows", [MIXED[1:2], MIXED[2:], MIXED], ids=["one image", "several images", "a mixed batch"])
def test_equals_llava_next(make_inputs, rows, padding_side):
    pinpoints = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
    vision, text = CLIPVisionConfig(**VISION, image_size=32, patch_size=8), LlamaConfig(**TEXT)
    peer = LlavaNextForConditionalGeneration(
        LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=50, image_grid_pinpoints=pinpoints)
    )
    config = LlavaVrConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=50,
        image_grid_pinpoints=pinpoints,
        projector_type="mlp",
        projector_downsample=1,
        remember_layers=[],
    )
    check_parity(peer, config, make_inputs, rows, padding_side)


@pytest.mark.parametrize("max_tiles", [1, 4])
def test_equals_llava_onevision(make_inputs, max_tiles):
    pinpoints = [[32 * rows, 32 * columns] for rows in range(1, 5) for columns in range(1, 5)]
    vision = SiglipVisionConfig(**VISION, image_size=32, patch_size=8, vision_use_head=False)
    text, ratio = Qwen2Config(**TEXT, max_window_layers=2), f"anyres_max_{max_tiles}"
    peer = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=50,
            image_grid_pinpoints=pinpoints,
            vision_aspect_ratio=ratio,
        )
    )
    config = LlavaVrConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=50,
        image_grid_pinpoints=pinpoints,
        projector_type="mlp",
        projector_downsample=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_aspect_ratio=ratio,
        remember_layers=[],
    )
    layout = config.image_layout
    limit = dataclasses.replace(layout, max_tiles=None)
    assert max_tiles > 1 or layout.num_tokens((64, 64), 1) < limit.num_tokens((64, 64), 1)  # it is resampled
    check_parity(peer, config, make_inputs, MIXED, "right")


# --------------------------------------------------------------------------------------------------- Vision Remember


def test_a_fresh_module_changes_no_logit(config, make_inputs):
    torch.manual_seed(0)
    fresh = LlavaVrForConditionalGeneration(config).eval()
    inputs = make_inputs(config, MIXED)
    with torch.no_grad():
        assert torch.equal(fresh(**inputs).logits, remember_off(fresh)(**inputs).logits)


def test_a_module_acts_only_from_the_image_on(config, model, make_inputs):
    inputs = make_inputs(config, MIXED)
    with torch.no_grad():
        difference = (model(**inputs).logits - remember_off(model)(**inputs).logits).abs().amax(-1)
    assert (difference[0] == 0).all(), "text only"
    assert difference[1, 0] == 0 and (difference[1, 1 : inputs["attention_mask"][1].sum()] > 0).all()
    assert (difference[2, : inputs["attention_mask"][2].sum()] > 0).all()


@pytest.mark.parametrize(
    ("downsample", "ratio", "starts"),
    [
        (2, 1.0, [0, 2, 4, 6]),
        (2, 2.0, [-1, 1, 3, 5]),
        (2, 1.5, [-1, 1, 3, 5]),
        (3, 1.0, [0, 3, 6]),
        (3, 2.0, [-2, 1, 4]),
        (7, 1.0, [0]),
    ],
)
def test_locality(tiny_config, downsample, ratio, starts):
    """A changed feature reaches exactly the tokens whose window holds it."""
    config = tiny_config(
        projector_downsample=downsample,
        remember_window_ratio=ratio,
        vision={"image_size": 56},  # 7 x 7 patches
    )
    window = config.window_size(downsample)
    torch.manual_seed(0)
    module, grid = VisionRemember(config), torch.randn(1, 7, 7, config.memory_size)
    torch.nn.init.normal_(module.out.weight)
    hidden = torch.randn(len(starts) ** 2, 32)

    def update(features):
        rows = torch.cat([module(features), torch.ones(1, 7, 7, 1)], -1)
        rows = cut_windows(rows, downsample, window)[0]
        return module(hidden, rows[..., :-1], rows[..., -1] > 0)[0]

    before = update(grid)
    for row, column in [(0, 0), (1, 3), (4, 4), (6, 6), (2, 5)]:
        changed = grid.clone()
        changed[0, row, column] = torch.randn(config.memory_size)
        reached = (update(changed) - before).abs().amax(-1) > 0
        holds = [0 <= row - top < window and 0 <= column - left < window for top in starts for left in starts]
        assert reached.tolist() == holds


@pytest.mark.parametrize("layer", ["key", "value"])
def test_a_layer_that_was_replaced_is_called(tiny_config, layer):
    """An adapter around keys or values takes part."""

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, features):
            return 2 * self.inner(features)

    torch.manual_seed(0)
    config = tiny_config()
    adapted = VisionRemember(config)
    doubled = copy.deepcopy(adapted)
    getattr(doubled, layer).weight.data *= 2
    setattr(adapted, layer, Doubled(getattr(adapted, layer)))
    memory = torch.randn(5, config.memory_size)
    torch.testing.assert_close(adapted(memory), doubled(memory))


@pytest.mark.parametrize("shared", [2, 1])
@pytest.mark.parametrize("window", [2, 3])
def test_the_module_is_attention_over_the_window(tiny_config, window, shared):
    """Against attention written out, one head and token at a time, with padding and tokens without a region.

    Both heads of the query have keys and values of their own, or share them.
    """
    torch.manual_seed(0)
    config = tiny_config(remember_num_key_value_heads=shared)
    module = VisionRemember(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    entries = window**2
    hidden, memory = torch.randn(5, 32), torch.randn(5, entries, config.memory_size)
    present = torch.ones(5, entries, dtype=torch.bool)
    present[1, 2:] = present[3] = False
    update, weights = module(hidden, module(memory), present)

    query, key, value = module.query(module.query_norm(hidden)), module.key(memory), module.value(memory)
    for token in (0, 1, 2, 4):
        kept = present[token].nonzero()[:, 0]
        heads = []
        for head, part in enumerate((slice(0, 8), slice(8, 16))):
            read = part if shared == 2 else slice(0, 8)
            scores = key[token, kept, read] @ query[token, part] / 8**0.5
            torch.testing.assert_close(weights[token, head, kept], scores.softmax(0))
            heads.append(scores.softmax(0) @ value[token, kept, read])
        torch.testing.assert_close(update[token], module.out(torch.cat(heads)))
    assert (weights[1, :, 2:] == 0).all() and (weights[3] == 0).all() and (update[3] == 0).all()


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_keys_and_values_per_patch_equal_those_per_window(tiny_config, make_model, make_inputs, projector, ratio):
    """Invariant 9: windows of raw features, normalised and projected entry by entry, give the same rows."""
    for downsample in (1,) if projector == "mlp" else (2, 3, 4):
        config = tiny_config(
            projector_type=projector,
            projector_downsample=downsample,
            remember_window_ratio=ratio,
            image_aspect_ratio="pad",
        )
        model = make_model(config)
        inputs = make_inputs(config, [[(40, 90), 5]])
        rows = model.get_image_features(inputs["pixel_values"]).deepstack_features[0][0]
        states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        levels = [states[i][:, 1:].unflatten(1, (4, 4)) for i in config.remember_feature_layers]
        window = window_size(downsample, ratio)
        shown = cut_windows(torch.ones(1, 4, 4, 1), downsample, window)[0]  # (tokens, entries, 1)
        windows = [cut_windows(level, downsample, window)[0] for level in levels]
        memory = torch.cat([torch.nn.functional.layer_norm(w, (32,), eps=1e-6) for w in windows], -1)
        modules = model.model.vision_remember.values()
        expected = torch.cat([*(m(memory) * shown for m in modules), shown], -1)
        torch.testing.assert_close(rows, expected.flatten(1), rtol=0, atol=1e-6)


class RawWindows(torch.nn.Module):
    """A module whose rows hold the memory itself."""

    def __init__(self, config):
        super().__init__()
        self.entry_size, self.rows = config.memory_size, None

    def forward(self, states, rows=None, present=None):
        if rows is None:
            return states
        self.rows = rows
        return torch.zeros_like(states), None


@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_a_module_is_called_with_rows_of_its_own_width(tiny_config, make_model, make_inputs, layers):
    model = make_model(tiny_config(remember_layers=layers))
    inputs = make_inputs(model.config, MIXED)
    update = model(**inputs).logits
    modules = {key: RawWindows(model.config) for key in model.model.vision_remember}
    model.model.vision_remember.update(modules)
    assert not torch.equal(model(**inputs).logits, update)
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    for module in modules.values():
        assert module.rows.shape == (tokens, model.config.window_size(2) ** 2, model.config.memory_size)
        assert torch.equal(module.rows, modules["0"].rows)


def test_attention_weights_on_request(config, model, make_inputs):
    inputs = make_inputs(config, MIXED)
    with torch.no_grad():
        plain, output = model(**inputs), model(**inputs, output_remember_attentions=True)
    tokens = int((inputs["input_ids"] == config.image_token_id).sum())
    assert plain.remember_attentions is None and torch.equal(plain.logits, output.logits)
    entries = config.window_size(config.projector_downsample) ** 2
    assert [w.shape for w in output.remember_attentions] == [(tokens, 2, entries)] * len(config.remember_layers)
    sums = output.remember_attentions[0].sum(-1)
    torch.testing.assert_close(sums[sums > 0], torch.ones_like(sums[sums > 0]))
    assert (sums == 0).any()  # newlines and separators attend to nothing


@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_memory_rows_follow_their_tokens(tiny_config, make_model, make_inputs, ratio):
    """Each row is the window of keys and values around its token, found here by position; newline tokens have none."""
    config = tiny_config(remember_feature_layers=[1], remember_window_ratio=ratio)
    model, size = make_model(config), (40, 90)  # three tiles of 2 x 2 tokens in a row, none of them padding
    inputs = make_inputs(config, [[size]])
    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    states = model.model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True).hidden_states[1][:, 1:]
    states = torch.nn.functional.layer_norm(states, (32,), eps=1e-6)
    patches = torch.cat([module(states) for module in model.model.vision_remember.values()], -1)
    rows, tokens = features.deepstack_features[0][0], iter(range(len(features.pooler_output[0])))
    layout, window = config.image_layout, config.window_size(2)
    tiles = [(0, i, j) for i in range(2) for j in range(2)]
    tile_rows, tile_columns = layout.tiling(size)
    shown_rows, shown_columns = layout.unpad(2 * tile_rows, 2 * tile_columns, size)
    for row in range(shown_rows.start, shown_rows.stop):
        for column in range(shown_columns.start, shown_columns.stop):
            tiles.append((1 + row // 2 * tile_columns + column // 2, row % 2, column % 2))
        tiles.append(None)
    assert len(tiles) == len(rows) == layout.num_tokens(size, 2)
    for place, token in zip(tiles, tokens):
        if place is None:
            assert (rows[token] == 0).all()
            continue
        tile, i, j = place
        before = (window - 2) // 2
        expected, absent = [], torch.zeros(patches.shape[-1] + 1)
        for a in range(2 * i - before, 2 * i - before + window):
            for b in range(2 * j - before, 2 * j - before + window):
                inside = 0 <= a < 4 and 0 <= b < 4
                expected.append(torch.cat([patches[tile, 4 * a + b], torch.ones(1)]) if inside else absent)
        torch.testing.assert_close(rows[token], torch.cat(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "tiling"), [((20, 30), (1, 1)), ((64, 20), (2, 1)), ((30, 90), (1, 3))])
def test_slices_stand_in_their_order(tiny_config, make_model, make_inputs, size, tiling):
    """Tile by tile with the separators between them, the base tile last; separators have no memory."""
    pinpoints = [[32, 32], [64, 32], [32, 96]]
    config = tiny_config(image_merge_type="slices", image_separator_ids=[60, 70], image_grid_pinpoints=pinpoints)
    model, inputs = make_model(config), make_inputs(config, [[size]])
    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    tiles = [  # each by itself, as the one tile of an image
        model.get_image_features(tile[None, :]).pooler_output[0] for tile in inputs["pixel_values"][0]
    ]
    rows, columns = tiling
    expected, valid = [], []
    embeddings = model.get_input_embeddings().weight
    for row in range(rows):
        for column in range(columns):
            tile = tiles[(tiling != (1, 1)) + row * columns + column]
            expected += [tile, embeddings[[60 if column < columns - 1 else 70]]]
            valid += [True, True, True, True, False]
    if tiling != (1, 1):
        expected += [tiles[0], embeddings[[70]]]
        valid += [True, True, True, True, False]
    torch.testing.assert_close(features.pooler_output[0], torch.cat(expected), rtol=0, atol=1e-6)
    memory = features.deepstack_features[0][0].unflatten(1, (config.window_size(2) ** 2, -1))
    assert memory[..., -1].any(1).tolist() == valid
    assert (memory[memory[..., -1] == 0] == 0).all() and (memory[memory[..., -1] == 1] != 0).all()


def test_resampled_tokens_take_resampled_memory(tiny_config, make_model, make_inputs):
    """Rows of keys and values are resampled as their tokens are.

    Features that are resampled first and projected then would give other rows, as the norm stands between. On random
    features, where neighbours have nothing in common, the two differ by 0.6 standard deviations on average.
    """
    config = tiny_config(image_aspect_ratio="anyres_max_1", remember_feature_layers=[1], remember_window_ratio=1.0)
    model, size = make_model(config), (64, 64)
    inputs = make_inputs(config, [[size]])
    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    states = model.model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True).hidden_states[1][1:, 1:]
    grid = torch.cat([torch.cat([*pair.unflatten(1, (4, 4))], 1) for pair in states.split(2)])  # (8, 8, 32)
    modules = model.model.vision_remember.values()

    def project(memory):
        memory = torch.nn.functional.layer_norm(memory, (32,), eps=1e-6)
        return torch.cat([*(module(memory) for module in modules), torch.ones_like(memory[..., :1])], -1)

    def resample(windows):  # (4, 4, features)
        resampled = torch.nn.functional.interpolate(windows.permute(2, 0, 1)[None], (2, 2), mode="bilinear")
        return resampled[0].permute(1, 2, 0)

    rows = features.deepstack_features[0][0][4:].unflatten(0, (2, 3))  # without the base tile, with newlines
    expected = resample(cut_windows(project(grid)[None], 2, 2)[0].unflatten(0, (4, 4)).flatten(2))
    torch.testing.assert_close(rows[:, :2], expected)
    assert (rows[:, 2] == 0).all()
    before = project(resample(cut_windows(grid[None], 2, 2)[0].unflatten(0, (4, 4)).flatten(2)).unflatten(-1, (4, 32)))
    moved = (before.flatten(2) - expected).abs() / expected.std()
    assert moved.mean() < 0.7


def test_resampled_entries_are_whole_or_absent(tiny_config, make_model, make_inputs):
    """An entry that is resampled from patches and from nothing keeps the patches' keys and values."""
    config = tiny_config(image_aspect_ratio="anyres_max_1")
    model, seen = make_model(config), []
    model.model.vision_tower.embeddings.position_embedding.weight.data.zero_()  # all patches of a plain picture alike
    inputs = make_inputs(config, [[(64, 64), 5]])
    inputs["pixel_values"] = torch.ones_like(inputs["pixel_values"])
    module = model.model.vision_remember["0"]
    attend = module.attend
    module.attend = lambda hidden, rows, present: seen.append((rows, present)) or attend(hidden, rows, present)
    with torch.no_grad():
        model(**inputs)
    rows, present = seen[0]
    assert (~present.any(1)).any() and (present.any(1) & ~present.all(1)).any()
    kept = rows[present]
    torch.testing.assert_close(kept, kept[:1].expand_as(kept), rtol=0, atol=1e-5)
    assert not rows[~present].any()


# ------------------------------------------------------------------------------------------ the number of tokens


@pytest.mark.parametrize("projector", ANY_DOWNSAMPLE)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_images_of_different_downsamples_equal_each_alone(
    tiny_config, make_model, make_inputs, projector, padding_side
):
    config = tiny_config(projector_type=projector, projector_downsample_choices=[1, 2, 3, 4])
    model, inputs = make_model(config), make_inputs(config, MIXED_DOWNSAMPLES, padding_side)
    check_rows_alone(model, inputs, MIXED_DOWNSAMPLES)


def test_downsample_that_is_asked_for_equals_the_configured_one(tiny_config, make_model, make_inputs):
    for downsample in (2, 3, 4):
        choosing = make_model(tiny_config(projector_downsample_choices=[2, 3, 4]))
        fixed = make_model(tiny_config(projector_downsample=downsample))
        asked = make_inputs(choosing.config, [[9, (40, 90, downsample), 10]])
        plain = make_inputs(fixed.config, [[9, (40, 90), 10]])
        assert "image_downsamples" not in plain
        with torch.no_grad():
            assert torch.equal(choosing(**asked).logits, fixed(**plain).logits)


def test_no_downsampling_is_the_uncompressed_model(tiny_config, make_model, make_inputs):
    """Invariant 10: s = 1 gives the logits of projector mlp without modules, bit for bit, and runs no module."""
    model = make_model(tiny_config(projector_downsample_choices=[1, 2, 4]))
    source = LlavaVrForConditionalGeneration(
        tiny_config(projector_type="mlp", projector_downsample=1, remember_layers=[])
    ).eval()
    source.load_state_dict({k: v for k, v in model.state_dict().items() if "vision_remember" not in k})
    rows = [[9, (40, 90), 10], [(64, 64), 12, (100, 20), 13]]
    asked = [[(*part, 1) if isinstance(part, tuple) else part for part in row] for row in rows]
    calls = []
    for module in model.model.vision_remember.values():
        module.register_forward_hook(lambda module, args, output: calls.append(len(args)))
    with torch.no_grad():
        expected = source(**make_inputs(source.config, rows)).logits
        assert torch.equal(model(**make_inputs(model.config, asked)).logits, expected)
    assert set(calls) == {1}  # memory is projected, and nothing attends to it


@pytest.mark.parametrize("choices", [[1, 2], [1, 4], [2, 4], [1, 2, 4]])
def test_images_encoded_apart_join(tiny_config, make_model, make_inputs, choices):
    """Features of images that were encoded one by one, each with its own s, are those of one call."""
    model = make_model(tiny_config(projector_downsample_choices=[1, 2, 4]))
    inputs = make_inputs(model.config, [[9, *((40, 90 + i, s) for i, s in enumerate(choices)), 10]])
    names = ("pixel_values", "image_sizes", "image_downsamples")
    with torch.no_grad():
        each = [model.get_image_features(*rows) for rows in zip(*(inputs[name].split(1) for name in names))]
        images = LlavaVrImageFeatures(
            pooler_output=[image.pooler_output[0] for image in each],
            deepstack_features=[[image.deepstack_features[0][0] for image in each]],
        )
        apart = model(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": images}).logits
        torch.testing.assert_close(apart, model(**inputs).logits, rtol=0, atol=1e-5)


def test_attentions_of_an_image_without_windows_are_empty(tiny_config, make_model, make_inputs):
    model = make_model(tiny_config(projector_downsample_choices=[1, 2]))
    inputs = make_inputs(model.config, [[9, (40, 90, 1), 10]])
    with torch.no_grad():
        outputs = model(**inputs, output_remember_attentions=True)
        assert torch.equal(outputs.logits, model(**inputs).logits)
    heads, tokens = model.config.remember_num_heads, len(outputs.image_hidden_states)
    assert [weights.shape for weights in outputs.remember_attentions] == [(tokens, heads, 0)] * len(
        model.config.remember_layers
    )


def test_wrong_downsamples_are_named(tiny_config, make_model, make_inputs):
    model = make_model(tiny_config(projector_downsample_choices=[2, 4]))
    inputs = make_inputs(model.config, [[9, (40, 90, 2), 10]])
    for downsamples in ([3], [2, 2]):
        with pytest.raises(ValueError, match=r"image_downsamples must have one of \[2, 4\]"):
            model(**{**inputs, "image_downsamples": torch.tensor(downsamples)})
    with pytest.raises(ValueError, match="placeholders"):
        model(**{**inputs, "image_downsamples": torch.tensor([4])})


# ------------------------------------------------------------------------------------------- batches, caches, chunks


def check_rows_alone(model, inputs, rows):
    with torch.no_grad():
        logits = model(**inputs).logits
    first = 0
    for row, prompt in enumerate(rows):
        images = sum(isinstance(part, tuple) for part in prompt)
        kept = inputs["attention_mask"][row].bool()
        alone = {"input_ids": inputs["input_ids"][row, kept][None]}
        if images:
            names = {"pixel_values", "image_sizes", "image_downsamples"} & inputs.keys()
            alone |= {key: inputs[key][first : first + images] for key in names}
        first += images
        with torch.no_grad():
            torch.testing.assert_close(logits[row, kept], model(**alone).logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_batch_equals_each_prompt_alone(config, model, make_inputs, padding_side):
    check_rows_alone(model, make_inputs(config, MIXED, padding_side), MIXED)


def test_prefill_and_decode_equal_one_forward(config, model, make_inputs):
    inputs = make_inputs(config, [[4, (40, 90), 5, 6, 7, 8]])
    ids = inputs["input_ids"]
    with torch.no_grad():
        full = model(**inputs).logits
        cache = DynamicCache(config=config.text_config)
        images = {key: inputs[key] for key in ("pixel_values", "image_sizes")}
        parts = [model(input_ids=ids[:, :-4], past_key_values=cache, use_cache=True, **images).logits]
        parts += [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(-4, -1)]
        parts.append(model(input_ids=ids[:, -1:], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-5)


def test_split_prefill_equals_one_prefill(config, model, make_inputs):
    inputs = make_inputs(config, [[4, (40, 90), 5, (64, 64), 6, 7]])
    ids, cache, parts = inputs["input_ids"], DynamicCache(config=config.text_config), []
    with torch.no_grad():
        full = model(**inputs).logits
        images = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        tokens, rows = torch.cat(images.pooler_output), torch.cat(images.deepstack_features[0])
        for chunk in ids.split(5, dim=1):
            count = int((chunk == config.image_token_id).sum())
            part = LlavaVrImageFeatures(pooler_output=[tokens[:count]], deepstack_features=[[rows[:count]]])
            tokens, rows = tokens[count:], rows[count:]
            seen = {"mm_encoder_outputs": {"image": part}} if count else {}
            parts.append(model(input_ids=chunk, past_key_values=cache, use_cache=True, **seen).logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-5)


def test_inputs_embeds_equal_input_ids(config, model, make_inputs):
    inputs = make_inputs(config, MIXED)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds, **rest).logits, model(**inputs).logits)


# --------------------------------------------------------------------------------- decoders, towers, projectors, merges


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_every_decoder_and_tower(make_model, make_inputs, decoder, tower):
    """The modules run in each decoder (their weights move the logits, from the image on) and survive a save."""
    special = {"head_dim": 8} if decoder in ("qwen3", "gemma3_text") else {}
    text = AutoConfig.for_model(decoder, **TEXT, **special, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    kind = CLIPVisionConfig if tower == "clip" else SiglipVisionConfig
    config = LlavaVrConfig(
        vision_config=kind(**VISION, image_size=32, patch_size=8),
        text_config=text,
        image_token_id=50,
        remember_hidden_size=16,
        remember_num_heads=2,
        tie_word_embeddings=False,
    )
    model = make_model(config)
    inputs = make_inputs(config, [[7, (40, 90), 8, 9]])
    with torch.no_grad():
        output = model(**inputs, output_remember_attentions=True, output_hidden_states=True)
        plain = remember_off(model)(**inputs, output_hidden_states=True)
    difference = (output.logits - plain.logits).abs().amax(-1)[0]
    assert difference[0] == 0 and (difference[1:] > 0).all()
    assert len(output.remember_attentions) == len(config.remember_layers)
    # hidden_states[i + 1] is the value after layer i and its module
    assert torch.equal(output.hidden_states[0], plain.hidden_states[0])
    assert not torch.equal(output.hidden_states[1], plain.hidden_states[1])


@pytest.mark.parametrize(
    "text", [OPTConfig(num_hidden_layers=3), FalconConfig(num_hidden_layers=3)], ids=["opt", "falcon"]
)
def test_a_decoder_that_cannot_take_the_module_is_refused_by_name(make_inputs, text):
    for key, value in {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 64}.items():
        setattr(text, key, value)
    text.word_embed_proj_dim = 32
    config = LlavaVrConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=32, patch_size=8),
        text_config=text,
        image_token_id=50,
        remember_hidden_size=16,
        remember_num_heads=2,
    )
    with pytest.raises(ValueError, match=text.model_type):
        LlavaVrForConditionalGeneration(config)(**make_inputs(config, [[7, (40, 90), 8]]))


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("with_modules", [True, False])
@pytest.mark.parametrize("merge", ["spatial_unpad", "spatial", "flat", "slices"])
def test_every_projector_and_merge(tiny_config, make_model, make_inputs, projector, with_modules, merge):
    for downsample in (1,) if projector == "mlp" else (2, 3, 4):  # 3 does not divide the grid of 4
        config = tiny_config(
            projector_type=projector,
            projector_downsample=downsample,
            image_merge_type=merge,
            image_separator_ids=[60, 70] if merge == "slices" else None,
            **({} if with_modules else {"remember_layers": []}),
        )
        inputs = make_inputs(config, MIXED)
        model = make_model(config).train()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        assert loss.isfinite()
        missing = [n for n, p in model.named_parameters() if p.grad is None and ".vision_tower." not in n]
        assert not missing


# ------------------------------------------------------------------------------------------------------------ numerics


@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.common)])
def test_attention_implementations_agree(config, model, make_inputs, implementation):
    eager, other = copy.deepcopy(model), copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    other.set_attn_implementation({"text_config": implementation, "vision_config": "sdpa"})
    inputs = make_inputs(config, MIXED)
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(eager(**inputs).logits[kept], other(**inputs).logits[kept], rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(config, make_model, make_inputs):
    inputs = make_inputs(config, MIXED)
    results = []
    for checkpointing in (False, True):
        model = make_model(config).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, plain), (other, recomputed) = results
    torch.testing.assert_close(loss, other)
    assert plain.keys() == recomputed.keys() and any("vision_remember" in name for name in plain)
    for name in plain:
        torch.testing.assert_close(plain[name], recomputed[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(config, model, make_inputs, dtype):
    inputs = make_inputs(config, MIXED)
    with torch.no_grad():
        exact, close = model(**inputs).logits, copy.deepcopy(model).to(dtype)(**inputs).logits
    assert close.dtype == dtype
    assert (exact - close).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.common
def test_compiled_decoder_equals_eager(config, model, make_inputs):
    inputs = make_inputs(config, MIXED)
    with torch.no_grad():
        eager = model(**inputs).logits
        compiled = copy.deepcopy(model)
        compiled(**inputs)  # the check that every module runs is made once, outside compiled code
        compiled.model.language_model.compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs).logits, eager, rtol=0, atol=1e-5)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_text_alone_in_training_gives_zero_gradients_and_the_same_logits(
    tiny_config, make_model, make_inputs, projector
):
    """So that processes with images and without agree; in evaluation the vision side is not run."""
    config = tiny_config(projector_type=projector, projector_downsample=1 if projector == "mlp" else 2)
    trained, inputs, calls = make_model(config), make_inputs(config, MIXED[:1]), []
    trained.model.vision_tower.register_forward_hook(lambda *_: calls.append(trained.training))
    expected = trained(**inputs).logits
    outputs = trained.train()(**inputs, labels=inputs["input_ids"], output_remember_attentions=True)
    assert calls == [True] and torch.equal(outputs.logits, expected)
    assert len(outputs.image_hidden_states) == 0 and all(len(w) == 0 for w in outputs.remember_attentions)
    outputs.loss.backward()
    for name, parameter in trained.model.named_parameters():
        if name.startswith(("multi_modal_projector", "vision_remember", "image_newline")):
            assert parameter.grad is not None and not parameter.grad.any(), name
    trained.requires_grad_(False).model.vision_remember.requires_grad_(True)
    trained(**inputs, labels=inputs["input_ids"]).loss.backward()  # nothing else to learn: no error


def test_no_downsampling_in_training_gives_the_modules_zero_gradients(tiny_config, make_model, make_inputs):
    """So that processes whose images ask for different numbers of tokens agree."""
    model = make_model(tiny_config(projector_downsample_choices=[1, 2]))
    inputs = make_inputs(model.config, [[9, (40, 90, 1), 10]])
    expected = model(**inputs).logits
    outputs = model.train()(**inputs, labels=inputs["input_ids"])
    assert torch.equal(outputs.logits, expected)
    outputs.loss.backward()
    for parameter in model.model.vision_remember.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


# -------------------------------------------------------------------------------------------- saving, loading, resizing


@pytest.mark.common
def test_save_and_load_in_a_fresh_process(config, model, make_inputs, tmp_path):
    inputs = make_inputs(config, MIXED)
    with torch.no_grad():
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    assert {f"{name}_llava_vr.py" for name in ("configuration", "modeling")} <= {p.name for p in tmp_path.iterdir()}
    torch.save((inputs, expected), tmp_path / "expected.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForImageTextToText as A\n"
        "model = A.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "inputs, expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "torch.set_num_threads(1)\n"
        "for p in model.parameters(): p.data = p.data.clone()  # aligned in memory, which a file's weights are not\n"
        "assert torch.equal(model(**inputs).logits, expected)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_missing_module_weights_are_named(config, model, tmp_path, caplog):
    plain = remember_off(model)
    plain.save_pretrained(tmp_path)
    logger = logging.getLogger("transformers")
    logger.propagate = True  # transformers keeps its records to itself
    logging.getLogger("llava_vr").propagate = True
    with caplog.at_level(logging.WARNING):
        loaded, info = LlavaVrForConditionalGeneration.from_pretrained(
            tmp_path, config=config, output_loading_info=True
        )
    assert any("vision_remember.0.query.weight" in key for key in info["missing_keys"])
    warnings = [
        r.getMessage() for r in caplog.records if "lacks weights of the Vision Remember modules" in r.getMessage()
    ]
    assert len(warnings) == 1 and "[0, 1]" in warnings[0]  # two, as no module stands after the last of three layers
    assert all((m.out.weight == 0).all() and (m.out.bias == 0).all() for m in loaded.model.vision_remember.values())
    assert all(m.query.weight.std() > 0 for m in loaded.model.vision_remember.values())


def test_disk_offload_equals_memory(config, model, make_inputs, tmp_path):
    """All but the vision side, which `generate` runs by itself: see the limitations in README.md."""
    inputs = make_inputs(config, MIXED[1:], "left")
    model.save_pretrained(tmp_path / "model")
    devices = {f"model.{part}": "cpu" for part in ("vision_tower", "multi_modal_projector", "image_newline")}
    devices |= {"model.language_model": "disk", "model.vision_remember": "disk", "lm_head": "disk"}
    offloaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", trust_remote_code=True, device_map=devices, offload_folder=tmp_path / "offload"
    )
    options = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        torch.testing.assert_close(offloaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)
    assert torch.equal(offloaded.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_attention_implementation_reaches_every_part(tiny_config, caplog, family):
    model = LlavaVrForConditionalGeneration(tiny_config(family, projector_type="tokenpacker"))
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        model.set_attn_implementation("eager")
    parts = (model.config, model.config.text_config, model.config.vision_config)
    assert [part._attn_implementation for part in parts] == ["eager"] * 3
    assert not [r for r in caplog.records if "attention" in r.getMessage().lower()]


def test_a_fresh_model_is_saved_with_all_auto_classes(tiny_config, tmp_path):
    LlavaVrForConditionalGeneration(tiny_config()).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}
    assert {f"{name.split('.')[0]}.py" for name in auto_map.values()} <= {p.name for p in tmp_path.iterdir()}


def test_resized_embeddings_keep_the_logits(config, make_model, make_inputs):
    model = make_model(config)
    inputs = make_inputs(config, MIXED)
    with torch.no_grad():
        before = model(**inputs).logits
        size = config.text_config.vocab_size
        model.resize_token_embeddings(size + 10, mean_resizing=False)
        after = model(**inputs).logits
    assert after.shape[-1] == size + 10
    assert torch.equal(after[..., :size], before)


def test_tied_embeddings(tiny_config):
    model = LlavaVrForConditionalGeneration(tiny_config(text={"tie_word_embeddings": True}))
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_hidden_states_and_attentions(config, model, make_inputs):
    inputs = make_inputs(config, MIXED)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        output = eager(**inputs, output_hidden_states=True, output_attentions=True)
    batch, length = inputs["input_ids"].shape
    assert [h.shape for h in output.hidden_states] == [(batch, length, 32)] * 4
    assert [a.shape for a in output.attentions] == [(batch, 4, length, length)] * 3
    tokens = int((inputs["input_ids"] == config.image_token_id).sum())
    assert output.image_hidden_states.shape == (tokens, 32)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_bad_inputs_are_named(config, model, make_inputs):
    inputs = make_inputs(config, MIXED)

    def refused(match, **changes):
        with pytest.raises(ValueError, match=match):
            model(**{**inputs, **changes})

    refused("placeholders", input_ids=inputs["input_ids"][:2], attention_mask=inputs["attention_mask"][:2])
    refused("0 vision tokens", pixel_values=None, image_sizes=None)
    refused("placeholders", pixel_values=inputs["pixel_values"][:1], image_sizes=inputs["image_sizes"][:1])
    refused("image_sizes", image_sizes=inputs["image_sizes"][:1])
    refused("image_sizes", image_sizes=None)
    refused("3, 32, 32", pixel_values=inputs["pixel_values"][..., :16])
    refused("image_grid_pinpoints", pixel_values=inputs["pixel_values"][:, :1])
    refused("pixel_values must be", pixel_values=inputs["pixel_values"][0, 0])
    refused("exactly one", inputs_embeds=torch.zeros(3, 4, 32))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    refused("0 vision tokens", input_ids=None, inputs_embeds=embeds, pixel_values=None, image_sizes=None)
    cache = DynamicCache(config=config.text_config)
    with pytest.raises(ValueError, match="0 vision tokens"):  # one token at a time, too
        model(input_ids=torch.tensor([[config.image_token_id]]), past_key_values=cache)
    with pytest.raises(ValueError, match="vision_feature_select_strategy"):
        full = copy.deepcopy(model)
        full.config.vision_feature_select_strategy = "full"  # keeps CLIP's CLS token, which has no place in the grid
        full(**inputs)
