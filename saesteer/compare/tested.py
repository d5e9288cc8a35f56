"""What an arm's evaluations on held-out items are, draw by draw."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saesteer.compare.tuned import Tuned

Value = Mapping[str, Any]
Key = tuple[str, int, float]
"""An arm, its number of pairs, the share of their labels that is swapped."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tested:
    """An arm's evaluations on held-out items.

    Attributes:
        values: by δ, one a draw; None where no edit was chosen.
        ood: the same out of distribution, at the problem's δ.
        by_alpha: for each draw by strength / α_max. raw: of draw 0 by strength.
        ood_slopes: of draw 0 by strength / α_max, out of distribution.
    """

    tuned: Tuned
    values: dict[float, list[dict[str, Any] | None]]
    ood: list[dict[str, Any] | None]
    by_alpha: list[dict[float, dict[str, Any]]]
    raw: dict[float, dict[str, Any]]
    ood_slopes: dict[float, dict[str, Any]]

    @property
    def arm(self) -> str:
        """Its name."""
        return self.tuned.made.contender.arm

    def gains(self, delta: float, base: Floats) -> Floats:
        """Margin less the base's, [draws, n]; 0 where nothing was edited or made."""
        return np.stack([margins_or(value, base) - base for value in self.values[delta]])


def margins_or(value: Value | None, base: Floats) -> Floats:
    """An evaluation's margins; the base's where nothing was edited, or nothing could be made."""
    return base if value is None or "failed" in value else np.asarray(value["margins"])
