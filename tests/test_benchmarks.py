"""The benchmarks: what they count is right, what they compare does the same, and each runs at a tiny size."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer


pytestmark = pytest.mark.common
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import common, loading, module, prefill, report, serving  # noqa: E402
from lab.evaluate import answer, encode  # noqa: E402
from llava_vr import LlavaVrConfig, LlavaVrForConditionalGeneration  # noqa: E402
from llava_vr.layout_llava_vr import cut_windows  # noqa: E402


CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = {"model_type": "qwen2", "vocab_size": 99, "num_key_value_heads": 2, **SIZES}
TINY = {
    "vision_config": {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 4, **SIZES},
    "text_config": TEXT,
    "image_token_id": 98,
    "remember_hidden_size": 16,
    "remember_num_heads": 2,
}


@pytest.fixture
def run_command(monkeypatch, tmp_path):
    """`run_command(benchmark, scale, *options)`: its JSON and its table, at that scale instead of the small one."""

    def run(benchmark, scale, *options: str) -> tuple[dict, str]:
        monkeypatch.setitem(benchmark.SCALES, "small", scale)
        monkeypatch.setattr(sys, "argv", ["benchmark", "--results", str(tmp_path), *options])
        benchmark.main()
        name = benchmark.__name__.rsplit(".", 1)[1]
        assert benchmark is loading or (tmp_path / "cpu" / f"{name}.png").stat().st_size
        return json.loads((tmp_path / "cpu" / f"{name}.json").read_text()), (
            tmp_path / "cpu" / f"{name}.md"
        ).read_text()

    return run


# ------------------------------------------------------------------------------------------------------ what is shared


@pytest.fixture
def clock(monkeypatch):
    """`clock.wait(seconds)` moves the clock that the benchmarks read."""

    class Clock:
        now = 0.0

        def wait(self, seconds: float):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock.now)
    return clock


def test_calls_take_turns_and_warm_up_uncounted(clock):
    order, waits = [], {"a": itertools.chain([100], itertools.count(1)), "b": itertools.count(10, 10)}

    def call(name):
        order.append(name)
        clock.wait(next(waits[name]))

    seconds = common.interleave({name: lambda name=name: call(name) for name in "ab"}, 3, warmup=1)
    assert "".join(order) == "abbaabba"
    assert seconds == {"a": [1, 2, 3], "b": [20, 30, 40]}


def test_a_short_call_is_measured_several_times_at_once(clock):
    seconds = common.interleave({"a": lambda: clock.wait(0.5)}, 2, each=4)
    assert seconds == {"a": [0.5, 0.5]}


def test_ratios_are_taken_round_by_round():
    compared = common.compare({"ours": [1.0, 2.0, 30.0], "other": [2.0, 4.0, 10.0]})
    assert compared["other"] == {"ms": [4000, 3000, 7000], "ours_over": [0.5, 0.5, 1.75]}
    assert compared["ours"]["ours_over"] == [1, 1, 1]


def test_extra_memory_is_the_peak_and_not_the_sum():
    kept = torch.zeros(1000)

    def call():
        first = torch.empty(3000)  # 12,000 bytes
        del first
        second = torch.empty(2000)  # 8,000
        second = second.add_(kept.sum()).exp()  # and 8,000 more, before the first 8,000 go
        return second[:1000] + kept  # 4,000 more

    call()
    assert 16_000 <= common.extra_memory(call, CPU) <= 16_100  # a sum's own bytes
    assert common.extra_memory(lambda: torch.empty(5, 7, dtype=torch.float64), CPU) == 280
    assert common.extra_memory(kept.exp_, CPU) == 0


def test_operations_of_products_and_attention():
    assert common.count_flops(lambda: torch.ones(3, 5) @ torch.ones(5, 7)) == 2 * 3 * 5 * 7
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 10, 8)
    attention = 2 * 4 * (2 * 6 * 10 * 8 + 2 * 6 * 10 * 8)
    assert common.count_flops(lambda: F.scaled_dot_product_attention(query, key, key)) == attention
    assert common.count_flops(lambda: (query @ key.mT).softmax(-1) @ key) == attention


def test_shards_hold_every_tensor_once(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "SHARD", 100)
    shapes = {"a": torch.Size([4, 8]), "b": torch.Size([10]), "c": torch.Size([40])}
    common.write_shards(shapes, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [{name: tensor.shape for name, tensor in load_file(file).items()} for file in files] == [
        {"a": shapes["a"], "b": shapes["b"]},
        {"c": shapes["c"]},
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 164},
        "weight_map": {"a": files[0].name, "b": files[0].name, "c": files[1].name},
    }


# ---------------------------------------------------------------------------------------------------------- the module


@pytest.fixture(scope="module")
def config():
    return LlavaVrConfig(**TINY)


def test_ours_on_the_grid_is_the_model_s(config):
    """A module over the grid, and the same module called as the model calls it, with windows of raw features."""
    torch.manual_seed(0)
    case = module.make_cases(config, 2, CPU, torch.float32)["ours"]
    (hidden_states, memory), ours = case.inputs, case.module.module
    windows = cut_windows(memory, 2, 4).flatten(0, 1)
    present = cut_windows(torch.ones_like(memory[..., :1]), 2, 4).flatten(0, 1)[..., 0] > 0
    expected, _ = ours(hidden_states, ours(windows), present)
    torch.testing.assert_close(case.forward(), expected, rtol=0, atol=1e-6)


SEEN_FROM_5 = {"ours": 4, "SVA": 4, "SVA layer": 4, "ours, ratio 1": 1, "SVA, ratio 1": 1, "DeepStack": 1, "global": 16}


@pytest.mark.parametrize("name", SEEN_FROM_5)
def test_peers_read_what_they_say(config, name):
    """A patch in the middle is in one region and four windows of twice the side."""
    torch.manual_seed(0)
    case = module.make_cases(config, 1, CPU, torch.float32)[name]
    before = case.forward()
    case.inputs[1][0, 3, 4].normal_()
    assert ((case.forward() - before).abs().amax(-1) > 1e-7).sum() == SEEN_FROM_5[name]


def test_row_sizes_of_the_2b_model():
    sizes = [module.row_sizes(LlavaVrConfig(projector_downsample=s)) for s in (2, 4)]
    assert [size["entries"] for size in sizes] == [16, 64]
    assert [size["bytes"] for size in sizes] == [32 * 2**10 + 2 * 16, 128 * 2**10 + 2 * 64]  # with presence
    assert [size["raw_bytes"] for size in sizes] == [96 * 2**10, 384 * 2**10]


def test_least_bytes_count_each_tensor_once(config):
    case = module.make_cases(config, 1, CPU, torch.float32)["DeepStack addition"]
    assert case.least_bytes == {"forward": 3 * 16 * 32 * 4, "backward": 6 * 16 * 32 * 4}


def test_deviation_from_a_line():
    assert module.deviation([1, 2, 10], [5.0, 7.0, 23.0]) == pytest.approx(0, abs=1e-9)
    assert module.deviation([1, 2, 3], [1.0, 4.0, 9.0]) > 0.1


def test_module_runs(run_command):
    scale = module.Scale(tiles=(1, 2), line=(1, 2, 3), repetitions=2, config=TINY, ceiling=64)
    result, table = run_command(module, scale, "--device", "cpu")
    groups = [(group["tokens"], group["downsample"]) for group in result["groups"]]
    assert groups == [(16, 2), (32, 2), (4, 4), (8, 4)]
    for group in result["groups"]:
        forward, backward = group["forward"], group["backward"]
        assert set(backward) == {*module.TRAINED, "matrix product", "copy"}
        assert backward["ours"]["flops"] > 1.9 * forward["ours"]["flops"]
        for name in ("ours", "SVA"):
            assert forward[f"{name}, ratio 1"]["flops"] < forward[name]["flops"]
    assert result["lines"][0]["tokens"] == [16, 32, 48]
    assert [(row["downsample"], row["ratio"], row["entries"]) for row in result["rows"]] == [
        (2, 1, 4),
        (2, 2, 16),
        (4, 1, 16),
        (4, 2, 64),
    ]
    assert table.count("| ours |") == 8


# ---------------------------------------------------------------------------------------------------- the whole models


@pytest.fixture
def scale(monkeypatch):
    """All models at tiny sizes, on two pictures."""
    low = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, **SIZES}
    high = {"model_type": "sam_vision_model", "image_size": 64, "patch_size": 16, "window_size": 2, **SIZES}
    high |= {"global_attn_indexes": [1, 3], "output_channels": 16, "mlp_dim": 64, "num_pos_feats": 8}
    deepseek = {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": low, "high_res_vision_config": high}
    onevision = {"text_config": TEXT, "vision_config": low, "image_grid_pinpoints": [[32, 32], [64, 64]]}
    tiny = {
        "DeepSeek-VL-7B": {**deepseek, "image_token_id": 98},
        "OneVision-0.5B": {**onevision, "image_token_index": 98},
    }
    monkeypatch.setattr(prefill, "PEERS", {name: (*prefill.PEERS[name][:2], sizes) for name, sizes in tiny.items()})
    return prefill.Scale((1, 5), (2,), (8,), repetitions=2, warmup=1, steps=3, config=TINY, peers=tuple(tiny))


def test_whole_models_run_and_go_on(scale, run_command):
    first, _ = run_command(prefill, scale, "--device", "cpu", "--minutes", "0")
    assert [case["tiles"] for case in first["cases"]] == [1]  # one at least, however short the time
    result, table = run_command(prefill, scale, "--device", "cpu")
    assert result["cases"][0] == first["cases"][0] and len(result["cases"]) == 2
    assert table.count("| uncompressed |") == 2 and result["sharing"] is None
    assert "| 5 | 4 | " in table.split("the number of tokens is the caller's choice")[1]
    one, five = (case["models"] for case in result["cases"])
    assert {name: row["image_tokens"] for name, row in one.items()} == {
        "ours": 16,
        "off": 16,
        "ours, s = 1": 64,
        "ours, s = 4": 4,
        "uncompressed": 64,
        "DeepSeek-VL-7B": 16,
        "OneVision-0.5B": 16 + 4 * 5,
    }
    assert (five["ours"]["image_tokens"], five["uncompressed"]["image_tokens"]) == (16 + 8 * 9, 64 + 16 * 17)
    assert one["ours"]["image_cache_bytes"] == 2 * 16 * 4 * 2 * (2 * 8) * 4  # rows, tokens, layers, both, width, float
    assert one["ours"]["prefill_flops"] > one["off"]["prefill_flops"]
    assert one["ours, s = 1"]["prefill_flops"] > one["uncompressed"]["prefill_flops"]  # it projects its memory
    assert one["ours"]["weights_bytes"] > one["off"]["weights_bytes"] == five["uncompressed"]["weights_bytes"]
    for row in one.values():
        first_token, parts = row["first token"]["ms"], (row["encode"]["ms"], row["prefill"]["ms"])
        assert first_token[0] == pytest.approx(sum(part[0] for part in parts), rel=0.01)  # of two rounds: exact


def test_the_same_backbones_share_their_weights(scale):
    models = prefill.make_models(scale, CPU, torch.float32)
    places = [
        models[name].model.language_model.embed_tokens.weight.data_ptr() for name in ("off", "Llava", "LlavaNext")
    ]
    assert places == 3 * [models["ours"].model.language_model.embed_tokens.weight.data_ptr()]


@torch.no_grad()
def test_prefill_from_recorded_towers_is_the_whole_s(scale):
    for name, model in prefill.make_models(scale, CPU, torch.float32).items():
        run = prefill.Run(model, prefill.pictures(model, 1 if name == "Llava" else 5, 2, 64), 2, 8)
        caches = []
        for call in (run.first_token, run.prefill, run.prefill, run.first_token):
            call()
            caches.append(run.cache.layers[-1].keys)
        assert all(torch.equal(cache, caches[0]) for cache in caches), name
        assert run.calls and not any("forward" in vars(tower) for tower, *_ in run.calls)


@torch.no_grad()
def test_layers_that_share_weights_are_layers(scale):
    shared, separate = (prefill.make_peer("DeepSeek-VL-7B", share, CPU, torch.float32) for share in (True, False))
    decoders = [model.model.language_model for model in (shared, separate)]
    separate.load_state_dict(shared.state_dict())
    assert sum(p.numel() for p in decoders[0].layers.parameters()) * 4 == sum(
        p.numel() for p in decoders[1].layers.parameters()
    )
    caches = []
    for model in (shared, separate):
        run = prefill.Run(model, prefill.pictures(model, 1, 1, 32), 1, 8)
        run.pictures = {key: torch.ones_like(value) for key, value in run.pictures.items()}
        run.first_token()
        run.decode()
        caches.append([layer.keys for layer in run.cache.layers])
    assert len(caches[0]) == 4
    torch.testing.assert_close(caches[0], caches[1])


def test_a_repeated_layer_runs_as_often_as_it_is_there():
    decoder = AutoModel.from_config(
        AutoConfig.for_model(**{**TEXT, "model_type": "llama", "num_hidden_layers": 1})
    ).eval()
    prefill.repeat_layer(decoder, 3)
    with torch.no_grad():
        outputs = decoder(inputs_embeds=torch.randn(1, 5, 32), output_hidden_states=True)
    assert len(outputs.hidden_states) == len(outputs.past_key_values.layers) + 1 == 4


def test_sharing_weights_is_timed_where_it_is_done(scale, run_command):
    scale = replace(scale, tiles=(1,), peers=("DeepSeek-VL-7B",), share_layers=True)
    result, table = run_command(prefill, scale, "--device", "cpu")
    assert set(result["sharing"]) == {"decoder", "layers", "shared", "separate"}
    assert "4 layers of DeepSeek-VL-7B's decoder" in table


def test_results_of_other_settings_are_not_mixed(scale, tmp_path):
    path = tmp_path / "prefill.json"
    common.write_json(path, {**common.head("tiny", CPU, compiled=True), "cases": [], "seconds": 0})
    with pytest.raises(SystemExit, match="other settings"):
        prefill.measure_all(scale, common.head("tiny", CPU, compiled=False), path, CPU, torch.float32, None)


def test_a_model_that_does_not_fit_is_left_out(scale, tmp_path, monkeypatch):
    pictures = prefill.pictures

    def out_of_memory(model, *args):
        if model.config.model_type == "deepseek_vl_hybrid":
            raise torch.OutOfMemoryError
        return pictures(model, *args)

    monkeypatch.setattr(prefill, "pictures", out_of_memory)
    settings = common.head("tiny", CPU, compiled=False)
    result = prefill.measure_all(scale, settings, tmp_path / "prefill.json", CPU, torch.float32, minutes=0)
    assert result["cases"][0]["models"]["DeepSeek-VL-7B"] == {"fits": False}
    assert "do not fit in memory (DeepSeek-VL-7B)" in prefill.tables(result)[0]


@pytest.mark.parametrize(
    "name, billions", [("DeepSeek-VL-7B", (7.1, 7.5)), ("OneVision-0.5B", (0.87, 0.92)), ("OneVision-7B", (7.9, 8.1))]
)
def test_peers_have_their_true_size(name, billions):
    model_class, config_class, sizes = prefill.PEERS[name]
    model = prefill.make(model_class, config_class(**sizes), torch.device("meta"), torch.bfloat16)
    assert billions[0] <= model.num_parameters() / 1e9 <= billions[1]


# -------------------------------------------------------------------------------------------------------------- loading


def test_loading_runs(run_command):
    result, table = run_command(loading, loading.Scale(rounds=2, repetitions=2, config=TINY))
    state = loading.LlavaVrForConditionalGeneration(LlavaVrConfig(**TINY)).state_dict()
    weights = sum(2 * tensor.numel() for tensor in state.values())
    assert weights < result["loading"]["file_bytes"] < 1.5 * weights
    assert result["loading"]["peak_over_file"][0] > 1
    images = result["images"]["ours"]
    assert images["images_a_second"] == pytest.approx(len(loading.SIZES) / images["ms"][0] * 1000, rel=1e-3)
    assert "from_pretrained" in table


# ------------------------------------------------------------------------------------------------------------- serving


def test_chats_ask_everything_of_the_other_loads_pictures():
    cases = serving.chat_loads(16)["chats, SmolLM2-135M"]
    assert [case.turn.question for case in cases] == [*serving.CHATS, *serving.CHATS]
    transcribed = serving.nano_loads(16)["price lists, transcribed"]
    assert [case.image.tobytes() for case in cases] == [case.image.tobytes() for case in transcribed]
    assert len({case.image.tobytes() for case in cases}) == 16


@pytest.fixture(scope="module")
def served_model(tmp_path_factory):
    """A tiny decoder behind the nano checkpoint's tower."""
    tokenizer = AutoTokenizer.from_pretrained(serving.ROOT)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**TEXT, "vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 1})
    decoder = AutoModelForCausalLM.from_config(config)
    return decoder, serving.write_model(decoder, tokenizer, tmp_path_factory.mktemp("served"))


