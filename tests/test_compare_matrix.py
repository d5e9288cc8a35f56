"""Effects on other behaviours, and two edits at once, each against its definition."""

from dataclasses import replace

import numpy as np
import pytest

from saesteer.compare import contenders, matrix
from saesteer.compare.combine import at, combined
from saesteer.compare.matrix import chosen, interactions, off_target
from saesteer.compare.prepared import Prepared, margins_of
from saesteer.compare.problem import Behaviour
from saesteer.compare.trial import Made
from saesteer.compare.tuned import Tuned
from saesteer.compare.tuning import Tried
from saesteer.errors import SteeringError
from tests.some_material import some_pairs
from tests.some_trial import a_problem, a_trial

DELTA = 0.25
LAYER = {"point": "layers.1.resid_post"}


def tuned(trial, arm, strength, **setting) -> Tuned:
    """What an arm would have chosen; None for the strength is no edit."""
    contender = contenders.contender(
        arm, trial.problem, trial.behaviour, trial.bench.model, trial.sae, trial.index
    )
    made = Made(contender, trial.problem.headline_n if contender.fits else 0)
    choice = None if strength is None else Tried(0, strength, 0.5, 0.1, 0.1)
    choices = dict.fromkeys((0.05, 0.1, 0.25, 0.5), choice)
    return Tuned(made, (setting,), (None,), (), choices, (), 4, 100, 1e9, 1.0)


def tunes(trial, **strengths):
    arms = {
        "mean_difference": ("mean-difference", LAYER),
        "sae_clamp": ("sae-clamp", {"candidate": 0, "feature": 5}),
    }
    found = {}
    for key, strength in strengths.items():
        arm, setting = arms[key]
        found[arm, trial.problem.headline_n, 0.0] = tuned(trial, arm, strength, **setting)
    return found


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """Two behaviours on one model: the sea against the sky, and the sea against the kitchen."""
    folder = tmp_path_factory.mktemp("matrix")
    problem = a_problem()
    first = a_trial(folder, problem)
    # The second's items are of other pairs; it is fitted on the first's, which is all the same.
    items = tuple(
        replace(item, pair=pair)
        for item, pair in zip(first.split.test, some_pairs(24), strict=False)
    )
    split = replace(first.split, test=items)
    second = a_trial(folder, problem, store="other", split=split, bench=first.bench)
    second.behaviour = Behaviour("kitchen", pairs="pairs.jsonl", query="one", words=("bread",))
    return [first, second]


@pytest.fixture(scope="module")
def chose(trials):
    return [
        tunes(trials[0], mean_difference=0.5, sae_clamp=0.1),
        tunes(trials[1], mean_difference=1.5, sae_clamp=None),
    ]


def gains(prepared, strength, trial):
    pairs = [item.pair for item in trial.items("test")]
    tokenizer = trial.bench.tokenizer
    steered = margins_of(prepared, tokenizer, pairs, strength)
    return (steered - margins_of(Prepared("none", prepared.model), tokenizer, pairs)).numpy()


def arm_of(trial, own, arm):
    one = chosen(trial, own, arm)
    return trial.prepared(one.made, one.setting), one.strength


def test_the_matrix_is_the_gain_of_each_behaviours_items(trials, chose):
    found = off_target(trials, chose)
    assert found["behaviours"] == ["sea", "kitchen"]
    assert list(found["arms"]) == ["mean-difference", "sae-clamp"]
    for i, (trial, own) in enumerate(zip(trials, chose, strict=True)):
        prepared, strength = arm_of(trial, own, "mean-difference")
        for j, on in enumerate(trials):
            cell = found["arms"]["mean-difference"][i][j]
            expected = gains(prepared, strength, on)
            assert cell["value"] == pytest.approx(expected.mean(), abs=1e-5)
            assert cell["low"] < cell["value"] < cell["high"]
            assert cell["n"] == len(on.items("test"))
    # No edit was chosen for the kitchen.
    assert found["arms"]["sae-clamp"][1] == [None, None]
    assert None not in found["arms"]["sae-clamp"][0]


