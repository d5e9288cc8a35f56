"""Cached activations on disk, opened for reading; what is in the files: see `shard_files.py`.

A row is one token: row = context · context_size + position. Rows are read by memory map, in any
order, so a true shuffle of all tokens costs no more than reading them.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saesteer.core.points import HookPoint
from saesteer.core.shard_files import (
    ContextBatch,
    Statistics,
    is_whole,
    read_manifest,
    read_statistics,
)
from saesteer.errors import CacheError

__all__ = ["ContextBatch", "Shards", "Statistics"]

_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# The tensors of a shard, and what they can be stored as.
_TENSORS = {
    "activations": _FLOATS,
    "tokens": {"I32": torch.int32},
    "documents": {"I32": torch.int32},
    "norms": {"F32": torch.float32},
}


class Shards:
    """A complete cache, opened for reading.

    Attributes:
        manifest: what stands in manifest.json; `manifest["made_from"]` says what made it.
        statistics: of the activations of all tokens that are not special.

    Raises:
        CacheError: there is none, it is incomplete, or a shard is missing or cut short.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None or not manifest["complete"]:
            state = "incomplete" if manifest else "missing"
            raise CacheError(
                f"the cached activations in {self.folder} are {state}; run `saesteer cache` or "
                "`saesteer train` on the run: it goes on where it stopped"
            )
        self.manifest = manifest
        self.context_size: int = manifest["context_size"]
        self.d_model: int = manifest["d_model"]
        self.hook_point = HookPoint.parse(manifest["hook_point"])
        contexts = [entry["contexts"] for entry in manifest["shards"]]
        self._first = np.concatenate([[0], np.cumsum(contexts)])  # of each shard, and the end
        self._maps = [self._map(entry) for entry in manifest["shards"]]
        self.statistics = read_statistics(self.folder, manifest)

    @property
    def n_contexts(self) -> int:
        """Number of contexts."""
        return int(self._first[-1])

    @property
    def n_tokens(self) -> int:
        """Number of rows, special tokens included."""
        return self.n_contexts * self.context_size

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """Every token: [n_contexts, context_size]."""
        return np.concatenate([m["tokens"].numpy() for m in self._maps])

    @cached_property
    def documents(self) -> NDArray[np.int32]:
        """The document of every token: [n_contexts, context_size]; −1 for none."""
        return np.concatenate([m["documents"].numpy() for m in self._maps])

    @cached_property
    def norms(self) -> NDArray[np.float32]:
        """‖x‖ of every token, special ones too: [n_contexts, context_size]."""
        return np.concatenate([m["norms"].numpy() for m in self._maps])

    def rows(self, indices: NDArray[Any]) -> Tensor:
        """Activations of any rows, in the order given: float32 [n, d_model].

        Raises:
            CacheError: an index below 0 or past the last row.
        """
        self._check_rows(indices)
        out = torch.empty(len(indices), self.d_model)
        shard = np.searchsorted(self._first * self.context_size, indices, side="right") - 1
        for number in np.unique(shard):
            here = np.flatnonzero(shard == number)
            flat = self._maps[number]["activations"].view(-1, self.d_model)
            local = indices[here] - self._first[number] * self.context_size
            found = flat.index_select(0, torch.from_numpy(local.astype(np.int64)))
            out.index_copy_(0, torch.from_numpy(here), found.float())
        return out

    def contexts(
        self, start: int = 0, stop: int | None = None, *, batch: int = 16
    ) -> Iterator[ContextBatch]:
        """Contexts start … stop − 1 in order, at most `batch` at a time.

        Raises:
            CacheError: a batch below 1, or a start below 0.
        """
        if batch < 1 or start < 0:
            raise CacheError(
                f"contexts from {start} on, {batch} at a time: expected 0 or more, 1 or more"
            )
        stop = self.n_contexts if stop is None else min(stop, self.n_contexts)
        while start < stop:
            number = int(np.searchsorted(self._first, start, side="right")) - 1
            end = min(start + batch, stop, int(self._first[number + 1]))
            low, high = start - self._first[number], end - self._first[number]
            maps = self._maps[number]
            yield ContextBatch(
                maps["tokens"][low:high].clone().numpy(),
                maps["documents"][low:high].clone().numpy(),
                maps["activations"][low:high].clone(),
                start,
            )
            start = end

    def verify(self) -> None:
        """Compare every byte with its checksum.

        Raises:
            CacheError: a shard is damaged; names it.
        """
        for entry in self.manifest["shards"]:
            if not is_whole(self.folder, entry):
                raise CacheError(_damaged(self.folder / entry["file"]))

    def text(self, row: int, tokenizer: Any, *, before: int = 12, after: int = 8) -> str:
        """The text around a row, from its own context.

        Raises:
            CacheError: there is no such row.
        """
        self._check_rows(np.array([row]))
        context, position = divmod(row, self.context_size)
        window = self.tokens[context, max(0, position - before) : position + after + 1]
        return str(tokenizer.decode(window.tolist()))

    def _check_rows(self, indices: NDArray[Any]) -> None:
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.n_tokens:
            raise CacheError(
                f"rows {indices.min()} to {indices.max()} of {self.folder}, which holds "
                f"rows 0 to {self.n_tokens - 1}"
            )

    def _map(self, entry: Mapping[str, Any]) -> dict[str, Tensor]:
        """A shard's tensors by name, mapped: read from the disk when they are looked at."""
        path = self.folder / entry["file"]
        try:
            if path.stat().st_size != entry["bytes"]:
                raise CacheError(_damaged(path))
            with path.open("rb") as file:
                start = 8 + int.from_bytes(file.read(8), "little")
                if start > entry["bytes"]:
                    raise CacheError(_damaged(path))
                header = json.loads(file.read(start - 8))
            # torch's mapping holds no file descriptor, so thousands of shards can be open.
            raw = torch.from_file(str(path), size=entry["bytes"], dtype=torch.uint8)
            maps = {}
            for name, dtypes in _TENSORS.items():
                first, last = header[name]["data_offsets"]
                shape = [entry["contexts"], self.context_size]
                if name == "activations":
                    shape.append(self.d_model)
                stored = raw[start + first : start + last].view(dtypes[header[name]["dtype"]])
                maps[name] = stored.view(shape)
            return maps
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CacheError(_damaged(path)) from error


def _damaged(path: Path) -> str:
    return (
        f"{path} is missing or damaged; run `saesteer cache` on the run again: it rebuilds this "
        "shard and keeps the others"
    )
