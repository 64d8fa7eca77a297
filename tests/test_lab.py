"""The lab: what is drawn is what is asked, the baselines are what they say, training resumes, differences are right."""

import json
import sys
import time
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel


pytestmark = pytest.mark.common
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lab import distill, export_nano, run_experiments  # noqa: E402
from lab.baselines import MODULES, FastV, GlobalCrossAttention, SvaLayer  # noqa: E402
from lab.data import charts, ocr, receipts, shapes, tables  # noqa: E402
from lab.data.dense_labels import CANVAS, COLOURS, LABEL_TYPES, PLANES, Labels  # noqa: E402
from lab.data.drawing import FONTS, HELD_OUT_FONTS, Canvas, Turn, generator  # noqa: E402
from lab.data.samples import DOMAINS, SHARES, draw_dialogue, draw_sample  # noqa: E402
from lab.evaluate import (  # noqa: E402
    Case,
    answer,
    attention_on_vision,
    characters_right,
    draw_cases,
    edit_distance,
    encode,
    exact_match,
    measure,
)
from lab.experiments import (  # noqa: E402
    ALL_EXPERIMENTS,
    BASELINES,
    LONG_SCHEDULE,
    NANO,
    REFERENCE,
    UNCOMPRESSED,
    UNCOMPRESSED_RETRAINED,
    Experiment,
    make_config,
    make_model,
)
from lab.flops import added_cost  # noqa: E402
from lab.nano import make_processor  # noqa: E402
from lab.report import (  # noqa: E402
    Score,
    compression_targets,
    difference,
    gain_table,
    gains,
    kept_answers,
    load,
    section_distill,
    section_from_nano,
    share,
    targets_table,
)
from lab.run_experiments import jobs  # noqa: E402
from lab.tower import LabelledPictures, ReadingTower, patch_labels  # noqa: E402
from lab.train_vlm import Dialogues, draw_turns, processor_of, start_of, training_of  # noqa: E402
from lab.training import train  # noqa: E402
from llava_vr import LlavaVrCollator, LlavaVrConfig, LlavaVrForConditionalGeneration  # noqa: E402
from llava_vr.training.distillation import DistillationCollator  # noqa: E402


@pytest.fixture(scope="module")
def processors():
    texts = ["What is the value of a?", "there is no tea"] * 50
    return {s: make_processor(texts, s) for s in (1, 4)}


@pytest.fixture(scope="module")
def tower() -> CLIPVisionModel:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=2,
        image_size=CANVAS,
        patch_size=8,
    )
    return CLIPVisionModel(config)


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)
@pytest.mark.parametrize("held_out", [False, True])
def test_picture_follows_from_seed_and_index(domain, held_out):
    first, again, other = (domain.draw(generator(3, index), held_out) for index in (5, 5, 6))
    assert first.facts == again.facts and first.image.tobytes() == again.image.tobytes()
    assert first.image.tobytes() != other.image.tobytes()


def test_held_out_fonts_are_never_drawn_in_training():
    assert not set(FONTS) & set(HELD_OUT_FONTS)


def cells(domain, facts) -> set[tuple]:
    """The (line, place, name, column, number) that must be named somewhere on a picture of these facts."""
    if domain is receipts:
        return {(n, place, row.item, None, row.price) for n, row in enumerate(facts, 1) for place in (1, 2)}
    if domain is charts:
        named = {(None, n, name, None, v) for n, (name, v) in enumerate(zip(facts.names, facts.values), 1)}
        return named | {(None, 1, None, None, None)}  # of the axis
    if domain is tables:
        named = {(1, place, None, letter, None) for place, letter in enumerate(facts.columns, 2)}
        for line, (name, values) in enumerate(zip(facts.rows, facts.numbers), 2):
            named.add((line, 1, name, None, None))
            places = enumerate(zip(facts.columns, values), 2)
            named |= {(line, place, name, letter, value) for place, (letter, value) in places}
        return named
    if domain is shapes:
        return {(None,) * 5}
    return {(n, place + 1, None, None, None) for n, line in enumerate(facts, 1) for place in range(len(line))}


def glyphs(domain, facts) -> set[str]:
    """The glyphs that must lie somewhere on a picture of these facts."""
    if domain is shapes:
        return {f"{shape.colour} {shape.name}" for shape in facts}
    if domain is charts:
        return {*facts.names, "0", "9"} | {f"value {value}" for value in facts.values}
    if domain is tables:
        return set("".join((*facts.rows, *facts.columns, *(str(n) for line in facts.numbers for n in line))))
    if domain is receipts:
        return set("".join(f"{row.item}{row.price}" for row in facts))
    return set("".join(facts))


