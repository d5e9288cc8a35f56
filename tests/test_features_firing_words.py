"""The words that features fire on: many features at a time, as one by one."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.core.sae import Codes
from saesteer.core.shards import ContextBatch
from saesteer.features import statistics as module
from saesteer.features.collect import collect
from saesteer.features.firing_words import Words, WordTable, company, firing_words
from saesteer.features.statistics import Statistics
from saesteer.features.tally import UNIT
from saesteer.features.words import Pieces
from saesteer.features.words_in import NONE, Lexicon
from tests.three_tokenizers import CASES, TOKENIZERS

D_SAE = 5


class Given:
    """An encoder whose codes are the activations."""

    d_sae = D_SAE

    def encode(self, x: torch.Tensor) -> Codes:
        rows, latents = torch.nonzero(x.reshape(-1, D_SAE), as_tuple=True)
        values = x.reshape(-1, D_SAE)[rows, latents]
        return Codes(rows, latents, values, x.shape[0] * x.shape[1])


def collected(tokens: np.ndarray, activations: np.ndarray, lexicon: Lexicon) -> Statistics:
    """Statistics of contexts [c, s], each a document, and activations [c, s, D_SAE]."""
    documents = np.repeat(np.arange(len(tokens), dtype=np.int32)[:, None], tokens.shape[1], 1)
    x = torch.from_numpy(activations.astype(np.float32))
    batch = ContextBatch(tokens.astype(np.int32), documents, x, 0)
    return collect([batch], Given(), special_ids=(), lexicon=lexicon)


def of(statistics: Statistics, lexicon: Lexicon, *, most: int = 99) -> Words:
    every = np.arange(D_SAE)
    return firing_words(statistics, WordTable.of(statistics), every, lexicon, most=most)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(kind=st.sampled_from(list(TOKENIZERS)), seed=st.integers(0, 10_000))
def test_words_are_as_counted_one_by_one(kind: str, seed: int) -> None:
    pieces, size = CASES[kind]
    rng = np.random.default_rng(seed)
    few = rng.choice(size, 8, replace=False) if size > 8 else np.arange(size)
    tokens = rng.choice(few, (6, 9))
    acts = np.maximum(rng.normal(size=(6, 9, D_SAE)) - 0.5, 0).astype(np.float32)
    lexicon = Lexicon(pieces, size)
    statistics = collected(tokens, acts, lexicon)
    found = of(statistics, lexicon)

    occurred: Counter[str] = Counter()
    fired: Counter[tuple[int, str]] = Counter()
    mass: Counter[tuple[int, str]] = Counter()
    spelled: dict[tuple[int, str], Counter[str]] = {}
    names: dict[int, str] = {}
    everywhere = lexicon.occurrences(tokens, np.zeros_like(tokens), names)
    for words, begins, x in zip(everywhere.words, everywhere.begins, acts, strict=True):
        for start in np.flatnonzero(begins).tolist():
            stop = start + 1
            while stop < len(words) and words[stop] == words[start] and not begins[stop]:
                stop += 1
            word = names[words[start]]
            occurred[word.casefold()] += 1
            for f in np.flatnonzero(x[start:stop].any(0)).tolist():
                units = int(np.rint(x[start:stop, f].astype(np.float64) / UNIT).sum())
                fired[f, word.casefold()] += 1
                mass[f, word.casefold()] += units
                spelled.setdefault((f, word.casefold()), Counter())[word] += units
    keys = [
        (row, lexicon.words[key])
        for row, key in zip(found.rows.tolist(), found.keys.tolist(), strict=True)
    ]
    assert sorted(keys) == sorted(fired)
    for i, (row, word) in enumerate(keys):
        recall = fired[row, word] / occurred[word]
        assert found.lift[i] * statistics.density[row] == pytest.approx(recall)
        assert found.base[i] == pytest.approx(occurred[word] / sum(occurred.values()))
        assert found.share[i] == pytest.approx(mass[row, word] / statistics.mass[row])
        ways = spelled[row, word]
        assert ways[lexicon.words[found.numbers[i]]] == max(ways.values())
    for row in range(D_SAE):
        assert (np.diff(found.share[found.rows == row]) <= 0).all()
    assert max(np.bincount(of(statistics, lexicon, most=2).rows), default=0) <= 2


def boats() -> tuple[Lexicon, dict[str, int]]:
    tokenizer = TOKENIZERS["sentencepiece"][0]()
    names = ["▁the", "▁bo", "at", "▁boat", "▁a", "▁The", "."]
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
    return Lexicon(Pieces(tokenizer), len(tokenizer)), ids


def test_a_word_is_judged_by_all_its_tokenisations() -> None:
    """A feature that fires on one way to write a word doesn't fire on most of it."""
    lexicon, ids = boats()
    stop = [ids["."]] * 2
    one, other = [ids["▁bo"], ids["at"], *stop], [ids["▁boat"], ids["."], *stop]
    tokens = np.array([one] + [other] * 9)
    acts = np.zeros((*tokens.shape, D_SAE))
    acts[0, :2, 0] = 2.0
    acts[:, 0, 1] = 1.0
    statistics = collected(tokens, acts, lexicon)
    words = of(statistics, lexicon)
    assert [lexicon.words[n] for n in words.numbers] == ["boat", "boat"]
    np.testing.assert_allclose(words.lift * statistics.density[:2], [0.1, 1.0])
    np.testing.assert_allclose(words.share, [1.0, 1.0])


