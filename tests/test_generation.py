"""`generate`: every way to decode gives what the plain way gives."""

import copy

import pytest
import torch
import transformers
from packaging import version
from transformers import DynamicCache, GenerationConfig


NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
TWO_IMAGES = [[5, (40, 90), 6, (64, 64), 7], [8, 9, (100, 20), 10]]
DOWNSAMPLES = [[5, (40, 90, 1), 6, (64, 64, 4), 7], [8, 9, (100, 20), 10]]
IMAGES = {"pixel_values", "image_sizes", "image_downsamples"}
MIXED = [[5, 6, 7], [9, (40, 90), 10, 11], [(64, 64), 12, (100, 20), 13]]
slices_images = version.parse(transformers.__version__) >= version.parse("5.23")  # in a prefill cut in chunks


@pytest.fixture(scope="module")
def model(variant_config, make_model):
    return make_model(variant_config)


@pytest.fixture(scope="module")
def inputs(model, make_inputs):
    return make_inputs(model.config, TWO_IMAGES, "left")


def new_tokens(model, inputs, **options):
    torch.manual_seed(0)
    prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return model.generate(**copy.deepcopy(inputs), **{**NEW, **options})[:, prompt:].tolist()


def alone(model, make_inputs, prompt, seed_inputs, images):
    """One row of a batch as a batch of its own, with the batch's pixels."""
    row = make_inputs(model.config, [prompt])
    if images.start < images.stop:
        row |= {key: seed_inputs[key][images] for key in IMAGES & seed_inputs.keys()}
    return row


def test_greedy_equals_repeated_full_forwards(model, inputs):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    images = {key: inputs[key] for key in ("pixel_values", "image_sizes")}
    for _ in range(NEW["max_new_tokens"]):
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, **images).logits[:, -1].clone()
        logits[:, model.config.text_config.eos_token_id] = float("-inf")  # min_new_tokens
        logits[:, model.config.image_token_id] = float("-inf")  # suppressed
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert ids[:, inputs["input_ids"].shape[1] :].tolist() == new_tokens(model, inputs)


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 1}],
    ids=["no cache", "static cache", "dynamic cache"],
)
def test_the_cache_changes_nothing(model, inputs, options):
    assert new_tokens(model, inputs, **options) == new_tokens(model, inputs)


@pytest.mark.parametrize("size", [3, 7, 1000])
def test_prefill_in_chunks(model, inputs, size):
    if slices_images:
        assert new_tokens(model, inputs, prefill_chunk_size=size) == new_tokens(model, inputs)
    else:
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            new_tokens(model, inputs, prefill_chunk_size=size)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_rows_alone(model, make_inputs, padding_side):
    batch = make_inputs(model.config, MIXED, "left")
    together, first = new_tokens(model, batch), 0
    for row, prompt in enumerate(MIXED):
        count = sum(isinstance(part, tuple) for part in prompt)
        single = alone(model, make_inputs, prompt, batch, slice(first, first + count))
        first += count
        assert new_tokens(model, single) == [together[row]]


def test_beams_with_two_images_in_a_row(model, inputs, make_inputs):
    """Each row's beams see its own images, whatever the other rows hold."""
    options = {"num_beams": 3, "num_return_sequences": 2}
    together = new_tokens(model, inputs, **options)
    assert len(together) == 4
    first = alone(model, make_inputs, TWO_IMAGES[0], inputs, slice(0, 2))
    second = alone(model, make_inputs, TWO_IMAGES[1], inputs, slice(2, 3))
    assert together == new_tokens(model, first, **options) + new_tokens(model, second, **options)