def test_served_model_has_the_decoder_and_the_checkpoint_s_pictures(served_model):
    decoder, folder = served_model
    nano, model = (LlavaVrForConditionalGeneration.from_pretrained(path) for path in (serving.ROOT, folder))
    state = decoder.model.state_dict()
    found = model.model.language_model.state_dict()
    assert state.keys() == found.keys()
    assert all(torch.equal(found[name][: len(value)], value) for name, value in state.items())
    assert model.config.remember_layers == [0, 1, 2]
    cases = serving.chat_loads(2)["chats, SmolLM2-135M"]
    old, new = (
        encode(nano, AutoProcessor.from_pretrained(path, trust_remote_code=True), cases)
        for path in (serving.ROOT, folder)
    )
    assert torch.equal(old["pixel_values"], new["pixel_values"])
    counts = [
        (inputs["input_ids"] == m.config.image_token_id).sum(1).tolist() for inputs, m in ((old, nano), (new, model))
    ]
    assert counts == [[16, 16], [16, 16]]
    assert (new["attention_mask"][:, 0] == 0).any() and new["attention_mask"][:, -1].all()  # padded on the left


@pytest.fixture
def engine(monkeypatch):
    """In vLLM's place: transformers, one request at a time, which gives the first answers as they are in `wrong`."""
    wrong = []

    class LLM:
        def __init__(self, folder, **options):
            self.model = LlavaVrForConditionalGeneration.from_pretrained(folder).eval()
            self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
            self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None))

        def generate(self, prompts, greedy, use_tqdm):
            inputs = [
                self.processor(images=prompt["multi_modal_data"]["image"], text=prompt["prompt"], return_tensors="pt")
                for prompt in prompts
            ]
            texts = [answer(self.model, self.processor, one)[0] for one in inputs]
            texts[: len(wrong)] = wrong
            tokenize = self.processor.tokenizer.encode
            return [
                SimpleNamespace(
                    prompt_token_ids=one["input_ids"][0], outputs=[SimpleNamespace(text=text, token_ids=tokenize(text))]
                )
                for one, text in zip(inputs, texts)
            ]

    vllm = SimpleNamespace(LLM=LLM, SamplingParams=dict, RequestOutput=object)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    return wrong


