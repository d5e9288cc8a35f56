"""Arms that steer with a direction or a map fitted on the pairs: every method of `directions`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saesteer.compare.prepared import Material, Prepared, validation_margin
from saesteer.core.model import HookPoint
from saesteer.directions.direction import Part
from saesteer.directions.fitting import fit_method
from saesteer.directions.methods import ALTERNATIVES
from saesteer.effects import apply


def vector(
    material: Material,
    *,
    method: str,
    points: Sequence[HookPoint],
    read: str | None = None,
    batch_size: int = 32,
    cache: Path | None = None,
    **options: Any,
) -> Prepared:
    """What a method of `directions.methods` makes of the pairs, applied as it is meant to be.

    Of a method without labels, which gives several directions with no preference, the first
    `budget` are tried at strength 1, and the one with the highest validation margin is taken.

    Args:
        points: where to fit; what is fitted at several acts at all of them.
        read, batch_size, cache, options: as in `directions.fitting.fit_method`.

    Raises:
        ConfigError: no such method or option, or one that only reads.
        PairsError: pairs that the method can make nothing of; no validation pairs to choose by.
        SteeringError: no edit does what the method's directions are for.
    """
    found = fit_method(
        method,
        material.model,
        material.tokenizer,
        material.pairs,
        points,
        read=read,
        batch_size=batch_size,
        seed=material.seed,
        cache=cache,
        **options,
    )
    parts = [part for some in found.values() for part in some]
    notes: dict[str, Any] = {"method": method, "points": [str(point) for point in points]}
    if method not in ALTERNATIVES:
        return _applying(method, material, parts, {**notes, "validation_looks": 0})
    tried = [_applying(method, material, [part], notes) for part in parts[: material.budget]]
    margins = [validation_margin(one, material) for one in tried]
    best = max(range(len(tried)), key=lambda i: margins[i])
    looks = {"chosen": best, "validation_margins": margins, "validation_looks": len(tried)}
    return _applying(method, material, [parts[best]], {**notes, **looks})


def _applying(
    method: str, material: Material, parts: Sequence[Part], notes: dict[str, Any]
) -> Prepared:
    apply.edits(parts)  # what can't be applied is refused now, not at the first strength
    return Prepared(
        method, material.model, edits=lambda strength: apply.edits(parts, strength), notes=notes
    )
