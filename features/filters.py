"""Which features the filters of a query let through."""

import operator
import sqlite3
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from saesteer.errors import IndexingError
from saesteer.features.query import Filter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def allowed(
    filters: Sequence[Filter],
    connection: sqlite3.Connection,
    column: "Callable[[str], NDArray[np.float32]]",
) -> "NDArray[np.bool_] | None":
    """The features that all filters let through: bool [n_features], or None without filters.

    A figure that was not measured passes no comparison.

    Args:
        column: name of a figure -> [n_features], NaN where not measured.

    Raises:
        IndexingError: a figure was measured of no feature at all.
    """
    if not filters:
        return None
    import numpy as np

    passed = np.ones(len(column("density")), bool)
    for one in filters:
        if one.sign in _COMPARE:
            values = column(one.name)
            if np.isnan(values).all():
                raise IndexingError(
                    f"no {one.name} was measured of any feature, so {one.name}{one.sign}"
                    f"{one.value:g} finds none; measure some with `saesteer index RUN --effects N`"
                )
            # As the figures are kept: a bound that is one of them equals it.
            passed &= _COMPARE[one.sign](values, np.float32(one.value))
            continue
        if one.value == "dead":
            own = column("max_act") <= 0
        else:
            if one.name == "tag":
                rows = connection.execute(
                    "SELECT feature FROM tags WHERE tag = ?", (str(one.value).casefold(),)
                )
            else:
                rows = connection.execute("SELECT feature FROM notes WHERE starred")
            own = np.zeros(len(passed), bool)
            own[[i for (i,) in rows if 0 <= i < len(own)]] = True
        passed &= own if one.sign == "=" else ~own
    return passed
