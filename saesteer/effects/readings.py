"""What is read in a text, token by token, by the model as it is."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saesteer.core.model import HookPoint
from saesteer.core.sae import Sae
from saesteer.steering.edits import Add, Clamp, Edit, Project, place, read_at


@dataclass(frozen=True)
class Reading:
    """Something to read on every token: `read` takes x [batch, seq, d] at `point` to [batch, seq].

    name: what it is, such as "feature 12".
    """

    name: str
    point: HookPoint
    read: Callable[[Tensor], Tensor]


def of_feature(sae: Sae, feature: int) -> Reading:
    """The activation of one of the SAE's features. FeatureError where there is none such."""
    sae.direction(feature)

    def read(x: Tensor) -> Tensor:
        return sae.activation(x.to(sae.W_enc.device, torch.float32), [feature])[..., 0]

    return Reading(f"feature {sae.trained_number(feature)}", sae.hook_point, read)


def of_vector(vector: Tensor, point: HookPoint) -> Reading:
    """x · v / ‖v‖; v is [d] and not zero."""
    unit = vector.detach().float() / vector.detach().float().norm()
    return Reading("projection", point, lambda x: x.float() @ unit.to(x.device))


def of_edit(edit: Edit) -> Reading | None:
    """What an edit is about: a clamp's feature, the direction added or projected on; else None."""
    if isinstance(edit, Clamp):
        return replace(of_feature(edit.sae, edit.feature), point=read_at(edit))
    if isinstance(edit, Add | Project) and bool(edit.vector.any()):
        return of_vector(edit.vector, place(edit))
    return None
