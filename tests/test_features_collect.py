"""The one pass that collects what features fire on, against loops written out by hand."""

from collections import Counter
from collections.abc import Iterable
from copy import deepcopy

import numpy as np
import pytest
import torch

from saesteer.core.model import HookPoint
from saesteer.core.sae import Codes, Sae
from saesteer.core.shards import ContextBatch
from saesteer.errors import IndexingError
from saesteer.features import collect as module
from saesteer.features.checkpoint import arrays
from saesteer.features.collect import Statistics, collect
from saesteer.features.examples import NO_TOKEN, Rows
from saesteer.features.sample import firing_keys, token_keys
from saesteer.features.statistics import PLACES
from saesteer.features.tally import UNIT
from saesteer.features.words_in import WORDS, Lexicon, hashed

VOCAB, D, D_SAE, LENGTH = 23, 6, 40, 12
SPECIAL = (0, 1)


class Spelled:
    """Tokens of made-up words: every third is glued to the one before, every seventh is a stop."""

    def texts(self, ids: Iterable[int]) -> list[str]:
        return ["." if i % 7 == 0 else f"x{i}" if i % 3 == 0 else f" w{i}" for i in ids]

    window = texts


LEXICON = Lexicon(Spelled(), VOCAB)  # type: ignore[arg-type]


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
    return collect(batches, sae, special_ids=SPECIAL, lexicon=LEXICON, **kwargs)


def dense(batches: list[ContextBatch], sae: Sae) -> tuple[np.ndarray, ...]:
    """tokens [c, s], documents [c, s], activations of features [c, s, d_sae]; special ones 0."""
    tokens = np.concatenate([b.tokens for b in batches])
    documents = np.concatenate([b.documents for b in batches])
    x = torch.cat([b.activations for b in batches])
    codes = sae.encode(x).dense(D_SAE).numpy().reshape(*tokens.shape, D_SAE)
    codes[np.isin(tokens, SPECIAL)] = 0
    return tokens, documents, codes


