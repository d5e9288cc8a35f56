"""A first problem.toml from a few answers."""

import pytest

from saesteer.compare.problem_file import read
from saesteer.compare.problem_new import QUESTIONS, answered, new, write
from saesteer.errors import ConfigError


def test_flags_alone_make_a_problem_that_can_be_read(tmp_path):
    path = tmp_path / "p.toml"
    made = new(answered({"behaviour": "sea", "source": "concept:sea", "words": "a, b"}, None))
    write(path, made)
    found = read(path)
    assert found == made
    assert found.behaviours[0].query == "sea" and found.behaviours[0].words == ("a", "b")


def test_what_was_not_given_is_asked_once_each():
    asked = []

    def ask(question):
        asked.append(question)
        return {0: "happy", 1: "x.toml"}.get(len(asked) - 1, "")

    found = answered({"format": "ab"}, ask)
    assert len(asked) == len(QUESTIONS) - 1
    assert found["behaviour"] == "happy" and found["format"] == "ab" and found["delta_ce"] == "0.25"
    assert new(found).behaviours[0].template == "x.toml"


def test_nobody_to_ask_is_an_error_that_names_the_flag():
    with pytest.raises(ConfigError, match="--source"):
        answered({"behaviour": "sea"}, None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("delta_ce", "much", "no number"), ("delta_ce", "0.3", "one of"), ("format", "x", "one of")],
)
def test_an_answer_that_makes_no_sense(key, value, message):
    given = answered({"behaviour": "sea", "source": "concept:sea", key: value}, None)
    with pytest.raises(ConfigError, match=message):
        new(given)


def test_a_file_that_is_there_is_kept(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="there already"):
        write(path, new(answered({"behaviour": "sea", "source": "concept:sea"}, None)))
    assert path.read_text() == "mine"
