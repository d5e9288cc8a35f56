"""saesteer.compare.metrics: hand-computed values, closed forms and invariants."""

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saesteer.compare.metrics import (
    STRENGTHS,
    alpha_break,
    best_within,
    harmonic,
    headline,
    pres,
    relative_ood,
    slope_summary,
    slopes,
)
from saesteer.compare.statistics import bootstrap, wilson
from saesteer.effects.dose import BREAK, breaking_points
from saesteer.errors import SteeringError

RNG = np.random.default_rng(0)
NUMBERS = st.floats(-10, 10)


def test_slopes_are_numpys_fits() -> None:
    margins = RNG.normal(size=(7, 20))
    assert slopes(STRENGTHS, margins) == pytest.approx(np.polyfit(STRENGTHS, margins, 1)[0])


@given(NUMBERS, NUMBERS, st.lists(NUMBERS, min_size=2, max_size=6, unique=True))
def test_a_line_has_its_slope(a: float, b: float, strengths: list[float]) -> None:
    if np.ptp(strengths) < 0.01:
        return
    x = np.array(strengths)
    assert slopes(x, (a + b * x)[:, None]) == pytest.approx([b], abs=1e-6)


def test_a_slope_in_units_of_alpha_max_is_alpha_max_times_it() -> None:
    margins = RNG.normal(size=(7, 5))
    assert slopes(np.array(STRENGTHS) * 4.0, margins) * 4.0 == pytest.approx(
        slopes(STRENGTHS, margins)
    )


def test_a_summary_by_hand() -> None:
    found = slope_summary([-1.0, 0.0, 1.0, 2.0, 3.0])
    assert (found.mean, found.sd) == (1.0, pytest.approx(np.sqrt(2.5)))
    expected = {"5": -0.8, "25": 0.0, "50": 1.0, "75": 2.0, "95": 2.8}
    assert found.quantiles == pytest.approx(expected)
    assert found.anti_steerable == wilson(1, 5)  # 0 is not below 0
    assert set(asdict(found)) == {"mean", "sd", "quantiles", "anti_steerable"}
    assert slope_summary([2.0]).sd == 0.0


def test_relative_ood() -> None:
    assert relative_ood(0.8, 0.2) == pytest.approx(0.25)
    assert relative_ood(0.8, -0.4) == pytest.approx(-0.5)
    assert relative_ood(0.0, 0.2) is None
    assert relative_ood(-0.1, 0.2) is None


CONTROL = ([-4.0, -1.0, -3.0, -2.0], [-5.0, -2.0, -4.0, -3.0])
STEERED = ([-2.0, -1.0, -2.0, -2.5], [-5.0, -4.0, -4.0, -2.0])


def test_pres_by_hand() -> None:
    """Positives by likelihood: −4, −3, −2, −1, moved by 2, 1, −.5, 0; negatives from the likeliest:
    −2, −3, −4, −5, pushed down by 2, −1, 0, 0."""
    found = pres(*CONTROL, *STEERED)
    assert [room.n for room in found] == [1, 2, 3]
    assert [room.positive for room in found] == pytest.approx([2.0, 1.5, 2.5 / 3])
    assert [room.negative for room in found] == pytest.approx([2.0, 0.5, 1 / 3])


def test_pres_normalised_by_hand() -> None:
    """The control's max is −1. Steered likelihoods doubled have a max of −2, so that "own" halves
    them again, and "control" leaves them."""
    doubled = tuple([2 * value for value in side] for side in STEERED)
    own = pres(*CONTROL, *doubled, normalise="own")
    assert own == pres(*CONTROL, *STEERED, normalise="own")
    assert own == pres(*CONTROL, *STEERED)  # divided by 1
    assert pres(*CONTROL, *doubled, normalise="control") == pres(*CONTROL, *doubled)
    tenth = tuple([value / 10 for value in side] for side in (*CONTROL, *STEERED))
    for room, same in zip(pres(*tenth, normalise="control"), pres(*CONTROL, *STEERED), strict=True):
        assert room.positive == pytest.approx(same.positive)
        assert room.negative == pytest.approx(same.negative)


