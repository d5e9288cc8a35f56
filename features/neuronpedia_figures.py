"""The figures of a line of a Neuronpedia export's features/; what is malformed is a ValueError."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from saesteer.features.neuronpedia_example import SPACES
from saesteer.features.records import Example, Histogram


def max_act(
    about: Mapping[str, Any], examples: Sequence[Example], activations: Histogram | None
) -> float:
    """The highest activation that the export tells of; 0: none at all."""
    given = finite(about["maxActApprox"]) if about.get("maxActApprox") is not None else 0.0
    highest = max((x.value for x in examples), default=0.0)
    if max(given, highest) > 0 or activations is None:
        return max(given, highest)
    bars = zip(itertools.pairwise(activations.edges), activations.counts, strict=True)
    return max(((low + high) / 2 for (low, high), count in bars if count), default=0.0)


def share(about: Mapping[str, Any], name: str) -> float | None:
    """A share; None where the export has none."""
    if about.get(name) is None:
        return None
    found = finite(about[name])
    if not 0 <= found <= 1:
        raise ValueError(f"{name} is {found:g}; expected a share from 0 to 1")
    return found


def finite(given: Any) -> float:
    """A number that is neither NaN nor infinite."""
    number = float(given)
    if not math.isfinite(number):
        raise ValueError(f"{given} is no finite number")
    return number


def histogram(about: Mapping[str, Any], name: str) -> Histogram | None:
    """From the bars' middles, which are as far from one another, and their heights."""
    bars = pairs(about, f"{name}_bar_values", f"{name}_bar_heights")
    if len(bars) < 2:
        return None
    middles = [finite(middle) for middle, _ in bars]
    half = (middles[-1] - middles[0]) / (len(bars) - 1) / 2
    edges = [middles[0] - half, *(middle + half for middle in middles)]
    return Histogram(tuple(edges), tuple(int(height) for _, height in bars))


def mean(activations: Histogram) -> float:
    """The mean of what a histogram counted, each value taken for its bar's middle; 0 of none."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(activations.edges)]
    total = sum(activations.counts)
    products = zip(middles, activations.counts, strict=True)
    return sum(middle * n for middle, n in products) / total if total else 0.0


def logits(about: Mapping[str, Any], side: str) -> tuple[tuple[str, float], ...]:
    """The tokens of one side, "pos" or "neg", and their logits."""
    found = pairs(about, f"{side}_str", f"{side}_values")
    return tuple((str(text).translate(SPACES), finite(value)) for text, value in found)


def pairs(about: Mapping[str, Any], one: str, other: str) -> list[tuple[Any, Any]]:
    """Two lists of a line side by side; none where both are missing."""
    return list(zip(about.get(one) or (), about.get(other) or (), strict=True))
