"""Pairs from templates: balanced, distinct, drawn by seed."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.directions.pair_checks import check, leaks, stems_of
from saesteer.directions.pair_template_files import read_templates
from saesteer.directions.pair_templates import Template, Templates, as_choices, fill
from saesteer.directions.pairs import Pair
from saesteer.errors import PairsError

FILE = """
[[templates]]
prompt = "{name} saw the {place}. {name} felt"
chosen = " {mood}."
rejected = " {mood}."
[[templates]]
prompt = "{{At home}} {name} was"
chosen = " {mood} now."
rejected = " {mood} now."
[slots]
name = ["Tom", "Lily", "Ben"]
mood = [["happy", "sad"], ["glad", "gloomy"]]
place = { file = "places.txt" }
"""
PLACES = ("sea", "park", "zoo", "shop")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "places.txt").write_text("sea\n\n park \nzoo\nshop\n")
    (tmp_path / "t.toml").write_text(FILE)
    return tmp_path / "t.toml"


def one(**slots: list[str]) -> Templates:
    """A template of "x", and of all slots in its prompt."""
    values = {name: tuple((v, v) for v in given) for name, given in slots.items()}
    return Templates((Template(" ".join(f"{{{s}}}" for s in slots), " a", " b"),), values)


def test_both_file_forms_are_read(path: Path) -> None:
    made = read_templates(path)
    assert [t.slots() for t in made.templates] == [("name", "place", "mood"), ("name", "mood")]
    assert made.slots["place"] == tuple((p, p) for p in PLACES)
    assert made.slots["mood"] == (("happy", "sad"), ("glad", "gloomy"))
    (path.parent / "p.json").write_text(json.dumps(PLACES))
    single = {
        "prompt": "the {place} was",
        "chosen": " big",
        "rejected": " small",
        "slots": {"place": {"file": "p.json"}},
        "choices": True,
    }
    (path.parent / "t.json").write_text(json.dumps(single))
    read = read_templates(path.parent / "t.json")
    assert (
        read.slots == {"place": made.slots["place"]} and read.choices and len(read.templates) == 1
    )


def test_every_pair_is_made_once_and_no_more(path: Path) -> None:
    made = read_templates(path)
    pairs = fill(made, 30)
    long = {
        Pair(f"{name} saw the {place}. {name} felt", f" {good}.", f" {bad}.")
        for name in ("Tom", "Lily", "Ben")
        for place in PLACES
        for good, bad in (("happy", "sad"), ("glad", "gloomy"))
    }
    short = {
        Pair(f"{{At home}} {name} was", f" {good} now.", f" {bad} now.")
        for name in ("Tom", "Lily", "Ben")
        for good, bad in (("happy", "sad"), ("glad", "gloomy"))
    }
    assert len(pairs) == 30 and set(pairs) == long | short
    with pytest.raises(PairsError, match="make 30 distinct pairs, but 31 were asked for"):
        fill(made, 31)
    with pytest.raises(PairsError, match="0 pairs were asked for"):
        fill(made, 0)


def test_templates_and_values_are_balanced(path: Path) -> None:
    pairs = fill(read_templates(path), 12, seed=5)
    assert sum(pair.prompt.startswith("{At") for pair in pairs) == 6
    assert set(Counter(pair.chosen for pair in pairs).values()) == {3}
    seen = [pair for pair in pairs if not pair.prompt.startswith("{At")]
    assert set(Counter(pair.prompt.split()[0] for pair in seen).values()) == {2}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(0, 9), st.data())
def test_values_are_used_alike_whatever_their_number(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    total = 1
    for size in sizes:
        total *= size
    n = data.draw(st.integers(1, total))
    made = one(**{f"s{i}": [f"v{j}" for j in range(size)] for i, size in enumerate(sizes)})
    pairs = fill(made, n, seed=seed)
    assert len(set(pairs)) == n and pairs == fill(made, n, seed=seed)
    for i, size in enumerate(sizes):
        used = Counter(pair.prompt.split()[i] for pair in pairs)
        counts = [used[f"v{j}"] for j in range(size)]
        # Within one where combinations are plenty; where few are left to choose from, nearly.
        assert max(counts) - min(counts) <= (1 if len(sizes) == 1 else 3)


def test_the_seed_draws(path: Path) -> None:
    made = read_templates(path)
    assert fill(made, 10, seed=1) == fill(made, 10, seed=1) != fill(made, 10, seed=2)


def test_a_great_many_combinations_are_not_listed() -> None:
    many = one(**{f"s{i}": [f"w{j}" for j in range(100)] for i in range(12)})
    pairs = fill(many, 200)
    assert len(set(pairs)) == 200
    for i in range(12):
        assert set(Counter(pair.prompt.split()[i] for pair in pairs).values()) == {2}


def test_values_given_twice_and_texts_that_coincide_count_once() -> None:
    made = Templates(
        (Template("{a}{b}", " x", " y"),),
        {"a": (("p", "p"), ("pq", "pq")), "b": (("qr", "qr"), ("r", "r"))},
    )
    assert {pair.prompt for pair in fill(made, 3)} == {"pqr", "pr", "pqqr"}
    with pytest.raises(PairsError, match="make 3 distinct"):
        fill(made, 4)


def test_what_the_test_file_asks_is_not_made(path: Path) -> None:
    made = read_templates(path)
    test = fill(made, 6, seed=3)
    # Pairs with the same prompt go as well, whatever their answers.
    pairs = fill(made, 10, against=test)
    assert not any(leaks(pair, stems_of(test)) for pair in pairs)
    assert {finding.kind for finding in check(pairs, other=test)} == {"few"}
    with pytest.raises(PairsError, match="30 more are in the test file"):
        fill(made, 1, against=fill(made, 30))


def test_questions_have_their_letters_balanced(path: Path) -> None:
    made = read_templates(path)
    asked = fill(replace(made, choices=True), 30, seed=2)
    assert Counter(pair.chosen for pair in asked) == {" (A)": 15, " (B)": 15}
    plain = fill(made, 30, seed=2)
    for pair, question in zip(plain, asked, strict=True):
        a, b = (pair.chosen, pair.rejected)
        if question.chosen == " (B)":
            a, b = b, a
        assert question.prompt == f"{pair.prompt}\n\nChoices:\n (A){a}\n (B){b}\n\nAnswer:"
        assert question.rejected == {" (A)": " (B)", " (B)": " (A)"}[question.chosen]
    # The letters depend on a pair's number alone, so that they can be given one by one.
    assert asked == tuple(as_choices([pair], seed=2, first=i)[0] for i, pair in enumerate(plain))
    assert {as_choices(plain[:1], seed=s)[0].chosen for s in range(20)} == {" (A)", " (B)"}


GOOD = 'prompt = "{a}"\nchosen = " x"\nrejected = " y"\n[slots]\na = ["1"]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("{a}", "{b}"), "has the slot 'b', but"),
        (GOOD + 'b = ["2"]', "no template uses the slot 'b'"),
        (GOOD.replace('["1"]', "[]"), "slot 'a' has no values"),
        (GOOD.replace('["1"]', "[1]"), "1 is no text"),
        (GOOD.replace('["1"]', '[["1", "2", "3"]]'), "is no text and no"),
        (GOOD.replace('["1"]', '[["1", "2"]]'), "differs between the sides"),
        (GOOD.replace('["1"]', '{ file = "none.txt" }'), r"none\.txt can't be read"),
        (GOOD.replace('["1"]', '{ fil = "none.txt" }'), "expected a list, or"),
        (GOOD.replace("{a}", "{a"), "'prompt' can't be read"),
        (GOOD.replace("{a}", "{a!r}"), "is no name"),
        (GOOD.replace("{a}", "{}"), "is no name"),
        (GOOD.replace("chosen", "choosen", 1), "unknown key 'choosen'"),
        (GOOD.replace('chosen = " x"\n', "", 1), "'chosen' is missing"),
        (GOOD.replace('" x"', "3"), "'chosen' is missing or no string"),
        (f"choices = 1\n{GOOD}", "'choices' is 1"),
        ("templates = []", "'templates' is no list"),
        ("templates = [3]", "template 1 is no table"),
        (f'slots = "a"\n{GOOD.split("[slots]")[0]}', "'slots' is no table"),
        ("= 3", "is no TOML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(PairsError, match=message) as raised:
        read_templates(tmp_path / "t.toml")
    assert "\n" not in str(raised.value) or "TOML" in message


def test_other_files_and_pairs_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="can't be read"):
        read_templates(tmp_path / "none.toml")
    (tmp_path / "t.json").write_text("[1]")
    with pytest.raises(PairsError, match="expected a table"):
        read_templates(tmp_path / "t.json")
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(PairsError, match="is no JSON"):
        read_templates(tmp_path / "t.json")
    same = Templates((Template("p", " {m}", " {m}"),), {"m": (("x", "x"),)})
    with pytest.raises(PairsError, match="are the same"):
        fill(same, 1)