@given(st.integers(1, 12), st.integers(0, 10_000))
def test_no_steering_moves_no_likelihood(n: int, seed: int) -> None:
    control = -np.random.default_rng(seed).exponential(size=(2, n)) - 0.1
    for how in ("raw", "own", "control"):
        for room in pres(*control, *control, normalise=how):
            assert (room.positive, room.negative) == (0.0, 0.0)


def test_the_harmonic_mean_by_hand() -> None:
    found = harmonic([2, 2, 1, 0, 2], [2, 1, 1, 2, 2], [2, 1, 2, 2, 0.5])
    assert found == pytest.approx([2.0, 1.2, 1.2, 0.0, 1.0])


@given(st.lists(st.floats(0, 2), min_size=3, max_size=3))
def test_the_harmonic_mean_lies_between_the_least_score_and_three_of_it(
    scores: list[float],
) -> None:
    (found,) = harmonic(*([score] for score in scores))
    assert min(scores) - 1e-9 <= found <= min(2.0, 3 * min(scores)) + 1e-9


def test_best_within_takes_the_highest_gain_in_the_budget() -> None:
    gains, cost = [0.1, 0.9, 0.5, 0.5, -0.2], [0.01, 0.6, 0.08, 0.04, 0.0]
    assert best_within(gains, cost, 0.05) == 3
    assert best_within(gains, cost, 0.1) == 3  # of equals the cheaper
    assert best_within(gains, cost, 1.0) == 1
    assert best_within(gains, cost, 0.005) is None  # the one within it loses
    assert best_within([float("nan"), 0.2], [0.0, float("nan")], 1.0) is None
    assert best_within([], [], 1.0) is None


@given(st.lists(st.tuples(NUMBERS, st.floats(0, 1)), min_size=1, max_size=10))
def test_a_larger_budget_never_gains_less(rows: list[tuple[float, float]]) -> None:
    gains, cost = [row[0] for row in rows], [row[1] for row in rows]
    reached = [
        0.0 if row is None else gains[row]
        for row in (best_within(gains, cost, delta) for delta in (0.05, 0.1, 0.25, 0.5))
    ]
    assert reached == sorted(reached)


def test_the_headline_is_the_test_gain_of_the_row_that_validation_chose() -> None:
    test = RNG.normal(size=(2, 3, 12))  # the better one on test is not the one chosen
    gains, cost = [0.3, 0.2], [0.01, 0.01]
    assert headline(gains, cost, test, 0.05) == bootstrap(test[0])
    assert headline(gains, cost, test[:, 0], 0.05, seed=2) == bootstrap(test[0, 0], seed=2)
    none = headline(gains, cost, test, 0.005)
    assert (none.value, none.low, none.n) == (0.0, None, 12)
    assert none.how == "no edit: nothing gains within ΔCE ≤ 0.005"


@given(st.lists(st.tuples(NUMBERS, st.floats(0, 1)), max_size=8))
def test_alpha_break_is_the_nearer_of_the_two_breaking_points(
    rows: list[tuple[float, float]],
) -> None:
    strengths, cost = [row[0] for row in rows], [row[1] for row in rows]
    points = [one for one in breaking_points(strengths, cost, BREAK) if one is not None]
    found = alpha_break(strengths, cost)
    assert (None if found is None else abs(found)) == min(map(abs, points), default=None)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(SteeringError, match=r"expected \[s\] and \[s, n\]"):
        slopes([1.0, 2.0], [[1.0]])
    with pytest.raises(SteeringError, match="two unlike strengths"):
        slopes([1.0, 1.0], [[1.0], [2.0]])
    with pytest.raises(SteeringError, match="no slopes"):
        slope_summary([])
    with pytest.raises(SteeringError, match="four of the same"):
        pres([-1.0], [-1.0], [-1.0], [-1.0, -2.0])
    with pytest.raises(SteeringError, match="use 'raw'"):
        pres([0.0], [-1.0], [-1.0], [-1.0], normalise="own")
    with pytest.raises(SteeringError, match="outside 0 … 2"):
        harmonic([3.0], [1.0], [1.0])
    with pytest.raises(SteeringError, match="one for each"):
        headline([0.1, 0.2], [0.0, 0.0], [[0.1]], 0.5)
