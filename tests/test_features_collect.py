"""The one pass that collects what features fire on, against loops written out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.core.model import HookPoint
from saesteer.core.sae import Codes, Sae
from saesteer.core.shards import ContextBatch
from saesteer.errors import IndexingError
from saesteer.features import collect as module
from saesteer.features.collect import Statistics, collect
from saesteer.features.examples import NO_TOKEN
from saesteer.features.tally import TokenTally

VOCAB, D, D_SAE, LENGTH = 23, 6, 40, 12
SPECIAL = (0, 1)


def an_sae(seed: int = 0, *, k: int = 4) -> Sae:
    rng = torch.Generator().manual_seed(seed)
    weights = torch.randn(D, D_SAE, generator=rng)
    bias = torch.randn(D_SAE, generator=rng) * 0.1
    return Sae(
        weights,
        bias,
        weights.T.contiguous(),
        torch.zeros(D),
        "topk",
        HookPoint(0, "resid_post"),
        None,
        k=k,
    )


def some_batches(n_contexts: int, *, batch: int = 3, seed: int = 0) -> list[ContextBatch]:
    """Contexts that begin with BOS (special), with documents that end inside and cross them."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, VOCAB, (n_contexts, LENGTH)).astype(np.int32)
    documents = np.cumsum(rng.random((n_contexts, LENGTH)) < 0.15).reshape(n_contexts, LENGTH)
    documents = documents.astype(np.int32)
    tokens[:, 0], documents[:, 0] = 1, -1
    tokens[rng.random(tokens.shape) < 0.05] = 0
    activations = torch.from_numpy(rng.normal(size=(n_contexts, LENGTH, D))).float()
    activations[:, 0] *= 100  # as real BOS activations are
    return [
        ContextBatch(tokens[i : i + batch], documents[i : i + batch], activations[i : i + batch], i)
        for i in range(0, n_contexts, batch)
    ]


def collected(batches: list[ContextBatch], sae: Sae, **kwargs: int) -> Statistics:
    return collect(batches, sae, special_ids=SPECIAL, vocab_size=VOCAB, **kwargs)


