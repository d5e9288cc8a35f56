"""Which parameters become what when edits are baked: biases for additions, orthogonalised matrices
for the ablation of a direction (weight orthogonalization: Arditi et al. 2024, arXiv 2406.11717).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from saesteer.core.blocks import head_columns
from saesteer.core.model import HookPoint, decoder_layers, site_module
from saesteer.errors import SteeringError
from saesteer.steering.bake_check import embedding_writers, linear_writers, reads_attention
from saesteer.steering.edits import Add, Edit, Project, place


@dataclass(frozen=True)
class Changes:
    """New values of parameters, by their name, and settings of the configuration."""

    tensors: dict[str, Tensor]
    settings: dict[str, bool]


def writes(model: nn.Module) -> list[HookPoint]:
    """Every place where something is added to the stream."""
    halves = [
        HookPoint(layer, site)
        for layer in range(len(decoder_layers(model)))
        for site in ("attn_out", "mlp_out")
    ]
    return [HookPoint(0, "resid_pre"), *halves]


def additions(model: PreTrainedModel, edits: Sequence[Edit]) -> Changes:
    """Each vector in the bias of the linear layer whose output is what is added there.

    Raises:
        SteeringError: no such layer there has a bias, and no setting gives it one.
    """
    halves = [_half(place(edit)) for edit in edits]
    both = [HookPoint(half.layer, site) for half in halves for site in ("attn_out", "mlp_out")]
    writers = linear_writers(model, list(dict.fromkeys(both)))
    held = dict(model.named_parameters())
    sums: dict[str, Tensor] = {}
    settings: dict[str, bool] = {}
    for edit, half in zip(edits, halves, strict=True):
        assert isinstance(edit, Add)
        module = site_module(model, place(edit))[0]
        near = next(module.parameters())
        change = edit.vector.detach().to(near.device, _wide(near)) * edit.strength
        if place(edit).head is not None:  # what the output projection makes of it
            weight = module.get_parameter("weight").detach()
            matrix = weight.T if isinstance(module, Conv1D) else weight
            change = matrix[:, head_columns(model, place(edit))].to(change) @ change
        name, settings = _bias_at(model, edit, half, writers, settings)
        sums[name] = sums[name] + change if name in sums else change
    tensors = {}
    for name, change in sums.items():
        if name in held:
            tensors[name] = (held[name].detach().to(change) + change).to(held[name].dtype)
        else:
            tensors[name] = change.to(held[weight_of(name)])
    return Changes(tensors, settings)


def _half(point: HookPoint) -> HookPoint:
    """The half of a block whose bias adds to the activation at `point`."""
    if point.head is not None:
        return HookPoint(point.layer, "attn_out")
    if point.site == "resid_post":
        return HookPoint(point.layer, "mlp_out")
    if point.site != "resid_pre":
        return point
    if point.layer == 0:
        raise SteeringError(
            f"an addition at {point} can't be baked: embeddings write it, which have no bias; add "
            "at layers.0.resid_post, or at the halves of block 0"
        )
    return HookPoint(point.layer - 1, "mlp_out")


def _bias_at(
    model: PreTrainedModel,
    edit: Edit,
    half: HookPoint,
    writers: Mapping[HookPoint, str],
    settings: dict[str, bool],
) -> tuple[str, dict[str, bool]]:
    """The name of a bias that adds at a half, and the settings so far with those it needs."""
    held = {name for name, _ in model.named_parameters()}
    halves = [half]
    if half not in writers or f"{writers[half]}.bias" not in held:
        # Where both halves read the same, it is all one in which of them something is added.
        other = "attn_out" if half.site == "mlp_out" else "mlp_out"
        halves += [] if reads_attention(model, half.layer) else [HookPoint(half.layer, other)]
    names = [f"{writers[each]}.bias" for each in halves if each in writers]
    for name in names:
        if name in held:
            return name, settings
    for name in names:
        if (with_bias := _settings_for_bias(model, name, settings)) is not None:
            return name, with_bias
    if not names:
        raise SteeringError(f"{edit} can't be baked: {_unlike(model, half)}, which has no bias")
    raise SteeringError(
        f"{edit} can't be baked: {type(model).__name__} has no {names[0]} and no setting of its "
        "configuration gives it one that stock code would load; steer at run time, or choose a "
        "place whose layer has a bias"
    )


def _unlike(model: PreTrainedModel, half: HookPoint) -> str:
    """Why a half that no linear layer ends can't hold a change."""
    module = site_module(model, half)[0]
    name = next(name for name, each in model.named_modules() if each is module)
    kind = type(module).__name__
    reason = "was normed after the last matrix" if "Norm" in kind else "is no linear layer's output"
    return f"what {type(model).__name__} writes at {half}, by {name} ({kind}), {reason}"


def _settings_for_bias(
    model: PreTrainedModel, name: str, settings: dict[str, bool]
) -> dict[str, bool] | None:
    """These settings, and one more if needed, with which the stock architecture has this bias.

    None where no setting gives it, or where one brings other parameters than biases.
    """
    shapes = {key: each.shape for key, each in model.state_dict().items()}
    stock: Any = model.config.get_text_config(decoder=True)
    flags = {
        key: not value
        for key, value in stock.to_dict().items()
        if "bias" in key and value is (key == "no_bias") and key not in settings
    }
    for more in ({}, *({flag: value} for flag, value in flags.items())):
        state = skeleton(model, {**settings, **more}).state_dict()
        new = {key: each.shape for key, each in state.items()}
        extra = new.keys() - shapes.keys()
        kept = all(new.get(key) == shape for key, shape in shapes.items())
        if name in extra and kept and all(key.endswith(".bias") for key in extra):
            return {**settings, **more}
    return None


