"""What output scores and own effects were measured with: the figures mean nothing without it."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from saesteer.features.migrate import reading

# Features asked for at once; SQLite takes 999 parameters at the least.
_CHUNK = 500
_PROMPT = 60  # letters of a prompt that are shown


def measured_with(path: Path, features: Sequence[int] | None = None) -> dict[int, dict[str, Any]]:
    """Feature → the settings its effects were measured with, as `store.keep_outputs` was given.

    Args:
        features: None: all. Those whose effects aren't kept are left out.

    Raises:
        IndexingError: the index can't be read.
    """
    select = "SELECT feature, settings FROM outputs"
    # Most were measured alike: one value for all of them.
    read = lru_cache(maxsize=16)(json.loads)
    with reading(path) as connection:
        if features is None:
            return {i: read(text) for i, text in connection.execute(select)}
        found: dict[int, dict[str, Any]] = {}
        for part in (features[i : i + _CHUNK] for i in range(0, len(features), _CHUNK)):
            marks = ", ".join("?" * len(part))
            rows = connection.execute(f"{select} WHERE feature IN ({marks})", part)
            found |= {i: read(text) for i, text in rows}
        return found


def told(settings: Mapping[str, Any]) -> str:
    """Settings in a few words, for those who read a figure."""
    parts = []
    if (amplification := settings.get("amplification")) is not None:
        parts.append(f"by adding {amplification:g}x")
    prompts = settings.get("prompts") or []
    if prompts:
        first = str(prompts[0])
        first = first if len(first) <= _PROMPT else f"…{first[1 - _PROMPT :]}"
        several = "" if len(prompts) == 1 else f"{len(prompts)} prompts, the first "
        parts.append(f"after {several}{first!r}")
    return " ".join(parts) or "as the index doesn't say"
