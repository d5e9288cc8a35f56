"""Features that fire together, and the sample of tokens on which that is counted."""

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from saesteer.features import coactive, collect
from saesteer.features.coactive import TokenSample, partners
from saesteer.features.sample import token_keys
from tests.test_features_collect import SPECIAL, an_sae, collected, dense, some_batches


def test_the_token_sample_holds_the_codes_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coactive, "_MOST", 200)
    # Many blocks also for a short stream.
    monkeypatch.setattr(collect, "_FIRST_BLOCK", 50)
    monkeypatch.setattr(collect, "_LARGEST_BLOCK", 50)
    monkeypatch.setattr(collect, "_A_FEATURE", 0)
    sae, batches = an_sae(), some_batches(30)
    sample = collected(batches, sae).token_sample
    tokens, _, codes = dense(batches, sae)
    c, s = np.nonzero(~np.isin(tokens, SPECIAL))
    keys = token_keys(c, s)
    order = np.argsort(keys)
    cost = np.cumsum(1 + (codes[c, s] > 0).sum(1)[order])
    order = order[cost <= 200]
    assert 30 < len(order) < len(keys)
    np.testing.assert_array_equal(sample.keys, keys[order])
    fires = codes[c[order], s[order]] > 0
    np.testing.assert_array_equal(sample.sizes, fires.sum(1))
    np.testing.assert_array_equal(sample.features, np.nonzero(fires)[1])


def a_sample(fires: np.ndarray) -> TokenSample:
    """The sample of tokens on which fire [tokens, features] says that they fire."""
    sample = TokenSample.empty()
    keys = np.arange(len(fires), dtype=np.uint64)
    sample.add(keys, fires.sum(1).astype(np.int32), np.nonzero(fires)[1].astype(np.int32))
    sample.settle()
    return sample


@pytest.mark.parametrize("at_once", [50, 2**23])
def test_partners_equal_a_loop(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(coactive, "_PAIRS_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    n, d_sae = 400, 15
    fires = rng.random((n, d_sae)) < rng.uniform(0.02, 0.4, d_sae)
    fires[:, 3] = fires[:, 8] & (rng.random(n) < 0.8)
    fires[:, 11] = False
    found = partners(a_sample(fires), d_sae, most=4, least=3)
    for f in range(d_sae):
        expected = []
        for g in range(d_sae):
            both = int((fires[:, f] & fires[:, g]).sum())
            one, other = fires[:, f].sum(), fires[:, g].sum()
            if g == f or both < 3 or both * n <= one * other:
                continue
            table = np.array([[both, one - both], [other - both, n - one - other + both]])
            ratio = chi2_contingency(table, lambda_="log-likelihood", correction=False)[0]
            expected.append((-ratio, g, both * n / (one * other), both))
        expected = sorted(expected)[:4]
        there = found.features[f] >= 0
        np.testing.assert_array_equal(found.features[f][there], [e[1] for e in expected])
        np.testing.assert_allclose(found.lift[f][there], [e[2] for e in expected], rtol=1e-6)
        np.testing.assert_array_equal(found.n[f][there], [e[3] for e in expected])
    assert found.features[3, 0] == 8
    assert found.features[8, 0] == 3
    assert (found.features[11] == -1).all()


def test_no_more_pairs_are_looked_at_than_there_is_time_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fires = np.random.default_rng(0).random((300, 12)) < 0.3
    fires[:, 5] = fires[:, 4]
    cost = np.cumsum(fires.sum(1) ** 2)
    monkeypatch.setattr(coactive, "_PAIRS", int(cost[199]))
    found, first = (partners(a_sample(x), 12, least=1) for x in (fires, fires[:200]))
    for one, other in zip(found, first, strict=True):
        np.testing.assert_array_equal(one, other)
    assert found.features[4, 0] == 5


def test_nothing_fires_together_where_nothing_fires() -> None:
    assert (partners(TokenSample.empty(), 5).features == -1).all()
    assert (partners(a_sample(np.zeros((9, 5), bool)), 5).features == -1).all()
