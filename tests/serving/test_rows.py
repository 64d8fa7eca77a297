"""What the vLLM plugin does without vLLM: packed rows, cut at any token, give the model's own logits; and the guard."""

from importlib.metadata import entry_points

import pytest
import torch
from transformers import DynamicCache
from variants import VARIANTS

from llava_vr.serving import check_vllm_version, register
from llava_vr.serving.rows import StepMemory, pack_rows


TOLERANCE = 1e-5
CONFIGS = {
    **VARIANTS,
    "anyres_max": {"image_aspect_ratio": "anyres_max_1"},
    "one tile": {"image_aspect_ratio": "square", "image_merge_type": "flat", "projector_type": "tokenpacker"},
    "choices": {"projector_downsample_choices": [1, 2, 4]},
    "no modules": {"remember_layers": []},
}
PROMPT = [10, (40, 90), 11, 12, (64, 30), (20, 20), 13, 14]


def prompt_of(config):
    """The prompt above; where the caller may choose s, each image has its own."""
    if config.projector_downsample_choices is None:
        return PROMPT
    return [10, (40, 90, 2), 11, 12, (64, 30, 1), (20, 20, 4), 13, 14]


class Engine:
    """A serving engine in little: each image is encoded by itself, and a prompt goes through in pieces."""

    def __init__(self, model):
        self.model = model
        self.step = StepMemory(model.model, model.model.vision_remember)
        model.model.vision_remember.look_again = lambda key, states, **kwargs: self.step.look_again(key, states)

    def encode(self, inputs) -> list[torch.Tensor]:
        images = {key: inputs[key] for key in inputs if key not in ("input_ids", "attention_mask")}
        each = [{key: value[i : i + 1] for key, value in images.items()} for i in range(len(images["image_sizes"]))]
        return [pack_rows(self.model.get_image_features(**image))[0] for image in each]

    def logits(self, inputs, chunk: int, rows: list[torch.Tensor]) -> torch.Tensor:
        """Of all positions, from a prompt cut every `chunk` tokens; `rows` are single tokens' rows."""
        ids, cache, rows, found = inputs["input_ids"], DynamicCache(config=self.model.config), list(rows), []
        for piece in ids.split(chunk, dim=1):
            is_image = piece[0] == self.model.config.image_token_id
            taken, rows = rows[: is_image.sum()], rows[is_image.sum() :]
            embeds = self.model.get_input_embeddings()(piece)
            if tokens := self.step.begin(taken, is_image):
                embeds[0, is_image] = torch.cat(tokens)
            nothing = {"image": None}  # to look for: the vision tokens are there already
            outputs = self.model.model(inputs_embeds=embeds, past_key_values=cache, mm_encoder_outputs=nothing)
            self.step.end()
            found.append(self.model.lm_head(outputs.last_hidden_state))
        return torch.cat(found, dim=1)


@pytest.fixture(params=CONFIGS)
def case(request, tiny_config, make_model, make_inputs):
    """A model, its inputs, and its own logits."""
    config = tiny_config(**CONFIGS[request.param])
    model, inputs = make_model(config), make_inputs(config, [prompt_of(config)])
    with torch.no_grad():
        return model, inputs, model(**inputs).logits


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_packed_rows_cut_anywhere_give_the_same_logits(case, chunk):
    model, inputs, expected = case
    engine = Engine(model)
    rows = [row for image in engine.encode(inputs) for row in image.split(1)]
    torch.testing.assert_close(engine.logits(inputs, chunk, rows), expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_memory_of_another_token_changes_the_logits(tiny_config, make_model, make_inputs):
    config = tiny_config()
    model, inputs = make_model(config), make_inputs(config, [PROMPT])
    engine, width = Engine(model), config.text_config.hidden_size
    image = torch.cat(engine.encode(inputs))
    right = engine.logits(inputs, 5, image.split(1))
    rotated = torch.cat([image[:, :width], image[:, width:].roll(1, 0)], dim=1)
    assert (engine.logits(inputs, 5, rotated.split(1)) - right).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_step_whose_modules_did_not_run_is_an_error(tiny_config, make_model, make_inputs):
    config = tiny_config()
    model = make_model(config)
    engine, inputs = Engine(model), make_inputs(config, [PROMPT])
    image = engine.encode(inputs)[0]
    everywhere = torch.ones(len(image), dtype=torch.bool)
    engine.step.begin([image], everywhere)
    with pytest.raises(RuntimeError, match=rf"did not run in a step with {len(image)} vision tokens"):
        engine.step.end()
    engine.step.begin([image], everywhere)
    with pytest.raises(RuntimeError, match=r"layers \[.*\] did not run"):
        engine.step.begin([], None)  # as where a whole graph is replayed, and no Python runs between two steps
    engine.step.begin([], None)
    with pytest.raises(RuntimeError, match="0 vision tokens"):  # each step calls each module, also without an image
        engine.step.end()


def test_vllm_without_the_plugin_is_refused(tiny_config, make_model):
    model = make_model(tiny_config())
    embeds = model.get_input_embeddings()(torch.tensor([[10, 11]]))
    model.config.text_config._attn_implementation = "vllm"  # as its transformers backend builds a model
    with pytest.raises(ValueError, match=r'pip install "\.\[vllm\]"'):
        model.model(inputs_embeds=embeds)


def test_placeholders_without_images_are_refused(tiny_config, make_model):
    model = make_model(tiny_config())
    ids = torch.tensor([[10, model.config.image_token_id, 11]])
    for inputs in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match="Found 1 image placeholders .* but 0 vision tokens"):
            model(**inputs)


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0"])
def test_untested_vllm_is_refused(version):
    with pytest.raises(ImportError, match=rf"vLLM >=0.32,<0.33, found {version}"):
        check_vllm_version(version)


def test_tested_vllm_passes():
    check_vllm_version("0.32.0+cpu")


def test_plugin_is_an_entry_point():
    (plugin,) = entry_points(group="vllm.general_plugins", name="llava_vr")
    assert plugin.load() is register
