"""Layers of the vision tower that nothing reads are left out, and no number changes."""

import pytest
import torch

from builders import SIZES, VISION, load, logits, make_inputs, randomize, theirs
from llava_vr.conversion.tower import cut_tower
from llava_vr.convert_weights import convert


def cut_config(tiny_config, **overrides):
    config = tiny_config(**overrides)
    cut_tower(config, [])
    return config


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])  # CLIP, CLIP and SigLIP
@pytest.mark.parametrize("layer, layers", [(-1, 3), (-2, 2), (1, 1), (-4, 1)])
def test_logits_are_the_sources(tmp_path, save_tokenizer, kind, layer, layers):
    strategy = "full" if kind == "llava_onevision" else "default"
    source = randomize(theirs(kind, vision_feature_layer=layer, vision_feature_select_strategy=strategy))
    source.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    result = convert(
        tmp_path / "source", tmp_path / "ours", remember_layers=[0], remember_feature_layers=[1], verify=True
    )
    config = result.plan.config
    assert config.vision_config.num_hidden_layers == layers
    assert config.vision_feature_layer == (layer if layers == 3 else layer % 4)
    unread = {handle.name for handle, reason in result.plan.dropped if "after the last that is read" in reason}
    assert len(unread) == 16 * (VISION["num_hidden_layers"] - layers) and "logits as" in result.summary()
    inputs = make_inputs(config, SIZES[:1])
    images = {} if "pixel_values" not in inputs or kind == "llava" else {"image_sizes": inputs["image_sizes"]}
    expected = logits(source, {k: v for k, v in inputs.items() if k != "image_sizes"} | images)
    assert torch.equal(logits(load(tmp_path / "ours"), inputs), expected)


def test_nothing_changes_where_the_last_layer_is_read(tiny_config):
    for indices in ({"vision_feature_layer": -1}, {"remember_feature_layers": [1, -1]}, {"vision_feature_layer": 3}):
        given = tiny_config(**indices)
        assert cut_config(tiny_config, **indices).to_dict() == given.to_dict()


def test_every_reader_counts(tiny_config):
    options = {"projector_type": "tokenpacker", "remember_feature_layers": [1], "vision_feature_layer": [-5, 1]}
    deep = {**options, "vision": {"num_hidden_layers": 5}}
    config = cut_config(tiny_config, **deep, projector_kwargs={"feature_layers": [-3, 1]})
    assert config.vision_config.num_hidden_layers == 3 and config.projector_kwargs["feature_layers"] == [3, 1]
    assert (config.vision_feature_layer, config.remember_feature_layers) == ([1, 1], [1])
    config = cut_config(
        tiny_config, **deep | {"remember_feature_layers": [-2]}, projector_kwargs={"feature_layers": [1]}
    )
    assert config.vision_config.num_hidden_layers == 4 and config.remember_feature_layers == [4]


def test_one_layer_stays(tiny_config):
    config = cut_config(tiny_config, vision_feature_layer=0, remember_feature_layers=[0])
    assert config.vision_config.num_hidden_layers == 1 and type(config).from_dict(config.to_dict())