def ablation(model: PreTrainedModel, edits: Sequence[Edit]) -> Changes:
    """W − r̂r̂ᵀW for every matrix and bias that writes to the stream; embeddings untied."""
    direction = _one_direction(model, edits)
    targets = [(f"{name}.weight", 1) for name in embedding_writers(model)]
    halves = writes(model)[1:]
    writers = linear_writers(model, halves)
    for half in halves:
        targets += _half_targets(model, half, writers.get(half))
    held = dict(model.named_parameters(remove_duplicate=False))
    tensors = {
        name: without_direction(held[name].detach(), direction, axis) for name, axis in targets
    }
    twins = [
        name
        for name, parameter in held.items()
        if name not in tensors and any(parameter is held[other] for other in tensors)
    ]
    settings = {"tie_word_embeddings": False} if twins else {}
    if twins:
        untied = dict(skeleton(model, settings).named_parameters())
        if stuck := [name for name in twins if name not in untied]:
            raise SteeringError(
                f"{type(model).__name__} can't be baked: {stuck[0]} is the same tensor as one that "
                "writes to the stream, and tie_word_embeddings=False doesn't part them"
            )
    return Changes(tensors, settings)


def _one_direction(model: PreTrainedModel, edits: Sequence[Edit]) -> Tensor:
    """The unit vector, float64 [d_model], that is projected out at every write of the model."""
    units = []
    for edit in edits:
        assert isinstance(edit, Project)
        vector = edit.vector.detach().cpu().double()
        units.append(vector / vector.norm())
        if place(edit).head is not None:
            raise SteeringError(f"{edit} can't be baked: a head's output is not the stream")
    if any(abs(float(unit @ units[0])) < 1 - 1e-6 for unit in units):
        raise SteeringError(
            "projections on several directions can't be baked at once: bake one, load the folder "
            "and bake the next (orthogonal to it)"
        )
    places = {place(edit) for edit in edits}
    lacking = [str(point) for point in writes(model) if point not in places]
    if lacking:
        some = ", ".join(lacking[:4]) + (f" and {len(lacking) - 4} more" if lacking[4:] else "")
        raise SteeringError(
            "a projection can only be baked at every write to the stream at once; these lack: "
            f"{some}; use ablation_everywhere(model, vector)"
        )
    return units[0]


def _half_targets(
    model: PreTrainedModel, half: HookPoint, writer: str | None
) -> list[tuple[str, int]]:
    """The parameters that write at a half, and which of their axes is the stream's."""
    found: list[tuple[str, int]] = []
    if writer is not None:
        module = model.get_submodule(writer)
        found.append((f"{writer}.weight", 1 if isinstance(module, Conv1D) else 0))
        return found + [(f"{writer}.bias", 0)] * (getattr(module, "bias", None) is not None)
    outer = site_module(model, half)[0]
    root = next(name for name, each in model.named_modules() if each is outer)
    # A mixture of experts: a weighted sum of what each expert's last matrix writes.
    for name, module in outer.named_modules(prefix=root):
        down = getattr(module, "down_proj", None)
        if isinstance(down, nn.Parameter) and down.dim() == 3:
            found.append((f"{name}.down_proj", 2 if getattr(module, "is_transposed", 0) else 1))
            if isinstance(getattr(module, "down_proj_bias", None), nn.Parameter):
                found.append((f"{name}.down_proj_bias", 1))
        elif isinstance(down, nn.Linear):
            found.append((f"{name}.down_proj.weight", 0))
            if down.bias is not None:
                found.append((f"{name}.down_proj.bias", 0))
    if not any(model.get_parameter(name).dim() == 3 for name, _ in found):
        raise SteeringError(
            f"the ablation can't be baked: {_unlike(model, half)}, so a direction can't be "
            "taken out of the matrices before it; steer at run time instead"
        )
    return found


def without_direction(weight: Tensor, direction: Tensor, axis: int) -> Tensor:
    """W − r̂r̂ᵀW, in the weight's dtype, computed in float32 or wider.

    weight: any shape whose `axis` is the stream's, [… d_model …]. direction: unit [d_model].
    """
    unit = direction.to(weight.device, _wide(weight))
    wide = weight.to(unit.dtype).movedim(axis, -1)
    return (wide - (wide @ unit)[..., None] * unit).movedim(-1, axis).contiguous().to(weight.dtype)


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def weight_of(bias: str) -> str:
    return bias.removesuffix("bias") + "weight"


def skeleton(model: PreTrainedModel, settings: Mapping[str, bool]) -> PreTrainedModel:
    """The stock architecture with these settings changed, on the meta device."""
    config = copy.deepcopy(model.config)
    for owner in (config, config.get_text_config(decoder=True)):
        for key, value in settings.items():
            if hasattr(owner, key):
                setattr(owner, key, value)
    with torch.device("meta"):
        return type(model)(config)
