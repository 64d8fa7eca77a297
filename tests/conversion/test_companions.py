"""The files of the result besides the weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor

from builders import ANYRES, IMAGE_ID, PINPOINTS, TILE, make_llava, randomize, theirs
from llava_vr.configuration_llava_vr import AUTO_MAP
from llava_vr.convert_weights import convert


ROOT = Path(__file__).parents[2]


@pytest.mark.common
def test_folder_is_complete_and_loads_in_a_fresh_process(tmp_path, clip_folder, save_tokenizer):
    """A prompt with a picture goes through the processor to an answer, all from the folder alone."""
    folder = make_llava(**ANYRES).save(tmp_path / "source")
    save_tokenizer(folder)
    sampling = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6, "_from_model_config": True}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    (clip_folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4, 0.5, 0.6]}))
    convert(folder, tmp_path / "out", vision_tower=clip_folder, max_shard_size="200KB", remember_layers=[0])
    (clip_folder / "preprocessor_config.json").unlink()
    names = {path.name for path in (tmp_path / "out").iterdir() if "model-0" not in path.name}
    assert names == {
        "README.md",
        "card_llava_vr.py",
        "chat_template.jinja",
        "collator_llava_vr.py",
        "config.json",
        "configuration_llava_vr.py",
        "generation_config.json",
        "images_llava_vr.py",
        "layout_llava_vr.py",
        "maps_llava_vr.py",
        "model.safetensors.index.json",
        "modeling_llava_vr.py",
        "processing_llava_vr.py",
        "processor_config.json",
        "projectors_llava_vr.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["padding_side"] == "left"  # the source's has none, and pads on the right
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [IMAGE_ID] and "temperature" not in generation
    processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert processor["image_processor"]["image_mean"] == [0.4, 0.5, 0.6]
    assert processor["image_processor"]["image_grid_pinpoints"] == PINPOINTS
    for name in (name for name in names if name.endswith("_llava_vr.py")):
        assert (tmp_path / "out" / name).read_bytes() == (ROOT / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert processor["auto_map"] == {"AutoProcessor": "processing_llava_vr.LlavaVrProcessor"}
    script = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
content = [{"type": "image", "image": Image.new("RGB", (70, 40), "red")}, {"type": "text", "text": "What?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt",
)
assert inputs["input_ids"][0, 0] != model.config.image_token_id
collator = get_class_from_dynamic_module("collator_llava_vr.LlavaVrCollator", sys.argv[1])
assert all(kind.__module__.startswith("transformers_modules.") for kind in (type(model), type(processor), collator))
print(model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] - inputs["input_ids"].shape[1])
"""
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.stdout.strip() in ("1", "2", "3"), done.stderr


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
def test_pixels_are_those_of_the_source_s_own_processor(kind, tmp_path, save_tokenizer):
    source = randomize(theirs(kind))
    source.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    square, tilings = {"height": TILE, "width": TILE}, {"image_grid_pinpoints": PINPOINTS}
    options = {"size": {"shortest_edge": TILE}, "crop_size": square}
    if kind == "llava":
        own = transformers.CLIPImageProcessorPil(**options)
    elif kind == "llava_next":
        own = transformers.LlavaNextImageProcessorPil(**options, **tilings)
    else:
        own = transformers.LlavaOnevisionImageProcessorPil(size=square, **tilings)
    own.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    noise = torch.rand(50, 90, 3, generator=torch.Generator().manual_seed(0)).mul(255).byte().numpy()
    picture = Image.fromarray(noise)
    found = processor(images=picture, text="<image>", return_tensors="pt")["pixel_values"]
    expected = own(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(found, expected)