def assert_same(one: Statistics, other: Statistics) -> None:
    """That every number of both is the same."""
    assert one.settings == other.settings
    assert (one.n_tokens, one.n_contexts) == (other.n_tokens, other.n_contexts)
    theirs = {path: getattr(part, name) for path, part, name in arrays(other)}
    for path, part, name in arrays(one):
        np.testing.assert_array_equal(getattr(part, name), theirs[path], err_msg=path)
    assert one.spellings == other.spellings


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks also for a short stream."""
    monkeypatch.setattr(module, "_FIRST_BLOCK", 50)
    monkeypatch.setattr(module, "_LARGEST_BLOCK", 200)
    monkeypatch.setattr(module, "_A_FEATURE", 0)


@pytest.mark.usefixtures("small_blocks")
def test_numbers_equal_those_of_a_dense_code() -> None:
    sae, batches = an_sae(), some_batches(30)
    found = collected(batches, sae)
    tokens, _, codes = dense(batches, sae)
    counted = ~np.isin(tokens, SPECIAL)
    assert found.n_tokens == counted.sum()
    np.testing.assert_array_equal(found.fired, (codes > 0).sum((0, 1)))
    units = np.rint(codes.astype(np.float64) / UNIT)
    np.testing.assert_array_equal(found.mass, units.sum((0, 1)))
    np.testing.assert_array_equal(found.max_act, codes.max((0, 1)))
    np.testing.assert_allclose(found.density, (codes > 0)[counted].mean(0))
    mean = codes.sum((0, 1)) / np.maximum(1, (codes > 0).sum((0, 1)))
    np.testing.assert_allclose(found.mean_act, mean, rtol=1e-5)
    np.testing.assert_array_equal(found.token_counts, np.bincount(tokens[counted], minlength=VOCAB))


@pytest.mark.usefixtures("small_blocks")
def test_words_are_counted_once_an_occurrence() -> None:
    sae, batches = an_sae(), some_batches(40)
    found = collected(batches, sae)
    tokens, documents, codes = dense(batches, sae)
    spelled = Spelled().texts(range(VOCAB))
    occurred: Counter[str] = Counter()
    fired: Counter[tuple[int, str]] = Counter()
    mass: Counter[tuple[int, str]] = Counter()
    for c in range(len(tokens)):
        runs: list[list[int]] = []
        for s in range(LENGTH):
            if tokens[c, s] in SPECIAL:
                continue
            piece = spelled[tokens[c, s]]
            before = spelled[tokens[c, s - 1]] if s else ""
            goes_on = (
                s > 0
                and tokens[c, s - 1] not in SPECIAL
                and documents[c, s] == documents[c, s - 1]
                and piece[0] == "x"
                and before != "."
            )
            if goes_on:
                runs[-1].append(s)
            else:
                runs.append([s])
        # What may be cut off at the end of a context is no whole word.
        if runs and runs[-1][-1] == LENGTH - 1 and spelled[tokens[c, -1]] != ".":
            runs.pop()
        for run in runs:
            word = "".join(spelled[t] for t in tokens[c, run]).strip()
            occurred[word] += 1
            for f in np.flatnonzero((codes[c, run] > 0).any(0)).tolist():
                fired[f, word] += 1
                mass[f, word] += int(np.rint(codes[c, run, f].astype(np.float64) / UNIT).sum())
    assert max(word.count("x") for word in occurred) > 1
    spellings = found.spellings
    counts = {
        spellings[k]: n for k, n in zip(found.word_counts.keys, found.word_counts.mass, strict=True)
    }
    assert counts == occurred
    pairs = [(k // WORDS, spellings[k % WORDS]) for k in found.words.keys.tolist()]
    assert dict(zip(pairs, found.words.counts.tolist(), strict=True)) == fired
    assert dict(zip(pairs, found.words.mass.tolist(), strict=True)) == mass
    assert all(key == hashed(word) for key, word in spellings.items())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("following", [False, True])
def test_tallies_equal_a_loop(following: bool) -> None:
    sae, batches = an_sae(), some_batches(20)
    found = collected(batches, sae)
    tally = found.next_tally if following else found.tally
    tokens, documents, codes = dense(batches, sae)
    mass, counts = np.zeros((D_SAE, VOCAB), np.int64), np.zeros((D_SAE, VOCAB), np.int64)
    for c, s, f in np.argwhere(codes > 0):
        at = s + following
        if at < LENGTH and documents[c, at] == documents[c, s] and tokens[c, at] not in SPECIAL:
            mass[f, tokens[c, at]] += round(float(codes[c, s, f]) / UNIT)
            counts[f, tokens[c, at]] += 1
    assert counts.sum() > 100
    assert (np.diff(tally.keys) > 0).all()
    np.testing.assert_array_equal(tally.keys, np.flatnonzero(counts))
    np.testing.assert_array_equal(tally.counts, counts.ravel()[tally.keys])
    np.testing.assert_array_equal(tally.mass, mass.ravel()[tally.keys])
    np.testing.assert_array_equal(counts.sum(1), found.next_fired if following else found.fired)
    np.testing.assert_array_equal(mass.sum(1), found.next_mass if following else found.mass)


@pytest.mark.usefixtures("small_blocks")
def test_next_tokens_and_places_equal_a_loop() -> None:
    sae, batches = an_sae(), some_batches(25)
    found = collected(batches, sae)
    tokens, documents, codes = dense(batches, sae)
    next_counts, places = np.zeros(VOCAB, int), np.zeros((D_SAE + 1, PLACES), int)
    for c, s in np.argwhere(~np.isin(tokens, SPECIAL)):
        place = int(s).bit_length()
        places[:-1, place] += codes[c, s] > 0
        places[-1, place] += 1
        if s + 1 < LENGTH and documents[c, s + 1] == documents[c, s]:
            next_counts[tokens[c, s + 1]] += tokens[c, s + 1] not in SPECIAL
    np.testing.assert_array_equal(found.next_counts, next_counts)
    np.testing.assert_array_equal(found.positions, places[:-1])
    np.testing.assert_array_equal(found.position_counts, places[-1])
    assert found.n_contexts == 25


@pytest.mark.usefixtures("small_blocks")
def test_histograms_equal_a_dense_code() -> None:
    sae, batches = an_sae(), some_batches(30)
    found = collected(batches, sae)
    codes = dense(batches, sae)[2]
    edges = found.histograms.edges(np.arange(D_SAE))
    for f in range(D_SAE):
        values = codes[..., f][codes[..., f] > 0]
        highest = values.max(initial=0)
        assert edges[f, -1] / 2 <= highest < edges[f, -1] or len(values) == 0 == edges[f, -1]
        if len(values):
            expected = np.histogram(values, edges[f])[0]
            np.testing.assert_array_equal(found.histograms.counts[f], expected)


def assert_window(rows: Rows, f: int, j: int, text: tuple[np.ndarray, ...], before: int) -> None:
    """That example j of feature f shows the text around it and what the feature does there."""
    tokens, documents, codes = text
    c, s = rows.contexts[f, j], rows.positions[f, j]
    document = documents[c, s]
    assert rows.documents[f, j] == document
    size = rows.tokens.shape[-1]
    near = np.arange(s - before, s - before + size)
    inside = (near >= 0) & (near < LENGTH)
    near = near.clip(0, LENGTH - 1)
    inside &= documents[c, near] == document
    np.testing.assert_array_equal(rows.tokens[f, j], np.where(inside, tokens[c, near], NO_TOKEN))
    true = np.where(inside, codes[c, near, f], 0)
    shown = rows.activations[f, j]
    assert shown[before] == rows.values[f, j] == true[before] > 0
    np.testing.assert_array_equal(shown > 0, true > 0)
    assert np.abs(shown - true).max() <= true.max() / 255 * (1 + 1e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("n", [1, 3, 20])
def test_examples_are_the_best_token_of_each_document(n: int) -> None:
    sae, batches = an_sae(), some_batches(30)
    found = collected(batches, sae, top_contexts=n, before=3, after=2)
    rows = found.examples.rows(np.arange(D_SAE))
    text = dense(batches, sae)
    _, documents, codes = text
    for f in range(D_SAE):
        best: dict[int, tuple[float, int, int]] = {}
        for c, s in np.argwhere(codes[..., f] > 0):
            document = int(documents[c, s])
            entry = (-float(codes[c, s, f]), int(c), int(s))
            best[document] = min(best.get(document, entry), entry)
        expected = sorted(best.values())[:n]
        kept = list(zip(-rows.values[f], rows.contexts[f], rows.positions[f], strict=True))
        assert kept[: len(expected)] == expected
        assert kept[len(expected) :] == [(0, -1, -1)] * (n - len(expected))
        assert (rows.tokens[f, len(expected) :] == NO_TOKEN).all()
        for j in range(len(expected)):
            assert_window(rows, f, j, text, before=3)


@pytest.mark.usefixtures("small_blocks")
def test_the_sample_is_drawn_by_hash() -> None:
    sae, batches = an_sae(), some_batches(30)
    found = collected(batches, sae, sampled=5, before=4, after=1)
    rows = found.sample.rows(np.arange(D_SAE))
    text = dense(batches, sae)
    for f in range(D_SAE):
        c, s = np.nonzero(text[2][..., f])
        keys = firing_keys(token_keys(c, s), np.full(len(c), f))
        chosen = np.argsort(keys)[:5]
        expected = sorted(zip(-text[2][c[chosen], s[chosen], f], c[chosen], s[chosen], strict=True))
        kept = list(zip(-rows.values[f], rows.contexts[f], rows.positions[f], strict=True))
        assert kept[: len(expected)] == expected
        for j in range(len(expected)):
            assert_window(rows, f, j, text, before=4)


def test_special_tokens_do_not_count() -> None:
    sae, batches = an_sae(), some_batches(10)
    with_bos = collect(batches, sae, special_ids=(), lexicon=LEXICON)
    without = collected(batches, sae)
    assert without.max_act.max() < with_bos.max_act.max() / 5
    assert with_bos.n_tokens == 10 * LENGTH > without.n_tokens
    assert not np.isin(without.tally.keys % VOCAB, SPECIAL).any()


def test_merge_leaves_its_arguments_alone() -> None:
    sae, batches = an_sae(), some_batches(12)
    a, b = collected(batches[:2], sae), collected(batches[2:], sae)
    before = deepcopy(a)
    a.merge(b)
    assert_same(a, before)


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
    assert_same(found, merged)


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
        collect(batches, sae, special_ids=(), lexicon=Lexicon(LEXICON.pieces, 5))
    batches[0].activations[1, 3, 2] = torch.nan
    with pytest.raises(IndexingError, match="contexts 0 to 1 hold NaN"):
        collected(batches, sae)
    one, other = collected(some_batches(2), sae), collected(some_batches(2), sae, top_contexts=3)
    with pytest.raises(IndexingError, match="can't be merged"):
        one.merge(other)


def test_no_token_follows_the_last_of_a_context() -> None:
    """A document that goes on in the next context: what is between them is not known to be next."""
    tokens = np.full((2, 3), 5, np.int32)
    batch = ContextBatch(tokens, np.zeros((2, 3), np.int32), torch.ones(2, 3, D), 0)
    found = collected([batch], an_sae())
    assert found.next_counts.sum() == 4
    assert set(found.next_fired.tolist()) == {0, 4} and set(found.fired.tolist()) == {0, 6}