def test_spellings_of_a_word_are_merged() -> None:
    lexicon, ids = boats()
    tokens = np.array([[ids["▁the"], ids["▁The"], ids["▁The"], ids["▁the"], ids["."]]])
    acts = np.zeros((*tokens.shape, D_SAE))
    acts[0, :3, 0] = [3.0, 2.0, 2.0]
    words = of(collected(tokens, acts, lexicon), lexicon)
    assert [lexicon.words[n] for n in words.numbers] == ["The"]
    np.testing.assert_allclose([*words.share, *words.lift, *words.base], [1, 0.75 / 0.6, 0.8])


def test_words_end_at_special_tokens_and_with_their_document() -> None:
    lexicon, ids = boats()
    bo, at, stop = ids["▁bo"], ids["at"], ids["."]
    tokens = np.array([[bo, at, stop, bo, NONE, at, stop, bo, at, stop]])
    documents = np.array([[0, 0, 0, 0, 0, 0, 0, 1, 2, 2]])
    names: dict[int, str] = {}
    found = lexicon.occurrences(tokens, documents, names)
    words = [names.get(word, "") for word in found.words[0].tolist()]
    assert words == ["boat", "boat", ".", "bo", "", "at", ".", "bo", "at", "."]
    assert found.begins[0].tolist() == [True, False, *[word != "" for word in words[2:]]]
    # What may go on behind the context's end is no whole word.
    cut = lexicon.occurrences(tokens[:, :2], documents[:, :2], names)
    assert (cut.words == NONE).all() and not cut.begins.any()


def test_characters_of_several_tokens_belong_to_one_word() -> None:
    tokenizer = TOKENIZERS["byte-level"][0]()
    lexicon = Lexicon(Pieces(tokenizer), len(tokenizer))
    tokens = np.array([tokenizer.encode(" né 🙂.")])
    names: dict[int, str] = {}
    found = lexicon.occurrences(tokens, np.zeros_like(tokens), names)
    words = [names[word] for word in found.words[0][found.begins[0]].tolist()]
    assert words == [" ", "né", " ", "🙂", "."]


def test_rare_words_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_WORDS", 4)
    lexicon, ids = boats()
    rare = [ids["▁boat"], ids["."], ids["▁bo"]]
    tokens = np.array([[ids["▁the"]] * 6 + [ids["▁a"]] * 3 + rare + [ids["."], ids["."]]])
    tokens = np.concatenate([tokens, np.array([[ids["at"], *[ids["."]] * 13]])])
    statistics = collected(tokens, np.ones((*tokens.shape, D_SAE)), lexicon)
    assert set(statistics.spellings.values()) == {".", "the"}
    assert {lexicon.words[n] for n in of(statistics, lexicon).numbers} == {".", "the"}


def test_company_is_of_own_words_within_one_example() -> None:
    lexicon, ids = boats()
    windows = lexicon.read(np.array([[ids["▁the"], ids["▁boat"]], [ids["▁a"], ids["▁boat"]]] * 2))
    own = np.array([lexicon.number(word) for word in ("the", "boat", "boat")])
    words = Words(np.array([0, 0, 1]), own, own, np.ones(3), np.full(3, 3.0), np.ones(3))
    found = company(words, windows, np.array([0, 0, 1, 1]), np.ones((4, 2)), lexicon, 3)
    np.testing.assert_allclose(found, [1.5, 1, 0])
