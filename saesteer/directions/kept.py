"""Directions and maps as files: one safetensors for what a method fitted, at every place."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from saesteer.core.files import written_aside
from saesteer.core.model import HookPoint
from saesteer.directions.direction import Direction, Map, Part, Use, check_fits
from saesteer.errors import SaesteerError, SteeringError

_FORMAT = "saesteer direction 2"
_FIRST = "saesteer direction 1"
_FACTS = ("method", "n_pairs", "read", "model_fingerprint")


def save_parts(path: str | Path, parts: Sequence[Part]) -> None:
    """Write parts to one safetensors file, aside and renamed; `load_parts` reads it.

    Raises:
        SteeringError: there are none.
        RunError: the folder can't be written, or the disk is full.
    """
    if not parts:
        raise SteeringError(f"there are no directions to write to {path}; fit some first")
    tensors = {
        f"{i}.{name}": tensor.detach().to("cpu", torch.float32).contiguous()
        for i, part in enumerate(parts)
        for name, tensor in _tensors(part).items()
    }
    facts = json.dumps([_facts(part) for part in parts])
    with written_aside(Path(path)) as aside:
        aside.write_bytes(save(tensors, {"format": _FORMAT, "parts": facts}))


def load_parts(
    path: str | Path, *, model_fingerprint: str | None = None, force: bool = False
) -> list[Part]:
    """Read what `save_parts` wrote, in its order; a file of the first version too.

    Args:
        model_fingerprint: of the model it is meant for; None doesn't check.
        force: load it for another model all the same.

    Raises:
        SteeringError: missing, damaged or foreign, or fitted on another model.
    """
    path = Path(path)
    if not path.is_file():
        raise SteeringError(f"there is no direction {path}; fit one from pairs first")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        parts = _read(metadata, tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, SaesteerError) as error:
        raise SteeringError(
            f"{path} is no direction of this version or is damaged ({error}); fit it again"
        ) from error
    if model_fingerprint is not None and not force:
        for part in parts:
            check_fits(part, model_fingerprint, str(path))
    return parts


def _read(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[Part]:
    found = metadata.get("format")
    if found == _FIRST:
        return [_part(json.loads(metadata["direction"]), {"vector": tensors["vector"]})]
    if found != _FORMAT:
        raise ValueError(f"its format is {found!r}, not {_FORMAT!r}")
    every = json.loads(metadata["parts"])
    if not every:
        raise ValueError("it holds nothing")
    return [
        _part(
            facts,
            {
                name.partition(".")[2]: tensor
                for name, tensor in tensors.items()
                if name.partition(".")[0] == str(i)
            },
        )
        for i, facts in enumerate(every)
    ]


def _tensors(part: Part) -> dict[str, Tensor]:
    if isinstance(part, Map):
        return {"matrix": part.matrix, "shift": part.shift}
    return {"vector": part.vector}


def _facts(part: Part) -> dict[str, Any]:
    facts = {name: getattr(part, name) for name in _FACTS}
    return facts | {
        "point": str(part.point),
        "provenance": dict(part.provenance),
        "use": vars(part.use),
    }


def _part(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
    common = dict(facts) | {"point": HookPoint.parse(facts["point"])}
    if "use" in facts:  # the first version has none
        common["use"] = Use(**facts["use"])
    if "vector" in tensors:
        if tensors["vector"].dim() != 1:
            raise ValueError(f"a vector of shape {list(tensors['vector'].shape)}")
        return Direction(vector=tensors["vector"], **common)
    return Map(matrix=tensors["matrix"], shift=tensors["shift"], **common)
