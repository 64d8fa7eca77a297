"""The tower's data: pictures follow from seeds, labels lie on the ink; training goes on where it stopped."""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.data import default_collate


pytestmark = pytest.mark.common
sys.path.insert(0, str(Path(__file__).parents[1]))

from lab import evaluate_tower, train_tower  # noqa: E402
from lab.data import fonts, page, scenes, sheet, text  # noqa: E402
from lab.data.labels import COUNTS, GRID, by_row, find_spots, make_labels  # noqa: E402
from lab.data.page import CLASSES, NUMBERS, SIDE, Page  # noqa: E402
from lab.pieces import LOG_STEPS, POOL, add_options, load_batches, train  # noqa: E402
from lab.train_tower import Pictures, new_run  # noqa: E402


FONTS = {family.name: family.files() for family in fonts.list_families() if family.package == "matplotlib"}
UPRIGHT = {
    name: [file for file in files if not re.search("Oblique|Italic", file.name)] for name, files in FONTS.items()
}


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    """A few words and the fonts of matplotlib, so that nothing need be fetched."""
    monkeypatch.setattr(text, "load_words", lambda: ("of", "paper", "dont", "bookkeeper", "willing"))
    for module in (train_tower, evaluate_tower):
        monkeypatch.setattr(module, "font_files", lambda split: FONTS)


def plain_page(monkeypatch, seed: int = 0, view: np.ndarray | None = None) -> Page:
    """A white page, black ink, upright fonts, and a given view or none; nothing blurs it."""
    monkeypatch.setattr(page, "draw_colours", lambda rng: ((255, 255, 255), (0, 0, 0)))
    monkeypatch.setattr(page, "degrade", lambda rng, image: image)
    monkeypatch.setattr(Page, "background", lambda self: Image.new("RGB", (self.side, self.side), self.paper))
    monkeypatch.setattr(page, "draw_view", lambda rng, side: np.eye(3) if view is None else view(side))
    return Page(np.random.default_rng(seed), UPRIGHT)


def everywhere() -> tuple[np.ndarray, np.ndarray]:
    """x and y of the middle of each pixel."""
    return np.meshgrid(np.arange(SIDE) + 0.5, np.arange(SIDE) + 0.5)


def test_pictures_follow_from_seed_and_number():
    first, again = (scenes.draw_picture(3, 5, FONTS) for _ in range(2))
    assert first.image.tobytes() == again.image.tobytes() and first.items == again.items
    assert first.image.size == (SIDE, SIDE)
    others = [scenes.draw_picture(3, 6, FONTS), scenes.draw_picture(4, 5, FONTS)]
    assert all(first.image.tobytes() != other.image.tobytes() for other in others)


@pytest.mark.parametrize("scene", scenes.SCENES, ids=lambda scene: scene.__name__)
def test_every_scene_is_drawn_and_labelled(scene):
    names = set()
    for seed in range(8):
        drawn = Page(np.random.default_rng(seed), FONTS)
        scene(drawn)
        labels = make_labels(drawn.finish())
        assert {kind: values.shape for kind, values in labels.items()} == {
            **dict.fromkeys(("name", "start"), (GRID**2, 2, 4)),
            **dict.fromkeys(COUNTS, (GRID**2, 2)),
        }
        assert all(0 <= labels[kind].min() and labels[kind].max() <= most for kind, most in COUNTS.items())
        names |= {CLASSES[number - 1].split()[0] for number in np.unique(labels["name"]) if number}
    expected = {"chart": "bar", "shapes": "green"}.get(scene.__name__)
    assert expected in names if expected else len(names & set(text.CHARACTERS)) > 20


def lean(side: int) -> np.ndarray:
    """Turned by three degrees and slanted, with some perspective, about the middle."""
    middle = np.array([[1, 0, side / 2], [0, 1, side / 2], [0, 0, 1]])
    turn = np.array([[0.9986, 0.0523, 0], [-0.0523, 0.9986, 0], [0.1 / side, -0.1 / side, 1]])
    return middle @ turn @ np.array([[1, 0.2, 0], [0, 1, 0], [0, 0, 1]]) @ np.linalg.inv(middle)


