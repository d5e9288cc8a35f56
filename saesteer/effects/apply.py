"""Directions and maps as edits of a model: what each method's `use` says, put into effect."""

from collections.abc import Sequence

import torch

from saesteer.core.model import HookPoint
from saesteer.directions.direction import Direction, Map, Part
from saesteer.errors import SteeringError
from saesteer.steering.edits import Add, Affine, Edit, Lean, Project
from saesteer.steering.positions import Positions

_WHERE = {
    "all": Positions(),
    "prompt": Positions(generated=False),
    "generated": Positions(prompt=False),
}
# A direction is only out of the stream where it is out of every token, as weights would have it.
_EVERYWHERE = Positions(special=True)
_ICV = 0.1  # λ of the paper


def edits(parts: Part | Sequence[Part], strength: float = 1.0) -> list[Edit]:
    """The edits that use directions and maps as they are meant to be used.

    strength: a factor on the change, 1 for the method as it is and 0 for none: strength · vector is
    added, and a projection, an ablation or a map goes so much of its way (beyond 1, further; below
    0, the other way).

    Raises:
        SteeringError: no parts, an ablation whose provenance doesn't list the model's writes, or a
            use that no edit can do.
    """
    listed = [parts] if isinstance(parts, Direction | Map) else list(parts)
    if not listed:
        raise SteeringError("no directions to steer with; fit or load at least one")
    return [edit for part in listed for edit in _edits(part, strength)]


def _edits(part: Part, strength: float) -> list[Edit]:
    where = _positions(part)
    if isinstance(part, Map):
        same = torch.eye(len(part.shift))
        matrix = same + strength * (part.matrix.float() - same)
        return [Affine(matrix, strength * part.shift.float(), part.point, where=where)]
    if part.use.how == "add":
        return [Add(part.vector, strength, part.point, part.method, where=where)]
    if part.use.how == "project":
        assert part.use.to is not None
        return _projections(part, [part.point], part.use.to, strength, where)
    if part.use.how == "ablate":
        return _ablations(part, strength)
    if part.use.how == "icv":
        return [Lean(part.vector, _ICV * strength, part.point, part.method, where=where)]
    raise SteeringError(
        f"a direction of {part.method} can't be a {part.use.how}; give it another use with "
        "dataclasses.replace(…, use=Use())"
    )


def _positions(part: Part) -> Positions:
    if part.use.position is None:
        return _WHERE[part.use.where]
    # Spans count from BOS on, where there is one.
    at = part.use.position + int(part.provenance.get("bos", 1))
    where = _WHERE[part.use.where]
    # A prompt that ends before is left as it is there: its other places are edited all the same.
    return Positions(where.prompt, where.generated, spans=((at, at + 1),), optional=True)


def _projections(
    part: Direction, points: Sequence[HookPoint], to: float, strength: float, where: Positions
) -> list[Edit]:
    """x + strength · (to − x·r̂) r̂ at each point."""
    if strength == 1:
        return [Project(part.vector, point, to, part.method, where=where) for point in points]
    if not bool(part.vector.any()):
        raise SteeringError(f"the vector of {part.method} is zero, and so no direction")
    unit = part.vector.double() / part.vector.double().norm()
    matrix = (torch.eye(len(unit)).double() - strength * torch.outer(unit, unit)).float()
    shift = (strength * to * unit).float()
    # One [d, d] for all of them: a large model has a hundred writes.
    return [Affine(matrix, shift, point, where=where) for point in points]


def _ablations(part: Direction, strength: float) -> list[Edit]:
    writes = part.provenance.get("writes")
    if not writes:
        raise SteeringError(
            "an ablation without a list of the model's writes in its provenance; fit it again"
        )
    places = [HookPoint.parse(place) for place in writes]
    return _projections(part, places, 0.0, strength, _EVERYWHERE)
