"""Activations of pairs on disk, found again by a hash of all that they depend on."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from saesteer.core.files import written_aside
from saesteer.core.model import HookPoint, fingerprint, weight_sizes

_FORMAT = "saesteer answer activations 1"
_RUNS_AFTER = "output_capturing_hook"


def key(model: PreTrainedModel, reads: Sequence[tuple[Sequence[int], Sequence[int]]]) -> str | None:
    """A hash of a model and of what is read of it, or None where that can't be kept.

    reads: token ids and the columns read, for each sequence. It covers the weights (see
    `fingerprint` and `weight_sizes`), the configuration and the dtype, so that another tokenizer,
    another read position or other pairs have another key and the batching doesn't. None where
    hooks are on the model: somebody edits its activations, and they aren't the model's own.
    """
    if any(_edits(module) for module in model.modules()):
        return None
    made_from = [
        _FORMAT,
        fingerprint(model),
        [f"{size:.3g}" for size in weight_sizes(model)],
        str(model.dtype),
        model.config.to_json_string(),
        [[list(ids), list(columns)] for ids, columns in reads],
    ]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]


def load(folder: Path, key: str, point: HookPoint, n: int) -> tuple[Tensor, Tensor] | None:
    """(chosen, rejected), each [n, d] float32, as `keep` wrote them; None if missing or damaged."""
    try:
        with safe_open(_path(folder, key, point), framework="pt") as file:
            if (file.metadata() or {}).get("format") != _FORMAT:
                return None
            sides = file.get_tensor("chosen"), file.get_tensor("rejected")
    except (OSError, SafetensorError):
        return None
    whole = all(
        side.dtype == torch.float32 and side.dim() == 2 and len(side) == n for side in sides
    )
    return sides if whole and all(bool(side.isfinite().all()) for side in sides) else None


def keep(folder: Path, key: str, point: HookPoint, chosen: Tensor, rejected: Tensor) -> None:
    """Write both sides, aside and renamed. RunError: the folder can't be written, the disk full."""
    tensors = {"chosen": chosen.contiguous(), "rejected": rejected.contiguous()}
    with written_aside(_path(folder, key, point)) as aside:
        aside.write_bytes(save(tensors, {"format": _FORMAT}))


def _path(folder: Path, key: str, point: HookPoint) -> Path:
    return folder / key / f"{point}.safetensors"


def _edits(module: nn.Module) -> bool:
    # transformers leaves hooks of its own behind, which only look.
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__name__", "") != _RUNS_AFTER for hook in hooks)