def test_serving_measures_what_gives_equal_answers(engine):
    loads = {"few": serving.nano_loads(4)["price lists, all types"]}
    found = serving.measure(serving.ROOT, loads, 2, CPU, torch.float32)["few"]
    assert found["equal_answers"] == 4 and set(found["times"]) == {"ours", "generate"}
    lengths = found["answer_tokens"]
    assert 0 < lengths["shortest"] <= lengths["mean"] <= lengths["longest"] < serving.MAX_TOKENS
    assert found["prompt_tokens"] > 16
    assert serving.table({"requests": 4, "loads": {"few": found}}).count("| few |") == 2
    engine.append("something else")
    with pytest.raises(SystemExit, match="few: 3 of 4 answers"):
        serving.measure(serving.ROOT, loads, 2, CPU, torch.float32)


def test_serving_s_figures_in_the_report(tmp_path):
    times = {"generate": {"ours_over": [0.5, 0.4, 0.6]}}
    result = {**common.head("small", CPU), "loads": {"chats, SmolLM2-135M": {"times": times}}, "seconds": 1}
    common.write_json(tmp_path / "cpu" / "serving.json", result)
    figures = report.targets(tmp_path)
    assert "SmolLM2-135M: vLLM, compiled, over `generate` in one batch | 0.769 | 0.5 (0.4 to 0.6), met |" in figures
    assert "price lists, all types: vLLM, compiled, over `generate` in one batch | 0.769 | open |" in figures


