"""The model: parity with its peers, the invariants of Vision Remember, numerics, saving and errors."""

import copy
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
from llava_vr.modeling_llava_vr import (
    PROJECTORS,
    LlavaVrImageFeatures,
    VisionRemember,
    cut_windows,
    normalize_memory,
)


MIXED = [[5, 6, 7, 8], [9, (40, 90), 10, 11], [(64, 64), 12, (100, 20), 13, (20, 33), 14, 15]]
DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "smollm3", "phi3")
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
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
    resampled = [layout.resample(*(s.stop - s.start for s in layout.unpad(size))) for size in [(40, 90), (64, 64)]]
    assert max_tiles > 1 or resampled != [(4, 8), (8, 8)]  # at one tile these images are resampled
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
    ("stride", "window", "starts"),
    [
        (2, 2, [0, 2, 4, 6]),
        (2, 3, [0, 2, 4, 6]),
        (2, 4, [-1, 1, 3, 5]),
        (3, 3, [0, 3, 6]),
        (3, 5, [-1, 2, 5]),
        (7 / 3, 3, [0, 2, 4]),
        (7 / 3, 5, [-1, 1, 3]),
        (7 / 4, 3, [0, 1, 3, 5]),  # the regions are 0 to 1, 1 to 3, 3 to 5 and 5 to 6
    ],
)
def test_locality(tiny_config, stride, window, starts):
    """A changed feature reaches exactly the tokens whose window holds it."""
    config = tiny_config(
        projector_type="c_abstractor",
        projector_downsample=stride,
        remember_window=window,
        vision={"image_size": 56},  # 7 x 7 patches
    )
    torch.manual_seed(0)
    module, grid = VisionRemember(config), torch.randn(1, 7, 7, config.memory_size)
    torch.nn.init.normal_(module.out.weight)
    regions = len(starts) ** 2
    hidden, valid = torch.randn(regions, 32), torch.ones(regions, dtype=torch.bool)

    def update(features):
        return module(hidden, cut_windows(features, stride, window)[0], valid)[0]

    before = update(grid)
    for row, column in [(0, 0), (1, 3), (4, 4), (6, 6), (2, 5)]:
        changed = grid.clone()
        changed[0, row, column] = torch.randn(config.memory_size)  # all raised alike would not pass the norm
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
    config = tiny_config(remember_window=3)
    adapted = VisionRemember(config)
    torch.nn.init.normal_(adapted.out.weight)
    doubled = copy.deepcopy(adapted)
    getattr(doubled, layer).weight.data *= 2
    setattr(adapted, layer, Doubled(getattr(adapted, layer)))
    inputs = torch.randn(5, 32), torch.randn(5, 9, config.memory_size), torch.ones(5, dtype=torch.bool)
    torch.testing.assert_close(adapted(*inputs), doubled(*inputs))


@pytest.mark.parametrize("shared", [2, 1])
@pytest.mark.parametrize("window", [2, 3])
def test_the_module_is_attention_over_the_window(tiny_config, window, shared):
    """Against attention written out, one head and token at a time, with padding and tokens without a region.

    Both heads of the query have keys and values of their own, or share them.
    """
    torch.manual_seed(0)
    config = tiny_config(remember_window=window, projector_downsample=2, remember_num_key_value_heads=shared)
    module = VisionRemember(config)
    module.has_padding = True
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    entries = window**2
    hidden, memory = torch.randn(5, 32), torch.randn(5, entries, config.memory_size)
    memory = normalize_memory(memory, config.vision_config.hidden_size)
    memory[1, 2:] = memory[3, :] = 0
    valid = torch.tensor([True, True, True, False, True])
    update, weights = module(hidden, memory, valid)

    query, key, value = module.query(module.query_norm(hidden)), module.key(memory), module.value(memory)
    for token in (0, 1, 2, 4):
        kept = [i for i in range(entries) if memory[token, i].any()]
        heads = []
        for head, part in enumerate((slice(0, 8), slice(8, 16))):
            read = part if shared == 2 else slice(0, 8)
            scores = key[token, kept, read] @ query[token, part] / 8**0.5 + module.window_bias[head, kept]
            torch.testing.assert_close(weights[token, head, kept], scores.softmax(0))
            heads.append(scores.softmax(0) @ value[token, kept, read])
        torch.testing.assert_close(update[token], module.out(torch.cat(heads)))
    assert (weights[1, :, 2:] == 0).all() and (update[3] == 0).all()


def test_attention_weights_on_request(config, model, make_inputs):
    inputs = make_inputs(config, MIXED)
    with torch.no_grad():
        plain, output = model(**inputs), model(**inputs, output_remember_attentions=True)
    tokens = int((inputs["input_ids"] == config.image_token_id).sum())
    assert plain.remember_attentions is None and torch.equal(plain.logits, output.logits)
    assert [w.shape for w in output.remember_attentions] == [(tokens, 2, 4)] * len(config.remember_layers)
    torch.testing.assert_close(output.remember_attentions[0].sum(-1), torch.ones(tokens, 2))


