"""problem.toml: every block has to be there, and what stands in it has to make sense."""

import tomllib
from pathlib import Path

import pytest

from saesteer.compare import problem_file as problems
from saesteer.compare.problem import Behaviour
from saesteer.compare.problem_file import EXAMPLES, parse, read, to_dict
from saesteer.core import tables
from saesteer.errors import ConfigError

WHOLE = "\n\n".join(EXAMPLES.values())
READY = [p for p in Path("configs/problems").glob("*.toml") if ".templates" not in p.name]


def changed(**blocks):
    values = tomllib.loads(WHOLE)
    for block, table in blocks.items():
        values[block] = {**values[block], **table} if isinstance(table, dict) else table
    return values


def test_the_examples_are_a_whole_problem_that_survives_being_written():
    found = parse(tomllib.loads(WHOLE), "it")
    assert parse(tomllib.loads(tables.written(to_dict(found))), "again") == found


@pytest.mark.parametrize("block", EXAMPLES)
def test_a_missing_block_is_refused_with_one_to_copy(block):
    values = tomllib.loads(WHOLE)
    del values[block]
    with pytest.raises(ConfigError, match="copy this") as raised:
        parse(values, "p.toml")
    assert EXAMPLES[block] in str(raised.value)
    copied = tomllib.loads(str(raised.value).partition(":\n")[2])
    assert parse({**values, **copied}, "p.toml") == parse(tomllib.loads(WHOLE), "p.toml")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"deployment": {"format": "compleation"}}, "did you mean 'completion'"),
        ({"deployment": {"positions": "last"}}, "one of all, prompt, generated"),
        ({"cost": {"delta_ce": 0.3}}, "one of"),
        ({"cost": {"deltace": 0.3}}, "unknown key"),
        ({"grid": {"headline_n": 8}}, "32 at least"),
        ({"grid": {"n": [8, 1]}}, "ascending"),
        ({"grid": {"layers": ["a", "b", "c", "d", "e"]}}, "four at most"),
        ({"grid": {"noise": [2.0]}}, "shares"),
        ({"grid": {"strengths": "many"}}, "not a int"),
        ({"splits": {"fit": 0.9}}, "add up to 1"),
        ({"primary": {"family": []}}, "family is empty"),
        ({"primary": {"family": ["sae-clamp"]}}, "a vs b"),
        ({"primary": {"margin": 0.0}}, "above 0"),
        ({"scoring": {"scorers": ["lexikon"]}}, "did you mean 'lexicon'"),
        ({"behaviour": []}, "at least one"),
        ({"behaviour": {"name": "happy"}}, "two brackets"),
        ({"behaviour": [{"pairs": "x"}]}, "no name"),
        ({"behaviour": [{"name": "x"}]}, "no pairs"),
        ({"behaviour": [{"name": "x", "pairs": "p", "concept": "sea"}]}, "pairs and concept"),
        ({"behaviour": [{"name": "x", "concept": "see"}]}, "did you mean 'sea'"),
    ],
)
def test_what_makes_no_sense_is_refused(blocks, message):
    if isinstance(blocks.get("behaviour"), dict):
        values = {**tomllib.loads(WHOLE), **blocks}
    else:
        values = changed(**blocks)
    with pytest.raises(ConfigError, match=message):
        parse(values, "p.toml")


def test_what_has_to_be_said_has_no_default():
    for block, key in (("deployment", "format"), ("cost", "delta_ce"), ("primary", "margin")):
        values = tomllib.loads(WHOLE)
        del values[block][key]
        with pytest.raises(ConfigError, match=key):
            parse(values, "p.toml")


def test_files_are_looked_for_beside_the_problem(tmp_path):
    (tmp_path / "happy-sad.templates.toml").write_text("")
    (tmp_path / "p.toml").write_text(WHOLE)
    found = read(tmp_path / "p.toml").behaviours[0].template
    assert Path(found) == tmp_path / "happy-sad.templates.toml"


def test_a_concept_brings_its_words():
    assert "boat" in Behaviour("sea", concept="sea").lexicon
    assert Behaviour("sea", concept="sea", words=("fish",)).lexicon == ("fish",)


def test_five_problems_stand_ready():
    assert len(READY) == 5


@pytest.mark.parametrize("path", READY, ids=lambda path: path.name)
def test_a_ready_problem_can_be_read_and_split(path):
    from saesteer.compare.splits import split

    found = read(path)
    assert problems.parse(to_dict(found), "again") == found
    for behaviour in found.behaviours:
        made = split(behaviour, found.splits, deployment=found.deployment)
        assert len(made.fit) > max(found.n)  # so that draws differ
        assert len(made.test) == found.splits.most_test


def test_a_scorer_of_ones_own_can_be_named(monkeypatch):
    from saesteer.compare import scorers

    monkeypatch.setitem(scorers.SCORERS, "mine", scorers.lexicon)
    assert parse(changed(scoring={"scorers": ["mine"]}), "p.toml").scorers == ("mine",)
