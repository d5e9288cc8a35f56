"""What to change: small values that say it, and nothing of how it is done.

    Clamp(sae, feature, value)              hold an SAE feature at a value (raw activation units)
    Add(vector, strength, point)            add a direction

Values are raw: a strength written "8x" (times max_act) is resolved before it gets here.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from saesteer.core.model import HookPoint
from saesteer.core.sae import Sae
from saesteer.errors import FeatureError, SteeringError, did_you_mean
from saesteer.steering.positions import Positions

# Squares of larger numbers overflow float32, in which edits and norms are computed.
LARGEST = 1e15

How = Literal["set", "min", "max", "scale"]


@dataclass(frozen=True, eq=False)
class Clamp:
    """Hold one SAE feature at a value.

    With a the feature's activation on a token, the code gets t in its place:
    set t = value · min (a floor) t = max(a, value) · max (a cap) t = min(a, value) ·
    scale t = value · a. `set 0` is ablation.

    sae, feature: which feature. point: where, by default where the SAE was trained; a HookPoint
    or its name. where: on which tokens. Raises SteeringError for a value that is not a finite
    number, an unknown `how` or a transcoder, and FeatureError for a feature that the SAE doesn't
    have.
    """

    sae: Sae
    feature: int
    value: float
    how: How = "set"
    point: HookPoint | str | None = None
    where: Positions = field(default_factory=Positions)

    def __post_init__(self) -> None:
        if self.how not in get_args(How):
            raise SteeringError(
                f"unknown kind of clamp {self.how!r}{did_you_mean(self.how, get_args(How))}: "
                f"use {', '.join(get_args(How))}"
            )
        if self.sae.hook_point_out is not None:
            raise SteeringError(
                f"the SAE is a transcoder from {self.sae.hook_point} to {self.sae.hook_point_out}, "
                "whose features can't be clamped yet: clamp a feature of an SAE of one place, or "
                f"add the decoder row, Add(sae.direction({self.feature}), strength, "
                "sae.write_point)"
            )
        feature = _whole(self.feature)
        if feature is None or not 0 <= feature < self.sae.d_sae:
            raise FeatureError(
                f"feature {self.feature} does not exist: this SAE has features 0 to "
                f"{self.sae.d_sae - 1}"
            )
        object.__setattr__(self, "feature", feature)
        object.__setattr__(self, "value", _finite(self.value, f"value of feature {feature}"))
        object.__setattr__(self, "point", _point(self.point or self.sae.hook_point))

    def __str__(self) -> str:
        return f"feature {self.feature} {self.how} {self.value:g} at {self.point}"


@dataclass(frozen=True, eq=False)
class Add:
    """Add strength · vector to the activation.

    vector: [d_model], any floating dtype and device; gradients flow to it. strength: a factor
    (the vector is taken as it is, not normalised). point: a HookPoint or its name. where: on
    which tokens. Raises SteeringError where a number isn't finite or the vector isn't flat.
    """

    vector: Tensor
    strength: float
    point: HookPoint | str
    where: Positions = field(default_factory=Positions)

    def __post_init__(self) -> None:
        if not isinstance(self.vector, Tensor) or self.vector.dim() != 1:
            shape = tuple(getattr(self.vector, "shape", ())) or type(self.vector).__name__
            raise SteeringError(f"a vector to add must be a tensor of shape [d_model], not {shape}")
        if not bool(self.vector.isfinite().all()):
            raise SteeringError("the vector to add holds NaN or infinite numbers")
        object.__setattr__(self, "strength", _finite(self.strength, "strength"))
        object.__setattr__(self, "point", _point(self.point))

    def __str__(self) -> str:
        return f"add {self.strength:g} × vector at {self.point}"


Edit = Clamp | Add


def place(edit: Edit) -> HookPoint:
    """The hook point of an edit."""
    return _point(edit.point)


def _point(point: HookPoint | str | None) -> HookPoint:
    if isinstance(point, HookPoint):
        return point
    return HookPoint.parse(str(point))


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