@pytest.mark.parametrize("view", [None, lean], ids=["straight", "leaning"])
@pytest.mark.parametrize("seed", range(6))
def test_what_a_character_adds_to_the_picture_lies_under_its_label(monkeypatch, seed, view):
    line, before = "To WAVE 3.50", None
    for length in range(1, len(line) + 1):
        drawn = plain_page(monkeypatch, seed, view)
        drawn.text(25, 110, line[:length], 18, line=1)
        picture = drawn.finish()
        ink = 255 - np.asarray(picture.image.convert("L"), dtype=float)
        if before is not None and line[length - 1] != " ":
            added = (ink - before).clip(0)
            assert picture.items[-1].name == line[length - 1]
            on_label = picture.find_items(*everywhere()) == len(picture.items)
            assert added[on_label].sum() > 0.7 * added.sum() > 0
        before = ink


def test_letters_that_come_twice_begin_twice(monkeypatch):
    drawn = plain_page(monkeypatch)
    drawn.text(20, 100, "willing", 32, line=3)
    picture = drawn.finish()
    labels, spots = make_labels(picture), by_row(find_spots(picture))
    row = np.flatnonzero((spots == 4).any(1))[0]
    names, starts = by_row(labels["name"])[row], by_row(labels["start"])[row]
    assert "".join(CLASSES[number - 1] for number in names[starts == 1]) == "willing"
    assert (starts[names == 0] == -100).all() and set(starts[names > 0]) == {0, 1}
    assert set(labels["line"][labels["line"] > 0]) == {3}
    assert set(labels["place"][labels["place"] > 0]) <= set(range(1, 8))


def test_filled_box_covers_the_labels_beneath(monkeypatch):
    drawn = plain_page(monkeypatch)
    drawn.text(20, 100, "gone", 30, line=1)
    drawn.box(0, 60, SIDE, 130, fill=(9, 9, 9))
    drawn.text(20, 100, "x", 30, line=1, ink=(255, 255, 255))
    labels = make_labels(drawn.finish())
    assert set(np.unique(labels["name"])) == {0, NUMBERS["x"]}


def test_contact_sheet_marks_the_labels(monkeypatch):
    drawn = plain_page(monkeypatch)
    drawn.text(20, 100, "o", 30, line=1)
    marked = np.asarray(sheet.mark_labels(drawn.finish(), zoom=4)).astype(int)
    red = (marked[..., 0] > 200) & (marked[..., 1:] < 60).all(-1)
    assert marked.shape == (4 * SIDE, 4 * SIDE, 3) and red.any()
    assert 4 * 15 < np.flatnonzero(red.any(0)).mean() < 4 * 35


def test_bar_ends_at_its_share_of_the_axis(monkeypatch):
    found = 0
    for seed in range(20):
        drawn = plain_page(monkeypatch, seed)
        monkeypatch.setattr(scenes, "COLOURS", {"red": (255, 0, 0)})
        scenes.chart(drawn)
        bars = [item for item in drawn.items if item.name.startswith("bar")]
        pixels = np.asarray(drawn.image).astype(int)
        red = (pixels[..., 0] > 200) & (pixels[..., 1] < 60)
        by_bar = [drawn.map == 1 + drawn.items.index(bar) for bar in bars]
        spans = [np.flatnonzero((red & there).any(1)) for there in by_bar]
        if len({span[-1] for span in spans}) > 1:  # they lie
            continue
        heights = np.array([span[-1] - span[0] + 1 for span in spans])
        values = np.array([int(bar.name.split()[1]) for bar in bars])
        unit = heights.sum() / values.sum()
        assert np.abs(heights - values * unit).max() < 2 * drawn.scale
        found += 1
    assert found > 5


def test_text_has_capitals_decimals_and_more_points_than_any_other_sign():
    rng = np.random.default_rng(0)
    drawn = " ".join(text.random_text(rng, 60) for _ in range(300))
    assert set(drawn) == {" ", *text.CHARACTERS}
    assert re.search(r"\d\.\d\d\b", drawn) and re.search(r"\$\d", drawn) and re.search(r"\b[A-Z]{4,}\b", drawn)
    signs = {sign: drawn.count(sign) for sign in text.CHARACTERS if not sign.isalnum()}
    assert max(signs, key=signs.get) == "." and signs[","] > signs[";"]


