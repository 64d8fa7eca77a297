"""`--verify`."""

import pytest

from builders import randomize, theirs
from llava_vr.conversion import plan
from llava_vr.conversion.readers import ConversionError
from llava_vr.convert_weights import convert


def test_verify_finds_other_logits(tmp_path, save_tokenizer, monkeypatch):
    source = randomize(theirs("llava_next"))
    source.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    make = plan.Maker.make

    def swapped(self, step):
        tensor = make(self, step)
        return tensor.flip(0) if step.target.endswith("layers.1.mlp.down_proj.weight") else tensor

    monkeypatch.setattr(plan.Maker, "make", swapped)
    with pytest.raises(ConversionError, match="logits differ from those of LlavaNextForConditionalGeneration"):
        convert(tmp_path / "source", tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()
