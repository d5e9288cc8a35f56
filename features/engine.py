"""What searches the features' text: FTS5 (`fts`), or another engine in its place."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol

from saesteer.features.query import Node

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of each feature that matches, its number and its score.
Scored = list[tuple[int, float]]


class TextEngine(Protocol):
    """A full-text index of the fields of `records.FIELDS`, weighted by `rank.FIELD_WEIGHTS`."""

    def scored(
        self,
        expression: Node,
        limit: int,
        *,
        allowed: "NDArray | None" = None,
        also: Collection[int] = (),
    ) -> Scored:
        """What matches best.

        Args:
            expression: what must match.
            limit: how many of the best; of equal scores the lower numbers.
            allowed: bool [n_features], which features may be found; None: all.
            also: features that are scored whatever their place, if they match.

        Returns:
            (feature, score) of the best first, then of those of `also` that aren't among them.
            Higher is better; scores compare within one call.
        """
        ...
