"""What a comparison costs: tokens and FLOPs as they are run, the K curve, K* and n*.

FLOPs are those of weights that multiply activations: 2 for each weight and token forward. Looking
up embeddings multiplies nothing and costs none, and attention's own products (of activations with
activations) are left out, as is usual (Kaplan et al. 2020, arXiv 2001.08361).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from saesteer.compare import statistics
from saesteer.core.blocks import decoder_layers, unembedding
from saesteer.core.model import HookPoint
from saesteer.errors import ConfigError

KS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
"""Numbers of concepts at which the K curve is told."""
_LEVEL = 0.05
_NOT_COUNTED = "What the SAE cost isn't known, so what its features cost isn't either."


@dataclass
class Count:
    """What has run so far.

    tokens, rows: that were embedded, padding included: it is computed, and so it is paid for.
    flops: of the linear layers of every model that ran, backward passes included.
    """

    tokens: int = 0
    rows: int = 0
    flops: float = 0.0


@contextmanager
def counting(model: PreTrainedModel) -> Iterator[Count]:
    """Count what goes through the model, and through copies that share its embeddings.

    Each linear layer is counted where it runs, so that a pass that stops early costs what it ran
    and of a mixture of experts those that ran count (experts kept as one tensor don't: no module
    of their own runs). A pass that keeps what a backward pass needs is taken to be followed by one:
    as much again for the gradient of a layer's input, and for that of its weight, where there are
    such. Nothing is hooked on the model itself, which would keep its activations out of the cache.
    """
    embedded = model.get_input_embeddings().weight
    count = Count()

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not isinstance(module, nn.Embedding | nn.Linear | Conv1D) or not args:
            return
        given = args[0]
        if isinstance(module, nn.Embedding):
            if module.weight is embedded:
                count.tokens += given.numel()
                count.rows += given.numel() // given.shape[-1]
            return
        weight: Tensor = module.weight
        passes = 1
        if torch.is_grad_enabled():
            passes += int(given.requires_grad) + int(weight.requires_grad)
        count.flops += 2.0 * passes * weight.numel() * (given.numel() // given.shape[-1])

    handle = register_module_forward_pre_hook(see)
    try:
        yield count
    finally:
        handle.remove()


def parameters_up_to(model: PreTrainedModel, point: HookPoint | None = None) -> int:
    """P_ℓ: weights that multiply activations in a pass that stops at `point`; None: in a whole one.

    A pass runs the whole block that a point is in, but for resid_pre. Of a mixture of experts all
    are counted.

    Raises:
        HookPointError, ModelError: see `core.blocks`.
    """
    blocks = decoder_layers(model)
    ran = len(blocks) if point is None else point.layer + (point.site != "resid_pre")
    found = sum(_multiplying(block) for block in list(blocks)[:ran])
    return found + (unembedding(model).numel() if point is None else 0)


def _multiplying(block: nn.Module) -> int:
    looked_up = {
        id(module.weight) for module in block.modules() if isinstance(module, nn.Embedding)
    }
    return sum(
        parameter.numel()
        for parameter in block.parameters()
        if parameter.dim() > 1 and id(parameter) not in looked_up
    )


def vector_flops(parameters: int, n: int, mean_tokens: float) -> float:
    """C_vec = 2 · P_ℓ · 2n · (mean tokens a side): both sides of n pairs, read up to the hook."""
    return 2.0 * parameters * 2 * n * mean_tokens


@dataclass(frozen=True)
class Cost:
    """FLOPs: what is paid once for all concepts, and what each concept costs."""

    shared: float
    per_concept: float

    def at(self, concepts: float) -> float:
        """FLOPs a concept at so many concepts."""
        return self.shared / concepts + self.per_concept


@dataclass(frozen=True)
class Shared:
    """FLOPs that all arms of features share; None where they can't be known.

    note: what they were counted from, in words for the report.
    """

    sae_training: float | None
    indexing: float | None
    note: str = ""


def k_curve(costs: Mapping[str, Cost | None], concepts: Sequence[int] = KS) -> list[dict[str, Any]]:
    """[{"K", "costs": {arm: FLOPs a concept}}]; None for an arm whose cost isn't known.

    Raises:
        ConfigError: fewer than one concept.
    """
    if any(k < 1 for k in concepts):
        raise ConfigError(f"the K curve at {min(concepts)} concepts; give numbers from 1 up")
    return [
        {"K": k, "costs": {arm: cost and cost.at(k) for arm, cost in costs.items()}}
        for k in concepts
    ]


def break_even(a: Cost, b: Cost) -> float | None:
    """K*: concepts at which a and b cost the same; None where there is no such number from 1 up."""
    dearer, cheaper = a.shared - b.shared, b.per_concept - a.per_concept
    if dearer * cheaper <= 0:
        return None
    found = dearer / cheaper
    return found if found >= 1 else None


def n_star(
    apart: Mapping[int, ArrayLike],
    margin: float,
    *,
    level: float = _LEVEL,
    seed: int = 0,
    resamples: int = statistics.RESAMPLES,
) -> int | None:
    """n*: the least n from which on the vector is no worse than the feature by the margin.

    It has to hold at every larger n that was tried as well: one lucky n in the middle is none. Each
    n is tested at the level (one-sided, `statistics.non_inferior`).

    Args:
        apart: for each n, effect of the vector less that of the feature, [prompts] or
            [draws, prompts].

    Raises:
        ConfigError: a margin of 0 or less. SteeringError: no differences.
    """
    least = None
    for n in sorted(apart, reverse=True):
        p = statistics.non_inferior(np.asarray(apart[n]), margin, seed=seed, resamples=resamples)
        if p >= level:
            break
        least = n
    return least


def costs_of(
    behaviours: Sequence[Mapping[str, Any]], shared: Shared | None
) -> dict[str, Cost | None]:
    """Each arm's cost, of the behaviours as they stand in report.json.

    What a concept costs is the mean over behaviours of what making, choosing and tuning the arm
    took. Arms of features also pay for the SAE and its index; None where that isn't known.
    """
    spent: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    for behaviour in behaviours:
        for arm in behaviour["arms"]:
            if arm["kind"] == "none" or arm["noise"] or not arm.get("ledger"):
                continue
            spent.setdefault(arm["arm"], []).append(float(arm["ledger"]["flops"]))
            kinds[arm["arm"]] = arm["kind"]
    together = None
    if shared is not None and shared.sae_training is not None and shared.indexing is not None:
        together = shared.sae_training + shared.indexing
    found: dict[str, Cost | None] = {}
    for arm, each in spent.items():
        once = together if kinds[arm] == "features" else 0.0
        found[arm] = None if once is None else Cost(once, float(np.mean(each)))
    return found


def ledger(
    behaviours: Sequence[Mapping[str, Any]],
    shared: Shared | None,
    pair: tuple[str, str] | None,
    concepts: Sequence[int] = KS,
) -> dict[str, Any]:
    """The "ledger" of report.json: "k_curve", "k_star" of the pair of arms, and "shared".

    Args:
        behaviours: as they stand in report.json.
        shared: None where there is no SAE.
        pair: whose K* is told; None, or an arm that wasn't run: no K*.

    Raises:
        ConfigError: fewer than one concept.
    """
    costs = costs_of(behaviours, shared)
    star = None
    if pair is not None and set(pair) <= set(costs):
        a, b = (costs[arm] for arm in pair)
        star = {"a": pair[0], "b": pair[1], "K": break_even(a, b) if a and b else None}
        if a is None or b is None:
            star = None  # not "they never cost the same", but not known
    told = None
    if shared is not None:
        unknown = shared.sae_training is None or shared.indexing is None
        note = f"{shared.note} {_NOT_COUNTED}".strip() if unknown else shared.note
        told = {"sae_training": shared.sae_training, "indexing": shared.indexing, "note": note}
    return {"k_curve": k_curve(costs, concepts), "k_star": star, "shared": told}
