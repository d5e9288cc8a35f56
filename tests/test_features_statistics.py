"""Parts of the statistics against loops, and that merging them is exact in any order."""

import itertools
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.core.sae import Codes
from saesteer.core.shards import ContextBatch
from saesteer.errors import IndexingError
from saesteer.features import coactive, tally
from saesteer.features.block import Block
from saesteer.features.collect import collect
from saesteer.features.examples import Window
from saesteer.features.histogram import BINS, Histograms
from saesteer.features.sample import firing_keys, token_keys
from saesteer.features.statistics import Settings, Statistics
from saesteer.features.tally import TokenTally
from saesteer.features.words_in import NONE, Lexicon
from tests.test_features_collect import assert_same
from tests.three_tokenizers import CASES

VOCAB, D_SAE, LENGTH = 7, 9, 8
SETTINGS = Settings(D_SAE, VOCAB, (0,), top_contexts=3, sampled=4, before=2, after=1)


def a_block(first: int, n: int, rng: np.random.Generator) -> Block:
    """Contexts of few documents, with activations that are often the same and of all sizes."""
    tokens = rng.integers(1, VOCAB, (n, LENGTH)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.1] = 0
    # Documents go on from one context to the next, so that shares have them in common.
    documents = (np.arange(first * LENGTH, (first + n) * LENGTH) // 11).reshape(n, LENGTH)
    fires = (rng.random((n * LENGTH, D_SAE)) < 0.3) & (tokens.reshape(-1, 1) != 0)
    rows, features = np.nonzero(fires)
    values = rng.integers(1, 6, len(rows)) * 2.0 ** rng.integers(-3, 4, len(rows))
    # Words of up to three tokens.
    begins = rng.random(tokens.shape) < 0.6
    begins[:, 0] = True
    begins[:, 1:] |= (tokens[:, :-1] == 0) | (tokens[:, 1:] == 0)
    words = np.repeat(
        rng.integers(0, 5, begins.sum()), np.diff([*np.flatnonzero(begins), tokens.size])
    )
    words = np.where(tokens == 0, NONE, words.reshape(tokens.shape))
    contexts = first + np.arange(n)
    values = values.astype(np.float32)
    return Block(tokens, documents, words, begins & (tokens != 0), contexts, rows, features, values)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    order=st.permutations(range(4)),
    grouping=st.sampled_from(["left", "right", "pairs"]),
    seed=st.integers(0, 10_000),
)
def test_merging_is_exact_in_any_order_and_grouping(
    sizes: list[int], order: list[int], grouping: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coactive, "_MOST", 60)
        whole = Statistics.empty(SETTINGS)
        parts = []
        for first, n in zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False):
            block = a_block(first, n, rng)
            whole.add(block)
            part = Statistics.empty(SETTINGS)
            part.add(block)
            part.settle()
            parts.append(part)
        whole.settle()
        a, b, c, d = (parts[i] for i in order)
        if grouping == "left":
            merged = a.merge(b).merge(c).merge(d)
        elif grouping == "right":
            merged = a.merge(b.merge(c.merge(d)))
        else:
            merged = a.merge(b).merge(c.merge(d))
    assert_same(merged, whole)
    assert whole.token_sample.below[0] < 2**64 - 1 or sum(sizes) < 6


def test_merging_with_nothing_changes_nothing() -> None:
    some = Statistics.empty(SETTINGS)
    some.add(a_block(0, 4, np.random.default_rng(0)))
    some.settle()
    assert_same(some.merge(Statistics.empty(SETTINGS)), some)
    assert_same(Statistics.empty(SETTINGS).merge(some), some)


def test_other_settings_are_not_merged() -> None:
    for other in (Settings(D_SAE + 1, VOCAB, (0,)), Settings(D_SAE, VOCAB, (0, 1))):
        with pytest.raises(IndexingError, match="can't be merged; collect both with the same"):
            Statistics.empty(SETTINGS).merge(Statistics.empty(other))


