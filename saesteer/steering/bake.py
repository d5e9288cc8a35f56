"""Edits written into a model's weights, for the few kinds that weights can hold.

    bake(model, [Add(vector, 4.0, "layers.6.resid_post", where=Positions(special=True))], "steered")
    bake(model, ablation_everywhere(model, vector), "ablated")

The result is a folder of stock weights, which transformers loads without saesteer (other servers
have to know the settings that `Baked.settings` names). What was written is loaded again and
measured against the steered original each time.
"""

import copy
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.errors import HookPointError, SteeringError
from saesteer.steering.bake_changes import (
    Changes,
    ablation,
    additions,
    skeleton,
    weight_of,
    writes,
)
from saesteer.steering.bake_check import agreement, logits_of, probe_texts, reloaded
from saesteer.steering.edits import Add, Affine, Clamp, Edit, Lean, Project, Rotate, Scope
from saesteer.steering.engine import steer
from saesteer.steering.positions import Positions

EVERYWHERE = Positions(special=True)
"""The positions that weights can tell apart: none."""

_NO_WEIGHTS: dict[type, str] = {
    Clamp: "a clamp depends on what the SAE reads on each token",
    Lean: "how far it turns depends on the activation",
    Affine: "an affine map has no layer that could hold it",
    Rotate: "a rotation depends on the activation",
}


@dataclass(frozen=True)
class Baked:
    """What `bake` wrote, and how near it is to the steered model.

    folder: holds the model. changed: its parameters that aren't the original's. settings: what was
    changed in config.json. error: the largest absolute difference between the logits of the steered
    original and of the folder loaded again, over random texts; relative_error: in standard
    deviations of the logits. effect: the largest difference that the edits make to the logits.
    """

    folder: Path
    changed: tuple[str, ...]
    settings: dict[str, bool]
    error: float
    relative_error: float
    effect: float


def ablation_everywhere(model: nn.Module, vector: Tensor) -> list[Edit]:
    """The edits that keep a direction out of the stream: a projection to 0 at every write.

    vector: [d_model]. The writes are what enters the first block and what each block's two halves
    add, special tokens included (Arditi et al. 2024, arXiv 2406.11717).
    """
    return [Project(vector, point, where=EVERYWHERE) for point in writes(model)]


