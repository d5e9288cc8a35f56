"""Directions that nobody labelled: those that change most downstream (Mack and Turner 2024).

"Mechanistically eliciting latent behaviors" (MELBO).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.blocks import decoder_layers, point_width
from saesteer.core.hooks import activations, capture, edit
from saesteer.core.model import HookPoint, device_of, fingerprint, special_token_ids
from saesteer.directions.direction import Direction
from saesteer.directions.places import side_tokens
from saesteer.directions.rows import added, check_length, padded
from saesteer.errors import HookPointError, PairsError

RANDOM = 20
"""Random vectors that a direction's effect is shown beside."""


Effects = Callable[[Tensor], Iterator[Tensor]]
"""Of a vector, the effect on each batch."""


class Batch(NamedTuple):
    """ids, mask, plain: [batch, seq]; target: [batch, seq, d_model], as it is with no edit."""

    ids: Tensor
    mask: Tensor
    plain: Tensor
    target: Tensor


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    points: Sequence[HookPoint],
    *,
    seed: int = 0,
    n: int = 4,
    most_prompts: int = 8,
    radius: float | None = None,
    target: int | None = None,
    steps: int = 100,
    learning_rate: float = 0.05,
    power: float = 2.0,
    root: float = 2.0,
    random_init: bool = False,
    batch_size: int = 8,
) -> list[Direction]:
    """n vectors θ with ‖θ‖ = R that maximise Σ over prompts of (Σ_t ‖ΔZ_t‖^p)^(1/q).

    θ is added to every plain token at a point, and ΔZ is what that changes in the stream as it
    leaves the target block. Each θ [d] is orthogonal to the ones before at its point. Adam on θ
    alone; after every step θ is put back onto the sphere.

    A direction's provenance has its "effect", the sum above, and of `RANDOM` random vectors of the
    same norm ("n_random" of them) the mean, "random_effect", and the highest, "random_most". A
    large ratio says that θ does much, not that what it does is a behaviour the model learnt:
    `random_init` fits the same on the architecture with random weights, which is the control (the
    directions have its fingerprint, not the model's). A direction's `n_pairs` are its prompts.

    Args:
        prompts: texts; nothing is generated. Of those that differ the first `most_prompts` are
            used, since every step runs them all.
        seed: of where each θ starts, the random vectors, and the random weights.
        radius: R, in units of activation; by default half of the mean norm at the point.
        target: a block after the point; by default three quarters of the way up.
        learning_rate: a share of R, by which an update moves θ about.
        power, root: p and q.

    Raises:
        PairsError: no prompts or one without tokens, or a count or size that isn't above 0.
        HookPointError: a target that isn't after the point, more directions than dimensions, or a
            place that the model doesn't have.
    """
    sizes = {
        "n": n,
        "most_prompts": most_prompts,
        "steps": steps,
        "batch_size": batch_size,
        "power": power,
        "root": root,
    }
    for name, value in (*sizes.items(), ("radius", 1.0 if radius is None else radius)):
        if not value > 0:
            raise PairsError(f"{name}={value}: expected a number above 0")
    if random_init:
        model = with_random_weights(model, seed)
    rows = _rows(model, tokenizer, list(dict.fromkeys(prompts))[:most_prompts])
    special = special_token_ids(model, tokenizer)
    name = fingerprint(model)
    found = []
    for point in points:
        end = _target(model, point, target)
        width = point_width(model, point)
        if n > width:
            raise HookPointError(f"{point} has {width} dimensions, in which {n} aren't orthogonal")
        batches = _batches(model, rows, end, special, batch_size)
        size = radius or 0.5 * _usual_norm(model, point, batches)
        rng = torch.Generator().manual_seed(seed)
        effect = partial(_effects, model, point, end, batches, special, power, root)
        chance = [
            _total(effect, _on_sphere(torch.randn(width, generator=rng), size))
            for _ in range(RANDOM)
        ]
        before = torch.zeros(0, width)
        for number in range(n):
            start = _on_sphere(_without(torch.randn(width, generator=rng), before), size)
            theta = _ascend(effect, start, before, size, steps, learning_rate)
            before = torch.cat([before, (theta / theta.norm())[None]])
            facts = {
                "number": number,
                "radius": size,
                "target": str(end),
                "effect": _total(effect, theta),
                "random_effect": sum(chance) / RANDOM,
                "random_most": max(chance),
                "n_random": RANDOM,
                "random_init": random_init,
            }
            found.append(Direction(theta, point, "melbo", len(rows), "prompt", name, facts))
    return found