def some_pairs(seed: int, *, n: int = 400, d_sae: int = 6, vocab: int = 60) -> list[np.ndarray]:
    """Keys, sorted, and mass of firings; few tokens are frequent."""
    rng = np.random.default_rng(seed)
    tokens = np.minimum(rng.zipf(1.4, n) - 1, vocab - 1)
    tokens = (tokens * (1 + seed)) % vocab
    keys = np.sort(rng.integers(0, d_sae, n) * vocab + tokens)
    return [keys, rng.integers(1, 50, n)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
@pytest.mark.parametrize("in_pairs", [False, True])
def test_a_pruned_tally_is_low_by_its_slack_at_most(
    monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...], in_pairs: bool
) -> None:
    d_sae, vocab, keep = 6, 60, 10
    monkeypatch.setattr(tally, "_PAIRS_A_FEATURE", 2 * keep)
    monkeypatch.setattr(tally, "_LEAST_PAIRS", 1)
    true: dict[int, int] = defaultdict(int)
    counts: dict[int, int] = defaultdict(int)
    totals = np.zeros(d_sae, int)
    parts = []
    for seed in range(4):
        keys, mass = some_pairs(seed)
        for key, m in zip(keys.tolist(), mass.tolist(), strict=True):
            true[key] += m
            counts[key] += 1
            totals[key // vocab] += m
        part = TokenTally.empty(d_sae, vocab)
        part.add(keys, mass)
        part.settle()
        assert len(part.keys) <= 2 * keep * d_sae
        parts.append(part)
    a, b, c, d = (parts[i] for i in order)
    if in_pairs:
        c.absorb(d)
        a.absorb(b)
        a.absorb(c)
    else:
        for part in (b, c, d):
            a.absorb(part)
    a.settle()
    assert (a.slack > 0).any()
    assert (a.slack <= totals / (keep + 1)).all()
    assert (np.diff(a.keys) > 0).all()
    assert (a.mass > 0).all()
    kept = dict(zip(a.keys.tolist(), a.mass.tolist(), strict=True))
    for key, mass in true.items():
        assert mass - a.slack[key // vocab] <= kept.get(key, 0) <= mass
        if mass > totals[key // vocab] / (keep + 1):
            assert key in kept
    for key, count in zip(a.keys.tolist(), a.counts.tolist(), strict=True):
        assert 1 <= count <= counts[key]


def test_the_tally_s_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "_LEAST_PAIRS", 300)
    monkeypatch.setattr(tally, "_PAIRS_A_FEATURE", 0)
    vocab, d_sae = 1000, 10
    rng = np.random.default_rng(0)
    total = TokenTally.empty(d_sae, vocab)
    for _ in range(20):
        features = rng.integers(0, d_sae, 400)
        # Half of the firings are on the feature's own token.
        tokens = np.where(rng.random(400) < 0.5, features, rng.integers(0, vocab, 400))
        total.add(np.sort(features * vocab + tokens), np.ones(400, np.int64))
        assert len(total.keys) + sum(len(keys) for keys, *_ in total.waiting) <= 450
    total.settle()
    order, rank = total.heaviest_first()
    own = np.arange(10) * vocab + np.arange(10)
    np.testing.assert_array_equal(total.keys[order[rank == 0]], own)
    assert total.counts[order[rank == 0]].sum() >= 0.45 * 20 * 400


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(0, 2.0**100, width=32, exclude_min=True), min_size=1, max_size=30),
    cut=st.integers(0, 30),
)
def test_a_histogram_does_not_depend_on_what_came_first(values: list[float], cut: int) -> None:
    array = np.array(values, np.float32)

    def of(*parts: np.ndarray) -> Histograms:
        made = Histograms.empty(2)
        for part in parts:
            if len(part):
                made.add(np.array([1]), np.array([0]), part)
        return made

    whole, merged = of(array), of(array[cut:])
    merged.absorb(of(array[:cut]))
    for other in (of(array[:cut], array[cut:]), of(*array[:, None]), merged):
        np.testing.assert_array_equal(other.counts, whole.counts)
        np.testing.assert_array_equal(other.exponents, whole.exponents)
    edges = whole.edges(np.array([0, 1]))
    assert (edges[0] == 0).all()
    assert edges[1, -1] / 2 <= array.max() < edges[1, -1]
    np.testing.assert_array_equal(whole.counts[1], np.histogram(array, edges[1])[0])
    assert whole.counts[0].sum() == 0
    assert whole.counts.shape == (2, BINS)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 400))
