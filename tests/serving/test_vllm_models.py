"""Other towers, decoders, projectors and layouts than the root checkpoint's, with random weights; LoRA; refusals."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoProcessor


pytest.importorskip("vllm")

from engines import ROOT, Answer, Engine, Request, Transformers, count_equal, draw_requests  # noqa: E402
from torchao.core.config import config_to_dict  # noqa: E402
from torchao.quantization import Int8WeightOnlyConfig, quantize_  # noqa: E402
from variants import VARIANTS  # noqa: E402

from llava_vr.conversion.templates import STYLES  # noqa: E402
from llava_vr.serving.vllm_inputs import LlavaVrProcessingInfo, LlavaVrRenderer  # noqa: E402


pytestmark = pytest.mark.vllm
TEXT = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4, "head_dim": 32}
TEXT |= {"intermediate_size": 96, "vocab_size": 262, "max_position_embeddings": 2048}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ONE_TILE = {"image_aspect_ratio": "square", "image_merge_type": "flat", "projector_type": "resampler"}
CASES = {  # decoder, tower, and the rest of the configuration; tiles where nothing else is said
    "tokenpacker": ("qwen3", "siglip", {"projector_type": "tokenpacker"}),
    "anyres_max": ("qwen2", "siglip", {"image_aspect_ratio": "anyres_max_2", "vision_feature_layer": [1, -1]}),
    "slices": ("llama", "clip", VARIANTS["slices"]),
    "resampler": ("llama", "clip", ONE_TILE),
    "choices": ("llama", "clip", {"projector_downsample_choices": [1, 2, 4]}),
    "no modules": ("llama", "clip", {"projector_type": "mlp", "projector_downsample": 1, "remember_layers": []}),
    **{decoder: (decoder, "clip", {}) for decoder in ("mistral", "gemma3_text", "granite", "phi3", "smollm3")},
}


@dataclass
class Adapters:
    folder: Path
    others: tuple[str, ...]
    requests: list[Request]
    plain: list[Answer]
    adapted: list[Answer]


def write_adapter(folder: Path, modules: dict[str, torch.nn.Module], names: list[str], rank: int = 4):
    """An adapter in PEFT's format for these modules, and what it adds to the weight of each."""
    generator, tensors, added = torch.Generator().manual_seed(0), {}, {}
    for name in names:
        outputs, inputs = modules[name].weight.shape
        a, b = (torch.randn(*shape, generator=generator) * 0.3 for shape in ((rank, inputs), (outputs, rank)))
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        added[name] = b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rsplit(".", 1)[1] for name in names})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


def draw_noise(*sizes: tuple[int, int]) -> tuple[Image.Image, ...]:
    rng = np.random.default_rng(0)
    return tuple(Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes)


def nine_requests(downsamples: list[int | None]) -> list[Request]:
    """One to three images of many shapes, one of exactly a tile's size, and text alone; s in turns."""
    shapes = [[(40, 90)], [(32, 32)], [(90, 31)], [(32, 32), (32, 20)], [(64, 64), (20, 70)], [(200, 10)] * 2]
    shapes += [[(33, 65), (64, 32), (5, 7)], [(96, 96)], []]
    return [
        Request(f"What is {i}?", draw_noise(*sizes), downsamples[i % len(downsamples)] if sizes else None)
        for i, sizes in enumerate(shapes)
    ]


@dataclass
class Case:
    folder: Path
    requests: list[Request]
    expected: list[Answer]


@pytest.fixture(scope="module")
def cases(tmp_path_factory, tiny_config, make_model, processor_for) -> dict[str, Case]:
    """Checkpoints, requests and what transformers answers: all before the first engine, which changes its classes."""
    made = {}
    for name, (decoder, tower, overrides) in CASES.items():
        folder, config = tmp_path_factory.mktemp("model"), tiny_config(tower, **overrides)
        rest = {key: value for key, value in config.to_dict().items() if key not in ("text_config", "remember_layers")}
        layers = overrides.get("remember_layers", [0, 2])
        config = type(config)(**rest, text_config=AutoConfig.for_model(decoder, **TEXT), remember_layers=layers)
        make_model(config).save_pretrained(folder)
        processor_for(config).save_pretrained(folder)
        requests = nine_requests([None, *overrides.get("projector_downsample_choices", [])])
        reference = Transformers(folder)
        made[name] = Case(folder, requests, [reference.answer(request) for request in requests])
    return made