def test_sampling_several_sequences(model, inputs):
    """Every sampled sequence has the probability that a full forward over it gives."""
    torch.manual_seed(0)
    options = {"do_sample": True, "num_return_sequences": 2, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(**copy.deepcopy(inputs), **{**NEW, **options})
    assert output.sequences.shape[0] == 4
    length = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, NEW["max_new_tokens"], dtype=torch.long)], 1)
    images = {key: inputs[key] for key in ("pixel_values", "image_sizes")}
    for nth in range(2):
        with torch.no_grad():
            full = model(input_ids=output.sequences[nth::2], attention_mask=mask, **images).logits
        seen = torch.stack(output.logits, 1)[nth::2]
        torch.testing.assert_close(seen, full[:, length - 1 : -1].float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("pass_all_images", [True, False])
def test_continuing_a_chat_with_a_second_image(model, make_inputs, pass_all_images):
    first, second = [5, (40, 90), 6], [7, (64, 64), 8]
    whole = make_inputs(model.config, [first + second])
    opening = make_inputs(model.config, [first])
    opening |= {key: whole[key][:1] for key in ("pixel_values", "image_sizes")}
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(**opening, past_key_values=cache, use_cache=True)
    turn = dict(whole)
    if not pass_all_images:
        turn |= {key: whole[key][1:] for key in ("pixel_values", "image_sizes")}
    assert new_tokens(model, {**turn, "past_key_values": cache}) == new_tokens(model, whole)


def test_inputs_embeds(model, inputs):
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    assert new_tokens(model, {"inputs_embeds": embeds, **rest}) == new_tokens(model, inputs)


def test_text_only(model, make_inputs):
    inputs = make_inputs(model.config, [[5, 6, 7], [8, 9]], "left")
    assert new_tokens(model, inputs) == new_tokens(model, inputs, use_cache=False)


def test_another_image_gives_other_logits(model, inputs):
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1) + 1}
    with torch.no_grad():
        difference = model(**inputs).logits[:, -1] - model(**other).logits[:, -1]
    assert (difference.abs().amax(-1) > 1e-3).all()


def test_decoding_runs_no_module(model, inputs, monkeypatch):
    """With a cache, only the forward pass that holds the placeholders runs the modules."""
    calls = []
    for module in model.model.vision_remember.values():
        attend = module.attend
        monkeypatch.setattr(module, "attend", lambda *args, attend=attend: calls.append(1) or attend(*args))
    new_tokens(model, inputs)
    assert len(calls) == len(model.config.remember_layers)


def test_wrong_number_of_images_is_refused(model, inputs):
    with pytest.raises(ValueError, match="placeholders"):
        new_tokens(model, {**inputs, **{key: inputs[key][:2] for key in ("pixel_values", "image_sizes")}})


def test_continuing_a_chat_with_beams(model, make_inputs):
    """The cache is repeated for the beams, as `generate` leaves a given one alone."""
    first, second = [5, (40, 90), 6], [7, (64, 64), 8]
    whole, opening = make_inputs(model.config, [first + second] * 2), make_inputs(model.config, [first] * 2)
    opening |= {key: whole[key][::2] for key in IMAGES & whole.keys()}
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(**opening, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(3)
    assert new_tokens(model, {**whole, "past_key_values": cache}, num_beams=3) == new_tokens(model, whole, num_beams=3)


def test_features_of_the_caller_stay_as_they_are(model, inputs):
    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    lengths = [len(image) for image in features.pooler_output]
    rest = {key: value for key, value in inputs.items() if key not in IMAGES}
    options = {"mm_encoder_outputs": {"image": features}, "max_new_tokens": 2, "pad_token_id": 0}
    answers = [model.generate(**copy.deepcopy(rest), **options).tolist() for _ in range(2)]
    assert answers[0] == answers[1] and [len(image) for image in features.pooler_output] == lengths


# ------------------------------------------------------------------------------------------ the number of tokens


@pytest.fixture(scope="module")
def choosing(tiny_config, make_model):
    return make_model(tiny_config(projector_downsample_choices=[1, 2, 4]))


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}],
    ids=["no cache", "static cache", "chunks"],
)
def test_downsamples_within_a_batch(choosing, make_inputs, options):
    if "prefill_chunk_size" in options and not slices_images:
        pytest.skip("prefill_chunk_size with images needs transformers 5.23")
    inputs = make_inputs(choosing.config, DOWNSAMPLES, "left")
    together = new_tokens(choosing, inputs, **options)
    first = alone(choosing, make_inputs, DOWNSAMPLES[0], inputs, slice(0, 2))
    second = alone(choosing, make_inputs, DOWNSAMPLES[1], inputs, slice(2, 3))
    assert together == new_tokens(choosing, first) + new_tokens(choosing, second)