def named(labels: Labels) -> dict[str, np.ndarray]:
    """The maps with what their numbers stand for, None where there is nothing."""
    return {name: np.array([None, *values], object)[labels.maps[PLANES[name]]] for name, values in LABEL_TYPES.items()}


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)
def test_labels_name_what_the_facts_say(domain):
    for index in range(20):
        picture = domain.draw(generator(4, index), held_out=index % 2 == 1)
        maps = named(picture.labels)
        is_marked = picture.labels.maps[PLANES["glyph"]] > 0
        assert set(maps["glyph"][is_marked]) == glyphs(domain, picture.facts)
        tens = np.ndenumerate(maps["tens"])
        number = [None if ten is None else 10 * ten + maps["ones"][place] for place, ten in tens]
        planes = [maps[name] for name in ("line", "place", "name", "column")]
        planes.append(np.array(number, object).reshape(is_marked.shape))
        assert set(zip(*(plane[is_marked] for plane in planes))) == cells(domain, picture.facts)
        patches = patch_labels(picture, 12)
        for name, plane in PLANES.items():
            assert set(np.unique(patches[name])) <= set(np.unique(picture.labels.maps[plane])) | {0}


def test_labels_lie_where_the_ink_is():
    picture = shapes.draw(generator(0, 1))
    maps, pixels = named(picture.labels)["glyph"], np.asarray(picture.image).astype(int)
    for shape in picture.facts:
        y, x = np.argwhere(maps == f"{shape.colour} {shape.name}").mean(0) * picture.image.width / CANVAS
        assert np.abs(pixels[round(y), round(x)] - np.array(COLOURS[shape.colour])).max() < 60  # noise included


def test_slanted_letters_stay_above_their_labels():
    def centre(slant: float) -> np.ndarray:
        canvas = Canvas(generator(0, 0), held_out=True)
        canvas.slant = slant
        canvas.text(20, 40, "mama")
        ink = np.abs(np.asarray(canvas.image).astype(int) - canvas.paper).sum(-1)
        return np.argwhere(ink > 0).mean(0) / canvas.scale

    assert centre(0.3) == pytest.approx(centre(0), abs=1)


def test_labels_turn_with_the_picture():
    labels = Labels()
    labels.mark(70, 46, 74, 50, glyph="a", number=42)  # right of the middle
    labels.turn(90)
    maps = named(labels)
    assert np.argwhere(maps["glyph"] == "a").mean(0) == pytest.approx([23.5, 47.5], abs=1)  # above it
    assert set(maps["tens"][maps["glyph"] == "a"]) == {4} and set(maps["ones"][maps["glyph"] == "a"]) == {2}


def assert_selected(turn: Turn, lines: dict[str, str]):
    """The answer has the lines of the names in the question, in its order."""
    names = [word.strip(",.") for word in turn.question.split() if word.strip(",.") in lines]
    assert names and turn.answer == "\n".join(lines[name] for name in names)


def test_answers_about_charts_and_tables_agree_with_their_transcriptions():
    for index in range(60):
        rng = generator(8, index)
        chart = charts.draw(rng).facts
        values = dict(line.split() for line in charts.ask(rng, chart, "transcribe").answer.splitlines())
        values = {name: int(value) for name, value in values.items()}
        assert charts.ask(rng, chart, "highest").answer == max(values, key=values.get)
        turn = charts.ask(rng, chart, "select")
        assert_selected(turn, {name: f"{name} {value}" for name, value in values.items()})
        turn = charts.ask(rng, chart, "above")
        limit = int("".join(filter(str.isdigit, turn.question)))
        assert int(turn.answer) == sum(value > limit for value in values.values())
        turn = charts.ask(rng, chart, "compare")
        pair = [word.strip(",?") for word in turn.question.split() if word.strip(",?") in values]
        assert turn.answer == max(pair, key=values.get)

        table = tables.draw(rng).facts
        head, *lines = [line.split() for line in tables.ask(rng, table, "transcribe").answer.splitlines()]
        cells = {(name, column): number for name, *numbers in lines for column, number in zip(head, numbers)}
        turn = tables.ask(rng, table, "select")
        assert_selected(turn, {name: " ".join((name, *numbers)) for name, *numbers in lines})
        turn = tables.ask(rng, table, "cell")
        words = [word.strip(",?") for word in turn.question.split()]
        assert turn.answer in {n for (row, column), n in cells.items() if row in words and column in words}
        turn = tables.ask(rng, table, "largest")
        columns = {word.strip("?") for word in turn.question.split()} & set(head)
        largest = {max((int(n), row) for (row, c), n in cells.items() if c == column)[1] for column in columns}
        assert turn.answer in largest

        lines = ocr.draw(rng).facts
        rows = receipts.draw(rng).facts
        turn = receipts.ask(rng, rows, "select")
        assert_selected(turn, {row.item: f"{row.item} {row.price}" for row in rows})

        turn = ocr.ask(rng, lines, "line")
        assert turn.answer == lines[int("".join(filter(str.isdigit, turn.question))) - 1]


