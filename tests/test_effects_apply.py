"""Directions and maps become the edits that their use says."""

from dataclasses import replace

import pytest
import torch

from saesteer.core.hooks import capture
from saesteer.core.model import HookPoint
from saesteer.directions.direction import Direction, Map, Use
from saesteer.effects.apply import edits
from saesteer.errors import SteeringError
from saesteer.steering.edits import Add, Affine, Project
from saesteer.steering.engine import steer
from saesteer.steering.positions import Positions
from tests.tiny import BOS, WIDTH, random_ids, tiny_model

POINT = HookPoint(1, "resid_post")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def direction(use: Use = Use(), **provenance: object) -> Direction:  # noqa: B008  (frozen)
    return Direction(normal(WIDTH), POINT, "mine", 32, "answer-mean", "f00d", provenance, use)


def a_map() -> Map:
    return Map(normal(WIDTH, WIDTH), normal(WIDTH), POINT, "mine", 32, "answer-mean", "f00d")


def moved(parts, strength: float, point: HookPoint = POINT):  # type: ignore[no-untyped-def]
    """x [seq, d] at a point without and with the edits; the first token is BOS."""
    model = tiny_model()
    ids = torch.cat([torch.tensor([[BOS]]), random_ids(1, 6)], 1)
    with torch.no_grad():
        with capture(model, [point]) as found:
            model(ids)
        plain = found[point][0]
        with steer(model, edits(parts, strength)), capture(model, [point]) as found:
            model(ids)
    return plain, found[point][0]


@pytest.mark.parametrize("strength", [-1.5, 0.0, 0.5, 1.0, 2.0])
def test_a_vector_is_added_so_many_times(strength: float) -> None:
    part = direction()
    (edit,) = edits(part, strength)
    assert isinstance(edit, Add)
    plain, steered = moved(part, strength)
    torch.testing.assert_close(steered[1:], plain[1:] + strength * part.vector)
    assert torch.equal(steered[0], plain[0])


@pytest.mark.parametrize("strength", [-1.5, 0.0, 0.5, 1.0, 2.0])
def test_a_projection_goes_so_much_of_its_way(strength: float) -> None:
    part = direction(Use("project", to=3.0))
    unit = part.vector / part.vector.norm()
    plain, steered = moved(part, strength)
    want = plain + strength * (3.0 - plain @ unit)[:, None] * unit
    torch.testing.assert_close(steered[1:], want[1:], rtol=1e-5, atol=1e-5)
    assert torch.equal(steered[0], plain[0])
    assert isinstance(edits(part)[0], Project)


@pytest.mark.parametrize("strength", [-1.5, 0.0, 0.5, 1.0, 2.0])
def test_a_map_goes_so_much_of_its_way(strength: float) -> None:
    part = a_map()
    plain, steered = moved(part, strength)
    want = plain + strength * (plain @ part.matrix.T + part.shift - plain)
    torch.testing.assert_close(steered[1:], want[1:], rtol=1e-4, atol=1e-4)


def test_an_ablation_is_a_projection_at_every_write_and_on_every_token() -> None:
    places = ["layers.0.resid_pre", "layers.0.attn_out", "layers.1.mlp_out"]
    part = direction(Use("ablate"), writes=places)
    made = edits(part)
    assert [str(edit.point) for edit in made] == places
    assert all(edit.where == Positions(special=True) for edit in made)
    assert all(isinstance(edit, Project) and edit.to == 0 for edit in made)
    half = edits(part, 0.5)
    assert len({id(edit) for edit in half}) == 3
    assert all(isinstance(edit, Affine) for edit in half)
    unit = part.vector / part.vector.norm()
    plain, steered = moved(
        direction(Use("ablate"), writes=places[:1]), 0.5, HookPoint(0, "resid_pre")
    )
    torch.testing.assert_close(steered @ unit, plain @ unit / 2, rtol=1e-4, atol=1e-6)


def test_a_partial_ablation_keeps_one_matrix_for_all_writes() -> None:
    places = [f"layers.{i}.resid_pre" for i in range(3)]
    made = edits(direction(Use("ablate"), writes=places), 0.5)
    assert len({edit.matrix.data_ptr() for edit in made}) == 1


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("all", Positions()),
        ("prompt", Positions(generated=False)),
        ("generated", Positions(prompt=False)),
    ],
)
def test_where(where: str, expected: Positions) -> None:
    for part in (direction(Use(where=where)), direction(Use("project", to=1.0, where=where))):
        assert edits(part)[0].where == expected
    assert edits(replace(a_map(), use=Use("map", where=where)))[0].where == expected


def test_a_position_counts_from_the_first_token_after_bos() -> None:
    part = direction(Use(where="prompt", position=2), bos=1)
    plain, steered = moved(part, 1.0)
    changed = (steered - plain).abs().amax(-1) > 0
    assert changed.tolist() == [False, False, False, True, False, False, False]
    without = direction(Use(where="prompt", position=2), bos=0)
    plain, steered = moved(without, 1.0)
    changed = (steered - plain).abs().amax(-1) > 0
    assert changed.tolist() == [False, False, True, False, False, False, False]


def test_several_parts_act_in_order() -> None:
    parts = [direction(), direction(Use("project", to=1.0)), a_map()]
    assert [type(edit) for edit in edits(parts)] == [Add, Project, Affine]
    assert [type(edit) for edit in edits(parts[::-1])] == [Affine, Project, Add]


def test_gradients_reach_what_is_added() -> None:
    vector = normal(WIDTH).requires_grad_()
    model = tiny_model()
    with steer(model, edits(replace(direction(), vector=vector), 2.0)):
        model(random_ids(1, 4)).logits.sum().backward()
    assert vector.grad is not None
    assert float(vector.grad.norm()) > 0


def test_what_no_edit_can_do_is_refused() -> None:
    with pytest.raises(SteeringError, match="no directions"):
        edits([])
    with pytest.raises(SteeringError, match="list of the model's writes"):
        edits(direction(Use("ablate")))
    zero = replace(direction(Use("project", to=1.0)), vector=torch.zeros(WIDTH))
    for strength in (0.5, 1.0):
        with pytest.raises(SteeringError, match="zero"):
            edits(zero, strength)
    with pytest.raises(SteeringError, match="strength"):
        edits(direction(), float("nan"))
