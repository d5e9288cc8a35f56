"""What to change: small values that say it, and nothing of how it is done.

    Clamp(sae, feature, value)              hold an SAE feature at a value (raw activation units)
    Add(vector, strength, point)            add a direction
    Project(vector, point, to=0)            set the projection on a direction; 0 projects it out
    Lean(vector, strength, point)           turn towards a direction, the norm kept
    Affine(matrix, shift, point)            matrix · x + shift
    Rotate(first, second, angle, point)     turn in the plane of two directions

All of them take `where`, `when`, `schedule` and `keep_norm` (see `Scope`). Values are raw: a
strength written "8x" (times max_act) is resolved before it gets here.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from saesteer.core.model import HookPoint
from saesteer.core.sae import Sae
from saesteer.errors import FeatureError, SteeringError, did_you_mean
from saesteer.steering.conditions import When
from saesteer.steering.positions import Positions
from saesteer.steering.schedules import Schedule

# Squares of larger numbers overflow float32, in which edits and norms are computed.
LARGEST = 1e15

How = Literal["set", "min", "max", "scale"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Scope:
    """What every edit has.

    where: on which tokens. when: only where a condition holds. schedule: a factor on the change,
    over the generated tokens. keep_norm: the edited activation is given the norm that it had.
    """

    where: Positions = field(default_factory=Positions)
    when: When | None = None
    schedule: Schedule | None = None
    keep_norm: bool = False


@dataclass(frozen=True, eq=False)
class Clamp(Scope):
    """Hold one SAE feature at a value.

    With a the feature's activation on a token, the code gets t in its place:
    set t = value · min (a floor) t = max(a, value) · max (a cap) t = min(a, value) ·
    scale t = value · a. `set 0` is ablation.

    sae, feature: which feature. point: where, by default where the SAE was trained; a HookPoint
    or its name. A transcoder's features are read at its input and written at its output. Raises
    SteeringError for a value that is not a finite number, an unknown `how` or a transcoder
    elsewhere, and FeatureError for a feature that the SAE doesn't have.
    """

    sae: Sae
    feature: int
    value: float
    how: How = "set"
    point: HookPoint | str | None = None

    def __post_init__(self) -> None:
        if self.how not in get_args(How):
            raise SteeringError(
                f"unknown kind of clamp {self.how!r}{did_you_mean(self.how, get_args(How))}: "
                f"use {', '.join(get_args(How))}"
            )
        moved = self.point is not None and _point(self.point) != self.sae.write_point
        if self.sae.hook_point_out is not None and moved:
            raise SteeringError(
                f"the SAE is a transcoder from {self.sae.hook_point} to {self.sae.hook_point_out}; "
                "its features can be clamped there alone: leave the point out"
            )
        feature = _whole(self.feature)
        if feature is None or not 0 <= feature < self.sae.d_sae:
            raise FeatureError(
                f"feature {self.feature} does not exist: this SAE has features 0 to "
                f"{self.sae.d_sae - 1}"
            )
        object.__setattr__(self, "feature", feature)
        object.__setattr__(self, "value", _finite(self.value, f"value of feature {feature}"))
        object.__setattr__(self, "point", _point(self.point or self.sae.write_point))

    def __str__(self) -> str:
        number = self.sae.trained_number(self.feature)
        return f"feature {number} {self.how} {self.value:.4g} at {self.point}"


@dataclass(frozen=True, eq=False)
class Add(Scope):
    """Add strength · vector to the activation.

    vector: [d_model] ([d_head] at a single head), any floating dtype and device; gradients flow to
    it. strength: a factor (the vector is taken as it is, not normalised). point: a HookPoint or
    its name. name: what receipts call the vector. Raises SteeringError where a number isn't finite
    or the vector isn't flat.
    """

    vector: Tensor
    strength: float
    point: HookPoint | str
    name: str = "vector"

    def __post_init__(self) -> None:
        _flat(self.vector, "a vector to add")
        object.__setattr__(self, "strength", _finite(self.strength, "strength"))
        object.__setattr__(self, "point", _point(self.point))

    def __str__(self) -> str:
        return f"add {self.strength:.4g} × {self.name} at {self.point}"


@dataclass(frozen=True, eq=False)
class Project(Scope):
    """Set the projection on a direction: x + (to − x·r̂) r̂, with r̂ = vector / ‖vector‖.

    vector: [d]. to: in the activation's own units; 0 projects the direction out, the mean of a
    class's x·r̂ puts every token where that class is (Arditi et al. 2024, arXiv 2406.11717). name:
    what receipts call the vector. Raises SteeringError where a number isn't finite or the vector is
    zero.
    """

    vector: Tensor
    point: HookPoint | str
    to: float = 0.0
    name: str = "vector"

    def __post_init__(self) -> None:
        _flat(self.vector, "a vector to project on", nonzero=True)
        object.__setattr__(self, "to", _finite(self.to, "projection"))
        object.__setattr__(self, "point", _point(self.point))

    def __str__(self) -> str:
        return f"projection on {self.name} to {self.to:.4g} at {self.point}"


@dataclass(frozen=True, eq=False)
class Lean(Scope):
    """Turn towards a direction, further where x points away from it; the norm stays.

    ‖x‖ · norm(x̂ + λ(1 + max(0, cos(x, −v))) v̂), of in-context vectors (Liu et al. 2023, arXiv
    2311.06668). vector: [d], of which the length is not used. strength: λ; the paper's is .1.
    name: what receipts call the vector. Raises SteeringError where a number isn't finite or the
    vector is zero.
    """

    vector: Tensor
    strength: float
    point: HookPoint | str
    name: str = "vector"

    def __post_init__(self) -> None:
        _flat(self.vector, "a vector to lean towards", nonzero=True)
        object.__setattr__(self, "strength", _finite(self.strength, "strength"))
        object.__setattr__(self, "point", _point(self.point))

    def __str__(self) -> str:
        return f"lean {self.strength:.4g} towards {self.name} at {self.point}"


@dataclass(frozen=True, eq=False)
class Affine(Scope):
    """matrix · x + shift, of an eraser or a transport map.

    matrix: [d, d]; shift: [d]. Raises SteeringError where shapes don't agree or a number isn't
    finite.
    """

    matrix: Tensor
    shift: Tensor
    point: HookPoint | str

    def __post_init__(self) -> None:
        _flat(self.shift, "a shift")
        if self.matrix.shape != (len(self.shift), len(self.shift)):
            raise SteeringError(
                f"a matrix of shape {list(self.matrix.shape)} beside a shift of {len(self.shift)}: "
                "expected [d, d] and [d]"
            )
        if not bool(self.matrix.isfinite().all()):
            raise SteeringError("the matrix holds NaN or infinite numbers")
        object.__setattr__(self, "point", _point(self.point))

    def __str__(self) -> str:
        return f"affine map at {self.point}"


@dataclass(frozen=True, eq=False)
class Rotate(Scope):
    """Turn the part of x that lies in a plane; the norm stays.

    first, second: [d], not parallel; they span the plane, and an angle counts from first towards
    second (as far as it is orthogonal to first). angle: in radians. how: "by" turns by the angle,
    "to" gives the part in the plane that angle. name: what receipts call the plane. Raises
    SteeringError for what is none of this.
    """

    first: Tensor
    second: Tensor
    angle: float
    point: HookPoint | str
    how: Literal["by", "to"] = "by"
    name: str = "a plane"

    def __post_init__(self) -> None:
        _flat(self.first, "a plane's first vector", nonzero=True)
        _flat(self.second, "a plane's second vector", nonzero=True)
        if len(self.first) != len(self.second):
            raise SteeringError(
                f"a plane's vectors have {len(self.first)} and {len(self.second)} dimensions"
            )
        cosine = torch.cosine_similarity(self.first.double(), self.second.double(), dim=0)
        if abs(float(cosine)) > 1 - 1e-6:
            raise SteeringError("a plane's two vectors are parallel: give two directions")
        if self.how not in ("by", "to"):
            raise SteeringError(f"how={self.how!r}: a rotation turns 'by' an angle or 'to' one")
        object.__setattr__(self, "angle", _finite(self.angle, "angle"))
        object.__setattr__(self, "point", _point(self.point))

    def __str__(self) -> str:
        return f"rotate {self.how} {self.angle:.4g} rad in {self.name} at {self.point}"


Edit = Clamp | Add | Project | Lean | Affine | Rotate


def width(edit: Edit) -> int:
    """Dimensions of the activation that an edit is made for."""
    if isinstance(edit, Clamp):
        return edit.sae.d_out
    if isinstance(edit, Affine):
        return len(edit.shift)
    return len(edit.first if isinstance(edit, Rotate) else edit.vector)


def place(edit: Edit) -> HookPoint:
    """The hook point of an edit."""
    return _point(edit.point)


def read_at(edit: Edit) -> HookPoint:
    """Where an edit's activation is read: where it is made, but for a transcoder's clamp."""
    if isinstance(edit, Clamp) and edit.sae.hook_point_out is not None:
        return edit.sae.hook_point
    return place(edit)


def _point(point: HookPoint | str | None) -> HookPoint:
    if isinstance(point, HookPoint):
        return point
    return HookPoint.parse(str(point))


def _flat(vector: Tensor, what: str, *, nonzero: bool = False) -> None:
    if not isinstance(vector, Tensor) or vector.dim() != 1:
        shape = tuple(getattr(vector, "shape", ())) or type(vector).__name__
        raise SteeringError(f"{what} must be a tensor of shape [d_model], not {shape}")
    if not bool(vector.isfinite().all()):
        raise SteeringError(f"{what} holds NaN or infinite numbers")
    if nonzero and not bool(vector.any()):
        raise SteeringError(f"{what} is zero, and so no direction")


def _finite(value: float, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise SteeringError(f"the {what} is {value!r}: a plain number is needed") from None
    if not math.isfinite(number):
        raise SteeringError(f"the {what} is {number}: a finite number is needed")
    if abs(number) > LARGEST:
        raise SteeringError(
            f"the {what} is {number:g}, beyond what activations can hold; {LARGEST:g} is the most"
        )
    return number


def _whole(value: int) -> int | None:
    """`value` as an int where it is a whole number (numpy's and torch's too), else None."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    return value.__index__()
