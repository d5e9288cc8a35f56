"""The caches that one pass fills: what each holds already, lacks, and was made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from saesteer.core.model import HookPoint
from saesteer.core.progress import progress
from saesteer.core.shard_files import (
    is_whole,
    read_manifest,
    read_tokens,
    totalled,
    write_manifest,
)
from saesteer.errors import CacheError

# Checking more than this takes over a second, so it is shown.
SHOWN_BYTES = 512 * 2**20


@dataclass
class Target:
    """One hook point's cache while it is filled.

    Attributes:
        about: what its manifest says besides the shards.
        entries: those of its shards there, each whole or not.
        ended: whether it was complete before; the entries are all there are then.
        changed: whether a shard has been made since.
    """

    point: HookPoint
    folder: Path
    about: dict[str, Any]
    entries: list[dict[str, Any]]
    whole: list[bool]
    ended: bool
    changed: bool = False

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.ended and not self.changed and all(self.whole)

    @property
    def n_contexts(self) -> int:
        """Contexts in the shards there are."""
        return sum(entry["contexts"] for entry in self.entries)

    def lacks(self, number: int) -> bool:
        """Whether a shard is to be made."""
        return number >= len(self.entries) or not self.whole[number]

    def put(self, number: int, entry: dict[str, Any]) -> None:
        """A shard has been made."""
        self.entries[number : number + 1] = [entry]
        self.whole[number : number + 1] = [True]
        self.changed = True

    def save(self) -> None:
        """Write the manifest of a cache that is not complete."""
        write_manifest(self.folder, {**self.about, "complete": False, "shards": self.entries})

    def finish(self) -> None:
        """Write the manifest of a complete cache, with its statistics."""
        parts = []
        for entry in self.entries:
            with safe_open(self.folder / entry["file"], "pt") as file:
                names = ("tokens", "norms", "sum", "square_sum")
                parts.append({name: file.get_tensor(name) for name in names})
        special_ids = self.about["made_from"].get("special_ids", [])
        statistics = totalled(parts, special_ids, self.about["context_size"])
        write_manifest(
            self.folder,
            {**self.about, "complete": True, "statistics": statistics, "shards": self.entries},
        )


def opened(
    folder: Path,
    points: Sequence[HookPoint],
    made_from: Mapping[str, Any],
    about: Mapping[str, Any],
) -> list[Target]:
    """Each point's cache as it is on the disk, checked; the first one's is in `folder` itself.

    Raises:
        CacheError: one was made from anything else than `made_from`.
    """
    targets: list[Target] = []
    for point in points:
        here = folder / str(point) if targets else folder
        for left in here.glob(".*.partial"):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)
        made = {**made_from, "hook_point": str(point)}
        manifest = read_manifest(here)
        if manifest is not None:
            _check_same(manifest["made_from"], made, here)
        entries = list(manifest["shards"]) if manifest else []
        targets.append(
            Target(
                point,
                here,
                {**about, "made_from": made, "hook_point": str(point)},
                entries,
                _checked(here, entries),
                ended=manifest is not None and manifest["complete"],
            )
        )
    _align(targets)
    return targets


def check_same_text(tokens: NDArray[np.int32], targets: Sequence[Target], number: int) -> None:
    """A data set's name can come to mean another text, which `made_from` can't tell."""
    for target in targets:
        if not target.lacks(number):
            entry = target.entries[number]
            if not np.array_equal(tokens, read_tokens(target.folder, entry)):
                raise CacheError(
                    f"the text or the tokenizer has changed since {target.folder / entry['file']} "
                    f"was cached; use another run folder, or remove {targets[0].folder} to cache "
                    "the text as it is now"
                )


def _align(targets: Sequence[Target]) -> None:
    """Forget shards whose length is not that of the fullest cache's, and those after them."""
    longest = max(targets, key=lambda target: target.n_contexts).entries
    for target in targets:
        for number, (entry, other) in enumerate(zip(target.entries, longest, strict=False)):
            if entry["contexts"] != other["contexts"]:
                target.entries, target.ended = target.entries[:number], False
                target.whole = target.whole[:number]
                break


def _checked(folder: Path, entries: list[dict[str, Any]]) -> list[bool]:
    """Which shards have the bytes that were written."""
    size = sum(entry["bytes"] for entry in entries)
    if size <= SHOWN_BYTES:
        return [is_whole(folder, entry) for entry in entries]
    shown = progress("verify", len(entries), unit="shard", iterable=entries)
    return [is_whole(folder, entry) for entry in shown]


def _check_same(before: Any, now: Any, folder: Path, name: str = "") -> None:
    """Raise CacheError with the first value, however deep, that differs."""
    if before == now:
        return
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in (*now, *before):
            _check_same(before.get(key), now.get(key), folder, f"{name}.{key}" if name else key)
    raise CacheError(
        f"{folder} holds other activations: their {name} was {_short(before)}, "
        f"asked for is {_short(now)}; use another run folder, or remove {folder}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
