"""What is claimed of arms: corrections over the family, groups beside prompts, unpaired draws."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.compare import claims, statistics
from saesteer.compare.claims import comparisons, family
from saesteer.compare.summaries import _mean_cost
from tests.some_trial import a_problem, a_trial


def gains(seed, draws, n, mean=0.0, spread=1.0):
    return np.random.default_rng(seed).normal(mean, spread, (draws, n))


def test_over_groups_the_interval_is_that_of_the_groups_resampled():
    groups = np.repeat(list("vwxyz"), 8)
    shift = np.repeat([1.2, 0.9, 0.1, -0.2, 0.8], 8)
    of = {"a": gains(0, 4, 40, spread=0.1) + shift, "b": gains(1, 4, 40, spread=0.1)}
    (one,) = family(of, [("a", "b")], 0.1, seed=3, groups=list(groups))
    expected = statistics.paired(of["a"], of["b"], list(groups), seed=3)
    assert one["by_group"]["groups"] == 5
    assert one["by_group"]["p"] == expected.p
    over, within = one["by_group"]["difference"], one["difference"]
    assert (over["low"], over["high"]) == (expected.difference.low, expected.difference.high)
    assert over["value"] == pytest.approx(within["value"])  # groups of the same size
    assert over["low"] < 0 < within["low"]
    assert one["verdict"] == "better"  # the prompts' verdict stands; the words say the rest


@pytest.mark.parametrize("groups", [None, list(range(12)), ["one"] * 12])
def test_groups_of_one_prompt_or_a_single_group_are_not_resampled(groups):
    of = {"a": gains(0, 1, 12), "b": gains(1, 1, 12)}
    assert family(of, [("a", "b")], 0.1, seed=0, groups=groups)[0]["by_group"] is None


def test_only_the_declared_pairs_are_told_by_group(tmp_path):
    trial = a_trial(tmp_path, a_problem())
    n = len(trial.items("test"))
    shared = [SimpleNamespace(group=i // 2) for i in range(n)]
    one = SimpleNamespace(problem=trial.problem, seed=0, items=lambda part: shared)
    found = comparisons(one, {"sae-clamp": gains(0, 3, n), "mean-difference": gains(1, 3, n)})
    assert [claim["primary"] for claim in found] == [True, False, False]
    assert found[0]["by_group"]["groups"] == len({item.group for item in shared})
    assert [claim["by_group"] for claim in found[1:]] == [None, None]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(-0.3, 0.3), min_size=1, max_size=4), st.integers(0, 99))
def test_as_good_as_needs_holm_over_the_family(means, seed):
    of = {f"a{i}": gains(seed + i, 1, 30, mean, 0.2) for i, mean in enumerate(means)}
    of["b"] = np.zeros((1, 30))
    found = family(of, [(arm, "b") for arm in of if arm != "b"], 0.15, seed=0)
    raw = [one["tost_p"] for one in found]
    assert [one["tost_p_holm"] for one in found] == pytest.approx(statistics.holm(raw).tolist())
    for one in found:
        assert one["tost_p_holm"] >= one["tost_p"]
        if one["verdict"] == "as good as":
            assert one["tost_p_holm"] < claims.LEVEL <= one["p_holm"]
        if one["verdict"] == "undecided":
            assert one["tost_p_holm"] >= claims.LEVEL


def test_a_raw_p_below_the_level_is_not_enough():
    near = np.linspace(-0.4, 0.4, 30)
    of = {f"a{i}": near[None] for i in range(6)} | {"b": np.zeros((1, 30))}
    margin = next(
        m
        for m in np.linspace(0.05, 0.2, 200)
        if 0.01 < float(statistics.tost(near, m, seed=0)) < 0.04
    )
    alone = family(of, [("a0", "b")], margin, seed=0)
    assert alone[0]["verdict"] == "as good as"
    assert alone[0]["tost_p"] == alone[0]["tost_p_holm"]
    together = family(of, [(f"a{i}", "b") for i in range(6)], margin, seed=0)
    assert [one["tost_p"] for one in together] == [alone[0]["tost_p"]] * 6
    assert {one["verdict"] for one in together} == {"undecided"}
    assert family(of, [], margin, seed=0) == []


def test_the_draws_of_the_random_control_are_not_paired_with_pairs():
    of = {"random": gains(0, 20, 15), "a": gains(1, 10, 15, 0.3), "none": np.zeros((1, 15))}
    held, turned, alone = family(
        of, [("a", "random"), ("random", "a"), ("random", "none")], 0.1, seed=0
    )
    assert held["difference"]["value"] == pytest.approx(of["a"].mean() - of["random"].mean())
    assert "10 draws" in held["difference"]["how"]
    assert turned["difference"]["value"] == pytest.approx(-held["difference"]["value"])
    assert "20 draws" in alone["difference"]["how"]  # one draw beside many: nothing to pair
    of["random"] = of["random"][np.random.default_rng(2).permutation(20)]
    again = family(of, [("a", "random")], 0.1, seed=0)[0]
    assert again["difference"]["low"] == pytest.approx(held["difference"]["low"])


def test_other_arms_are_held_draw_by_draw():
    shared = gains(0, 10, 15, spread=5.0)
    of = {"a": shared + gains(1, 10, 15, 0.5, 0.01), "shuffled-labels": shared}
    (one,) = family(of, [("a", "shuffled-labels")], 0.1, seed=0)
    assert one["difference"]["high"] - one["difference"]["low"] < 0.1


def test_a_failed_draw_makes_no_arm_cheaper():
    gave = [{"cost": {"delta_ce": 0.2}}, {"cost": {"delta_ce": 0.4}}]
    assert _mean_cost([*gave, {"failed": "no feature"}], "delta_ce") == pytest.approx(0.3)
    assert _mean_cost([{"failed": "no feature"}], "delta_ce") is None
    assert _mean_cost([None, None], "delta_ce") == 0.0