def test_dialogue_transcribes_once_and_never_repeats_a_question():
    for index in range(50):
        rng, domain, picture = draw_sample(1, index)
        turns = draw_dialogue(rng, domain, picture)
        assert len(set(turns)) == len(turns)
        assert [turn.question_type for turn in turns].count("transcribe") == ("transcribe" in domain.QUESTION_TYPES)


@pytest.mark.parametrize("experiment", BASELINES, ids=lambda experiment: experiment.name)
def test_baselines_cost_what_ours_costs(experiment, tower, processors):
    tokenizer = processors[4].tokenizer
    ours, theirs = (added_cost(make_model(e, tower, tokenizer, 0)) for e in (REFERENCE, experiment))
    for figure in ("parameters", "flops"):
        assert 0.9 <= theirs[figure] / ours[figure] <= 1.1
    assert theirs["tokens"] == ours["tokens"] == 9


def test_a_larger_window_costs_no_projection(tower, processors):
    ours, wider = (
        added_cost(make_model(replace(REFERENCE, ratio=ratio), tower, processors[4].tokenizer, 0))
        for ratio in (1.0, 2.0)
    )
    products = 9 * 3 * 4 * 128  # with each entry of a window: tokens, modules, two products of multiply-adds, width
    assert wider["flops"] - ours["flops"] == products * (64 - 16)
    assert wider["parameters"] == ours["parameters"]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_adds_nothing_until_it_is_trained_and_can_be_trained(name, tower, processors):
    model = make_model(Experiment("avg_pool", 4, name), tower, processors[4].tokenizer, 0)
    module = model.model.vision_remember["0"]
    hidden_states, present = torch.randn(18, 192), torch.ones(18, 16, dtype=torch.bool)
    present[17] = False
    update, _ = module(hidden_states, module(torch.randn(18, 16, 384)), present)
    assert update.eq(0).all()
    (update - torch.randn_like(update)).square().sum().backward()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", [*MODULES, "sva layer"])
def test_what_a_token_of_each_module_sees(name, tower, processors):
    module = {**MODULES, "sva layer": SvaLayer}[name](make_config(REFERENCE, tower, processors[4].tokenizer))
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    hidden_states, memory = torch.randn(18, 192), torch.randn(18, 16, 384)  # two images
    present = torch.ones(18, 16, dtype=torch.bool)
    present[17] = present[4, 8:] = False

    def update() -> torch.Tensor:
        return module(hidden_states, module(memory), present)[0]

    before = update()
    memory[4, 8:], memory[17] = torch.randn(8, 384), torch.randn(16, 384)
    torch.testing.assert_close(update(), before, rtol=0, atol=1e-5)  # what is absent is not read
    memory[4, 7] = torch.randn(384)
    after = update()
    changed = (before - after).abs().amax(-1) > 1e-5
    seeing = range(9) if name == "global" else [4]
    assert changed.nonzero().flatten().tolist() == list(seeing)
    assert after[17].eq(0).all()


def test_global_attention_refuses_windows_that_overlap(tower, processors):
    config = make_config(replace(REFERENCE, ratio=2.0), tower, processors[4].tokenizer)
    with pytest.raises(ValueError, match="remember_window_ratio must be 1.0"):
        GlobalCrossAttention(config)