def test_tenths_are_those_of_all_activations(seed: int, n: int) -> None:
    """To what a bin of the histogram holds; exactly where activations are spread evenly."""
    rng = np.random.default_rng(seed)
    values = np.sort(rng.exponential(2.0, n).astype(np.float32) + 1e-3)
    every = Histograms.empty(3)
    every.add(np.array([1]), np.array([0]), values)
    found = every.tenths(np.ones(n, np.int64), values)
    assert (np.diff(found) >= 0).all() and 0 <= found[0] <= found[-1] <= 9
    in_bin = every.counts[1].max()
    true = 10 * np.arange(n) / n
    assert (np.abs(found + 0.5 - true) <= 0.5 + 10 * in_bin / n + 1e-9).all()
    even = ((np.arange(320) + 0.5) / 10).astype(np.float32)
    every = Histograms.empty(1)
    every.add(np.array([0]), np.array([0]), even)
    np.testing.assert_array_equal(every.tenths(np.zeros(320, int), even), np.arange(320) // 32)


def test_the_sample_is_fair() -> None:
    """Every tenth of the text is drawn from alike, for each feature apart."""
    n, features = 1000, 300
    contexts, positions = np.divmod(np.arange(n), 100)
    tokens = token_keys(contexts, positions)
    drawn = np.stack([np.argsort(firing_keys(tokens, np.full(n, f)))[:30] for f in range(features)])
    found = np.bincount(drawn.ravel() // 100, minlength=10)
    expected = 30 * features / 10
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected)
    # Two features draw from the same tokens no more often than by chance: 30² / 1000.
    shared = [len(np.intersect1d(a, b)) for a, b in itertools.pairwise(drawn)]
    assert 0.7 < np.mean(shared) < 1.1


@pytest.mark.parametrize("vocab", [2**16 - 1, 2**16, 200_000])
def test_windows_of_large_vocabularies(vocab: int) -> None:
    made = Settings(2, vocab, (), top_contexts=1, sampled=1, before=1, after=1)
    statistics = Statistics.empty(made)
    tokens = np.array([[0, vocab - 1, 5]], np.int32)
    statistics.add(
        Block(
            tokens,
            np.zeros((1, 3), int),
            tokens.astype(np.int64),
            np.ones((1, 3), bool),
            np.array([7]),
            np.array([0, 1]),
            np.array([1, 1]),
            np.array([2, 3], np.float32),
        )
    )
    statistics.settle()
    assert statistics.examples.codes.itemsize == (2 if vocab < 2**16 else 4)
    rows = statistics.examples.rows(np.array([1]))
    np.testing.assert_array_equal(rows.tokens[0, 0], tokens[0])
    np.testing.assert_allclose(rows.activations[0, 0], [2, 3, 0], rtol=4e-3)
    assert Window(1, 1).size == rows.tokens.shape[-1]


def test_an_activation_too_large_to_add_up_is_refused() -> None:
    class Loud:
        d_sae = 1

        def encode(self, x: torch.Tensor) -> Codes:
            zero = torch.zeros(1, dtype=torch.long)
            return Codes(zero, zero, torch.tensor([2.0**41]), 2)

    batch = ContextBatch(
        np.ones((1, 2), np.int32), np.zeros((1, 2), np.int32), torch.zeros(1, 2, 3), 4
    )
    with pytest.raises(IndexingError, match=r"contexts 4 to 4 is 2.2e\+12, expected below 2e\+07"):
        collect([batch], Loud(), special_ids=(), lexicon=Lexicon(CASES["wordpiece"][0], 3))
