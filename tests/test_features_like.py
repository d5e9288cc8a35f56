"""Features by example and by contrast, against definitions computed the slow way."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.core.sae_codes import Codes
from saesteer.errors import IndexingError
from saesteer.features.like import auroc, by_example, contrast

D_SAE = 6


def codes(dense: list[list[float]]) -> Codes:
    x = torch.tensor(dense, dtype=torch.float32).reshape(len(dense), D_SAE)
    rows, latents = x.nonzero(as_tuple=True)
    return Codes(rows, latents, x[rows, latents], len(x))


def firing(**tokens: list[float]) -> Codes:
    """Codes of features f0, f1, …: their activations on the tokens."""
    n = len(next(iter(tokens.values())))
    dense = torch.zeros(n, D_SAE)
    for name, values in tokens.items():
        dense[:, int(name[1:])] = torch.tensor(values)
    return codes(dense.tolist())


def test_a_score_by_hand():
    found = by_example(
        firing(f1=[0, 2.0, 6.0, 0]),
        density=np.array([0, 0.1, 0, 0, 0, 0]),
        max_act=np.array([1, 4.0, 1, 1, 1, 1]),
        n_tokens=1000,
    )
    base = (100 + 0.5) / 1001
    evidence = 4 * (0.5 * math.log(0.5 / base) + 0.5 * math.log(0.5 / (1 - base)))
    (one,) = found
    assert (one.feature, one.fired, one.rate, one.base) == (1, 2, 0.5, 0.1)
    assert one.evidence == pytest.approx(evidence)
    assert one.strength == pytest.approx((0.5 + 1) / 2)  # 6 is above its max: 1 at the most
    assert one.score == pytest.approx(evidence * 0.75)


def test_rare_beats_frequent_and_strong_beats_weak():
    found = by_example(
        firing(f0=[1.0, 1.0, 0], f1=[1.0, 1.0, 0], f2=[0.1, 0.1, 0], f3=[1.0, 1.0, 1.0]),
        density=np.array([0.01, 0.2, 0.01, 1.0, 0, 0]),
        max_act=np.ones(D_SAE),
        n_tokens=10_000,
    )
    assert [one.feature for one in found][:3] == [0, 1, 2]
    assert found[-1].score < 1e-3 or found[-1].feature != 3  # what always fires tells nothing


def test_no_more_often_than_elsewhere_is_no_likeness():
    found = by_example(
        firing(f0=[1.0, 0, 0, 0], f1=[1.0, 1.0, 0, 0]),
        density=np.array([0.25, 0.6, 0, 0, 0, 0]),
        max_act=np.ones(D_SAE),
        n_tokens=10**9,
    )
    assert [one.feature for one in found if one.score > 1e-6] == []


def test_a_feature_that_never_fired_in_the_index_can_be_found():
    found = by_example(
        firing(f5=[0, 3.0]), density=np.zeros(D_SAE), max_act=np.zeros(D_SAE), n_tokens=500
    )
    assert [one.feature for one in found] == [5] and found[0].strength == 1
    assert math.isfinite(found[0].score) and found[0].score > 3


def test_nothing_fired_nothing_found():
    figures = {"density": np.zeros(D_SAE), "max_act": np.ones(D_SAE), "n_tokens": 10}
    assert by_example(codes([]), **figures) == []
    assert by_example(codes([[0.0] * D_SAE]), **figures) == []
    assert by_example(firing(f0=[1.0]), limit=0, **figures) == []


tables = st.lists(
    st.lists(
        st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.5]), min_size=D_SAE, max_size=D_SAE),
        min_size=1,
        max_size=4,
    ),
    min_size=2,
    max_size=5,
)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(tables, tables)
def test_contrast_is_the_slow_definition(positive, negative):
    pos = np.array([np.mean(text, axis=0) for text in positive], dtype=np.float64)
    neg = np.array([np.mean(text, axis=0) for text in negative], dtype=np.float64)
    found = contrast(
        [codes(text) for text in positive], [codes(text) for text in negative], limit=D_SAE
    )
    for one in found:
        p, n = pos[:, one.feature], neg[:, one.feature]
        pairs = [(a > b) + (a == b) / 2 for a in p for b in n]
        assert one.auroc == pytest.approx(np.mean(pairs))
        pooled = ((len(p) - 1) * p.var(ddof=1) + (len(n) - 1) * n.var(ddof=1)) / (
            len(p) + len(n) - 2
        )
        if one.effect_size is None:
            assert pooled == pytest.approx(0, abs=1e-12)
        else:
            assert one.effect_size == pytest.approx((p.mean() - n.mean()) / math.sqrt(pooled))
        assert one.positive == pytest.approx(p.mean())
        assert one.negative == pytest.approx(n.mean())
        assert one.fires_positive == np.mean(p > 0) and one.fires_negative == np.mean(n > 0)
    away = [abs(one.auroc - 0.5) for one in found]
    assert away == sorted(away, reverse=True)
    # What is left out is the same in both sets as far as ranks and means can tell.
    for feature in set(range(D_SAE)) - {one.feature for one in found}:
        pairs = [(a > b) + (a == b) / 2 for a in pos[:, feature] for b in neg[:, feature]]
        assert np.mean(pairs) == pytest.approx(0.5)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(tables, tables)
def test_the_sides_swapped_are_the_same_the_other_way(positive, negative):
    one = [codes(text) for text in positive]
    two = [codes(text) for text in negative]
    there = {c.feature: c for c in contrast(one, two, limit=D_SAE)}
    back = {c.feature: c for c in contrast(two, one, limit=D_SAE)}
    assert there.keys() == back.keys()
    for feature, c in there.items():
        assert back[feature].auroc == pytest.approx(1 - c.auroc)
        if c.effect_size is not None:
            assert back[feature].effect_size == pytest.approx(-c.effect_size)


def test_a_longer_text_does_not_separate_by_its_length():
    """The same share of firing tokens in texts of 2 and of 200 tokens."""
    short = [firing(f0=[1.0, 0]), firing(f0=[0, 1.0])]
    long = [firing(f0=[1.0, 0] * 100), firing(f0=[0, 1.0] * 100)]
    assert contrast(short, long) == []


def test_sets_that_are_constant_and_unlike_have_no_effect_size():
    (one,) = contrast([firing(f2=[1.0])] * 3, [firing(f2=[0.0])] * 2)
    assert one.effect_size is None and one.auroc == 1 and one.feature == 2


def test_one_text_is_no_set():
    with pytest.raises(IndexingError, match="two or more"):
        contrast([firing(f0=[1.0])], [firing(f0=[0.0])] * 3)
    assert contrast([codes([])] * 2, [codes([])] * 2) == []


def test_auroc_of_features_that_never_fire_is_one_half():
    none = np.zeros(0, np.int64)
    found = auroc(none, np.zeros(0), np.zeros(0, bool), 3, 4, 5)
    np.testing.assert_allclose(found, 0.5)