def with_random_weights(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The same architecture as it is before training, by seed: its norms and its weights' sizes are
    what the configuration begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = type(model)(copy.deepcopy(model.config))
    return new.to(device_of(model), model.dtype).eval().requires_grad_(False)


def _ascend(
    effect: Effects,
    theta: Tensor,
    before: Tensor,
    size: float,
    steps: int,
    learning_rate: float,
) -> Tensor:
    """Maximise Σ effect on the sphere of radius `size`, orthogonal to the rows of `before`."""
    theta = theta.clone().requires_grad_()
    adam = torch.optim.Adam([theta], lr=learning_rate * size / len(theta) ** 0.5, amsgrad=True)
    best, reached = theta.detach().clone(), -float("inf")
    for _ in range(steps):
        gradient, total = torch.zeros_like(theta), 0.0
        with torch.enable_grad():
            for part in effect(theta):
                gradient -= torch.autograd.grad(part, theta)[0]
                total += float(part.detach())
        if total > reached:
            best, reached = theta.detach().clone(), total
        along = theta.detach() / theta.detach().norm()
        # What points off the sphere, or along an earlier one, would only fill Adam's moments.
        theta.grad = _without(gradient, torch.cat([before, along[None]]))
        adam.step()
        with torch.no_grad():
            theta.copy_(_on_sphere(_without(theta, before), size))
    return best


def _without(vector: Tensor, units: Tensor) -> Tensor:
    """vector [d] without its parts along orthonormal units [k, d]; done twice, against rounding."""
    for _ in range(2):
        vector = vector - units.T @ (units @ vector)
    return vector


def _on_sphere(vector: Tensor, size: float) -> Tensor:
    unit: Tensor = vector / vector.norm()
    return size * unit


def _effects(
    model: PreTrainedModel,
    point: HookPoint,
    end: HookPoint,
    batches: Sequence[Batch],
    special: frozenset[int],
    power: float,
    root: float,
    vector: Tensor,
) -> Iterator[Tensor]:
    """Σ over the rows of each batch of (Σ_t ‖ΔZ_t‖^p)^(1/q): scalars on the CPU."""
    for batch in batches:
        with (
            edit(model, {point: lambda x, t: added(x, vector, t)}, special_ids=special),
            capture(model, [end]) as found,
        ):
            # The blocks alone: logits aren't needed, and may be larger than all the rest.
            model.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        moved = (found[end].float() - batch.target)[batch.plain].norm(dim=-1)
        row = batch.plain.nonzero()[:, 0]
        sums = moved.new_zeros(len(batch.ids)).index_add(0, row, moved**power)
        yield sums.pow(1 / root).sum().cpu()


@torch.no_grad()
def _total(effect: Effects, vector: Tensor) -> float:
    return sum(float(part) for part in effect(vector))


def _rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[list[int]]:
    if not prompts:
        raise PairsError("no prompts; give melbo a few texts to change")
    rows = []
    for i, prompt in enumerate(prompts, 1):
        rows.append(side_tokens(tokenizer, prompt, "").ids)
        if not any(token not in tokenizer.all_special_ids for token in rows[-1]):
            raise PairsError(f"prompt {i}: {prompt!r} has no tokens; give it some text")
        check_length(model, rows[-1], f"prompt {i}")
    return rows


def _batches(
    model: PreTrainedModel,
    rows: Sequence[list[int]],
    end: HookPoint,
    special: frozenset[int],
    size: int,
) -> list[Batch]:
    device = device_of(model)
    found = []
    for first in range(0, len(rows), size):
        ids, mask = (each.to(device) for each in padded(rows[first : first + size]))
        plain = (mask > 0) & ~torch.isin(ids, torch.tensor(sorted(special), device=device))
        found.append(Batch(ids, mask, plain, activations(model, [end], ids, mask)[end].float()))
    return found


def _usual_norm(model: PreTrainedModel, point: HookPoint, batches: Sequence[Batch]) -> float:
    norms = [
        activations(model, [point], batch.ids, batch.mask)[point].float()[batch.plain].norm(dim=-1)
        for batch in batches
    ]
    return float(torch.cat(norms).mean())


def _target(model: PreTrainedModel, point: HookPoint, layer: int | None) -> HookPoint:
    last = len(decoder_layers(model)) - 1
    # The point's own block will do where the point is before its end.
    least = point.layer + (point.site == "resid_post")
    if layer is None:
        layer = min(last, max(least, last - last // 4))
    if not least <= layer <= last:
        raise HookPointError(
            f"the effect of {point} can't be measured at block {layer}; choose a target from "
            f"{least} to {last}, or an earlier point"
        )
    return HookPoint(layer, "resid_post")
