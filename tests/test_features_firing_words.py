"""The words that features fire on: many features at a time, as one by one."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.features.firing_words import Parts, Tokens, company, completions, firing_words
from saesteer.features.words import Pieces
from saesteer.features.words_in import Lexicon
from tests.three_tokenizers import CASES, TOKENIZERS


def slowly(tokens: Tokens, windows, rows, activations, lexicon: Lexicon, seen) -> dict:
    """`firing_words`, token by token: row -> {word's key: [share, fires, base]}, and spellings."""
    own: dict = defaultdict(lambda: defaultdict(float))
    for row, ids, words, acts in zip(rows, windows.ids, windows.words, activations, strict=True):
        for token, word, act in zip(ids, words, acts, strict=True):
            if act > 0:
                own[row, token][lexicon.words[word]] += act
    found: dict = defaultdict(lambda: defaultdict(lambda: np.zeros(3)))
    spelled: dict = defaultdict(lambda: defaultdict(float))
    for row, token, share, lift, base in zip(
        tokens.rows, tokens.ids, tokens.share, tokens.lift, tokens.base, strict=True
    ):
        text = lexicon.pieces.texts([int(token)])[0]
        parts = own.get((row, token)) or seen.get(token) or {text.strip() or text: 1.0}
        for word, weight in parts.items():
            part = weight / sum(parts.values())
            key = word.casefold()
            found[row][key] += part * np.array([share, lift * base, base])
            spelled[row, key][word] += part * share
    return {"words": found, "spelled": spelled}


@settings(derandomize=True, deadline=None, max_examples=60)
@given(kind=st.sampled_from(list(TOKENIZERS)), seed=st.integers(0, 10_000))
def test_words_are_as_added_up_one_by_one(kind: str, seed: int) -> None:
    pieces, size = CASES[kind]
    rng = np.random.default_rng(seed)
    few = rng.choice(size, 8, replace=False) if size > 8 else np.arange(size)
    lexicon = Lexicon(pieces, size)
    everywhere = lexicon.read(rng.choice(few[: len(few) // 2 + 1], (4, 5)))
    seen: dict = defaultdict(lambda: defaultdict(float))
    for ids, words in zip(everywhere.ids, everywhere.words, strict=True):
        for token, word in zip(ids[:-1], words[:-1], strict=True):
            seen[token][lexicon.words[word]] += 1
    m = 3
    rows = np.sort(rng.integers(0, m, 6))
    windows = lexicon.read(rng.choice(few, (6, 5)))
    activations = np.maximum(rng.normal(size=(6, 5)), 0)
    ids = np.concatenate([np.sort(rng.choice(few, 4, replace=False)) for _ in range(m)])
    tokens = Tokens(
        np.repeat(np.arange(m), 4), ids, rng.random(12), 5 * rng.random(12), rng.random(12) / 9
    )
    found = firing_words(
        tokens, windows, rows, activations, completions(everywhere), lexicon, most=99
    )
    expected = slowly(tokens, windows, rows, activations, lexicon, seen)
    for row in range(m):
        mine = found.rows == row
        keys = [lexicon.words[k] for k in found.keys[mine]]
        words = expected["words"][row]
        assert sorted(keys) == sorted(words)
        assert (np.diff(found.share[mine]) <= 0).all()
        for key, number, share, lift, base in zip(
            keys, *(x[mine] for x in (found.numbers, found.share, found.lift, found.base)),
            strict=True,
        ):  # fmt: skip
            np.testing.assert_allclose(
                [share, lift * base, base], words[key], rtol=1e-9, atol=1e-12
            )
            spellings = expected["spelled"][row, key]
            assert spellings[lexicon.words[number]] >= max(spellings.values()) - 1e-12
    kept = firing_words(
        tokens, windows, rows, activations, completions(everywhere), lexicon, most=2
    )
    assert max(np.bincount(kept.rows)) <= 2
    together = company(found, windows, rows, activations, lexicon, m)
    for row in range(m):
        own = set(found.keys[(found.rows == row) & (found.lift >= 2)])
        fired = [
            set(lexicon.keys(words[acts > 0])) & own
            for words, acts, r in zip(windows.words, activations, rows, strict=True)
            if r == row
        ]
        assert together[row] == pytest.approx(sum(map(len, fired)) / max(1, len(fired)))


def boats() -> tuple[Lexicon, np.ndarray]:
    make, spelled = TOKENIZERS["sentencepiece"]
    tokenizer = make()
    ids = np.array(tokenizer.convert_tokens_to_ids([*spelled, "▁a", "▁The"]))
    return Lexicon(Pieces(tokenizer), len(tokenizer)), ids


def test_pieces_are_named_by_the_words_they_are_part_of() -> None:
    lexicon, (_, bo, at, boat, a, _) = boats()
    one = Tokens(*(np.array([x]) for x in (0, bo, 1.0, 50.0, 1e-3)))
    nothing = Parts.of(*(np.zeros(0, np.int64),) * 3)
    windows = lexicon.read(np.array([[a, bo, at]] * 3 + [[a, bo, a]]))
    activations = np.array([[0, 1.0, 0]] * 4)
    rows = np.zeros(4, np.int64)
    words = firing_words(one, windows, rows, activations, nothing, lexicon, most=9)
    assert [lexicon.words[n] for n in words.numbers] == ["boat", "bo"]
    np.testing.assert_allclose(words.share, [0.75, 0.25])
    np.testing.assert_allclose(words.lift, 50)
    # A token that is in none of the feature's own examples: as it was seen elsewhere.
    none = lexicon.read(np.zeros((0, 3), np.int64))
    elsewhere = completions(lexicon.read(np.array([[bo, at, boat]])))
    words = firing_words(one, none, rows[:0], np.zeros((0, 3)), elsewhere, lexicon, most=9)
    assert [lexicon.words[n] for n in words.numbers] == ["boat"]


def test_spellings_of_a_word_are_merged() -> None:
    lexicon, (the, *_, capital) = boats()
    two = Tokens(
        np.zeros(2, np.int64), np.array([the, capital]), np.array([0.3, 0.6]),
        np.full(2, 50.0), np.full(2, 1e-3),
    )  # fmt: skip
    none = lexicon.read(np.zeros((0, 3), np.int64))
    nothing = Parts.of(*(np.zeros(0, np.int64),) * 3)
    rows = np.zeros(0, np.int64)
    words = firing_words(two, none, rows, np.zeros((0, 3)), nothing, lexicon, most=9)
    assert [lexicon.words[n] for n in words.numbers] == ["The"]
    np.testing.assert_allclose([*words.share, *words.lift], [0.9, 50])