@pytest.fixture(scope="module")
def adapters(cases, tmp_path_factory) -> Adapters:
    """Adapters of the root checkpoint, of its decoder and of other parts, and the answers with the first."""
    folder, requests, reference = tmp_path_factory.mktemp("adapters"), draw_requests()[:8], Transformers(ROOT)
    modules = dict(reference.model.named_modules())
    parts = ("self_attn.q_proj", "mlp.up_proj")
    names = [f"model.language_model.layers.{layer}.{part}" for layer in (0, 3) for part in parts]
    added = write_adapter(folder / "decoder", modules, names)
    plain = [reference.answer(request) for request in requests]
    for name, weight in added.items():
        modules[name].weight.data += weight
    others = ("model.vision_remember.1.query", "model.vision_tower.encoder.layers.0.self_attn.q_proj")
    for name in others:
        write_adapter(folder / name, modules, [name])
    return Adapters(folder, others, requests, plain, [reference.answer(request) for request in requests])


@pytest.fixture(scope="module")
def quantized() -> list[Answer]:
    """What transformers answers with the root checkpoint's decoder, and that alone, in 8 bits."""
    reference = Transformers(ROOT)
    quantize_(reference.model.model.language_model.layers, Int8WeightOnlyConfig())
    return [reference.answer(request) for request in draw_requests()]


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_model(cases, adapters, quantized, name):
    case = cases[name]
    engine = Engine(case.folder, enforce_eager=True, max_model_len=1024, limit_mm_per_prompt={"image": 3})
    try:
        assert count_equal(engine.answers(case.requests), case.expected) == 9
        engine.forget()
        engine.set_chunk(7)
        assert count_equal(engine.answers(case.requests), case.expected) == 9
    finally:
        engine.close()


@pytest.mark.parametrize("name", CASES)
def test_no_image_has_more_tokens_than_vllm_makes_room_for(cases, name):
    folder = cases[name].folder
    config, processor = (auto.from_pretrained(folder, trust_remote_code=True) for auto in (AutoConfig, AutoProcessor))
    model_config = SimpleNamespace(model=str(folder), revision=None, trust_remote_code=True)
    info = LlavaVrProcessingInfo(SimpleNamespace(model_config=model_config, get_hf_config=lambda: config))
    sizes = np.random.default_rng(0).integers(1, 300, (300, 2)).tolist()
    counts = processor._get_num_multimodal_tokens(sizes, projector_downsample=min(config.downsamples))
    assert max(counts.num_image_tokens) <= info.get_mm_max_tokens_per_item(0, {})["image"]


@pytest.mark.parametrize("style", STYLES)
def test_vllm_leaves_images_to_the_chat_template(style):
    from vllm.renderers.hf import _detect_content_format

    assert _detect_content_format(STYLES[style], default="string") == "openai"


