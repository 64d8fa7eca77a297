"""The benchmarks: what they count is right, what they compare does the same, and each runs at a tiny size."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file


sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import common, loading, module, prefill, report  # noqa: E402
from llava_vr import LlavaVrConfig  # noqa: E402
from llava_vr.modeling_llava_vr import VisionRemember  # noqa: E402


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


@pytest.mark.parametrize("fused", [True, False])
def test_global_attention_under_the_mask_is_ours(config, fused):
    torch.manual_seed(0)
    ours, other = VisionRemember(config), module.GlobalAttention(config, fused)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.zeros_(ours.window_bias)
    for name, parameter in ours.named_parameters():
        if "memory_norm" in name:
            torch.nn.init.constant_(parameter, float("weight" in name))
    other.load_state_dict(ours.state_dict(), strict=False)
    cases = module.make_cases(config, 2, CPU, torch.float32)
    hidden_states, memory, valid = cases["ours"].inputs
    memory = F.layer_norm(memory.unflatten(-1, (3, 32)), (32,)).flatten(-2)  # normed already
    mask = cases["global (fused)"].inputs[2]
    expected, _ = ours(hidden_states, memory, valid)
    torch.testing.assert_close(other(hidden_states, memory, mask), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["SVA", "SVA layer", "DeepStack"])
def test_peers_read_only_their_own_window(config, name):
    case = module.make_cases(config, 1, CPU, torch.float32)[name]
    before = module.update(case.forward()).clone()
    case.inputs[1][5, 2].normal_()
    changed = (module.update(case.forward()) != before).any(-1)
    assert changed.nonzero().flatten().tolist() == [5]


def test_least_bytes_count_each_tensor_once(config):
    case = module.make_cases(config, 1, CPU, torch.float32)["DeepStack addition"]
    assert case.least_bytes == {"forward": 3 * 16 * 32 * 4, "backward": 6 * 16 * 32 * 4}


def test_deviation_from_a_line():
    assert module.deviation([1, 2, 10], [5.0, 7.0, 23.0]) == pytest.approx(0, abs=1e-9)
    assert module.deviation([1, 2, 3], [1.0, 4.0, 9.0]) > 0.1


def test_module_runs(run_command):
    scale = module.Scale(tiles=(1, 2), line=(1, 2, 3), repetitions=2, config=TINY, ceiling=64)
    result, table = run_command(module, scale, "--device", "cpu")
    assert [(group["tokens"], group["window"]) for group in result["groups"]] == [(16, 4), (32, 4), (4, 16), (8, 16)]
    for group in result["groups"]:
        forward, backward = group["forward"], group["backward"]
        assert set(backward) == {*module.TRAINED, "matrix product", "copy"}
        assert backward["ours"]["flops"] > 1.9 * forward["ours"]["flops"]
        assert forward["global (eager)"]["extra_bytes"] > forward["global (fused)"]["extra_bytes"]
        assert forward["global (eager)"]["flops"] == forward["global (fused)"]["flops"]
    assert result["lines"][0]["tokens"] == [16, 32, 48]
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
    return prefill.Scale((1, 5), (2,), (8,), repetitions=2, steps=3, config=TINY, peers=tuple(tiny))


def test_whole_models_run_and_go_on(scale, run_command):
    first, _ = run_command(prefill, scale, "--device", "cpu", "--minutes", "0")
    assert [case["tiles"] for case in first["cases"]] == [1]  # one at least, however short the time
    result, table = run_command(prefill, scale, "--device", "cpu")
    assert result["cases"][0] == first["cases"][0] and len(result["cases"]) == 2
    assert table.count("| uncompressed |") == 2
    one, five = (case["models"] for case in result["cases"])
    assert {name: row["image_tokens"] for name, row in one.items()} == {
        "ours": 16,
        "off": 16,
        "uncompressed": 64,
        "DeepSeek-VL-7B": 16,
        "OneVision-0.5B": 16 + 4 * 5,
    }
    assert (five["ours"]["image_tokens"], five["uncompressed"]["image_tokens"]) == (16 + 8 * 9, 64 + 16 * 17)
    assert one["ours"]["image_cache_bytes"] == 2 * 16 * 4 * 2 * (2 * 8) * 4  # rows, tokens, layers, both, width, float
    assert one["ours"]["prefill_flops"] > one["off"]["prefill_flops"]
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


# -------------------------------------------------------------------------------------------------- loading and report


def test_loading_runs(run_command):
    result, table = run_command(loading, loading.Scale(rounds=2, repetitions=2, config=TINY))
    state = loading.LlavaVrForConditionalGeneration(LlavaVrConfig(**TINY)).state_dict()
    weights = sum(2 * tensor.numel() for tensor in state.values())
    assert weights < result["loading"]["file_bytes"] < 1.5 * weights
    assert result["loading"]["peak_over_file"][0] > 1
    images = result["images"]["ours"]
    assert images["images_a_second"] == pytest.approx(len(loading.SIZES) / images["ms"][0] * 1000, rel=1e-3)
    assert "from_pretrained" in table


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

    written = {**common.head("full", CPU), "cases": [case(5, 1.05), case(10, 1.3)], "seconds": 120}
    common.write_json(tmp_path / "cpu" / "prefill.json", written)
    marks = "".join(f"<!-- {part} -->\nstale\n<!-- end of {part} -->\n" for part in ("commands", "bars", "machines"))
    text = report.fill(f"before\n{marks}after\n", tmp_path)
    assert text.startswith("before") and text.endswith("after\n") and "stale" not in text
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("|")}
    assert "| 1.12 | 1.3 (0.9 to 2), missed | open |" in rows["prefill with four modules over none, eager"]
    for stage in ("prefill", "first token"):
        assert "0.263 (0.1 to 0.3), holds" in rows[f"{stage} over the same backbones uncompressed, 5 tiles"]
    assert "| 0.25, holds | open |" in rows["image's part of the cache over the same uncompressed, 5 tiles"]
    assert "--device cuda" in rows["first token over DeepSeek-VL-7B"]
    assert "2 min (CPU, full)" in rows["`python -m benchmarks.prefill`"]
    assert report.fill(text, tmp_path) == text


def test_report_needs_its_marks(tmp_path):
    with pytest.raises(SystemExit, match="commands"):
        report.fill("nothing", tmp_path)