def test_memory_rows_follow_their_tokens(tiny_config, make_model, make_inputs):
    """Each row is the window of features under its token, found here by position; newline tokens have none."""
    config = tiny_config(remember_feature_layers=[1])
    model, size = make_model(config), (40, 90)  # three tiles of 2 x 2 tokens in a row, none of them padding
    inputs = make_inputs(config, [[size]])
    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    states = model.model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True).hidden_states[1][:, 1:]
    rows, tokens = features.deepstack_features[0][0], iter(range(len(features.pooler_output[0])))
    layout = config.image_layout
    tiles = [(0, i, j) for i in range(2) for j in range(2)]
    tile_rows, tile_columns = layout.tiling(size)
    shown_rows, shown_columns = layout.unpad(size)
    for row in range(shown_rows.start, shown_rows.stop):
        for column in range(shown_columns.start, shown_columns.stop):
            tiles.append((1 + row // 2 * tile_columns + column // 2, row % 2, column % 2))
        tiles.append(None)
    assert len(tiles) == len(rows) == layout.num_tokens(size)
    for place, token in zip(tiles, tokens):
        if place is None:
            assert (rows[token] == 0).all()
            continue
        tile, i, j = place
        window = [states[tile, (2 * i + a) * 4 + 2 * j + b] for a in range(2) for b in range(2)]
        torch.testing.assert_close(rows[token, :-1], torch.cat(window), rtol=0, atol=0)
        assert rows[token, -1] == 1


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
            expected += [tiles[1 + row * columns + column], embeddings[[60 if column < columns - 1 else 70]]]
            valid += [1, 1, 1, 1, 0]
    if tiling != (1, 1):
        expected += [tiles[0], embeddings[[70]]]
        valid += [1, 1, 1, 1, 0]
    torch.testing.assert_close(features.pooler_output[0], torch.cat(expected), rtol=0, atol=1e-6)
    memory = features.deepstack_features[0][0]
    assert memory[:, -1].tolist() == valid
    assert (memory[memory[:, -1] == 0] == 0).all() and (memory[memory[:, -1] == 1] != 0).all()


def test_resampled_tokens_take_resampled_memory(tiny_config, make_model, make_inputs):
    config = tiny_config(image_aspect_ratio="anyres_max_1", remember_feature_layers=[1])
    model, size = make_model(config), (64, 64)
    inputs = make_inputs(config, [[size]])
    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    states = model.model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True).hidden_states[1][1:, 1:]
    grid = torch.cat([torch.cat([*pair.unflatten(1, (4, 4))], 1) for pair in states.split(2)])  # (8, 8, 32)
    windows = cut_windows(grid[None], 2, 2)[0].unflatten(0, (4, 4)).flatten(2)  # (4, 4, 4 * 32)
    height, width = config.image_layout.resample(4, 4)
    assert (height, width) == (2, 2)
    expected = torch.nn.functional.interpolate(windows.permute(2, 0, 1)[None], (2, 2), mode="bilinear")[0]
    rows = features.deepstack_features[0][0][4:].unflatten(
        0, (2, 3)
    )  # after the base tile; the last column is newlines
    torch.testing.assert_close(rows[:, :2, :-1], expected.permute(1, 2, 0))
    assert (rows[:, :2, -1] - 1).abs().max() < 1e-6 and (rows[:, 2] == 0).all()


# ------------------------------------------------------------------------------------------- batches, caches, chunks


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_batch_equals_each_prompt_alone(config, model, make_inputs, padding_side):
    inputs = make_inputs(config, MIXED, padding_side)
    with torch.no_grad():
        logits = model(**inputs).logits
    first = 0
    for row, prompt in enumerate(MIXED):
        images = sum(isinstance(part, tuple) for part in prompt)
        kept = inputs["attention_mask"][row].bool()
        alone = {"input_ids": inputs["input_ids"][row, kept][None]}
        if images:
            alone |= {key: inputs[key][first : first + images] for key in ("pixel_values", "image_sizes")}
        first += images
        with torch.no_grad():
            torch.testing.assert_close(logits[row, kept], model(**alone).logits[0], rtol=0, atol=1e-5)


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
    "text", [OPTConfig(num_hidden_layers=2), FalconConfig(num_hidden_layers=2)], ids=["opt", "falcon"]
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
    strides = {"mlp": (1,), "c_abstractor": (4 / 3, 2, 3, 4)}  # 3 does not divide the grid of 4
    for stride in strides.get(projector, (2, 3, 4)):
        config = tiny_config(
            projector_type=projector,
            projector_downsample=stride,
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


def test_end_tokens_have_no_memory(tiny_config, make_model, make_inputs):
    config = tiny_config(
        projector_type="c_abstractor",
        projector_kwargs={"end_tokens": 2},
        image_aspect_ratio="pad",
        image_merge_type="flat",
    )
    model, inputs = make_model(config), make_inputs(config, [[(40, 90), 5]])
    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    assert len(features.pooler_output[0]) == config.image_layout.num_tokens((40, 90)) == 6
    assert features.deepstack_features[0][0][:, -1].tolist() == [1, 1, 1, 1, 0, 0]
    assert model(**inputs).logits.isfinite().all()


# ------------------------------------------------------------------------------------------------------------ numerics


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
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


def test_compiled_decoder_equals_eager(config, model, make_inputs):
    inputs = make_inputs(config, MIXED)
    with torch.no_grad():
        eager = model(**inputs).logits
        compiled = copy.deepcopy(model)
        compiled(**inputs)  # the check that every module runs is made once, outside compiled code
        compiled.model.language_model.compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs).logits, eager, rtol=0, atol=1e-5)


