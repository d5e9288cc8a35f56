"""A pass over the text that was stopped goes on where it was; ranks' passes become one."""

import json
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saesteer.core.files import written_aside
from saesteer.errors import IndexingError
from saesteer.features.statistics import Settings, Statistics

# At most a 20th of the time goes into saving.
_COST = 20


class Progress(NamedTuple):
    """Statistics of all contexts numbered below `next_context`; done: there are no more."""

    statistics: Statistics
    next_context: int
    done: bool


@dataclass
class Checkpoint:
    """One file that keeps a pass; remove it when the index is written.

    path: a .npz file; made_from: what the pass is of, as JSON: SAE, text, how much of it, the
    rank's share of it. A checkpoint of something else is not gone on from. every: seconds from
    one save to the next.
    """

    path: Path
    made_from: Mapping[str, Any]
    every: float = 60.0
    _due: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._due = time.monotonic() + self.every

    def load(self, settings: Settings | None = None) -> Progress | None:
        """What was kept, or None where there is nothing.

        Args:
            settings: those that the pass must have; any where None.

        Raises:
            IndexingError: it is damaged, or of another SAE, text or settings.
        """
        if not self.path.exists():
            return None
        try:
            with self.path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                about = json.loads(file["about"].item())
                kept = about["settings"]
                kept = Settings(**kept | {"special_ids": tuple(kept["special_ids"])})
                self._check(about["made_from"], kept, settings or kept)
                statistics = Statistics.empty(kept)
                statistics.n_tokens, statistics.n_contexts = about["n_tokens"], about["n_contexts"]
                statistics.spellings = dict(about["spellings"])
                for path, part, name in arrays(statistics):
                    setattr(part, name, file[path])
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise IndexingError(
                f"{self.path} can't be read ({type(error).__name__}: {error}); expected an "
                "unfinished pass over the text: begin anew with --restart"
            ) from error
        return Progress(statistics, about["next_context"], about["done"])

    def save(self, progress: Progress) -> None:
        """Keep a pass, in place of what was kept before.

        Raises:
            RunError: the file can't be written, or the disk is full.
        """
        began = time.monotonic()
        statistics = progress.statistics
        statistics.settle()
        about = {
            "made_from": dict(self.made_from),
            "settings": asdict(statistics.settings),
            "n_tokens": statistics.n_tokens,
            "n_contexts": statistics.n_contexts,
            "spellings": list(statistics.spellings.items()),
            "next_context": progress.next_context,
            "done": progress.done,
        }
        kept = {path: getattr(part, name) for path, part, name in arrays(statistics)}
        with written_aside(self.path) as aside, aside.open("wb") as file:
            np.savez(file, about=np.array(json.dumps(about)), **kept)
        ended = time.monotonic()
        self._due = ended + max(self.every, _COST * (ended - began))

    def save_if_due(self, progress: Progress) -> None:
        """`save` where enough time went by since the last one."""
        if time.monotonic() >= self._due:
            self.save(progress)

    def _check(self, made_from: Mapping[str, Any], kept: Settings, settings: Settings) -> None:
        found = {**made_from, **asdict(kept)}
        wanted = {**self.made_from, **asdict(settings)}
        # As they read once they were written: a tuple is a list then.
        found, wanted = json.loads(json.dumps(found)), json.loads(json.dumps(wanted))
        other = [name for name in wanted if found.get(name) != wanted[name]]
        if other:
            name = other[0]
            raise IndexingError(
                f"{self.path} holds an unfinished pass with {name} {found.get(name)!r:.60}, "
                f"expected {wanted[name]!r:.60}; begin anew with --restart, or run the command "
                "that it came from to finish it"
            )


def gathered(checkpoints: Sequence[Checkpoint]) -> Statistics:
    """The statistics of all ranks' shares, once each has finished its own.

    Raises:
        IndexingError: a rank's pass is missing or unfinished, or of something else.
    """
    total: Statistics | None = None
    for checkpoint in checkpoints:
        progress = checkpoint.load()
        if progress is None or not progress.done:
            raise IndexingError(
                f"{checkpoint.path} {'is missing' if progress is None else 'is unfinished'}: "
                "expected the finished pass of every rank; run the same command again, it goes on"
            )
        if total is None:
            total = progress.statistics
        else:
            total.absorb(progress.statistics)
    if total is None:
        raise IndexingError("there are no passes to merge; expected one for each rank")
    return total


def arrays(statistics: Statistics) -> Iterator[tuple[str, Any, str]]:
    """Every array of statistics: its path, what holds it, and its name there."""
    parts = {"": statistics} | {
        f"{name}.": part for name, part in vars(statistics).items() if hasattr(part, "__dict__")
    }
    for prefix, part in parts.items():
        for name, value in vars(part).items():
            if isinstance(value, np.ndarray):
                yield prefix + name, part, name
