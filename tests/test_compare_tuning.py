"""α_max, shares of the budget, and what is chosen."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saesteer.compare import tuning
from saesteer.compare.tuning import Tried, alpha_max, choose, hardest, ladder, shares
from saesteer.errors import SteeringError


@given(st.floats(-6, 8), st.floats(0.5, 4))
def test_alpha_max_is_where_half_a_nat_is_reached(size, power):
    true = 2.0**size
    found = alpha_max(lambda strength: 0.5 * (strength / true) ** power)
    assert found.reached and found.tried <= 24
    assert 0.475 <= 0.5 * (found.strength / true) ** power <= 0.5 + 1e-9
    assert found.above > true * (1 - 1e-9)


def test_alpha_max_stands_before_a_jump_and_is_capped_where_nothing_breaks():
    found = alpha_max(lambda strength: 0.0 if strength < 3 else math.inf)
    assert found.reached and 2.98 < found.strength < 3 <= found.above < 3.02
    found = alpha_max(lambda strength: 0.01)
    assert (found.strength, found.reached, found.above) == (1024.0, False, None)
    with pytest.raises(SteeringError, match="every strength"):
        alpha_max(lambda strength: math.nan)


@given(st.integers(1, 200), st.integers(1, 20))
def test_shares_spend_the_budget_and_no_more(budget, settings):
    found = shares(budget, settings)
    assert sum(found) == budget and min(found) >= 1 and max(found) - min(found) <= 1
    assert len(found) == min(budget, settings)


def test_the_ladder_ends_at_alpha_max():
    assert ladder(8.0, 4) == [(0.25, 2.0), (0.5, 4.0), (0.75, 6.0), (1.0, 8.0)]


def some_tried() -> list[Tried]:
    figures = [(0.1, 0.04), (0.3, 0.09), (0.3, 0.08), (-0.2, 0.2), (0.9, 0.3), (5.0, 0.6)]
    return [Tried(0, float(i), None, gain, cost) for i, (gain, cost) in enumerate(figures)]


def test_the_highest_gain_within_the_cost_is_chosen():
    found = choose(some_tried(), [0.01, 0.05, 0.1, 0.25, 0.5])
    assert [one and one.strength for one in found.values()] == [None, 0.0, 2.0, 2.0, 4.0]
    assert choose([Tried(0, 1.0, None, -0.1, 0.0)], [0.5]) == {0.5: None}


def test_a_control_pushes_as_hard_as_it_may():
    found = hardest(some_tried(), [0.01, 0.1, 0.25])
    assert [one and one.strength for one in found.values()] == [None, 1.0, 3.0]


def test_choices_as_json_name_their_setting():
    found = tuning.to_json(choose(some_tried(), [0.01, 0.5]), [{"point": "here"}])
    assert found["0.01"] is None
    assert found["0.5"]["setting"] == {"point": "here"} and found["0.5"]["strength"] == 4.0
