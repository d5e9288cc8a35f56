"""What a method fits on contrast pairs: a direction or an affine map, with where it came from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from saesteer.core.model import HookPoint
from saesteer.errors import SteeringError, did_you_mean

How = Literal["add", "project", "ablate", "icv", "map"]
Where = Literal["all", "prompt", "generated"]


@dataclass(frozen=True)
class Use:
    """How a direction or a map is meant to be applied. It is JSON; `effects.apply` follows it.

    how: "add" the vector; "project", set the projection on vector/‖vector‖ to `to`; "ablate",
        take it out wherever the model writes; "icv", add it and keep the norm; "map", apply a Map.
    to: of "project", in units of activation.
    where: "all" plain tokens, or those of the "prompt" or of what is "generated" alone.
    position: only the token at this place of the prompt, 0 being the first after BOS; None is all.

    Raises SteeringError for anything else.
    """

    how: How = "add"
    to: float | None = None
    where: Where = "all"
    position: int | None = None

    def __post_init__(self) -> None:
        for value, known, what in ((self.how, How, "use"), (self.where, Where, "place")):
            if value not in get_args(known):
                hint = did_you_mean(str(value), get_args(known))
                raise SteeringError(
                    f"unknown {what} {value!r} of a direction{hint}; use one of {get_args(known)}"
                )
        if (self.how == "project") != (self.to is not None):
            raise SteeringError(
                f"a use {self.how!r} with to={self.to!r}: 'project', and it alone, says what the "
                "projection is set to"
            )
        if self.to is not None and not math.isfinite(self.to):
            raise SteeringError(f"a projection can't be set to {self.to}; give a finite number")
        if self.position is not None and self.position < 0:
            raise SteeringError(
                f"position {self.position} of a prompt; they count from 0, the first after BOS"
            )


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector of the stream at a hook point, fitted on contrast pairs.

    vector: [d] float32 (d_model; d_head at a single head), in units of activation: adding it once
        moves the mean of the rejected side to the mean of the chosen side (for a mean difference).
    read: what of an answer was read, one of `answers.READS` or "after:TEXT".
    model_fingerprint: of the weights it was fitted on.
    provenance: anything else worth keeping; must be JSON.
    use: how it is meant to be applied.

    `a + b`, `a - b`, `-a`, `2.0 * a` and `a.orthogonal_to(b)` make new ones of directions that are
    to be added at one place of one model: SteeringError where they are not. The new one's
    provenance names what it was made of, and its `n_pairs` is the smaller of the two.
    """

    vector: Tensor
    point: HookPoint
    method: str
    n_pairs: int
    read: str
    model_fingerprint: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    use: Use = Use()

    def __add__(self, other: "Direction") -> "Direction":
        if not isinstance(other, Direction):
            return NotImplemented
        _check_same_place(self, other)
        return _made(self.vector + other.vector, "{} + {}", self, other)

    def __sub__(self, other: "Direction") -> "Direction":
        if not isinstance(other, Direction):
            return NotImplemented
        _check_same_place(self, other)
        return _made(self.vector - other.vector, "{} - {}", self, other)

    def __neg__(self) -> "Direction":
        return _made(-self.vector, "-{}", self)

    def __mul__(self, factor: float) -> "Direction":
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        if not math.isfinite(factor):
            raise SteeringError(f"a direction times {factor}; multiply by a finite number")
        return _made(self.vector * factor, f"{factor:g} * {{}}", self)

    __rmul__ = __mul__

    def orthogonal_to(self, other: "Direction") -> "Direction":
        """This direction without its part along `other`.

        Raises:
            SteeringError: of another place or model, `other` is zero, or nothing is left.
        """
        _check_same_place(self, other)
        v, b = self.vector.double(), other.vector.double()
        if not bool(b.any()):
            raise SteeringError("a direction can't be made orthogonal to zero; give another one")
        b = b / b.norm()
        rest = v - (v @ b) * b
        # Where nothing is left, what rounding leaves in float32 would be taken for a direction.
        if float(rest.norm()) <= 1e-6 * float(v.norm()):
            raise SteeringError(
                "the two directions are parallel, so that nothing is left of the first without "
                "the second"
            )
        return _made(rest.to(self.vector.dtype), "{} orthogonal to {}", self, other)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, aside and renamed; `load` reads it.

        Raises:
            RunError: the folder can't be written, or the disk is full.
        """
        from saesteer.directions.kept import save_parts  # kept.py rests on this module

        save_parts(path, [self])

    @classmethod
    def load(
        cls, path: str | Path, *, model_fingerprint: str | None = None, force: bool = False
    ) -> "Direction":
        """Read a saved direction.

        Args:
            model_fingerprint: of the model it is meant for; None doesn't check.
            force: load it for another model all the same.

        Raises:
            SteeringError: missing, damaged or foreign, fitted on another model, or a file of
                several directions or of a map, which `kept.load_parts` reads.
        """
        from saesteer.directions.kept import load_parts

        parts = load_parts(path, model_fingerprint=model_fingerprint, force=force)
        if len(parts) != 1 or not isinstance(parts[0], Direction):
            raise SteeringError(
                f"{path} holds {len(parts)} directions or maps, not one direction; read it with "
                "saesteer.directions.kept.load_parts"
            )
        return parts[0]

    def check_fits(self, model_fingerprint: str, name: str = "this direction") -> None:
        """Raise SteeringError if it was fitted on a model with other weights."""
        check_fits(self, model_fingerprint, name)


@dataclass(frozen=True, eq=False)
class Map:
    """An affine map of the stream at a hook point: x becomes matrix · x + shift.

    matrix: [d, d] float32. shift: [d] float32, in units of activation. The rest as in `Direction`.
    Raises SteeringError where the shapes don't agree.
    """

    matrix: Tensor
    shift: Tensor
    point: HookPoint
    method: str
    n_pairs: int
    read: str
    model_fingerprint: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    use: Use = Use("map")

    def __post_init__(self) -> None:
        if self.shift.dim() != 1 or self.matrix.shape != (len(self.shift), len(self.shift)):
            raise SteeringError(
                f"a map with a matrix of shape {list(self.matrix.shape)} and a shift of shape "
                f"{list(self.shift.shape)}; expected [d, d] and [d]"
            )


Part = Direction | Map
"""What a method fits at one hook point; a method may fit several."""


def check_fits(part: Part, model_fingerprint: str, name: str) -> None:
    """Raise SteeringError if `part`, called `name`, was fitted on a model with other weights."""
    if part.model_fingerprint != model_fingerprint:
        raise SteeringError(
            f"{name} was fitted on another model (fingerprint {part.model_fingerprint}, this "
            f"one has {model_fingerprint}); fit it on this model, or force it"
        )


def _check_same_place(a: Direction, b: Direction) -> None:
    if a.point != b.point:
        raise SteeringError(
            f"a direction at {a.point} and one at {b.point} can't be combined; fit both at one "
            "hook point"
        )
    check_fits(b, a.model_fingerprint, "the second direction")
    if a.vector.shape != b.vector.shape:
        raise SteeringError(
            f"a direction of {len(a.vector)} dimensions and one of {len(b.vector)} can't be "
            "combined; fit both on one model"
        )


def _made(vector: Tensor, how: str, *of: Direction) -> Direction:
    """`vector`, made of the directions `of`; `how` has a place for the name of each."""
    for part in of:
        if part.use.how != "add":
            raise SteeringError(
                f"{part.method} is a direction to {part.use.how}, and sums and multiples of such "
                "have no meaning; make it one to add with dataclasses.replace(…, use=Use())"
            )
    if any(part.use != of[0].use for part in of):
        raise SteeringError(
            "the two directions are meant for different tokens (see their use); give them one use "
            "with dataclasses.replace"
        )
    names = [f"({p.method})" if " " in p.method else p.method for p in of]
    parts = [
        {
            "method": part.method,
            "n_pairs": part.n_pairs,
            "read": part.read,
            "norm": float(torch.linalg.vector_norm(part.vector.double())),
            "provenance": dict(part.provenance),
        }
        for part in of
    ]
    return Direction(
        vector,
        of[0].point,
        how.format(*names),
        min(part.n_pairs for part in of),
        ", ".join(dict.fromkeys(part.read for part in of)),
        of[0].model_fingerprint,
        {"made_of": parts},
        of[0].use,
    )