def test_it_is_computed_once_and_kept(trials, chose, monkeypatch):
    first = off_target(trials, chose, ["mean-difference"])
    looks = [trial.store.looks for trial in trials]

    def never(*_, **__):
        raise AssertionError("computed again")

    for trial in trials:
        monkeypatch.setattr(trial.bench, "evaluate", never)
    assert off_target(trials, chose, ["mean-difference"]) == first
    assert [trial.store.looks for trial in trials] == looks == [1, 1]


def test_a_diagonal_is_the_comparisons_own_evaluation(trials, chose):
    off_target(trials, chose, ["mean-difference"])
    kept = [
        key
        for key, _ in trials[0].store.select(split="test", behaviour="sea")
        if key.get("arm") == "mean-difference"
    ]
    assert kept and all(key["draw"] == 0 and key["strength"] == 0.5 for key in kept)
    apart = trials[0].store.count(kind="together", split="test")
    assert apart >= 1  # the kitchen's arm on the sea's items


def test_one_behaviour_has_no_others(trials, chose):
    assert off_target(trials[:1], chose[:1]) is None


def test_interactions_are_their_definition(trials, chose):
    found, not_run = interactions(trials, chose)
    by_name = {(one["a"], one["b"]): one for one in found}
    assert list(by_name) == [
        ("sae-clamp (sea)", "mean-difference (sea)"),
        ("mean-difference (sea)", "mean-difference (kitchen)"),
    ]
    why = "no edit was chosen for one of them"
    assert not_run == [
        {"what": "kitchen: sae-clamp and mean-difference together", "why": why},
        {"what": "sae-clamp for sea and kitchen together", "why": why},
    ]
    clamp = at(*arm_of(trials[0], chose[0], "sae-clamp"))
    adds = [at(*arm_of(t, own, "mean-difference")) for t, own in zip(trials, chose, strict=True)]
    for pair, on, name in (
        ((clamp, adds[0]), trials[:1], ("sae-clamp (sea)", "mean-difference (sea)")),
        (tuple(adds), trials, ("mean-difference (sea)", "mean-difference (kitchen)")),
    ):
        a, b = pair

        def effect(prepared, on=on):
            return np.concatenate([gains(prepared, 1.0, trial) for trial in on])

        first, second, both = effect(a), effect(b), effect(combined(a, b))
        expected = {
            "first": first,
            "second": second,
            "together": both,
            "interaction": both - first - second,
            "order": both - effect(combined(b, a)),
        }
        for figure, values in expected.items():
            assert by_name[name][figure]["value"] == pytest.approx(values.mean(), abs=1e-5)
            assert by_name[name][figure]["n"] == len(values)


def test_additions_add_up_in_either_order_and_a_clamp_undoes_what_was_before(trials, chose):
    """A clamp to a value takes back what an addition before it did to its feature."""
    found, _ = interactions(trials, chose)
    clamp, adds = found
    assert abs(adds["order"]["value"]) < 1e-5
    assert abs(clamp["order"]["value"]) > 1e-4


def test_what_cant_be_combined_or_made_is_told(trials, chose, monkeypatch):
    pairs = [("sae-clamp", "mean-difference")]

    def broken(self, *_):
        raise SteeringError("each bring a model of their own")

    monkeypatch.setattr(matrix, "combined", broken)
    fresh = [tunes(trials[0], mean_difference=0.75, sae_clamp=0.2), {}]
    found, not_run = interactions(trials[:1], fresh[:1], pairs)
    assert found == []
    assert not_run == [
        {
            "what": "sea: sae-clamp and mean-difference together",
            "why": "each bring a model of their own",
        }
    ]
    # A cell that can't be computed is empty, and the others stand.
    rows = off_target(trials, fresh, ["mean-difference"])["arms"]["mean-difference"]
    assert rows[0][0] is not None and rows[0][1] is None and rows[1] == [None, None]


def test_chosen_is_of_the_headline_at_the_problems_delta(trials, chose):
    one = chosen(trials[0], chose[0], "mean-difference")
    assert (one.strength, one.setting, one.made.draw) == (0.5, LAYER, 0)
    assert one.name == "mean-difference (sea)"
    assert chosen(trials[0], chose[0], "random") is None
    assert chosen(trials[1], chose[1], "sae-clamp") is None
