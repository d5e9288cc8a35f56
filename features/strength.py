"""What a strength means: "8x" of a feature, or a raw activation."""

import math
import re

from saesteer.errors import FeatureError

_STRENGTH = re.compile(
    r"\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?)\s*(x?)\s*", re.IGNORECASE
)


def strength(value: str | float, max_act: float | None, *, feature: int | None = None) -> float:
    """The raw activation that a strength means: "8x" is 8 × max_act, a bare number itself.

    Args:
        value: "8x", "-2.5x", "12" or a number.
        max_act: of the feature; None where there is no index, 0 where it never fired.
        feature: its number, for messages.

    Raises:
        FeatureError: malformed, not finite, or "8x" without a max_act.
    """
    name = "this feature" if feature is None else f"feature {feature}"
    how = 'write "8x" for 8 times its highest activation, or a plain number for a raw activation'
    match = _STRENGTH.fullmatch(str(value))
    if match is None or isinstance(value, bool) or not math.isfinite(float(match[1])):
        raise FeatureError(f"{value!r} is no strength for {name}; {how}")
    if not match[2]:
        return float(match[1])
    if max_act is None:
        raise FeatureError(
            f"{value!r} needs the highest activation of {name}, which only an index knows; make "
            "one with `saesteer index`, or give a plain number"
        )
    if max_act <= 0:
        raise FeatureError(
            f"{name} never fired on the indexed text, so {value!r} means nothing; choose another "
            "feature, or give a plain number"
        )
    if not math.isfinite(float(match[1]) * max_act):
        raise FeatureError(f"{value!r} is too large a strength for {name}; {how}")
    return float(match[1]) * max_act