@pytest.mark.parametrize("experiment", [UNCOMPRESSED, *ALL_EXPERIMENTS], ids=lambda experiment: experiment.name)
def test_every_experiment_can_be_trained(experiment, tower, processors):
    model = make_model(experiment, tower, processors[1].tokenizer, 0)
    tokens = model.config.image_layout.num_tokens(None, experiment.downsample)
    ids = torch.tensor([[7, *[model.config.image_token_id] * tokens, 8, 9]])
    model(input_ids=ids, pixel_values=torch.randn(1, 3, CANVAS, CANVAS), labels=ids).loss.backward()
    for part in (model.model.multi_modal_projector, *model.model.vision_remember.values()):
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in part.parameters())


@pytest.fixture(scope="module")
def uncompressed(tower, processors):
    return make_model(UNCOMPRESSED, tower, processors[1].tokenizer, 0).eval()


@pytest.fixture(scope="module")
def chats(uncompressed, processors):
    return encode(uncompressed, processors[1], list(draw_cases(1, 1, False, ("ocr", "chart"))))


def test_fastv_that_keeps_all_changes_nothing(uncompressed, processors, chats):
    is_vision = chats["input_ids"] == uncompressed.config.image_token_id
    plain = uncompressed.generate(**chats, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    with FastV(uncompressed.model.language_model.layers, is_vision, keep=144):
        assert torch.equal(uncompressed.generate(**chats, max_new_tokens=5, min_new_tokens=5, do_sample=False), plain)
    assert answer(uncompressed, processors[1], chats)  # its hooks are gone


@torch.inference_mode()
def test_fastv_hides_all_but_the_kept_tokens_from_later_layers(uncompressed, chats):
    is_vision, layers = (
        chats["input_ids"] == uncompressed.config.image_token_id,
        uncompressed.model.language_model.layers,
    )

    def last_logits(pruned: FastV | None, disturb: bool) -> torch.Tensor:
        def noise(layer, args, output):
            return output + disturb * 3 * dropped[..., None]

        hook = layers[1].register_forward_hook(noise)
        logits = uncompressed(**chats, use_cache=False).logits[:, -1]
        hook.remove()
        return logits

    dropped = torch.zeros_like(is_vision)
    with FastV(layers, is_vision, keep=9) as pruned:
        last_logits(pruned, False)
        dropped = pruned.dropped
        assert dropped.sum(1).tolist() == [144 - 9] * len(dropped)
        torch.testing.assert_close(last_logits(pruned, True), last_logits(pruned, False), rtol=0, atol=1e-5)
    assert (last_logits(None, True) - last_logits(None, False)).abs().max() > 1e-3


def test_attention_on_vision_is_a_share(uncompressed, processors):
    shares = attention_on_vision(uncompressed, processors[1], list(draw_cases(1, 1, False, ("table",))))
    assert len(shares) == 5 and all(0 < share < 1 for share in shares)


def test_dialogues_take_the_choices_of_s_in_turn(tower):
    processor = make_processor(["What is the value of a?"] * 50, 4, (2, 4))
    data = Dialogues(processor, partial(draw_turns, shares=SHARES), 2)
    model = make_model(Experiment("avg_pool", 4, "ours", choices=(2, 4)), tower, processor.tokenizer, 0)
    image, batch = model.config.image_token_id, data.collate([data[0], data[1]])
    assert batch["image_downsamples"].tolist() == [2, 4]
    assert (batch["input_ids"] == image).sum(1).tolist() == [36, 9]
    assert (batch["labels"] == image).sum() == 0 and model(**batch).loss.isfinite()


def test_interrupted_training_ends_where_the_uninterrupted_does(tower, tmp_path):
    def fresh():
        torch.manual_seed(0)
        return ReadingTower(deepcopy(tower), [4, 6])

    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    data, whole, first, second = LabelledPictures(1, 6, 12), fresh(), fresh(), fresh()
    assert train(whole, data, tmp_path / "whole", settings, 0) is not None
    assert train(first, data, tmp_path / "parts", settings, 0, deadline=time.monotonic()) is None
    log = train(second, data, tmp_path / "parts", settings, 0)
    assert log[0]["step"] == 1 and all(entry["seconds"] >= 0 for entry in log)  # the first part's time counts, too
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], weight, rtol=0, atol=1e-6)
        assert "glyphs" not in name or not torch.equal(first.state_dict()[name], weight)