def test_missing_words_name_their_extra(monkeypatch):
    monkeypatch.undo()
    text.load_words.cache_clear()
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    with pytest.raises(ImportError, match=r'pip install .*"\.\[lab\]"'):
        text.load_words()


def stem(name: str) -> str:
    return re.sub(r"-(sans|serif|mono|slab|pro|text|condensed|code|sc|\d)\b", "", name)


def test_held_out_families_are_other_families_from_pinned_packages():
    train, held_out = (
        [family for family in fonts.list_families() if family.split == split] for split in ("train", "held_out")
    )
    assert len(train) >= 60 and len(held_out) >= 15 and len(train) + len(held_out) == len(fonts.list_families())
    for key in ("name", "package"):
        assert not {getattr(family, key) for family in train if family.package != "matplotlib"} & {
            getattr(family, key) for family in held_out
        }
    assert not {stem(family.name) for family in train} & {stem(family.name) for family in held_out}
    assert all(family.version and family.licence for family in train + held_out)


def test_missing_fonts_are_one_line_that_says_how_to_fetch_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fonts, "CACHE", tmp_path)
    monkeypatch.setattr(scenes, "load_words", lambda: ())
    fonts.font_files.cache_clear()
    with pytest.raises(SystemExit):
        scenes.check_data(argparse.ArgumentParser(prog="train_tower"))
    fonts.font_files.cache_clear()
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("train_tower: error: ") and "`python -m lab.data.fonts` fetches them" in message


def test_fetched_fonts_have_every_character():
    try:
        files = [file for split in fonts.SPLITS for family in fonts.font_files(split).values() for file in family]
    except FileNotFoundError as error:
        pytest.skip(str(error))
    for file in files:
        font = ImageFont.truetype(str(file), 20)
        unknown = bytes(font.getmask("\uffff"))
        assert not [character for character in text.CHARACTERS if bytes(font.getmask(character)) in (unknown, b"")], (
            file
        )


def take(batches, count: int) -> list[dict[str, torch.Tensor]]:
    return list(itertools.islice(batches, count))


def test_training_goes_on_where_it_stopped(tmp_path):
    state, pictures = tmp_path / "state.safetensors", Pictures(train_tower.SEED, "train")
    run, batches = new_run(state, batch_size=2), iter(load_batches(pictures, 0, 2, workers=0))
    for batch in take(batches, 2):
        run.step(batch)
    run.save()
    assert os.path.getsize(state) < 25e6 and not list(tmp_path.glob("*.part"))
    with safe_open(state, "pt") as file:
        facts = json.loads(file.metadata()["run"])
    assert (facts["step"], facts["images"], facts["seed"]) == (2, 4, train_tower.SEED)

    resumed = new_run(state)
    (next_batch,) = take(load_batches(pictures, resumed.facts["images"], 2, workers=0), 1)
    for key, value in next(batches).items():
        assert torch.equal(value, next_batch[key])
    losses = [[part.step(next_batch) for _ in range(2)] for part in (run, resumed)]
    assert losses[0][0] == losses[1][0] and losses[0][1] == pytest.approx(losses[1][1], rel=1e-3)
    assert resumed.facts["images"] == 8