@pytest.mark.parametrize("template", ["{{ bos_token }}", ""])
def test_chat_begins_as_the_processor_begins_it(tokenizer, template):
    """With one beginning token where the tokenizer writes it, whether the template does or not."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template + "{{ messages[0].content }}"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    renderer = SimpleNamespace(get_tokenizer=lambda: tokenizer)

    def begin() -> list[int]:
        prompt = LlavaVrRenderer._begin(renderer, {"prompt": text})["prompt"]
        return tokenizer.encode(prompt, add_special_tokens=False)

    plain = tokenizer.encode("hi", add_special_tokens=False)
    assert begin() == [tokenizer.bos_token_id] * bool(template) + plain
    special = [(tokenizer.bos_token, tokenizer.bos_token_id)]
    processing = TemplateProcessing(single=f"{tokenizer.bos_token} $A", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = processing
    assert begin() == [tokenizer.bos_token_id, *plain]


def test_lora_on_the_decoder_alone(adapters):
    from vllm.lora.request import LoRARequest

    engine = Engine(ROOT, enable_lora=True, enforce_eager=True)
    try:
        decoder = LoRARequest("decoder", 1, str(adapters.folder / "decoder"))
        assert count_equal(engine.answers(adapters.requests), adapters.plain) == 8
        assert count_equal(engine.answers(adapters.requests, lora_request=decoder), adapters.adapted) == 8
        assert sum(a.tokens != b.tokens for a, b in zip(adapters.plain, adapters.adapted)) > 0
        for number, name in enumerate(adapters.others):
            with pytest.raises(ValueError, match=rf"{name} \(not in the decoder\)"):
                engine.llm.llm_engine.add_lora(LoRARequest(name, 2 + number, str(adapters.folder / name)))
        assert count_equal(engine.answers(adapters.requests), adapters.plain) == 8
    finally:
        engine.close()


def test_the_decoder_alone_is_quantized(adapters, quantized):
    config = json.dumps(config_to_dict(Int8WeightOnlyConfig()))
    overrides = {"quantization_config_dict_json": config}
    engine = Engine(ROOT, enforce_eager=True, quantization="torchao", hf_overrides=overrides)
    try:
        found = engine.answers(draw_requests())
    finally:
        engine.close()
    assert count_equal(found, quantized) == 50
    assert count_equal(found[:8], adapters.plain) < 8


# --------------------------------------------------------------------------------------------------------- refusals


OPTIONS = {
    "cudagraph_mode FULL": {"compilation_config": {"cudagraph_mode": "FULL"}},
    "cudagraph_mode FULL_AND_PIECEWISE": {"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}},
    "--pipeline-parallel-size 2": {"pipeline_parallel_size": 2},
    "--enable-mm-embeds": {"enable_mm_embeds": True},
    "--enable-prompt-embeds": {"enable_prompt_embeds": True},
    "--enable-tower-connector-lora": {"enable_lora": True, "enable_tower_connector_lora": True},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option_that_would_leave_the_modules_out_is_refused_by_name(option, monkeypatch):
    from vllm import EngineArgs

    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "2,3")  # the modules follow layers 0, 1 and 2

    arguments = EngineArgs(str(ROOT), trust_remote_code=True, dtype="float32", block_size=32, **OPTIONS[option])
    with pytest.raises(ValueError, match=f"LLaVA-VR cannot be served with {option}: "):
        arguments.create_engine_config()


def test_stages_may_part_after_the_last_module(monkeypatch):
    from vllm import EngineArgs

    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,2")
    arguments = EngineArgs(str(ROOT), trust_remote_code=True, dtype="float32", block_size=32, pipeline_parallel_size=2)
    config = arguments.create_engine_config()
    assert not config.compilation_config.cudagraph_mode.has_full_cudagraphs()


WITHOUT_PLUGIN = f"""
from vllm import LLM

llm = LLM({str(ROOT)!r}, trust_remote_code=True, dtype="float32", block_size=32, enforce_eager=True)
print(llm.generate("hello"))
"""


def test_vllm_without_the_plugin_stops():
    env = {**os.environ, "VLLM_PLUGINS": ""}
    done = subprocess.run([sys.executable, "-c", WITHOUT_PLUGIN], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert 'vLLM leaves the Vision Remember modules out: pip install ".[vllm]"' in done.stdout + done.stderr


def test_untested_version_is_refused(tmp_path):
    code = f"import vllm\nvllm.__version__ = '0.33.0'\n{WITHOUT_PLUGIN}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "LLaVA-VR serves with vLLM >=0.32,<0.33" in done.stdout + done.stderr