def dense(batches: list[ContextBatch], sae: Sae) -> tuple[np.ndarray, ...]:
    """tokens [c, s], documents [c, s], activations of features [c, s, d_sae]; special ones 0."""
    tokens = np.concatenate([b.tokens for b in batches])
    documents = np.concatenate([b.documents for b in batches])
    x = torch.cat([b.activations for b in batches])
    codes = sae.encode(x).dense(D_SAE).numpy().reshape(*tokens.shape, D_SAE)
    codes[np.isin(tokens, SPECIAL)] = 0
    return tokens, documents, codes


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks also for a short stream."""
    monkeypatch.setattr(module, "_FIRST_BLOCK", 50)
    monkeypatch.setattr(module, "_LARGEST_BLOCK", 200)


@pytest.mark.usefixtures("small_blocks")
def test_numbers_equal_those_of_a_dense_code() -> None:
    sae, batches = an_sae(), some_batches(30)
    found = collected(batches, sae)
    tokens, _, codes = dense(batches, sae)
    counted = ~np.isin(tokens, SPECIAL)
    assert found.n_tokens == counted.sum()
    np.testing.assert_array_equal(found.fired, (codes > 0).sum((0, 1)))
    np.testing.assert_allclose(found.mass, codes.sum((0, 1)), rtol=1e-6)
    np.testing.assert_array_equal(found.max_act, codes.max((0, 1)))
    np.testing.assert_allclose(found.density, (codes > 0)[counted].mean(0))
    mean = codes.sum((0, 1)) / np.maximum(1, (codes > 0).sum((0, 1)))
    np.testing.assert_allclose(found.mean_act, mean, rtol=1e-6)
    np.testing.assert_array_equal(found.token_counts, np.bincount(tokens[counted], minlength=VOCAB))


@pytest.mark.usefixtures("small_blocks")
def test_tally_equals_a_loop() -> None:
    sae, batches = an_sae(), some_batches(20)
    tally = collected(batches, sae).tally
    tokens, _, codes = dense(batches, sae)
    table = np.zeros((D_SAE, VOCAB))
    counts = np.zeros((D_SAE, VOCAB), int)
    for c, s, f in np.argwhere(codes > 0):
        table[f, tokens[c, s]] += codes[c, s, f]
        counts[f, tokens[c, s]] += 1
    assert (np.diff(tally.keys) > 0).all()
    np.testing.assert_array_equal(tally.keys, np.flatnonzero(counts))
    np.testing.assert_array_equal(tally.counts, counts.ravel()[tally.keys])
    np.testing.assert_allclose(tally.mass, table.ravel()[tally.keys], rtol=1e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("n", [1, 3, 20])
def test_examples_are_the_best_token_of_each_document(n: int) -> None:
    sae, batches = an_sae(), some_batches(30)
    examples = collected(batches, sae, top_contexts=n, before=3, after=2).examples
    tokens, documents, codes = dense(batches, sae)
    for f in range(D_SAE):
        best: dict[int, tuple[float, int, int]] = {}
        for c, s in np.argwhere(codes[..., f] > 0):
            document = int(documents[c, s])
            entry = (-float(codes[c, s, f]), int(c), int(s))
            best[document] = min(best.get(document, entry), entry)
        expected = sorted((entry, document) for document, entry in best.items())[:n]
        filled = len(expected)
        assert (examples.values[f, filled:] == 0).all()
        for j, ((value, c, s), document) in enumerate(expected):
            assert examples.values[f, j] == -value
            assert examples.documents[f, j] == document
            assert (examples.contexts[f, j], examples.positions[f, j]) == (c, s)
            for w, position in enumerate(range(s - 3, s + 3)):
                inside = 0 <= position < LENGTH and documents[c, position] == document
                assert examples.tokens[f, j, w] == (tokens[c, position] if inside else NO_TOKEN)
                expected_act = codes[c, position, f] if inside else 0
                assert examples.activations[f, j, w] == expected_act


def test_special_tokens_do_not_count() -> None:
    sae, batches = an_sae(), some_batches(10)
    with_bos = collect(batches, sae, special_ids=(), vocab_size=VOCAB)
    without = collected(batches, sae)
    assert without.max_act.max() < with_bos.max_act.max() / 5
    assert with_bos.n_tokens == 10 * LENGTH > without.n_tokens
    assert not np.isin(without.tally.keys % VOCAB, SPECIAL).any()


@settings(max_examples=20, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 10), min_size=2, max_size=2).map(sorted),
    left_first=st.booleans(),
    seed=st.integers(0, 5),
)
def test_merge_is_associative_and_equals_one_pass(
    cuts: list[int], left_first: bool, seed: int
) -> None:
    sae, batches = an_sae(seed), some_batches(30, seed=seed)
    parts = [batches[: cuts[0]], batches[cuts[0] : cuts[1]], batches[cuts[1] :]]
    window = {"top_contexts": 4, "before": 2, "after": 2}
    empty = Statistics.empty(D_SAE, VOCAB, top_contexts=4, window=module.Window(before=2, after=2))
    a, b, c = (collected(part, sae, **window) if part else empty for part in parts)
    merged = a.merge(b).merge(c) if left_first else a.merge(b.merge(c))
    whole = collected(batches, sae, **window)
    assert merged.n_tokens == whole.n_tokens
    np.testing.assert_array_equal(merged.fired, whole.fired)
    np.testing.assert_allclose(merged.mass, whole.mass)
    np.testing.assert_array_equal(merged.tally.keys, whole.tally.keys)
    np.testing.assert_array_equal(merged.tally.counts, whole.tally.counts)
    for name, array in vars(whole.examples).items():
        np.testing.assert_array_equal(getattr(merged.examples, name), array, err_msg=name)


def test_merge_leaves_its_arguments_alone() -> None:
    sae, batches = an_sae(), some_batches(12)
    a, b = collected(batches[:2], sae), collected(batches[2:], sae)
    before = a.examples.values.copy()
    a.merge(b)
    np.testing.assert_array_equal(a.examples.values, before)


def test_contexts_of_different_lengths() -> None:
    sae, batches = an_sae(), some_batches(8, batch=1)
    short = batches[3]
    batches[3] = ContextBatch(
        short.tokens[:, :7], short.documents[:, :7], short.activations[:, :7], 3
    )
    parts = [collected([batch], sae) for batch in batches]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    found = collected(batches, sae)
    np.testing.assert_array_equal(found.fired, merged.fired)
    np.testing.assert_array_equal(found.examples.values, merged.examples.values)
    np.testing.assert_array_equal(found.examples.tokens, merged.examples.tokens)


def test_pruning_keeps_the_heaviest_and_bounds_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saesteer.features.tally._PAIRS", 300)
    monkeypatch.setattr("saesteer.features.tally._KEPT", 2)
    vocab, d_sae = 1000, 10
    rng = np.random.default_rng(0)
    total = TokenTally.empty(d_sae, vocab)
    for _ in range(20):
        features = rng.integers(0, d_sae, 400)
        # Half of the firings are on the feature's own token.
        tokens = np.where(rng.random(400) < 0.5, features, rng.integers(0, vocab, 400))
        part = TokenTally.of(
            features, tokens, np.ones(400, np.float32), d_sae=d_sae, vocab_size=vocab
        )
        total = total.merge(part)
        assert len(total.keys) <= 300
        assert (np.diff(total.keys) > 0).all()
    order, rank = total.heaviest_first()
    np.testing.assert_array_equal(
        total.keys[order[rank == 0]], np.arange(10) * vocab + np.arange(10)
    )
    assert total.counts[order[rank == 0]].sum() >= 0.45 * 20 * 400


class Silent:
    """An encoder of which nothing ever fires."""

    d_sae = D_SAE

    def encode(self, x: torch.Tensor) -> Codes:
        none = torch.zeros(0, dtype=torch.long)
        return Codes(none, none, torch.zeros(0), x.shape[0] * x.shape[1])


def test_features_that_never_fire() -> None:
    found = collected(some_batches(5), Silent())
    assert found.n_tokens > 0
    assert found.fired.sum() == 0 == found.max_act.sum() == found.mean_act.sum()
    assert len(found.tally.keys) == 0


def test_bad_input_is_refused_in_one_line() -> None:
    sae, batches = an_sae(), some_batches(2)
    with pytest.raises(IndexingError, match="no token to index"):
        collected([], sae)
    only_bos = ContextBatch(
        np.ones((1, LENGTH), np.int32),
        np.full((1, LENGTH), -1, np.int32),
        torch.zeros(1, LENGTH, D),
        0,
    )
    with pytest.raises(IndexingError, match="no token to index"):
        collected([only_bos], sae)
    with pytest.raises(IndexingError, match="vocabulary of 5"):
        collect(batches, sae, special_ids=(), vocab_size=5)
    batches[0].activations[1, 3, 2] = torch.nan
    with pytest.raises(IndexingError, match="contexts 0 to 1 hold NaN"):
        collected(batches, sae)
    one, other = collected(some_batches(2), sae), collected(some_batches(2), sae, top_contexts=3)
    with pytest.raises(IndexingError, match="can't be merged"):
        one.merge(other)
