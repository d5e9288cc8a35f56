"""The language of a search."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.errors import IndexingError
from saesteer.features.query import AllOf, AnyOf, Filter, Node, Phrase, Query, Without, parse


def word(text: str, *, prefix: bool = False, field: str | None = None) -> Phrase:
    return Phrase(tuple(text.split()), prefix, field)


A, B, C = word("a"), word("b"), word("c")


@pytest.mark.parametrize(
    "text, words",
    [
        ("boat", ["boat"]),
        ("  Boat, SEA!  boat ", ["boat", "sea"]),
        ("well-known don't", ["well", "known", "don", "t"]),
        ("f(x) (boat)", ["f", "x", "boat"]),
        ("near: the http://boat", ["near", "the", "http", "boat"]),
        ("and or not", ["and", "or", "not"]),
        ("ANDROID NOTE", ["android", "note"]),
        ("a_label:b - c", ["a", "label", "b", "c"]),
        ("hashtag:x this:y", ["hashtag", "x", "this", "y"]),
        ("", []),
        ('""', []),
    ],
)
def test_plain_words(text: str, words: list[str]) -> None:
    assert parse(text) == Query(tuple(map(word, words)), None, ())


@pytest.mark.parametrize(
    "text, node",
    [
        ("a AND b", AllOf((A, B))),
        ("a OR b", AnyOf((A, B))),
        ("a OR b c", AnyOf((A, AllOf((B, C))))),
        ("(a OR b) c", AllOf((AnyOf((A, B)), C))),
        ("a -b", Without(A, (B,))),
        ("-b a", Without(A, (B,))),
        ("a AND NOT b", Without(A, (B,))),
        ("a NOT b NOT c", Without(A, (B, C))),
        ("a NOT NOT b", AllOf((A, B))),
        ("a -(b OR c)", Without(A, (AnyOf((B, C)),))),
        ('"a b"', word("a b")),
        ('"A, b!" c', AllOf((word("a b"), C))),
        ("a*", word("a", prefix=True)),
        ('"a b"*', word("a b", prefix=True)),
        ("label:a", word("a", field="label")),
        ('context:"a b" c', AllOf((word("a b", field="context"), C))),
        ("a -token:c", Without(A, (word("c", field="token"),))),
        ("promotes:a*", word("a", prefix=True, field="promotes")),
        ("a AND (b)", AllOf((A, B))),
        ("a OR b OR c", AnyOf((A, B, C))),
    ],
)  # fmt: skip
def test_expressions(text: str, node: Node) -> None:
    asked = parse(text)
    assert asked.expression == node
    assert asked.note == ""


@pytest.mark.parametrize(
    "text, why",
    [
        ('"boat', "no partner"),
        ("a OR", "its end"),
        ("AND a", "'AND'"),
        ("a AND OR b", "'OR'"),
        ("(a OR b", "not closed"),
        ("a OR b)", "closes nothing"),
        ("a OR ()", r"'\)'"),
        ("-a", "not wanted"),
        ("a OR -b", "not wanted"),
        ('"!" AND a', "no words"),
        (" OR ".join("abcdefghijklmnopqrs"), "more than 16 words"),
        ("(" * 400 + "a OR b" + ")" * 400, "deep"),
    ],
)
def test_what_cannot_be_read_is_plain_words_and_says_so(text: str, why: str) -> None:
    asked = parse(text)
    assert asked.expression is None
    assert word("a") in asked.words or word("boat") in asked.words
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(asked.note)
    assert "plain words" in asked.note


def test_words_whose_firing_counts_are_those_wanted_in_tokens() -> None:
    asked = parse('a -b "c d"* label:e token:f promotes:g a')
    expected = (A, C, word("d", prefix=True), word("f"))
    assert asked.words == expected


def test_filters_stand_beside_words_and_expressions() -> None:
    asked = parse(
        'a density<1% b max_act > 3 own_effect>=-.5e-1 tag:Sea -tag:"x y" is:Starred -is:dead'
    )
    assert asked.expression is None
    assert asked.words == (A, B)
    assert asked.filters == (
        Filter("density", "<", 0.01),
        Filter("max_act", ">", 3.0),
        Filter("own_effect", ">=", -0.05),
        Filter("tag", "=", "Sea"),
        Filter("tag", "!=", "x y"),
        Filter("is", "=", "starred"),
        Filter("is", "!=", "dead"),
    )
    assert parse("(a OR b density<=2)") == Query(
        (A, B), AnyOf((A, B)), (Filter("density", "<=", 2.0),)
    )
    assert parse('"density<1"').filters == ()
    assert parse("densities<1 xdensity<1").filters == ()


@pytest.mark.parametrize("text", ["density<abc", "max_act>1e999", "own_effect<nan", "density>1%%"])
def test_a_filter_without_a_number_is_refused(text: str) -> None:
    with pytest.raises(IndexingError, match="no number") as raised:
        parse(f"boat {text}")
    assert text in str(raised.value)


def test_an_unknown_state_is_refused() -> None:
    with pytest.raises(IndexingError, match="did you mean 'starred'"):
        parse("is:stared")


def test_what_is_read_is_bounded() -> None:
    assert len(parse("a" * 1000).words[0].words[0]) == 64
    assert len(parse(" ".join(f"w{i}" for i in range(99))).words) == 16
    assert len(parse(f'"{"x " * 99}"').words) == 1  # too long a phrase is words


def written(node: Node) -> str:
    match node:
        case Phrase(words, prefix, field):
            star = "*" if prefix else ""
            return f'{f"{field}:" if field else ""}"{" ".join(words)}"{star}'
        case AllOf(parts):
            return f"({' AND '.join(map(written, parts))})"
        case AnyOf(parts):
            return f"({' OR '.join(map(written, parts))})"
        case Without(keep, drop):
            return f"({written(keep)}{''.join(f' NOT {written(part)}' for part in drop)})"


PHRASES = st.builds(
    Phrase,
    st.sampled_from([("a",), ("b",), ("and",), ("ä", "海")]),
    st.booleans(),
    st.sampled_from([None, "label", "token"]),
)


def nested(parts: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    two = st.lists(parts, min_size=2, max_size=3).map(tuple)
    return st.one_of(
        st.builds(AllOf, two),
        st.builds(AnyOf, two),
        st.builds(Without, parts, st.lists(parts, min_size=1, max_size=2).map(tuple)),
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(node=st.recursive(PHRASES, nested, max_leaves=7))
def test_what_is_written_is_what_is_read(node: Node) -> None:
    # An operator outside makes the parentheses count where the expression is one phrase.
    assert parse(f"{written(node)} AND a").expression == AllOf((node, A))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(max_size=30) | st.text(alphabet='"*():- ANDORTabl\0_é', max_size=25))
def test_words_are_never_an_error_and_none_is_lost(text: str) -> None:
    asked = parse(text)
    if asked.note:
        assert asked.expression is None
    assert all(0 < len(one) <= 64 for phrase in asked.words for one in phrase.words)
