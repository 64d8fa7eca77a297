"""Documents of print and questions about them, and the training of the checkpoint that reads them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch


pytestmark = pytest.mark.common
sys.path.insert(0, str(Path(__file__).parents[1]))

from lab import evaluate_plain, train_reader, train_tower  # noqa: E402
from lab.data import fonts, page, reading, text  # noqa: E402
from lab.data.drawing import Turn, generator, pixels  # noqa: E402
from lab.data.labels import PATCH  # noqa: E402
from lab.data.page import SIDE, Page  # noqa: E402
from lab.data.reading import READING  # noqa: E402
from lab.data.samples import DOMAINS, draw_dialogue  # noqa: E402
from lab.evaluate import MAX_NEW_TOKENS  # noqa: E402
from lab.pieces import Run  # noqa: E402
from lab.train_vlm import Dialogues  # noqa: E402


FONTS = {family.name: family.files() for family in fonts.list_families() if family.package == "matplotlib"}
WORDS = tuple(f"{a}{b}" for a in ("sea", "tin", "wood", "corn", "way") for b in ("er", "land", "s", "ing"))


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    """A few words and the fonts of matplotlib, so that nothing need be fetched."""
    monkeypatch.setattr(text, "load_words", lambda: WORDS)
    monkeypatch.setattr(reading, "font_files", lambda split: FONTS)


@pytest.fixture(params=READING)
def domain(request):
    return READING[request.param]


def ask(domain, seed: int, question_type: str) -> tuple[Turn, list[str]]:
    """A question with its answer, and the lines of the same picture."""
    rng = generator(seed, 0)
    facts = domain.draw(rng).facts
    said = domain.ask(rng, facts, question_type)
    return said, domain.ask(rng, facts, "transcribe").answer.split("\n")


@pytest.mark.parametrize("held_out", [False, True])
def test_sheets_follow_from_the_seed(domain, held_out):
    first, again, other = (domain.draw(generator(seed, 0), held_out) for seed in (4, 4, 5))
    assert first.image.tobytes() == again.image.tobytes() and first.facts == again.facts
    assert first.image.size == (SIDE, SIDE) and first.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("held_out", [False, True])
def test_print_is_large_enough_for_the_tower_and_on_the_picture(domain, held_out, monkeypatch):
    sizes, edges, write = [], [], Page.text

    def text(page, x, base, text, size, *others):
        sizes.append(size)
        edges.extend((x, SIDE - x - page.width(text, size), base - 0.8 * size, SIDE - base - 0.1 * size))
        return write(page, x, base, text, size, *others)

    monkeypatch.setattr(Page, "text", text)
    for seed in range(30):
        domain.draw(generator(seed, 0), held_out)
    assert min(sizes) >= 10 and min(edges) > -1


def test_bars_stand_out_from_the_paper(monkeypatch):
    monkeypatch.setattr(page, "draw_colours", lambda rng: ((25, 25, 25), (230, 220, 200)))
    fills, draw_box = set(), Page.box
    monkeypatch.setattr(Page, "box", lambda *a, fill, **k: fills.add(fill) or draw_box(*a, fill=fill, **k))
    for seed in range(20):
        READING["print charts"].draw(generator(seed, 0))
    assert fills == {colour for name, colour in page.COLOURS.items() if name != "black"}


def test_a_name_is_asked_about_in_any_case_and_is_in_no_other():
    rng = generator(0, 0)
    assert {reading.as_asked(rng, "Corn") for _ in range(80)} == {"Corn", "corn", "CORN"}
    names = iter(["Sea", "seaside", "TOTAL", "tot", " ", "sEa", "corn", "overcast"])
    assert reading.distinct(rng, lambda rng: next(names), 3, 4) == ["Sea", "corn", "over"]


def test_answers_and_dialogues_fit(domain):
    """What a test may generate, and what the decoder has positions for."""
    tokenizer = train_reader.make_reader_processor().tokenizer
    for seed in range(30):
        rng = generator(seed, 0)
        document = domain.draw(rng)
        turns = draw_dialogue(rng, domain, document, train_reader.CONFIG["turns"])
        answers, questions = (
            [len(tokenizer.tokenize(getattr(turn, part))) for turn in turns] for part in ("full_answer", "question")
        )
        assert len(tokenizer.tokenize(domain.ask(rng, document.facts, "transcribe").answer)) < MAX_NEW_TOKENS
        assert 256 + sum(answers) + sum(questions) + 4 * len(turns) < train_reader.MAX_LENGTH


def test_training_draws_every_domain(monkeypatch):
    class Blank:
        def draw(self, rng):
            return reading.Document(None, None)

    monkeypatch.setattr(train_reader, "READING", dict.fromkeys(READING, Blank()))
    monkeypatch.setattr(train_reader, "draw_dialogue", lambda rng, domain, *_: [Turn("", "", domain)])
    domains = [train_reader.draw(index)[1][0].answer for index in range(200)]
    assert all(domain in domains for domain in DOMAINS.values())


@pytest.mark.parametrize(
    "name, question_type",
    [
        *(("receipt", kind) for kind in ("price", "item", "no item", "no price")),
        *(("print receipts", kind) for kind in ("price", "item", "no item")),
        *(("print tables", kind) for kind in ("cell", "no row", "no column")),
        *(("print charts", kind) for kind in ("value", "no bar")),
        *(("table", "cell"), ("chart", "value")),
    ],
)
def test_a_full_answer_begins_with_what_is_asked_about(name, question_type):
    domain = (DOMAINS | READING)[name]
    for seed in range(20):
        rng = generator(seed, 0)
        said = domain.ask(rng, domain.draw(rng).facts, question_type)
        words = said.full_answer.removesuffix(" is not there.").removesuffix(f" {said.answer}").split(" ")
        assert words == said.subject.split(" ") and all(word in said.question for word in words)
        if question_type.startswith("no "):
            assert said.full_answer.endswith(" is not there.") and words[-1].lower() in said.answer.lower()
        else:
            assert said.full_answer == f"{said.subject} {said.answer}"
    others = [kind for kind in domain.QUESTION_TYPES if kind in ("count", "total", "transcribe")]
    for said in (domain.ask(rng, domain.draw(rng).facts, kind) for kind in others):
        assert said.full_answer == said.answer


def test_the_value_stands_before_the_name_of_what_is_highest_or_lowest():
    kinds = ("cheapest", "dearest", "highest", "lowest", "largest")
    for domain in (DOMAINS | READING).values():
        for question_type in set(kinds) & set(domain.QUESTION_TYPES):
            for seed in range(10):
                rng = generator(seed, 0)
                facts = domain.draw(rng).facts
                said = domain.ask(rng, facts, question_type)
                value = said.subject.split(" ")[-1]
                lines = domain.ask(rng, facts, "transcribe").answer.split("\n")
                assert said.full_answer == f"{said.subject} {said.answer}"
                (line,) = (line for line in lines if line.startswith(f"{said.answer} "))
                assert value in line.removeprefix(said.answer).split(" ")


def test_practice_lists_a_column():
    tables = READING["print tables"]
    for seed in range(20):
        said, lines = ask(tables, seed, "column")
        names, *rows = (line.split(" ") for line in lines)
        column = [name.lower() for name in names].index(said.subject.lower())
        assert said.subject in said.question
        assert said.answer.split("\n") == [f"{row[0]} {row[column + 1]}" for row in rows]


def test_practice_names_column_and_row_of_a_number():
    tables = READING["print tables"]
    for seed in range(20):
        said, lines = ask(tables, seed, "place")
        names, *rows = (line.split(" ") for line in lines)
        assert said.subject in said.question
        assert said.answer in {
            f"{column} {row}"
            for row, *numbers in rows
            for column, number in zip(names, numbers)
            if number == said.subject
        }


@pytest.mark.parametrize("question_type", ["first", "last", "number", "count"])
def test_answers_about_lines_are_lines(question_type):
    for seed in range(20):
        said, lines = ask(READING["print lines"], seed, question_type)
        expected = {"first": lines[:1], "last": lines[-1:], "number": lines, "count": [str(len(lines))]}
        assert said.answer in expected[question_type] and all(len(line) <= 24 for line in lines)
        assert all(any(map(str.isalnum, line)) for line in lines)


def money(printed: str) -> int:
    return int(printed.replace("$", "").replace(".", "").replace(",", ""))


def test_answers_about_receipts_are_in_the_transcription():
    receipts, seen = READING["print receipts"], set()
    for seed in range(60):
        said = {kind: ask(receipts, seed, kind)[0] for kind in receipts.QUESTION_TYPES}
        lines = ask(receipts, seed, "transcribe")[1]
        facts = receipts.draw(generator(seed, 0)).facts
        rows = dict(line.rsplit(" ", 1) for line in lines[bool(facts.heading) :])
        total = rows.pop("Total", None)
        prices = {item: money(price) for item, price in rows.items()}
        assert tuple(prices) == facts.items and said["count"].answer == str(len(rows))
        assert said["total"].answer == (total or "There is no total.")
        assert total is None or money(total) == sum(prices.values())
        assert prices[said["cheapest"].answer] == min(prices.values())
        assert prices[said["dearest"].answer] == max(prices.values())
        assert said["price"].answer in rows.values() and rows[said["item"].answer] in said["item"].question
        missing = said["no item"].answer.removeprefix("There is no ").removesuffix(".")
        assert missing in said["no item"].question.lower() and missing not in "\n".join(lines).lower()
        seen |= {total is None, bool(facts.heading), facts.mark, facts.sign}
    assert seen >= {True, False, ".", ",", "", "$"}


def test_answers_about_tables_are_in_the_transcription():
    tables = READING["print tables"]
    for seed in range(40):
        table = tables.draw(generator(seed, 0)).facts
        for kind in ("highest", "lowest"):
            said = ask(tables, seed, kind)[0]
            columns = [number for number, name in enumerate(table.columns) if name.lower() in said.question.lower()]
            best = {"highest": np.argmax, "lowest": np.argmin}[kind]
            values = np.array(table.numbers, float)
            assert said.answer in {table.rows[best(values[:, column])] for column in columns}
        said, lines = ask(tables, seed, "cell")
        rows = {line.split(" ")[0].lower(): line.split(" ")[1:] for line in lines[1:]}
        named = [row for row in rows if row in said.question.lower()]
        assert any(said.answer in rows[row] for row in named)
        assert all(len(set(column)) == len(column) for column in zip(*table.numbers))


def test_answers_about_charts_are_in_the_transcription():
    charts = READING["print charts"]
    for seed in range(40):
        lines = ask(charts, seed, "transcribe")[1]
        values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
        assert values[ask(charts, seed, "highest")[0].answer] == max(values.values())
        assert values[ask(charts, seed, "lowest")[0].answer] == min(values.values())
        said = ask(charts, seed, "value")[0]
        asked = {value for name, value in values.items() if name.lower() in said.question.lower()}
        assert float(said.answer) in asked


def test_nothing_leaves_a_whole_picture(monkeypatch):
    """A view that would cut a letter off is not taken; one that does not is."""
    shift = np.eye(3)

    def found(base: float) -> int:
        drawn = Page(np.random.default_rng(0), FONTS)
        monkeypatch.setattr(page, "draw_view", lambda rng, side: shift * [[1, 1, drawn.scale], [1] * 3, [1] * 3])
        drawn.text(60, base, "W", 20, 1)
        x, y = np.meshgrid(np.arange(SIDE) + 0.5, np.arange(SIDE) + 0.5)
        return np.flatnonzero(drawn.finish(whole=True).find_items(x, y).any(0))[0]

    at_first = found(90)
    shift[0, 2] = -30  # in pixels of the finished picture, to the right
    assert found(90) == at_first + 30
    shift[0, 2] = 100  # to the left, out of the picture
    assert found(90) == at_first


def test_any_text_is_spelled_and_questions_are_words():
    processor = train_reader.make_reader_processor()
    tokenizer = processor.tokenizer
    for line in ("Qz#~ 7.25%", "naïve €3", "total TOTAL\nrow 1 of 20"):
        assert tokenizer.decode(tokenizer.encode(line)) == line
    assert len(tokenizer) < 500 and len(tokenizer.tokenize("How much is the")) == 4
    assert len(tokenizer.tokenize("what does line")) == len(tokenizer.tokenize("There is no")) == 3
    assert {len(tokenizer.tokenize(f" {digit}")) for digit in range(10)} == {1}
    assert len(tokenizer.tokenize("salad")) == 5  # a name that `lab.data.receipts` knows
    assert not any("{" in text or "}" in text for text in train_reader.question_texts())
    assert processor.image_layout.num_tokens((50, 70), 2) == (SIDE // PATCH // 2) ** 2


def read_off(lines: list[list[str]], turn: Turn) -> str:
    """What a page of cells answers."""
    names, *below = lines
    column, _, row = turn.subject.partition(" ")
    rows = [line for line in (below if names[0] in ("", "CAFE ROMA") else lines) if line[0] != "Total"]
    match turn.question_type:
        case "transcribe":
            return "\n".join(map(" ".join, lines))
        case "first" | "last" | "number":
            digits = "".join(filter(str.isdigit, turn.question))
            return " ".join(lines[{"first": 0, "last": -1}.get(turn.question_type, int(digits or 1) - 1)])
        case "count":
            return str(len(rows))
        case "price" | "total":
            return next(line[-1] for line in lines if line[0].lower() == (turn.subject or "total"))
        case "item":
            return next(line[0] for line in rows if line[-1] == turn.subject)
        case "cheapest" | "dearest":
            by_price = sorted(rows, key=lambda line: line[-1].zfill(9))
            name, price = by_price[0 if turn.question_type == "cheapest" else -1]
            return name if turn.subject == price else f"{name} costs {price}"
        case "no item":
            return f"There is no {turn.subject}." if turn.subject not in str(lines).lower() else "It is there."
        case "cell":
            return next(line for line in rows if line[0] == row)[names.index(column)]
        case "highest":
            return max(rows, key=lambda line: int(line[names.index(column)]))[0]


def test_plain_pictures_show_what_is_asked(monkeypatch):
    files = next(iter(FONTS.values()))
    monkeypatch.setattr(evaluate_plain, "font_files", lambda split: {str(family): files for family in range(20)})
    cases = evaluate_plain.draw_cases()
    assert len({case.image.tobytes() for case in cases}) == len(evaluate_plain.PAGES) and len(cases) == 28
    asked = [(lines, turn) for lines, _, turns in evaluate_plain.PAGES for turn in turns]
    assert [case.turn for case in cases] == [turn for _, turn in asked]
    for lines, turn in asked:
        assert turn.answer == read_off(lines, turn), turn


def test_a_new_reader_can_tell_where_a_token_is(tmp_path):
    """By the nearest of the mean tokens of all places in one half of the pictures, for the tokens of the other half."""
    tower = tmp_path / "tower.safetensors"
    train_tower.new_run(tower).save()
    model = train_reader.make_reader(train_reader.make_reader_processor().tokenizer, tower).eval()
    pictures = torch.stack([torch.from_numpy(pixels(train_reader.draw(index)[0], SIDE)) for index in range(16)])

    def told() -> float:
        with torch.inference_mode():
            tokens = model.get_image_features(
                pictures, image_downsamples=torch.ones(16, dtype=torch.long)
            ).pooler_output
        seen, fresh = torch.stack(list(tokens)).chunk(2)
        return (torch.cdist(fresh, seen.mean(0)).argmin(-1) == torch.arange(fresh.shape[1])).float().mean().item()

    before = told()
    train_reader.code_places(model, pictures)
    assert told() > 5 * before


@torch.inference_mode()
def test_a_turn_is_learned_as_if_it_were_asked_alone(tmp_path):
    """But in one dialogue of eight, whose turns see those before them."""
    tower = tmp_path / "tower.safetensors"
    train_tower.new_run(tower).save()
    processor = train_reader.make_reader_processor()
    model = train_reader.make_reader(processor.tokenizer, tower).eval()
    drawn = [train_reader.draw(index) for index in (7, 8)]

    def predictions(data, indices) -> list[torch.Tensor]:
        batch = data.collate([data[index] for index in indices])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        return [row[label != -100] for row, label in zip(logits, labels)]

    found = predictions(train_reader.Questions(processor, train_reader.draw, 0, [2]), (7, 8))
    image, turns = drawn[0]
    assert len(turns) > 4
    alone = Dialogues(processor, lambda index: (image, [turns[index]]), 0, [2])
    expected = torch.cat([row for index in range(len(turns)) for row in predictions(alone, [index])])
    (chat,) = predictions(Dialogues(processor, lambda index: drawn[1], 0, [2]), [0])
    for one, other in zip(found, (expected, chat)):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_a_reader_learns_and_goes_on_where_it_stopped(tmp_path):
    """Only what is trained is in its state; the tower is that of the tower's state file, and stays."""
    tower = tmp_path / "tower.safetensors"
    train_tower.new_run(tower).save()
    processor = train_reader.make_reader_processor()

    def begin(state):
        model = train_reader.make_reader(processor.tokenizer, tower)
        return Run(train_reader.Reader(model), state, train_reader.CONFIG["seed"], batch_size=2)

    data = Dialogues(processor, train_reader.draw, 0)
    batch = data.collate([data[index] for index in range(2)])
    run = begin(tmp_path / "reader.safetensors")
    losses = [run.step(batch) for _ in range(6)]
    assert losses[-1] < losses[0] and torch.isfinite(torch.tensor(losses)).all()
    run.save()
    assert run.file.stat().st_size < 30e6
    resumed = begin(run.file)
    assert resumed.facts == run.facts and not any("vision_tower" in name for name in resumed.trained)
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    with pytest.raises(ValueError, match="it is of another model"):
        train_tower.new_run(run.file)


def test_a_run_begins_with_the_weights_of_a_checkpoint(tmp_path):
    """All but those of the tower, and only if the checkpoint reads and writes the same tokens."""
    towers = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    for number, file in enumerate(towers):
        tower = train_tower.new_run(file)
        tower.model.tower.embeddings.class_embedding.data.fill_(number)
        tower.save()
    tokenizer = train_reader.make_reader_processor().tokenizer
    checkpoint, model = (train_reader.make_reader(tokenizer, file) for file in towers)
    for weight in checkpoint.parameters():
        weight.data += 1
    checkpoint.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    train_reader.take_weights(model, tmp_path, tokenizer)
    for name, weight in model.state_dict().items():
        source = before if "vision_tower" in name else checkpoint.state_dict()
        assert torch.equal(weight, source[name]), name
    tokenizer.add_tokens("another")
    with pytest.raises(ValueError, match="its tokenizer has other tokens"):
        train_reader.take_weights(model, tmp_path, tokenizer)