def test_nano_checkpoint_is_the_nano_experiment():
    stored, processor = LlavaVrConfig.from_pretrained(ROOT), make_processor(("tea",), NANO.downsample, NANO.choices)
    built = make_config(NANO, CLIPVisionModel(stored.vision_config), processor.tokenizer)
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    assert all(getattr(built.text_config, name) == getattr(stored.text_config, name) for name in same)
    own = [name for name in built.to_dict() if name.startswith(("remember", "projector", "vision_feature"))]
    own += ["image_merge_type", "image_aspect_ratio"]
    assert {name: getattr(built, name) for name in own} == {name: getattr(stored, name) for name in own}
    assert processor.projector_downsample_choices == built.projector_downsample_choices == [2, 3, 4]


def test_an_exported_folder_leaves_lengths_and_caching_to_its_caller(uncompressed, processors, tmp_path):
    model = deepcopy(uncompressed)
    model.config.use_cache = False  # as Trainer leaves it
    export_nano.save(model.bfloat16(), processors[1], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert LlavaVrForConditionalGeneration.from_pretrained(tmp_path).dtype == torch.float32
    assert "use_cache" not in config and set(config["auto_map"]) >= {"AutoConfig", "AutoModel"}
    assert not {"max_length", "max_new_tokens"} & json.loads((tmp_path / "generation_config.json").read_text()).keys()


def test_the_uncompressed_model_is_trained_first_and_then_what_is_asked_for():
    assert [experiment.name for experiment, _ in jobs("cpu")] == [
        "uncompressed",
        "avg_pool-16-none",
        "avg_pool-16-ours",
        "tokenpacker-16-none",
        "tokenpacker-16-ours",
    ]
    assert jobs("cpu", ["avg_pool-16-sva"]) == [(UNCOMPRESSED, 11), (Experiment("avg_pool", 4, "sva"), 21)]
    assert len(jobs("gpu")) == len(set(jobs("gpu")))
    names = [f"avg_pool-16-{module}-long_schedule" for module in ("none", "ours")]
    assert [experiment.name for experiment, _ in jobs("cpu", names)] == ["uncompressed", *names]
    assert [experiment.name for experiment, _ in jobs("cpu", names, from_nano=True)] == names


def test_what_is_missing_and_what_it_starts_from_are_trained(tmp_path, monkeypatch, capsys):
    experiment, trained = Experiment("avg_pool", 4, "sva"), []

    def tower_of(scale, folder, deadline):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.json").write_text("{}")
        return True

    def time_is_up(experiment, *_):
        trained.append(experiment)

    monkeypatch.setattr(run_experiments, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run_experiments, "train_tower", tower_of)
    monkeypatch.setattr(run_experiments, "train_experiment", time_is_up)
    monkeypatch.setattr(sys, "argv", ["", "--runs", str(tmp_path / "runs"), "--experiments", experiment.name])
    results = tmp_path / "results" / "cpu"
    results.mkdir(parents=True)
    (results / "uncompressed-11.json").write_text("{}")
    run_experiments.main()
    assert trained == [UNCOMPRESSED]  # its result is there, its weights are not
    weights = tmp_path / "runs" / "cpu" / "uncompressed-11" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    run_experiments.main()
    assert trained == [UNCOMPRESSED, experiment]
    (results / f"{experiment.name}-21.json").write_text("{}")
    monkeypatch.setattr(run_experiments, "train_tower", None)
    run_experiments.main()
    assert trained == [UNCOMPRESSED, experiment] and capsys.readouterr().out.endswith("every result is there\n")


def test_models_from_nano_start_with_its_tower_and_decoder_and_all_else_new(tmp_path):
    tower, decoder = start_of(REFERENCE, tmp_path, from_nano=True)
    weights = make_model(REFERENCE, tower, processor_of(REFERENCE).tokenizer, 0, decoder).state_dict()
    for name, weight in load_file(ROOT / "model.safetensors").items():
        starts_there = name.startswith(("model.vision_tower.", "model.language_model."))
        assert torch.equal(weights[name], weight) == starts_there, name


def test_models_from_nano_are_compared_with_each_other(tmp_path, monkeypatch):
    """Results of today, and those of earlier code under the names of today; also of a module that is gone."""
    monkeypatch.setattr("lab.report.RESULTS", tmp_path)
    common = {"tokens": 9, "parameters": 1, "train_seconds": 60, "test_seconds": 0, "start_sha256": "0123456789abcdef"}
    common |= dict.fromkeys(("device", "python", "torch", "transformers"), "any")
    folder = tmp_path / "cpu-from-nano"
    folder.mkdir()
    for name, right in (("ours", "1110"), ("ours-window8-shared2", "1111"), ("no_bias", "1100")):
        answers = {style: dict.fromkeys(DOMAINS, {"line": right}) for style in ("seen", "held out")}
        named = {"experiment": f"avg_pool-16-{name}", "flops": 1}
        if name != "ours":
            named = {"arm": f"avg_pool-16-{name}", "operations": 1}
        (folder / f"avg_pool-16-{name}-21.json").write_text(json.dumps({"right": answers, **named, **common}))
    lines = "\n".join(section_from_nano("cpu"))
    assert "sha256 0123456789ab. " in lines and "Cost: 3 minutes for 3 models" in lines
    assert lines.count("| avg_pool-16-ours-ratio2-key_value_heads2 | -25.0 [") == 2  # of training, and held out
    assert lines.count("| avg_pool-16-no_bias | +25.0 [") == 2


def test_stored_results_have_the_names_of_experiments():
    names = {experiment.name for experiment in (UNCOMPRESSED, *ALL_EXPERIMENTS)} | {"fastv-9", "fastv-36"}
    assert set(load("cpu")) <= names and set(load("cpu-from-nano")) - names == {"avg_pool-16-no_bias"}


def test_a_long_schedule_is_more_steps_and_nothing_else():
    for experiment in LONG_SCHEDULE:
        (settings, shares), (once, same) = (
            training_of(e, "cpu") for e in (experiment, replace(experiment, schedule="default"))
        )
        assert settings == once | {"max_steps": 3 * once["max_steps"]} and shares == same


def test_exact_match_and_difference_count_by_hand():
    right = {"ocr": {"transcribe": "1100", "line": "1111"}}
    assert exact_match(right) == {"ocr": {"transcribe": 0.5, "line": 1.0, "all": 0.75}}

    def score(*texts: str) -> Score:
        return Score([{"right": {"seen": {"ocr": {"line": text}}}} for text in texts])

    assert difference(score("1111"), score("0000"), ("ocr",), "seen") == (100, 100, 100)
    assert difference(score("1010", "1010"), score("1010"), ("ocr",), "seen") == (0, 0, 0)
    gain, low, high = difference(score("1" * 60 + "0" * 40), score("1" * 40 + "0" * 60), ("ocr",), "seen")
    assert gain == pytest.approx(20)
    assert low == pytest.approx(20 - 1.96 * 4, abs=1.5) and high == pytest.approx(20 + 1.96 * 4, abs=1.5)


def scored(right: int) -> Score:
    """Right in this many of 20 pictures of each domain."""
    return Score([{"right": {"seen": dict.fromkeys(DOMAINS, {"line": "1" * right + "0" * (20 - right)})}}])


@pytest.mark.parametrize(
    "said, meant, edits", [("", "", 0), ("tea", "", 3), ("", "tea", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)]
)
def test_edit_distance_counts_by_hand(said, meant, edits):
    assert edit_distance(said, meant) == edit_distance(meant, said) == edits


def test_an_answer_may_begin_with_what_was_asked_about(monkeypatch):
    monkeypatch.setattr("lab.evaluate.encode", lambda model, processor, cases, downsample: cases)
    said = {"4.20": "1", "Tea 4.20": "1", "tea 4.20": "0", "Tea": "0", "Tea 4.2": "0", "4.20 Tea": "0"}
    cases = [Case("receipt", None, Turn("price", text, "4.20", "Tea")) for text in said]
    right, misses = measure(
        None, None, cases, answer=lambda model, processor, inputs: [c.turn.question for c in inputs]
    )
    assert right == {"receipt": {"price": "".join(said.values())}}
    assert [text for _, text in misses] == [text for text, is_right in said.items() if is_right == "0"]


def test_characters_right_are_those_of_transcriptions():
    def case(domain, question_type, answer):
        return Case(domain, None, Turn(question_type, "", answer))

    wrong, lookup = case("ocr", "transcribe", "tea 42"), case("ocr", "line", "tea")
    cases = [wrong, case("ocr", "transcribe", "milk"), lookup, case("shapes", "count", "2")]
    assert characters_right(cases, [(wrong, "ten 4"), (lookup, "x")]) == {"ocr": pytest.approx(1 - 2 / 10)}


def test_targets_are_met_or_not():
    scores = {"uncompressed": scored(20), "avg_pool-16-none": scored(10), REFERENCE.name: scored(16)}
    scores["avg_pool-16-sva"] = scored(18)
    rows = targets_table(scores, gains(scores, "seen"), "seen")[2:]
    verdicts = {line.split(" | ")[0][2:]: line.split(" | ")[2:] for line in rows}
    assert {what: (float(found), verdict.strip(" |")) for what, (found, verdict) in verdicts.items()} == {
        "exact match of uncompressed": (100, "met"),
        "avg_pool, 16:1: gain": (30, "met"),
        "avg_pool, 16:1: lower end of the gain's interval": (pytest.approx(20, abs=6), "met"),
        "avg_pool, 16:1: gain beyond that on shapes": (0, "not met"),
        "avg_pool, 16:1: of the gap to uncompressed": (60, "met"),
        "ahead of avg_pool-16-sva": (-10, "not met"),
    }


def test_models_of_a_long_schedule_are_compared_with_each_other():
    scores = {
        name: scored(right) for name, right in zip(["uncompressed", "avg_pool-16-none", REFERENCE.name], (20, 0, 0))
    }
    scores |= {experiment.name: scored(right) for experiment, right in zip(LONG_SCHEDULE, (10, 14))}
    gained = gains(scores, "seen")
    assert {gain.pair: (gain.reading[0], gain.closed) for gain in gained.values()} == {
        "avg_pool, 16:1": (0, {"uncompressed": 0}),
        "avg_pool, 16:1, long_schedule": (20, {"uncompressed": 40}),
    }


def test_the_gap_is_told_to_each_uncompressed_model_that_is_ahead():
    names = [UNCOMPRESSED_RETRAINED.name, "uncompressed", "avg_pool-16-none", REFERENCE.name]
    gained = gains({name: scored(right) for name, right in zip(names, (18, 10, 10, 12))}, "seen")
    assert gained[REFERENCE].closed == {"uncompressed, retrained": pytest.approx(25)}
    assert gain_table(gained)[0].endswith("| gain on shapes | of the gap to uncompressed, retrained |")
    assert gain_table(gained)[2].endswith("| 25% |")


def test_the_uncompressed_model_is_retrained_as_the_compressed_ones_are():
    assert UNCOMPRESSED_RETRAINED.name != "uncompressed"
    assert training_of(UNCOMPRESSED_RETRAINED, "cpu") == training_of(REFERENCE, "cpu")


# ----------------------------------------------------------------------------------------- compression without labels


@pytest.fixture(scope="module")
def source():
    """The nano checkpoint made uncompressed, and not trained on."""
    fields = {"projector_type": "mlp", "projector_downsample": 1, "projector_downsample_choices": None}
    fields |= {"projector_kwargs": None, "remember_layers": []}
    return distill.derive(LlavaVrForConditionalGeneration.from_pretrained(ROOT), **fields)


def test_compressed_model_is_its_source_at_1(source):
    model, other = (distill.compress(source, (2, 4), seed) for seed in (1, 2))
    assert distill.equal_at_1(model, source) and distill.equal_at_1(other, source)
    before, after = model.state_dict(), other.state_dict()
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert differing and all("vision_remember" in name for name in differing)
    assert not len(distill.compress(source, (4,), 1, modules=False).model.vision_remember)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight.add_(0.01)
    assert not distill.equal_at_1(model, source)


def test_shrunk_pictures_have_positions_as_clip_interpolates_them(source):
    pixels = torch.randn(2, 3, CANVAS // 2, CANVAS // 2)
    small = distill.shrink(source, 2)
    with torch.no_grad():
        expected = source.model.vision_tower.embeddings(pixels, interpolate_pos_encoding=True)
        torch.testing.assert_close(small.model.vision_tower.embeddings(pixels), expected)
    inputs = encode(small, distill.processor_for(small), list(draw_cases(0, 1, True, ("shapes",))), 1)
    assert (inputs["input_ids"] == small.config.image_token_id).sum() == len(inputs["input_ids"]) * 36


def test_frozen_tower_sees_each_picture_once(tower):
    pictures, passed = torch.randn(3, 3, CANVAS, CANVAS), []
    with torch.no_grad():
        expected = tower(pictures, output_hidden_states=True).hidden_states
        tower = deepcopy(tower)
        tower.embeddings.register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))
        distill.run_once(tower, [-1, 2])
        for chosen in ([0, 1], [1, 2, 0], [2, 2]):
            states = tower(pictures[chosen], output_hidden_states=True).hidden_states
            assert [layer for layer, state in enumerate(states) if state is not None] == [2, 6]
            for layer in (2, -1):
                torch.testing.assert_close(states[layer], expected[layer][chosen])
    assert passed == [2, 1]


