"""vLLM answers as transformers does, token for token. `tests/serving/run` makes the environment and starts this.

All tests of an engine share one start, which takes about a minute.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch


pytest.importorskip("vllm")

from engines import ROOT, Engine, Transformers, count_equal, draw_requests  # noqa: E402
from vllm.config import CompilationMode  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402


pytestmark = pytest.mark.vllm
ENGINES = {
    "eager": {"enforce_eager": True},
    "compiled": {},
    "tensor parallel": {"enforce_eager": True, "tensor_parallel_size": 2},
}


@pytest.fixture(scope="module")
def requests():
    return draw_requests()


@pytest.fixture(scope="module")
def reference():
    return Transformers(ROOT)


@pytest.fixture(scope="module")
def expected(requests, reference):
    return [reference.answer(request) for request in requests]


@pytest.fixture(scope="module")
def mixed(requests, reference):
    """The requests in turns with s = 2, 3, 4 and the model's own, the first picture with each; and their answers."""
    turns = [replace(request, downsample=(2, 3, 4, None)[i % 4]) for i, request in enumerate(requests)]
    same = [replace(requests[0], downsample=s) for s in (4, 2, None, 3)]
    return [*turns, *same], [reference.answer(request) for request in [*turns, *same]]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, expected, mixed):
    if request.param == "tensor parallel":
        patch = pytest.MonkeyPatch()
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        request.addfinalizer(patch.undo)
    engine = Engine(ROOT, **ENGINES[request.param])
    compiles = engine.core.vllm_config.compilation_config.mode != CompilationMode.NONE
    assert compiles == (request.param == "compiled")
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def fresh(engine):
    engine.set_chunk(0)
    engine.forget()


@pytest.mark.parametrize("chunk", [0, 5, 7, 20])
def test_answers_with_prompts_cut_at_any_token(engine, requests, expected, chunk):
    engine.set_chunk(chunk)
    assert count_equal(engine.answers(requests), expected) == 50


def test_answers_from_the_prefix_cache(engine, requests, expected):
    assert count_equal(engine.answers(requests), expected) == 50
    cached = [output.num_cached_tokens for output in engine.outputs(requests)]
    assert sum(count > 0 for count in cached) >= 4  # 32 tokens a block, so within an image where there are several
    assert count_equal(engine.answers(requests), expected) == 50


def test_answers_from_the_prefix_cache_after_images_were_evicted(engine, requests, expected):
    engine.answers(requests)
    engine.llm.reset_mm_cache()
    engine.llm.llm_engine.reset_encoder_cache()
    assert any(output.num_cached_tokens for output in engine.outputs(requests))
    engine.llm.llm_engine.reset_encoder_cache()
    assert count_equal(engine.answers(requests), expected) == 50


@pytest.mark.parametrize("chunk", [0, 7])
def test_each_request_chooses_its_number_of_tokens(engine, mixed, chunk):
    requests, answers = mixed
    engine.set_chunk(chunk)
    assert count_equal(engine.answers(requests), answers) == len(requests)
    assert len(Counter(answer.prompt_tokens for answer in answers[-4:])) == 3  # one picture, three values of s
    assert count_equal(engine.answers(requests), answers) == len(requests)  # from the caches


@pytest.fixture
def model(engine, monkeypatch):
    """The engine's model, of the engine without compiled code and in this process."""
    if not engine.llm.llm_engine.model_config.enforce_eager or engine.core.vllm_config.parallel_config.world_size > 1:
        pytest.skip("one engine is enough")
    return engine.model


def test_images_are_cut(engine, model, requests, monkeypatch):
    """What the tests above rest on: 16 tokens of an image in four steps."""
    begin, pieces = model.step.begin, []
    monkeypatch.setattr(model.step, "begin", lambda packed, is_image: pieces.append(packed) or begin(packed, is_image))
    engine.set_chunk(5)
    engine.answers(requests[:2])
    assert [list(map(len, packed)) for packed in pieces if packed] == [[4, 4], [5, 5], [5, 5], [2, 2]]


def test_memory_of_another_token_changes_answers(engine, model, requests, expected, monkeypatch):
    join = model.model.join_memory
    monkeypatch.setattr(model.model, "join_memory", lambda *rows: join(*rows).roll(1, 0), raising=False)
    assert count_equal(engine.answers(requests), expected) <= 5


def test_without_the_modules_half_of_the_answers_change(engine, model, requests, expected, monkeypatch):
    monkeypatch.setattr(model.step, "_modules_look_again", lambda key, states, **memory: states)
    changed = sum(a.tokens != b.tokens for a, b in zip(engine.answers(requests), expected))
    assert changed >= 25


def test_step_without_a_module_is_an_error(model, monkeypatch):
    monkeypatch.setattr(model.step, "keys", model.step.keys | {"3"})
    (image,) = model.embed_multimodal(pixel_values=torch.zeros(1, 3, 96, 96))
    ids, everywhere = torch.full((16,), model.config.image_token_id), torch.ones(16, dtype=torch.bool)
    model.embed_input_ids(ids, [image], is_multimodal=everywhere)
    model.step.asked = {"0", "1", "2"}
    with pytest.raises(RuntimeError, match=r"after decoder layers \[3\] did not run in a step with 16 vision tokens"):
        model.step.end()


REFUSED = {
    "placeholder in the text": ("<image><image>", 1, {}, "The prompt has 2 <image> but 1 images"),
    "no image": ("<image>", 0, {}, "The prompt has 1 <image> but 0 images"),
    "no placeholder": ("what is it?", 1, {}, "The prompt has 0 <image> but 1 images"),
    "s": ("<image>", 1, {"projector_downsample": 5}, r"must be one of \[2, 3, 4\]"),
    "two s": ("<image><image>", 2, {"projector_downsample": [2, 3]}, "must be one number for all images, found"),
    "another option": ("<image>", 1, {"do_resize": False}, r"mm_processor_kwargs has \['do_resize'\]"),
    "too long": ("<image>" * 40, 40, {}, "The prompt has 640 tokens, 640 of them of its 40 images"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_request_is_refused_with_a_reason(engine, requests, expected, case):
    text, count, options, reason = REFUSED[case]
    images = {"image": list(requests[0].images) * count} if count else {}
    prompt = {"prompt": text, "multi_modal_data": images, "mm_processor_kwargs": options}
    with pytest.raises(VLLMValidationError, match=reason):
        engine.llm.generate([prompt], use_tqdm=False)
    assert count_equal(engine.answers(requests[:1]), expected[:1]) == 1
