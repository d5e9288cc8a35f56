"""What contrast pairs were made with and what they cost, kept as JSON beside them."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saesteer.core.files import write_json
from saesteer.core.writers import Cost
from saesteer.directions.pairs import Pair, parse_pairs, write_pairs
from saesteer.errors import PairsError

DROPPED = ("malformed", "repeat", "overlap", "margin")
"""Why an item is not kept: no pair could be read; its prompt was there before; it is in the test
file; the model doesn't agree."""

_FORMAT = "saesteer made pairs 1"


@dataclass
class Record:
    """What pairs were made with and what they cost; kept as JSON beside them.

    Attributes:
        settings: who made what; a file goes on only with the same.
        n: pairs in the file; asked: items of which it was made.
        dropped: items that were not kept, by reason (`DROPPED`).
        writing, filtering: calls, tokens and seconds, of work that was lost to a stop as well.
    """

    settings: dict[str, Any]
    n: int = 0
    asked: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DROPPED, 0))
    writing: dict[str, float] = field(default_factory=Cost().as_json)
    filtering: dict[str, float] = field(default_factory=Cost().as_json)


def record_path(path: str | Path) -> Path:
    """Where the `Record` of a file of pairs is: beside it."""
    return Path(path).with_suffix(".cost.json")


def begun(path: Path, settings: dict[str, Any]) -> tuple[list[Pair], Record]:
    """The pairs and the record of a file that was begun; no pairs where there is none.

    Raises:
        PairsError: the file is something else, or was begun with other settings.
    """
    beside = record_path(path)
    if not path.exists() and not beside.exists():
        return [], Record(settings)
    try:
        kept = json.loads(beside.read_text(encoding="utf-8"))
        if kept.pop("format") != _FORMAT:
            raise ValueError("another format")
        record = Record(**kept)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PairsError(
            f"{path} is there, but {beside.name} beside it doesn't tell how it was written; name "
            "another file, or remove it"
        ) from error
    other = [key for key, value in settings.items() if record.settings.get(key) != value]
    if other:
        raise PairsError(
            f"{path} was begun with another {' and '.join(other)} "
            f"({record.settings.get(other[0])!r}, now {settings[other[0]]!r}); name another file, "
            f"or remove it and {beside.name}"
        )
    # A stop between the two files leaves pairs that the record doesn't know: they come again.
    pairs = [pair for _, pair in parse_pairs(path)] if record.n else []
    return pairs[: record.n], record


def keep(path: Path, pairs: Sequence[Pair], record: Record) -> None:
    """Write the pairs, and their record beside them.

    Raises:
        RunError: the folder can't be written, or the disk is full.
    """
    record.n = len(pairs)
    # The pairs first: a record that is behind them tells how many count.
    if pairs:
        write_pairs(path, pairs)
    write_json(record_path(path), {"format": _FORMAT, **dataclasses.asdict(record)})


def hashed(pairs: Sequence[Pair]) -> str | None:
    """16 hex digits of pairs; None of none."""
    if not pairs:
        return None
    text = json.dumps([list(vars(pair).values()) for pair in pairs])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
