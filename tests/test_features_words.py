"""Tokens as text, whole words, and labels, through three kinds of tokenizer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.features import labels, words_in
from saesteer.features.labels import NEVER
from saesteer.features.records import WordStat
from saesteer.features.words import Pieces
from saesteer.features.words import words_in as words_of_pieces
from saesteer.features.words_in import NONE, Lexicon, beside
from tests.three_tokenizers import CASES, TOKENIZERS, byte_level, sentencepiece


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_read_as_in_the_middle_of_a_text(kind: str) -> None:
    make, spelled = TOKENIZERS[kind]
    tokenizer = make()
    ids = tokenizer.convert_tokens_to_ids(spelled)
    pieces = Pieces(tokenizer)
    assert pieces.texts(ids) == [" the", " bo", "at", " boat"]
    assert "".join(pieces.window(ids)) == " the boat boat"
    assert words_of_pieces(pieces.window(ids)) == ["the", "boat", "boat", "boat"]


@pytest.mark.parametrize("make", [sentencepiece, byte_level])
def test_characters_of_several_tokens(make: type) -> None:
    tokenizer = make()
    spell = {
        sentencepiece: [f"<0x{b:02X}>" for b in "é🙂".encode()],
        byte_level: tokenizer.convert_ids_to_tokens(tokenizer.encode("é🙂")),
    }[make]
    ids = tokenizer.convert_tokens_to_ids(spell)
    assert len(ids) == 6
    pieces = Pieces(tokenizer)
    window = pieces.window([*ids, *ids[:1]])
    assert len(window) == 7
    assert [text for text in window if text] == ["é", "🙂", "\ufffd"]  # the last is cut off


def test_words_around_pieces() -> None:
    assert words_of_pieces([" don", "'", "t", " go"]) == ["don't", "don't", "don't", "go"]
    assert words_of_pieces(["sea", "-", "side"]) == ["sea", "-", "side"]
    assert words_of_pieces([" boat", "."]) == ["boat", "."]
    assert words_of_pieces([" a", "\n"]) == ["a", "\n"]
    assert words_of_pieces(["海" * 20, "船", "浜" * 20])[1] == "船"
    assert words_of_pieces([" half", ""]) == ["half", ""]
    assert words_of_pieces([" x y"]) == ["x"]
    assert words_of_pieces([]) == []


@settings(derandomize=True, deadline=None, max_examples=80)
@given(kind=st.sampled_from(list(TOKENIZERS)), seed=st.integers(0, 10_000))
def test_many_windows_are_read_as_each_by_itself(kind: str, seed: int) -> None:
    """Whatever the tokens, halves of characters and text without spaces among them."""
    pieces, size = CASES[kind]
    rng = np.random.default_rng(seed)
    few = rng.integers(0, size, 6)  # so that runs repeat
    ids = rng.choice(few, (5, 7))
    for row, (first, last) in zip(ids, rng.integers(0, 8, (5, 2)), strict=True):
        row[:first], row[last:] = NONE, NONE
    lexicon = Lexicon(pieces, size)
    windows = lexicon.read(ids)
    np.testing.assert_array_equal(lexicon.spelled(ids), windows.pieces)
    lefts, rights = beside(windows, 3, lexicon.number(""))
    for i in range(5):
        at = np.flatnonzero(ids[i] >= 0)
        expected = pieces.window(ids[i, at].tolist())
        assert windows.pieces[i, at].tolist() == expected
        words = words_of_pieces(expected)
        assert [lexicon.words[n] for n in windows.words[i, at]] == words
        outside = ids[i] < 0
        assert (windows.words[i, outside] == NONE).all()
        assert not any(windows.pieces[i, outside])
        keys = lexicon.keys(windows.words[i, at])
        assert [lexicon.words[n] for n in keys] == [word.casefold() for word in words]
        if ids[i, 3] != NONE:
            place = int(np.searchsorted(at, 3))
            others = [(j, w) for j, w in enumerate(words) if w not in ("", words[place])]
            before = [w for j, w in others if j < place]
            after = [w for j, w in others if j > place]
            assert lexicon.words[lefts[i]] == (before[-1] if before else "")
            assert lexicon.words[rights[i]] == (after[0] if after else "")


def test_what_is_forgotten_is_learnt_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words_in, "_REMEMBERED", 3)
    pieces, size = CASES["byte-level"]
    lexicon = Lexicon(pieces, size)
    first = np.arange(12).reshape(2, 6)
    lexicon.read(first)
    kept = lexicon.words[:4]
    keys = [lexicon.words[k] for k in lexicon.keys(np.arange(4))]
    lexicon.read(np.arange(40, 64).reshape(4, 6))
    many = len(lexicon.words)
    lexicon.forget(4)
    assert len(lexicon.words) < many
    assert lexicon.words[:4] == kept
    assert [lexicon.words[k] for k in lexicon.keys(np.arange(4))] == keys
    again, fresh = lexicon.read(first), Lexicon(pieces, size)
    expected = fresh.read(first)
    found = [[lexicon.words[n] for n in row] for row in again.words]
    assert found == [[fresh.words[n] for n in row] for row in expected.words]


def word(text: str, share: float, lift: float = 50.0, base: float = 1e-3) -> WordStat:
    return WordStat(text, share, lift, base)


def test_label_names_what_carries_the_activation_and_is_not_frequent() -> None:
    words = [word("the", 0.4, lift=1.1, base=0.05)]
    words += [word("sea", 0.25), word("boat", 0.2), word("wave", 0.14)]
    label, confidence = labels.label(words)
    assert label == "sea, boat, wave"
    assert confidence == pytest.approx(0.59 * (1 - 1 / 50))


def test_function_words_are_named_only_where_nothing_else_carries_the_feature() -> None:
    assert labels.label([word("of", 0.5, lift=30), word("boat", 0.3)])[0] == "boat"
    assert labels.label([word("of", 0.6, lift=30), word("to", 0.39, lift=30)])[0] == "of, to"
    assert labels.label([word(".", 0.5, lift=9), word(",", 0.5, lift=8)])[0] == "., ,"


def test_one_word_features_say_where_it_stands() -> None:
    boat = [word("boat", 1.0)]
    assert labels.label(boat, [("a", "boat", "now")] * 3)[0] == "'boat' after 'a'"
    assert labels.label(boat, [("a", "boat", "now")] * 2)[0] == "'boat'"
    others = [(f"w{i}", "boat", f"v{i}") for i in range(4)]
    assert labels.label(boat, others)[0] == "'boat'"
    before = [(f"w{i}", "Boat", "sank") for i in range(4)]
    assert labels.label(boat, before)[0] == "'boat' before 'sank'"
    # Examples on another word say nothing of where this one stands, nor do those at an edge.
    assert labels.label(boat, [("a", "ship", "now")] * 5)[0] == "'boat'"
    assert labels.label(boat, [("", "boat", "")] * 5)[0] == "'boat'"


def test_a_label_says_more_where_there_is_more_to_say() -> None:
    clear, vague = [word("sea", 0.5), word("boat", 0.4)], [word("sea", 0.2), word("boat", 0.02)]
    assert labels.label(clear, early=True)[0] == "sea, boat at the start"
    assert labels.label(clear, promotes="numbers")[0] == "sea, boat"
    assert labels.label(vague, promotes="numbers")[0] == "sea; promotes numbers"


def test_a_dead_feature_says_so() -> None:
    assert labels.label([], promotes="numbers") == (NEVER, 0.0)


def test_confidence_is_low_where_words_are_as_frequent_as_anywhere() -> None:
    assert labels.label([word("x", 0.5, lift=1.0), word("y", 0.4, lift=1.2)])[1] < 0.1


def test_breadth_counts_own_words() -> None:
    assert labels.breadth([]) == 0
    assert labels.breadth([WordStat("boat", 0.5, 20, 0.1)]) == pytest.approx(1)
    even = [WordStat(f"w{i}", 0.05, 20, 0.1) for i in range(13)]
    assert labels.breadth(even) == pytest.approx(13)
    assert labels.breadth([*even, WordStat("the", 0.35, 1.1, 0.1)]) == pytest.approx(13)
