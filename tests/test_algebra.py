"""Directions written as text."""

import pytest
import torch

from saesteer.core.model import HookPoint
from saesteer.directions.algebra import combined, names_in
from saesteer.directions.direction import Direction, Use
from saesteer.errors import SteeringError

POINT = HookPoint(1, "resid_post")


def direction(*values, point=POINT, of="model", use=Use()):  # noqa: B008  (frozen)
    return Direction(torch.tensor(values), point, "mean-difference", 32, "answer-mean", of, {}, use)


A, B, LONG = direction(1.0, 2.0), direction(3.0, -1.0), direction(10.0, 20.0)
KNOWN = {"a": A, "b": B, "a-b": LONG, "calm-lat-0": B, "is": A, "7": LONG}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [1, 2]),
        ("a + b", [4, 1]),
        ("a - 0.5*b", [-0.5, 2.5]),
        ("a-0.5*b", [-0.5, 2.5]),
        ("-(a + 2*b)/4", [-1.75, 0]),
        ("+a - -b", [4, 1]),
        (".5 * 2 * (3 - 1) * a", [2, 4]),
        # Longest first: a dash without spaces belongs to a name where there is such a name.
        ("a-b", [10, 20]),
        ("a - b", [-2, 3]),
        ("b-a", [2, -3]),
        ("2*calm-lat-0", [6, -2]),
        ("is + b", [4, 1]),
        ("7*a", [7, 14]),
        ("1e1*a", [10, 20]),
        ("orthogonal(b, a)", [2.8, -1.4]),
        ("2*orthogonal(a + b, a) - b", [2.6, -1.8]),
    ],
)
def test_an_expression_is_what_it_says(text, expected):
    found = combined(text, KNOWN)
    torch.testing.assert_close(found.vector, torch.tensor(expected, dtype=torch.float32))
    assert found.provenance["expression"] == text
    assert (found.point, found.model_fingerprint, found.use) == (POINT, "model", Use())


def test_it_is_what_the_operators_give_with_their_provenance():
    by_hand = A - 0.5 * B
    found = combined("a - 0.5*b", KNOWN)
    assert torch.equal(found.vector, by_hand.vector)
    assert found.method == by_hand.method
    assert found.provenance["made_of"] == by_hand.provenance["made_of"]


def test_names_are_found_in_the_order_in_which_they_stand():
    assert names_in("b + 2*orthogonal(a-b, b)", KNOWN) == ("b", "a-b")
    orthogonal = {**KNOWN, "orthogonal": A}
    assert names_in("orthogonal + orthogonal(a, b)", orthogonal) == ("orthogonal", "a", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a + c", r"no direction 'c'.*there are 7, a, a-b, b"),
        ("calm-lta-0 + a", "no direction 'calm'"),
        ("_0 + a", "no direction '_0'"),  # the parser's own stand-ins are no names
        ("__import__('os').system('true')", "no direction '__import__'"),
        ("a.vector", "no direction 'vector'"),
        ("a +", "can't be read"),
        ("", "can't be read"),
        ("a b", "can't be read"),
        ("a ** 2", "can't be read"),
        ("a[0]", "can't be read"),
        ("[a, b]", "can't be read"),
        ("'a'", "can't be read|no direction"),
        ("a(b)", "can't be read"),
        ("orthogonal(a)", "can't be read"),
        ("orthogonal(a, *b)", "can't be read"),
        ("orthogonal(a, 2)", "is of two directions"),
        ("a * b", "can't be multiplied"),
        ("a + 1", "can't be added"),
        ("a / 0", "divide by a number other than 0"),
        ("2 / a", "divide by a number"),
        ("2 * 3", "is a number"),
        ("a - a", "comes to zero"),
        ("orthogonal(a, 2*a)", "parallel"),
        ("1e30*1e30*a", "too long for float32"),
        ("1e999*a", "finite"),
        ("-" * 100_000 + "a", "can't be read"),
        ("(" * 5_000 + "a" + ")" * 5_000, "can't be read"),
        ("9" * 5_000 + "*a", "can't be read"),
    ],
)
def test_what_has_no_meaning_is_refused(text, message):
    with pytest.raises(SteeringError, match=message) as refused:
        combined(text, KNOWN)
    assert len(str(refused.value)) < 400


def test_directions_of_two_places_models_or_uses_are_not_combined():
    elsewhere = direction(1.0, 2.0, point=HookPoint(0, "resid_post"))
    foreign = direction(1.0, 2.0, of="another")
    projected = direction(1.0, 2.0, use=Use("project", to=1.0))
    for other, message in (
        (elsewhere, "fit both at one hook point"),
        (foreign, "fitted on another model"),
        (projected, "a direction to project"),
    ):
        with pytest.raises(SteeringError, match=message):
            combined("a + b", {"a": A, "b": other})
