"""Inference-time intervention: the heads that tell two sides apart best (Li et al. 2023).

arXiv 2306.03341.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.model import HookPoint, fingerprint
from saesteer.directions import sides
from saesteer.directions.answers import answer_activations
from saesteer.directions.direction import Direction
from saesteer.directions.groups import groups_of, split
from saesteer.directions.heads import all_heads
from saesteer.directions.pairs import Pair, warn_if_few
from saesteer.directions.rows import layers_of
from saesteer.errors import PairsError, did_you_mean

How = Literal["mass-mean", "probe"]
MOST_HEADS = 48
VALIDATION = 0.2


class HeadProbe(NamedTuple):
    """What a head says of the sides: θ [d_head] of length 1 and σ along it; of its probe, on
    pairs that it hasn't seen, the accuracy and the mean log-likelihood of the labels, in nats."""

    theta: Tensor
    sigma: float
    accuracy: float
    log_likelihood: float


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    points: Sequence[HookPoint],
    *,
    seed: int = 0,
    direction: How = "mass-mean",
    heads: int | None = None,
    alpha: float = 15.0,
    read: str = "answer-last",
    batch_size: int = 32,
    cache: Path | None = None,
) -> list[Direction]:
    """α·σ·θ, added to the outputs of the heads whose probes tell the sides apart best.

    A logistic probe is fitted to each head's output at the last token of the answers, and judged
    on a fifth of the pairs that it has not seen; pairs that ask the same are all seen or all not,
    unless all pairs ask the same. The best K heads by accuracy are taken; where
    several are as accurate, as they often are on few pairs, those first whose probes find the
    labels likelier. θ is, from all pairs, the direction between the sides' means ("mass-mean",
    which does best in the paper) or the probe's weights ("probe"), of length 1 and towards the
    chosen side; σ is the standard deviation of all outputs along θ.

    Args:
        points: of a head, that head; of anything else, all heads of its block. The method is meant
            for all blocks.
        seed: of the pairs that are kept for validation.
        heads: K; by default 5 % of the heads, at least 1 and at most 48.
        alpha: α; the paper's is 15. It is in the vectors, so that strength 1 is α.
        read, batch_size, cache: see `answers.answer_activations`.

    Returns:
        K directions [d_head] at head hook points, the most accurate first. The provenance says
        how many heads are as accurate as the last of them, itself included ("tied_at_cut").

    Raises:
        PairsError: fewer than two pairs, or one that can't be read; an unknown `direction`; a
            number of heads that there aren't; a head with the same mean on both sides.
        HookPointError: the model has no such place, or heads that can't be told apart.
    """
    if direction not in get_args(How):
        hint = did_you_mean(direction, get_args(How))
        raise PairsError(f"unknown direction {direction!r}{hint}; use one of {get_args(How)}")
    candidates = _heads(model, points)
    wanted = min(MOST_HEADS, max(1, len(candidates) // 20)) if heads is None else heads
    if not 1 <= wanted <= len(candidates):
        raise PairsError(f"heads={wanted}: there are {len(candidates)} at these points; take some")
    found = answer_activations(
        model, tokenizer, pairs, candidates, read=read, batch_size=batch_size, cache=cache
    )
    warn_if_few(len(pairs))
    groups = groups_of(pairs)
    probes = {
        point: head_probe(*found[point], groups, direction=direction, seed=seed)
        for point in candidates
    }
    best = sorted(
        candidates, key=lambda point: (-probes[point].accuracy, -probes[point].log_likelihood)
    )[:wanted]
    cut = probes[best[-1]].accuracy
    tied = sum(probe.accuracy == cut for probe in probes.values())
    name = fingerprint(model)
    return [
        Direction(
            alpha * probes[point].sigma * probes[point].theta,
            point,
            "iti",
            len(pairs),
            read,
            name,
            {
                "direction": direction,
                "alpha": alpha,
                "sigma": probes[point].sigma,
                "accuracy": probes[point].accuracy,
                "log_likelihood": probes[point].log_likelihood,
                "candidates": len(candidates),
                "tied_at_cut": tied,
            },
        )
        for point in best
    ]


def head_probe(
    chosen: Tensor,
    rejected: Tensor,
    groups: Sequence[int] | None = None,
    *,
    direction: How = "mass-mean",
    seed: int = 0,
) -> HeadProbe:
    """θ, σ and how the probe does on validation, from one head's outputs, each [n, d_head].

    groups: for each pair its group, of which validation has the whole or nothing (`groups_of`);
    None, and one group of all, are each pair its own.

    Raises PairsError for fewer than two pairs, or sides with the same mean.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import

    both = sides.checked(chosen, rejected, fewest=2)
    shift = sides.shift(*both)  # a probe of sides that are the same has no direction either
    values = both[0].numpy(), both[1].numpy()
    if groups is None or not any(groups):
        groups = range(len(chosen))
    wanted = max(1, round(VALIDATION * len(chosen)))
    kept, rest = split(groups, wanted, np.random.default_rng(seed))

    def labelled(rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate([side[rows] for side in values]), np.repeat([1, 0], len(rows))

    probe = LogisticRegression(max_iter=1000).fit(*labelled(rest))
    x, labels = labelled(kept)
    logits = probe.decision_function(x) * np.where(labels, 1, -1)
    theta = torch.from_numpy(probe.coef_[0]) if direction == "probe" else shift
    theta = theta / theta.norm()
    sigma = float((torch.cat(both) @ theta).std(correction=0))
    return HeadProbe(
        theta.float(),
        sigma,
        accuracy=float(probe.score(x, labels)),
        log_likelihood=-float(np.logaddexp(0, -logits).mean()),
    )


def _heads(model: PreTrainedModel, points: Sequence[HookPoint]) -> list[HookPoint]:
    """The heads that points stand for, in order of layers and numbers."""
    named = [point for point in points if point.head is not None]
    whole = layers_of([point for point in points if point.head is None])
    return sorted(
        {*named, *all_heads(model, whole)}, key=lambda point: (point.layer, point.head or 0)
    )