def test_rows_are_encoded_once_for_each_s(source, monkeypatch):
    def chat(colour):
        image = {"type": "image", "image": Image.new("RGB", (CANVAS, CANVAS), colour)}
        question = {"role": "user", "content": [image, {"type": "text", "text": "Which colour?"}]}
        return {"id": colour, "messages": [question, {"role": "assistant", "content": colour}]}

    processor, calls = distill.processor_for(distill.compress(source, (2, 4), 1)), []
    batches = [[chat(colour) for colour in colours] for colours in (["red"], ["red", "blue"], ["blue", "red"])] * 2
    expected = [DistillationCollator(processor, seed=1).student_batch(rows) for rows in batches]
    encode = LlavaVrCollator.encode

    def count(self, row, *options):
        calls.append(row["id"])
        return encode(self, row, *options)

    monkeypatch.setattr(LlavaVrCollator, "encode", count)
    collator = distill.StoredTeacherCollator(processor, 1, dict.fromkeys(("red", "blue"), torch.zeros(1, 8)))
    for rows, batch in zip(batches, expected):
        found = collator(rows)
        assert found.pop("teacher_logits").shape == (len(rows), 8)
        assert found.keys() == batch.keys() and all(torch.equal(found[name], batch[name]) for name in batch)
    chosen = [zip((row["id"] for row in rows), s["image_downsamples"].tolist()) for rows, s in zip(batches, expected)]
    assert len(calls) == len({pair for pairs in chosen for pair in pairs}) > 2


