"""Cached activations on disk: shards of whole contexts, and a manifest that says what they are.

    manifest.json          what made them, shapes, and for each shard its size and SHA-256
    acts-00000.safetensors activations [contexts, context_size, d_model], and tokens and documents
                           int32 [contexts, context_size]; every shard but the last is equally long

A row is one token: row = context · context_size + position. Rows are read by memory map, in any
order, so a true shuffle of all tokens costs no more than reading them.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from saesteer.core.files import write_json, written_aside
from saesteer.core.points import HookPoint
from saesteer.errors import CacheError

FORMAT = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# The tensors of a shard, and what they can be stored as.
_TENSORS = {
    "activations": {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32},
    "tokens": {"I32": torch.int32},
    "documents": {"I32": torch.int32},
}
# What must stand in a manifest and, below, in a shard's entry there, for anything else to rest on.
_NEEDED = {
    "complete": bool,
    "made_from": dict,
    "hook_point": str,
    "context_size": int,
    "d_model": int,
    "shards": list,
}
_ENTRY = {"file": str, "contexts": int, "bytes": int, "sha256": str}


@dataclass(frozen=True, eq=False)
class ContextBatch:
    """A few contexts with their activations.

    Attributes:
        tokens: int32 [contexts, context_size].
        documents: int32 [contexts, context_size]; which document a token came from, −1 for none.
        activations: [contexts, context_size, d_model], in the dtype they were made or stored in.
        first_context: number of the first of them in the cache or stream.
    """

    tokens: NDArray[np.int32]
    documents: NDArray[np.int32]
    activations: Tensor
    first_context: int


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"acts-{number:05d}.safetensors"


def write_shard(folder: Path, number: int, batch: ContextBatch) -> dict[str, Any]:
    """Write one shard, aside and renamed; return its entry for the manifest."""
    data = save(
        {
            "activations": batch.activations.contiguous(),
            "tokens": torch.from_numpy(batch.tokens),
            "documents": torch.from_numpy(batch.documents),
        }
    )
    with written_aside(folder / shard_name(number)) as aside:
        aside.write_bytes(data)
    return {
        "file": shard_name(number),
        "contexts": len(batch.tokens),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder of shards, None where there is none.

    Raises:
        CacheError: it is damaged or of another format.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT
        if known:
            _check_kinds(manifest, _NEEDED)
            for entry in manifest["shards"]:
                _check_kinds(entry, _ENTRY)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"{path} is damaged ({type(error).__name__}); remove {folder} and cache again"
        ) from error
    if not known:
        raise CacheError(
            f"{path} is of format {manifest['format']}, this saesteer reads format {FORMAT}; "
            f"remove {folder} and cache again"
        )
    return manifest


def _check_kinds(values: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    for key, kind in kinds.items():
        if not isinstance(values[key], kind):
            raise TypeError(f"{key} is no {kind.__name__}")


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, aside and renamed."""
    write_json(folder / "manifest.json", {"format": FORMAT, **manifest})


def read_tokens(folder: Path, entry: Mapping[str, Any]) -> NDArray[np.int32]:
    """The tokens of one whole shard: int32 [contexts, context_size]."""
    with safe_open(folder / entry["file"], "np") as file:
        return file.get_tensor("tokens")


def is_whole(folder: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a shard's file has the bytes that were written."""
    try:
        with (folder / entry["file"]).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
    except OSError:
        return False


class Shards:
    """A complete cache, opened for reading.

    Attributes:
        manifest: what stands in manifest.json; `manifest["made_from"]` says what made it.

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