def bake(
    model: PreTrainedModel,
    edits: Edit | Sequence[Edit],
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Baked:
    """Write a changed copy of the model that does by itself what the edits do.

    Two kinds can be: additions, which become biases of the layers that write there, and the
    ablation of one direction at every write (`ablation_everywhere`), which becomes
    W − r̂r̂ᵀW on every matrix and bias that writes to the stream, embeddings included and untied
    from the unembedding (weight orthogonalization: Arditi et al. 2024, arXiv 2406.11717). All of
    them need `where=Positions(special=True)`, since weights act on every token. They act on padding
    too, which edits don't; nothing that isn't padding reads it.

    folder: made new, or empty. tokenizer: saved along.

    The folder is loaded again by the stock code and its logits are compared with the steered
    original's; what is over `bake_check.TOLERANCE`, or over half of what the edits do, is removed.
    The model given stays as it is. In 16 bits the router of a mixture of experts can choose others
    within rounding, which the comparison doesn't let through: load such a model in float32.

    Raises:
        HookPointError: a place that the model doesn't have, or where it can't be steered.
        SteeringError: an edit or an architecture that can't be baked, with the reason; a folder
            that isn't empty or can't be written; a copy that doesn't agree.
    """
    listed = _listed(edits)
    _check_model(model)
    path = Path(folder).expanduser().resolve()
    texts = probe_texts(model)
    with steer(model, listed, tokenizer=tokenizer):
        wanted = logits_of(model, texts)
    try:
        changes = (additions if isinstance(listed[0], Add) else ablation)(model, listed)
    except HookPointError as error:
        reason = str(error).partition("; use ")[0]
        raise SteeringError(
            f"{type(model).__name__} can't be baked: {reason}; steer at run time instead"
        ) from error
    with _new_folder(path) as aside:
        _save(model, changes, aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        got = logits_of(reloaded(aside, model), texts)
        measured = agreement(logits_of(model, texts), wanted, got)
        if not measured.holds:
            narrow = wanted[0].dtype in (torch.bfloat16, torch.float16)
            raise SteeringError(
                "the baked model is not the steered one, and was removed: their logits differ by "
                f"up to {measured.error:.3g} ({measured.relative:.3g} standard deviations, "
                f"{measured.tolerance:g} are allowed in {wanted[0].dtype}), where the edits make a "
                f"difference of {measured.effect:.3g}; "
                + ("load the model in float32 and bake that" if narrow else "steer at run time")
            )
    return Baked(
        path,
        tuple(changes.tensors),
        changes.settings,
        measured.error,
        measured.relative,
        measured.effect,
    )


def _listed(edits: Edit | Sequence[Edit]) -> list[Edit]:
    """The edits as a list of additions or a list of projections; SteeringError for all else."""
    listed = [edits] if isinstance(edits, Scope) else list(edits)
    if not listed:
        raise SteeringError("no edits given: name at least one Add, or ablation_everywhere(…)")
    for edit in listed:
        if isinstance(edit, list | tuple):
            raise SteeringError(
                "lists of edits for each row can't be baked: a model's weights are the same for "
                "every row; bake each list to a folder of its own"
            )
        if not isinstance(edit, Scope):
            raise SteeringError(f"{type(edit).__name__} is not an edit: use Add or Project")
        _check_edit(edit)
    if len({type(edit) for edit in listed}) > 1:
        raise SteeringError(
            "additions and projections can't be baked at once, as they depend on their order: bake "
            "one, load the folder and bake the other"
        )
    return listed


def _check_edit(edit: Edit) -> None:
    reason = _NO_WEIGHTS.get(type(edit))
    if isinstance(edit, Project) and edit.to != 0:
        reason = "a projection to a value other than 0 at every write adds the value each time"
    elif edit.when is not None:
        reason = "its condition is worked out on each token; leave `when` out"
    elif edit.schedule is not None:
        reason = "its schedule counts generated tokens; leave `schedule` out"
    elif edit.keep_norm and reason is None:
        reason = "keep_norm depends on the activation; leave it out"
    elif edit.where != EVERYWHERE and reason is None:
        reason = (
            f"it is for {edit.where}, and weights act on every token, special ones included: say "
            "so by where=Positions(special=True)"
        )
    if reason is not None:
        raise SteeringError(f"{edit} can't be baked: {reason}")


def _check_model(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        reason = "it is no transformers model; an adapter has to be merged first"
    elif type(model).__module__.startswith("transformers_modules"):
        reason = "its code is not part of transformers, so nobody could load the folder by itself"
    elif getattr(model, "is_quantized", False):
        reason = "its weights are quantised; load it without quantisation"
    elif any(parameter.is_meta for parameter in model.parameters()):
        reason = "some of its weights are not in memory; load it whole"
    elif model.training:
        reason = "it is in training mode, in which dropout changes its logits; call model.eval()"
    else:
        return
    raise SteeringError(f"{name} can't be baked: {reason}")


def _save(model: PreTrainedModel, changes: Changes, folder: Path) -> None:
    """Write the changed copy; what isn't changed is shared with the model, not copied."""
    new = skeleton(model, changes.settings)
    state = {**model.state_dict(), **changes.tensors}
    for name, empty in new.state_dict().items():
        if name not in state:  # biases that came with the one that was wanted
            state[name] = torch.zeros(empty.shape, dtype=state[weight_of(name)].dtype)
    new.load_state_dict(state, assign=True)
    new.tie_weights()
    if model.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    try:
        new.save_pretrained(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SteeringError(f"the baked model can't be written to {folder}: {error}") from error


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, which takes its name when the body succeeds; else it is removed."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise SteeringError(
            f"{path} is there already: name a folder that doesn't exist or is empty"
        )
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        yield aside
        aside.replace(path)
    except OSError as error:
        raise SteeringError(
            f"cannot write {path}: {error.strerror or error}; choose a folder that you can write to"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
