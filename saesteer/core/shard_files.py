"""The files of a cache: shards, and the manifest that says what they are.

manifest.json          what made them, shapes, for each shard its size and SHA-256, and, once all
                       are there, the statistics of the activations
acts-00000.safetensors activations [contexts, context_size, d_model]
                       tokens, documents int32 [contexts, context_size]
                       norms float32 [contexts, context_size]
                       sum float64 [d_model] and square_sum float64 [1], over plain tokens
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from saesteer.core.files import sha256, write_json, written_aside
from saesteer.errors import CacheError

FORMAT = 2
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# The median norm is taken over at most about so many tokens, evenly spread.
MEDIAN_TOKENS = 2**20
# Numbers converted to float32 at once: as many as stay in a processor's cache.
_CHUNK = 2**17
# What must stand in a manifest and, below, in its parts, for anything else to rest on.
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


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of a cache's activations x as they are stored, over its tokens that are not special.

    Attributes:
        tokens: how many.
        mean_norm, median_norm: of ‖x‖; the median over all or over an even sample.
        variance: mean ‖x − mean‖², the sum of the variances of all dimensions.
        mean: float64 [d_model].
    """

    tokens: int
    mean_norm: float
    median_norm: float
    variance: float
    mean: Tensor


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"acts-{number:05d}.safetensors"


def shard_tensors(batch: ContextBatch, special_ids: Sequence[int] = ()) -> dict[str, Tensor]:
    """What a shard of these contexts holds; special_ids: the tokens its sums leave out."""
    x = batch.activations.contiguous()
    plain = torch.from_numpy(~np.isin(batch.tokens, np.asarray(special_ids, dtype=np.int64)))
    norms = torch.empty(x.shape[:2])
    total = torch.zeros(x.shape[2], dtype=torch.float64)
    at_once = max(1, _CHUNK // (x.shape[1] * x.shape[2]))
    for first in range(0, len(x), at_once):
        here = slice(first, first + at_once)
        some = x[here].float()
        torch.linalg.vector_norm(some, dim=-1, out=norms[here])
        total += plain[here].float().reshape(-1) @ some.flatten(0, 1)
    return {
        "activations": x,
        "tokens": torch.from_numpy(batch.tokens),
        "documents": torch.from_numpy(batch.documents),
        "norms": norms,
        "sum": total,
        "square_sum": norms[plain].double().square().sum()[None],
    }


def write_shard(folder: Path, number: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one shard, aside and renamed; return its entry for the manifest."""
    data = save(dict(tensors))
    with written_aside(folder / shard_name(number)) as aside:
        aside.write_bytes(data)
    return {
        "file": shard_name(number),
        "contexts": len(tensors["tokens"]),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def totalled(
    parts: Sequence[Mapping[str, Tensor]], special_ids: Sequence[int], context_size: int
) -> dict[str, Any]:
    """The statistics of a cache from those of its shards, as they stand in its manifest."""
    special = np.asarray(special_ids, dtype=np.int64)
    rows = sum(part["norms"].numel() for part in parts)
    stride = -(-rows // MEDIAN_TOKENS)
    while math.gcd(stride, context_size) > 1:  # else only some positions would be looked at
        stride += 1
    norm_sum, square_sum, n = 0.0, 0.0, 0
    total = torch.zeros_like(parts[0]["sum"])
    sample = []
    for part in parts:
        plain = ~np.isin(part["tokens"].numpy().reshape(-1), special)
        norms = part["norms"].numpy().reshape(-1)
        sample.append(norms[::stride][plain[::stride]])
        norm_sum += float(norms.sum(where=plain, dtype=np.float64))
        square_sum += float(part["square_sum"])
        total += part["sum"]
        n += int(plain.sum())
    several = np.concatenate(sample)
    mean = total / max(n, 1)
    return {
        "tokens": n,
        "mean_norm": norm_sum / max(n, 1),
        "median_norm": float(np.median(several)) if len(several) else 0.0,
        "variance": max(0.0, square_sum / max(n, 1) - float(mean.square().sum())),
        "mean": mean.tolist(),
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


def read_statistics(folder: Path, manifest: Mapping[str, Any]) -> Statistics:
    """The statistics in a complete manifest.

    Raises:
        CacheError: they are missing or damaged.
    """
    try:
        found = manifest["statistics"]
        mean = torch.tensor(found["mean"], dtype=torch.float64).view(manifest["d_model"])
        return Statistics(
            tokens=int(found["tokens"]),
            mean_norm=float(found["mean_norm"]),
            median_norm=float(found["median_norm"]),
            variance=float(found["variance"]),
            mean=mean,
        )
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CacheError(
            f"the statistics in {folder / 'manifest.json'} are damaged "
            f"({type(error).__name__}); remove {folder} and cache again"
        ) from error


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
        return bool(sha256(folder / entry["file"]) == entry["sha256"])
    except OSError:
        return False
