"""Activation patching: nodes replaced one after the other, the exact check of an attribution."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.hooks import activations, edit
from saesteer.core.model import HookPoint
from saesteer.core.progress import progress
from saesteer.core.sae import Sae
from saesteer.directions.pairs import Pair
from saesteer.effects.attribution import Attribution, Effect, score
from saesteer.effects.contrast import Batch, contrast_batches, margins
from saesteer.effects.nodes import baseline, changes, feature_change, mean_baseline, points_of


@torch.no_grad()
def check(
    found: Attribution,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    sae: Sae | None = None,
    corrupt: Sequence[str] | None = None,
    batch_size: int = 8,
) -> Attribution:
    """Measure the effect of every node and feature that an attribution lists, by replacing it.

    One forward pass a node and batch. The arguments are those of `attribute`, and must be the same.
    """
    batches = contrast_batches(model, tokenizer, pairs, corrupt=corrupt, batch_size=batch_size)
    nodes = [effect.node for effect in found.nodes]
    features = [effect.node.feature for effect in found.features]
    points = points_of(nodes, sae)
    means = None if corrupt is not None else mean_baseline(model, batches, nodes, sae)
    measured: list[Tensor] = []
    total = len(batches) * (len(nodes) + len(features))
    with progress("patch", total, unit="pass") as bar:
        for batch in batches:
            base = margins(model, batch).cpu()
            own = activations(model, points, batch.ids, batch.mask)
            other = baseline(model, batch, points, means)
            effects = []
            for node, change in zip(nodes, changes(nodes, batch, own, other), strict=True):
                effects.append(patched_margins(model, batch, node.point, change) - base)
                bar.update(1)
            for feature in features:
                assert sae is not None and feature is not None
                change = feature_change(feature, sae, batch, own, other)
                effects.append(patched_margins(model, batch, sae.write_point, change) - base)
                bar.update(1)
            measured.append(torch.stack(effects, 1))
    scores = [score(column) for column in torch.cat(measured).T]

    def patched(effects: Sequence[Effect], start: int) -> tuple[Effect, ...]:
        return tuple(replace(e, patched=s) for e, s in zip(effects, scores[start:], strict=False))

    return replace(
        found, nodes=patched(found.nodes, 0), features=patched(found.features, len(nodes))
    )


@torch.no_grad()
def patched_margins(
    model: PreTrainedModel, batch: Batch, point: HookPoint, change: Tensor
) -> Tensor:
    """The metric of each pair [n] with `change` [rows, seq, width] added at a point."""
    with edit(model, {point: lambda x, _: x + change.to(x)}):
        return margins(model, batch).cpu()


def rank_correlation(effects: Sequence[Effect]) -> float | None:
    """Spearman's ρ between attributed and measured effects, signs included.

    None where fewer than three were measured, or all are equal.
    """
    from scipy.stats import spearmanr

    both = [(e.attribution.mean, e.patched.mean) for e in effects if e.patched is not None]
    if len(both) < 3 or any(len(set(column)) < 2 for column in zip(*both, strict=True)):
        return None
    return float(spearmanr(*zip(*both, strict=True)).statistic)