# -------------------------------------------------------------------------------------------------------------- report


def test_report_fills_what_was_measured(tmp_path):
    def case(tiles, ratio):
        ours, other = {"image_cache_bytes": 10}, {"image_cache_bytes": 40}
        return {
            "tiles": tiles,
            "models": {
                "ours": ours,
                "off": {**other, **{stage: {"ours_over": [ratio, 0.9, 2.0]} for stage in prefill.STAGES}},
                "uncompressed": {**other, **{stage: {"ours_over": [ratio / 4, 0.1, 0.3]} for stage in prefill.STAGES}},
                "DeepSeek-VL-7B": {"fits": False},
            },
        }

    written = {**common.head("2b", CPU), "cases": [case(1, 1.3), case(5, 1.04), case(10, 2.0)], "seconds": 120}
    common.write_json(tmp_path / "cpu" / "prefill-2b.json", written)
    marks = "".join(f"<!-- {part} -->\nstale\n<!-- end of {part} -->\n" for part in ("commands", "targets", "machines"))
    text = report.fill(f"before\n{marks}after\n", tmp_path)
    assert text.startswith("before") and text.endswith("after\n") and "stale" not in text
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("|")}
    assert "| 1.05 | 1.3 (0.9 to 2), not met | open |" in rows["2B, prefill with four modules over none, 1 tile"]
    assert "| 1.05 | 1.04 (0.9 to 2), met | open |" in rows["2B, prefill with four modules over none, 5 tiles"]
    assert "|  | open | " in rows["2B, prefill with four modules over none, compiled"].replace("1.05", "")
    backbones = "the same backbones uncompressed"
    assert "|  | 0.325 (0.1 to 0.3) | open |" in rows[f"2B, first token over {backbones}, 1 tile"]
    assert "| 0.5 | 0.26 (0.1 to 0.3), met | open |" in rows[f"2B, first token over {backbones}, 5 tiles"]
    assert "| 0.25, met | open |" in rows["2B, image's part of the cache over the same uncompressed, 5 tiles"]
    assert "--device cuda" in rows["2B, first token over DeepSeek-VL-7B, 1 tile"]
    assert "--scale 2b`" in rows["2B, first token over DeepSeek-VL-7B, 5 tiles"]
    assert "2 min (CPU, 2b)" in rows["`python -m benchmarks.prefill --scale 2b`"]
    assert report.fill(text, tmp_path) == text


def test_report_needs_its_marks(tmp_path):
    with pytest.raises(SystemExit, match="commands"):
        report.fill("nothing", tmp_path)