def test_downsamples_with_beams(choosing, make_inputs):
    inputs, options = make_inputs(choosing.config, DOWNSAMPLES, "left"), {"num_beams": 3, "num_return_sequences": 2}
    first = alone(choosing, make_inputs, DOWNSAMPLES[0], inputs, slice(0, 2))
    second = alone(choosing, make_inputs, DOWNSAMPLES[1], inputs, slice(2, 3))
    together = new_tokens(choosing, inputs, **options)
    assert together == new_tokens(choosing, first, **options) + new_tokens(choosing, second, **options)


@pytest.mark.parametrize("pass_all_images", [True, False])
def test_continuing_a_chat_with_an_image_of_another_downsample(choosing, make_inputs, pass_all_images):
    first, second = [5, (40, 90, 4), 6], [7, (64, 64, 1), 8]
    whole = make_inputs(choosing.config, [first + second])
    opening = make_inputs(choosing.config, [first]) | {key: whole[key][:1] for key in IMAGES}
    cache = DynamicCache(config=choosing.config.text_config)
    with torch.no_grad():
        choosing(**opening, past_key_values=cache, use_cache=True)
    turn = whole if pass_all_images else whole | {key: whole[key][1:] for key in IMAGES}
    assert new_tokens(choosing, {**turn, "past_key_values": cache}) == new_tokens(choosing, whole)


# ----------------------------------------------------------------------------------------- images that are not there


@pytest.mark.parametrize("options", [{"use_cache": False}, {"prompt_lookup_num_tokens": 2}, {}])
def test_the_placeholder_is_never_generated(model, inputs, options):
    """No image could follow it; with a head that asks for nothing else, other tokens are taken."""
    eager = copy.deepcopy(model)
    eager.lm_head.weight.data[eager.config.image_token_id] *= 100
    if "prompt_lookup_num_tokens" in options:
        inputs = {key: value[:2] if key in IMAGES else value[:1] for key, value in inputs.items()}
    assert all(eager.config.image_token_id not in row for row in new_tokens(eager, inputs, **options))
    own = GenerationConfig(max_new_tokens=6, pad_token_id=0)
    output = eager.generate(**copy.deepcopy(inputs), generation_config=own)[:, inputs["input_ids"].shape[1] :]
    assert eager.config.image_token_id not in output


def test_zero_images(model, make_inputs):
    inputs = make_inputs(model.config, [[5, 6, 7], [8, 9]], "left")
    none = {"pixel_values": torch.zeros(0, 1, 3, 32, 32), "image_sizes": torch.zeros(0, 2, dtype=torch.long)}
    for options in ({}, {"num_beams": 2}):
        assert new_tokens(model, inputs | none, **options) == new_tokens(model, inputs, **options)


def test_placeholders_without_images_are_refused(model, inputs):
    with pytest.raises(ValueError, match="0 vision tokens"):
        new_tokens(model, {key: value for key, value in inputs.items() if key not in IMAGES})


def test_the_decoders_context_may_be_exceeded(model, make_inputs):
    """Rotary positions go on; whoever wants a limit has the processor's and the collator's."""
    longer = copy.deepcopy(model)
    longer.config.text_config.max_position_embeddings = 8
    inputs = make_inputs(model.config, TWO_IMAGES, "left")
    assert new_tokens(longer, inputs) == new_tokens(model, inputs)
