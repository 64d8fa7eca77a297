"""The card of a folder that is saved or tuned."""

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText

from llava_vr import LlavaVrForConditionalGeneration
from llava_vr.card_llava_vr import make_card, trained_parts, write_card


def rows(text: str) -> dict[str, str]:
    """The card's table."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1] for row in cells if len(row) == 2}


def test_a_saved_folder_has_a_card(tiny_config, make_model, tmp_path):
    config = tiny_config(projector_type="avg_pool", projector_downsample_choices=[1, 2, 4], remember_layers=[0, 1])
    make_model(config).save_pretrained(tmp_path / "plum")
    card = ModelCard.load(tmp_path / "plum" / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-text-to-text"
    assert card.data.base_model is None and card.data.license is None
    table = rows(card.text)
    assert card.text.strip().startswith("# plum") and "base model" not in table and "trained" not in table
    assert table["Vision Remember modules"] == "after decoder layers 0, 1"
    count = config.image_layout.num_tokens
    expected = f"{count((32, 32), 2)} for a picture of 32 x 32 pixels"
    assert table["image tokens"] == f"{expected}, {count((32, 32), 1)} at s = 1, {count((32, 32), 4)} at s = 4"


def test_a_copy_names_its_base_and_licence_and_no_path(tiny_config, make_model, tmp_path):
    base, copy = tmp_path / "base", tmp_path / "copy"
    make_model(tiny_config()).save_pretrained(base)
    text = (base / "README.md").read_text().replace("tags:", "license: mit\ntags:", 1)
    (base / "README.md").write_text(text)
    LlavaVrForConditionalGeneration.from_pretrained(base).save_pretrained(copy)
    card = ModelCard.load(copy / "README.md")
    assert card.data.license == "mit" and card.data.base_model is None
    assert rows(card.text)["base model"] == "`base`" and str(tmp_path) not in card.content


def test_a_model_of_the_hub_is_the_base_model(tiny_config, make_model, tmp_path):
    model = make_model(tiny_config())
    model.config._name_or_path = model.name_or_path = "someone/plum"
    model.save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "someone/plum"


def test_a_card_that_is_there_stays(tiny_config, make_model, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    model = make_model(tiny_config())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    write_card(tmp_path, model, trained_parts(model))
    assert rows((tmp_path / "README.md").read_text())["trained"] == "projector"


def test_a_model_that_was_in_training_says_what_is_trained(tiny_config, make_model, tmp_path):
    base, plain, tuned = (tmp_path / name for name in ("base", "plain", "tuned"))
    make_model(tiny_config()).save_pretrained(base)
    model = LlavaVrForConditionalGeneration.from_pretrained(base)
    model.save_pretrained(plain)
    assert "trained" not in rows((plain / "README.md").read_text())
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    model.train()
    model.eval()  # as Trainer leaves it after an evaluation
    model.save_pretrained(tuned)
    text = (tuned / "README.md").read_text()
    assert "fine-tuned from `base`" in text
    assert rows(text)["trained"] == "vision tower, projector, newline token, Vision Remember modules"


def test_an_adapter_gets_a_card_and_not_a_template(package, tmp_path):
    peft = pytest.importorskip("peft")
    base = AutoModelForImageTextToText.from_pretrained(package, trust_remote_code=True)
    target = r".*language_model\.layers\..*_proj"
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=target, modules_to_save=["multi_modal_projector"]))
    model.save_pretrained(tmp_path)
    write_card(tmp_path, model, trained_parts(model))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft" and "More Information Needed" not in card.text
    assert rows(card.text)["trained"] == "projector, decoder (LoRA)"
    assert "PeftModel.from_pretrained(model, 'FOLDER')" in card.text.replace('"', "'")


def test_the_metadata_of_a_converted_folder(tiny_config):
    text = make_card(tiny_config(), "plum", "Converted.", {"conversation": "chatml"}, license="apache-2.0")
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and rows(card.text)["conversation"] == "chatml"
