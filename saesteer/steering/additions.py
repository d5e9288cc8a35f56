"""Edits as plain additions at the output of blocks, which is all that other programs hold."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saesteer.core.model import HookPoint
from saesteer.errors import SteeringError
from saesteer.steering.edits import Add, Edit, place
from saesteer.steering.positions import Positions

EVERYWHERE = Positions(special=True)


def block_outputs(edits: Sequence[Edit], program: str, with_special: bool) -> dict[int, Tensor]:
    """What is added after each block, by its number, float32 [d_model] on the CPU.

    Raises SteeringError where a plain addition there doesn't say it.
    """
    sums: dict[int, Tensor] = {}
    for edit in [edits] if isinstance(edits, Add) else edits:
        if not isinstance(edit, Add):
            raise SteeringError(
                f"{edit} ({type(edit).__name__}) can't be given to {program}, which adds vectors "
                "and nothing else: keep it with save_edits"
            )
        for name, plain in (("when", None), ("schedule", None), ("keep_norm", False)):
            if getattr(edit, name) != plain:
                raise SteeringError(
                    f"{edit} has a {name}, which {program} doesn't know: keep it with save_edits, "
                    "or take it out"
                )
        if edit.where == Positions() and not with_special:
            raise SteeringError(
                f"{edit} leaves special tokens alone, and {program} steers every token, BOS "
                "included: give with_special=True (or the edit Positions(special=True)) to accept "
                "that"
            )
        if edit.where not in (Positions(), EVERYWHERE):
            raise SteeringError(
                f"{edit} is for {edit.where}, and {program} steers every token: keep it with "
                "save_edits, or choose no tokens"
            )
        point = place(edit)
        layer = {"resid_post": point.layer, "resid_pre": point.layer - 1}.get(point.site, -1)
        if layer < 0:
            raise SteeringError(
                f"{edit}: {program} is given vectors at the output of a block only: use resid_post"
            )
        change = edit.vector.detach().to("cpu", torch.float32) * edit.strength
        if layer in sums and len(sums[layer]) != len(change):
            raise SteeringError(
                f"{edit}: {len(change)} dimensions, and another edit there has {len(sums[layer])}"
            )
        sums[layer] = sums[layer] + change if layer in sums else change
    if not sums:
        raise SteeringError("no edits to give away: name at least one Add")
    if len({len(change) for change in sums.values()}) > 1:
        raise SteeringError("the edits' vectors differ in length; they are of different models")
    return dict(sorted(sums.items()))


def as_edits(vectors: Mapping[Any, Any], source: str) -> list[Edit]:
    """An addition after each block, by its number; zero vectors are left out."""
    edits: list[Edit] = []
    for layer, vector in sorted(vectors.items()):
        if isinstance(layer, bool) or not hasattr(layer, "__index__") or layer < 0:
            raise SteeringError(
                f"{source} has a layer {layer!r}: expected a block's number from 0 up"
            )
        edit = added(vector, HookPoint(layer.__index__(), "resid_post"), 1.0)
        if bool(edit.vector.any()):
            edits.append(edit)
    if not edits:
        raise SteeringError(f"{source} adds nothing: it holds no vector other than zero")
    return edits


def added(vector: Any, point: HookPoint, strength: float) -> Add:
    try:
        # A copy: what the other program does to its own afterwards is no edit of ours.
        copied = torch.as_tensor(vector).detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SteeringError(f"what is to be added at {point} is no vector: {error}") from error
    return Add(copied, strength, point, where=EVERYWHERE)