def test_a_piece_tells_how_it_went_and_keeps_its_learning_rate(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_options(parser, tmp_path / "state.safetensors")
    args = parser.parse_args("--minutes 1e-9 --workers 0 --batch-size 2 --lr 3e-4".split())
    run = new_run(args.state, args.batch_size)
    train(run, Pictures(train_tower.SEED, "train"), default_collate, lambda: 0.5, args)
    said = json.loads(capsys.readouterr().out)
    assert (said["step"], said["images"], said["held_out"]) == (1, 2, 0.5)
    assert said["lr"] == pytest.approx(2e-6)  # the second of 300 steps of warm-up
    assert new_run(args.state).facts == run.facts and run.facts["lr"] == 3e-4


SHARED = """
import sys
from argparse import Namespace
from pathlib import Path

import torch

from lab.pieces import Run, share_cores, train


class Line(torch.nn.Linear):
    def loss(self, pixel_values):
        return self(pixel_values).square().mean()


share_cores(1)
torch.manual_seed(0)
run = Run(Line(3, 1), Path(sys.argv[1]), 0, int(sys.argv[2]))
options = Namespace(lr=0.1, decay_steps=8, minutes=None, workers=0)
rows = torch.arange(300.0).reshape(100, 3) % 7
train(run, rows, lambda batch: {"pixel_values": torch.stack(batch)}, lambda: 0, options)
"""


def test_two_processes_train_as_one_with_batches_twice_as_large(tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    states, told = [tmp_path / f"{count}.safetensors" for count in (1, 2)], []
    for state, command, size in zip(states, ((), ("-m", "torch.distributed.run", "--nproc-per-node=2")), ("4", "2")):
        done = subprocess.run(
            [sys.executable, *command, script, state, size],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        (line,) = done.stdout.splitlines()
        told.append({name: json.loads(line)[name] for name in ("step", "images", "lr")})
    assert told[0] == told[1] == {"step": 8, "images": 32, "lr": 0}
    one, two = map(load_file, states)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-2 if weight.dtype == torch.bfloat16 else 1e-4, atol=1e-5)


def test_a_batch_is_of_samples_of_about_the_same_length():
    lengths = [5, 1, 8, 2, 7, 3, 6, 4]
    (short, *_, long) = take(load_batches(lengths, 0, 2, workers=0, length=int), POOL)
    assert short.tolist() == [1, 2] and long.tolist() == [7, 8]
    assert LOG_STEPS % POOL == 0  # a run is saved at the end of a pool


def test_learning_rate_rises_stays_and_falls_once_told(tmp_path):
    run = new_run(tmp_path / "none")
    run.facts["step"] = 29
    assert run.learning_rate() == pytest.approx(run.facts["lr"] / 10)
    run.facts["step"] = 10**6
    assert run.learning_rate() == run.facts["lr"] and not run.is_over
    run.facts |= {"decay_from": 10**6, "decay_steps": 100}
    run.facts["step"] += 50
    assert run.learning_rate() == pytest.approx(run.facts["lr"] / 2) and not run.is_over
    run.facts["step"] += 50
    assert run.learning_rate() == 0 and run.is_over
    train(run, None, None, None, argparse.Namespace())
    assert run.facts["step"] == 10**6 + 100 and not run.file.exists()


class Oracle:
    """Says what the labels of the test pictures are; a wrong one calls everything an "x"."""

    def __init__(self, wrong: bool):
        self.pictures, self.index, self.wrong = Pictures(train_tower.TEST_SEED, "train"), -1, wrong

    def __call__(self, pixel_values: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        self.index += 1
        labels = self.pictures[self.index]
        names = torch.full_like(labels["name"], NUMBERS["x"]) if self.wrong else labels["name"]
        logits = {kind: 9.0 * torch.nn.functional.one_hot(labels[kind], most + 1) for kind, most in COUNTS.items()}
        logits["name"] = 9.0 * torch.nn.functional.one_hot(names, len(CLASSES) + 1)
        logits["start"] = labels["start"].float() - 0.5
        return {kind: [value[None]] for kind, value in logits.items()}


def test_evaluation_says_one_for_what_is_right_and_less_for_what_is_not():
    right = evaluate_tower.evaluate(Oracle(wrong=False), "train", 6)
    shares = {group: values for group, values in right.items() if group != "counts"}
    assert set(right["width"]) <= set(evaluate_tower.WIDTHS) and set(right["family"]) <= set(FONTS)
    assert {share for values in shares.values() for share in values.values()} == {1.0}
    wrong = evaluate_tower.evaluate(Oracle(wrong=True), "train", 6)
    assert wrong["characters"]["all"] < 0.1 and wrong["patches"]["line"] == 1.0
    assert 0 <= right["counts"]["characters without a spot"] < 0.1 * right["counts"]["characters"]
