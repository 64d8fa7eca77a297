"""`from_pretrained` itself on a folder of transformers' LLaVA-NeXT, in every layout that its names have had."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from builders import SIZES, load, logits, make_inputs, randomize, theirs
from llava_vr import LlavaVrConfig, LlavaVrForConditionalGeneration, LlavaVrModel


RENAMED = {
    "as saved": [],
    "with the tower's inner name": [(r"vision_tower\.", "vision_tower.vision_model.")],
    "older": [
        (r"language_model\.lm_head", "lm_head"),
        (r"language_model\.model\.", "model.language_model."),
        (r"(?=vision_tower|multi_modal_projector|image_newline)", "model."),
    ],
}


@pytest.fixture(params=RENAMED)
def saved(request, tmp_path):
    """A model of transformers, its folder, and the configuration that means the same here."""
    source = randomize(theirs("llava_next"))
    source.save_pretrained(tmp_path / "source")
    path, weights = tmp_path / "source" / "model.safetensors", {}
    for name, tensor in load_file(path).items():
        for pattern, new in RENAMED[request.param]:
            if re.match(pattern, name):
                name = re.sub(pattern, new, name, count=1)
                break
        weights[name] = tensor
    save_file(weights, path, metadata={"format": "pt"})
    config = LlavaVrConfig(
        vision_config=source.config.vision_config.to_dict(),
        text_config=source.config.text_config.to_dict(),
        image_token_id=source.config.image_token_index,
        image_grid_pinpoints=source.config.image_grid_pinpoints,
        projector_type="mlp",
        projector_downsample=1,
        remember_layers=[],
    )
    return source, tmp_path / "source", config


def load_all(model_class, folder, **options):
    model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    return model.eval(), info["unexpected_keys"]


def test_logits_are_those_of_transformers(saved, tmp_path):
    source, folder, config = saved
    model, unexpected = load_all(LlavaVrForConditionalGeneration, folder, config=config)
    inputs = make_inputs(config, SIZES)
    assert not unexpected and torch.equal(logits(model, inputs), logits(source, inputs))
    config.save_pretrained(folder)
    model, _ = load_all(LlavaVrForConditionalGeneration, folder)
    assert torch.equal(logits(model, inputs), logits(source, inputs))
    base, _ = load_all(LlavaVrModel, folder)
    assert all(torch.equal(weight, model.model.state_dict()[name]) for name, weight in base.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    names = set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert {name.replace("vision_tower.vision_model.", "vision_tower.") for name in names} == set(model.state_dict())
    assert torch.equal(logits(load(tmp_path / "saved"), inputs), logits(source, inputs))