def test_answers_kept_and_their_targets():
    theirs = {"seen": {"ocr": {"a": "110", "b": "101"}}, "held out": {"ocr": {"a": "01", "b": "11"}}}
    ours = {"seen": {"ocr": {"a": "011", "b": "100"}}, "held out": {"ocr": {"a": "11", "b": "01"}}}
    of, kept = kept_answers(theirs, theirs), kept_answers(ours, theirs)
    assert of.tolist() == [2, 1, 1, 1, 2] and kept.tolist() == [1, 1, 0, 0, 2]
    value, low, high = share([kept, of], of)
    assert value == pytest.approx(100 * (4 + 7) / 2 / 7) and low < value < high
    found = compression_targets({("modules-4", "4"): {1: of}, ("pooling-4", "4"): {1: kept}}, of, [True, False])
    assert found[2].startswith("| kept at s = 4, with modules | at least 85 | 100.0 [100.0, 100.0] | met |")
    assert "| 42.9 [" in found[3] and len(found) == 5 and found[4].endswith("| 1 of 2 | not met |")


def test_the_table_of_compression(tmp_path, monkeypatch):
    """Of one step each: what is stored is read, and what is there is not run again."""
    short = {"max_steps": 1, "per_device_train_batch_size": 2}
    small = {"pictures": {**distill.CONFIG["pictures"], "count": 3}, "test": {"count": 1, "seed": 5}}
    small |= {name: {**distill.CONFIG[name], **short} for name in ("source", "student")}
    monkeypatch.setattr(distill, "CONFIG", distill.CONFIG | small)
    monkeypatch.setattr(distill, "RESULTS", tmp_path / "results")
    arguments = ["distill", "--rows", "source", "modules-2-4", "--seeds", "1", "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", arguments)
    distill.main()
    stored = {path.name: path.read_text() for path in (tmp_path / "results").iterdir()}
    assert set(stored) == {"source-0.json", "modules-2-4-1.json"}
    result = json.loads(stored["modules-2-4-1.json"])
    assert set(result["right"]) == {"2", "4"} and result["equal_at_1"]
    table = "\n".join(section_distill())
    assert "| source | 1 | 144 |" in table and "| modules-2-4 | 4 | 9 |" in table and "| 1 of 1 | met |" in table
    monkeypatch.setattr(distill, "run", None)
    distill.main()


def test_controls_come_first_then_seed_by_seed():
    jobs = distill.jobs(None, (1, 2))
    assert jobs[: len(distill.CONTROLS)] == [(name, 0) for name in distill.CONTROLS]
    assert jobs[len(distill.CONTROLS) :] == [(name, seed) for seed in (1, 2) for name in distill.STUDENTS]
    assert distill.jobs(["pooling-4", "modules-4"], (1,)) == [("modules-4", 1), ("pooling-4", 1)]