def test_text_alone_in_training_gives_zero_gradients_and_the_same_logits(config, model, make_inputs):
    """So that processes with images and without agree; in evaluation the vision side is not run."""
    trained, inputs, calls = copy.deepcopy(model), make_inputs(config, MIXED[:1]), []
    trained.model.vision_tower.register_forward_hook(lambda *_: calls.append(trained.training))
    expected = trained(**inputs).logits
    outputs = trained.train()(**inputs, labels=inputs["input_ids"], output_remember_attentions=True)
    assert calls == [True] and torch.equal(outputs.logits, expected)
    assert outputs.image_hidden_states is None and outputs.remember_attentions is None
    outputs.loss.backward()
    for name, parameter in trained.model.named_parameters():
        if name.startswith(("multi_modal_projector", "vision_remember", "image_newline")):
            assert parameter.grad is not None and not parameter.grad.any(), name
    trained.requires_grad_(False).model.vision_remember.requires_grad_(True)
    trained(**inputs, labels=inputs["input_ids"]).loss.backward()  # nothing else to learn: no error


# -------------------------------------------------------------------------------------------- saving, loading, resizing


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
    assert len(warnings) == 1 and "[0, 1]" in warnings[0]
    assert all((m.out.weight == 0).all() and (m.out.bias == 0).all() for m in loaded.model.vision_remember.values())
    assert all(m.query.weight.std() > 0 for m in loaded.model.vision_remember.values())


def test_disk_offload_equals_memory(config, model, make_inputs, tmp_path):
    inputs = make_inputs(config, MIXED)
    with torch.no_grad():
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path / "model")
        parts = ("vision_tower", "multi_modal_projector", "image_newline", "language_model")
        devices = {f"model.{part}": "cpu" for part in parts} | {"model.vision_remember": "disk", "lm_head": "cpu"}
        offloaded = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "model", trust_remote_code=True, device_map=devices, offload_folder=tmp_path / "offload"
        )
        torch.testing.assert_close(offloaded(**inputs).logits, expected, rtol=0, atol=1e-5)


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
    assert [h.shape for h in output.hidden_states] == [(batch, length, 32)] * 3
    assert [a.shape for a in output.attentions] == [(batch, 4, length, length)] * 2
    tokens = int((inputs["input_ids"] == config.image_token_id).sum())
    assert output.image_hidden_states.shape == (tokens, 32)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_bad_inputs_are_named(config, model, make_inputs):
    inputs = make_inputs(config, MIXED)

    def refused(match, **changes):
        with pytest.raises(ValueError, match=match):
            model(**{**inputs, **changes})

    refused("placeholders", input_ids=inputs["input_ids"][:2], attention_mask=inputs["attention_mask"][:2])
    refused("placeholders", pixel_values=inputs["pixel_values"][:1], image_sizes=inputs["image_sizes"][:1])
    refused("image_sizes", image_sizes=inputs["image_sizes"][:1])
    refused("image_sizes", image_sizes=None)
    refused("pixel_values has NaN", pixel_values=inputs["pixel_values"] * float("nan"))
    refused("tiles of 32 x 32", pixel_values=inputs["pixel_values"][..., :16])
    refused("image_grid_pinpoints", pixel_values=inputs["pixel_values"][:, :1])
    refused("pixel_values must be", pixel_values=inputs["pixel_values"][0, 0])
    refused("exactly one", inputs_embeds=torch.zeros(3, 4, 32))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        missing = config.text_config.max_position_embeddings + 1 - inputs["input_ids"].shape[1]
        model(**{**inputs, "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, missing), value=1)})
    with pytest.raises(ValueError, match="vision_feature_select_strategy"):
        full = copy.deepcopy(model)
        full.config.vision_feature_select_strategy = "full"  # keeps CLIP's CLS token, which has no place in the grid
        full(**inputs)
