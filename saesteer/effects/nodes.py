"""Nodes of a model, what they hold on pairs, and what is put in its place.

A node is replaced on all plain tokens at once: by what it holds on the corrupt prompts, token by
token, or, without these, by its mean over all plain tokens of the pairs (mean ablation, Wang et al.
2022, arXiv 2211.00593). Both are a change that is added at one hook point.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saesteer.core.hooks import activations
from saesteer.core.model import HookPoint, decoder_layers
from saesteer.core.sae import Codes, Sae
from saesteer.directions.heads import all_heads
from saesteer.effects.contrast import Batch, wide
from saesteer.errors import ConfigError, PairsError, SteeringError, did_you_mean

KINDS = ("blocks", "heads", "mlps")
At = Mapping[HookPoint, Tensor]


@dataclass(frozen=True)
class Node:
    """A part of a model that is replaced as one.

    kind: "block" is what a block adds to the stream, its two halves together; "head" and "mlp" are
    what stands at their hook points; "feature" is the activation of an SAE's feature. point: where
    the change is written, at which the node can be steered too.
    """

    kind: Literal["block", "head", "mlp", "feature"]
    point: HookPoint
    feature: int | None = None

    def __str__(self) -> str:
        if self.kind == "block":
            return f"layers.{self.point.layer}, the block"
        return str(self.point) if self.feature is None else f"feature {self.feature}"


@dataclass(frozen=True)
class Means:
    """Means over the plain tokens of all pairs: of each node [width], of the code [d_sae]."""

    nodes: Mapping[Node, Tensor]
    code: Tensor | None


def model_nodes(model: PreTrainedModel, kinds: Collection[str] = KINDS) -> list[Node]:
    """All blocks, heads and MLPs of a model, or those of some kinds, from the first layer up.

    Raises:
        ConfigError: there is no such kind. HookPointError: heads that can't be told apart.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(
                f"no nodes {kind!r}{did_you_mean(kind, KINDS)}; use some of {', '.join(KINDS)}"
            )
    found = []
    for layer in range(len(decoder_layers(model))):
        if "blocks" in kinds:
            found.append(Node("block", HookPoint(layer, "resid_post")))
        if "heads" in kinds:
            found += [Node("head", point) for point in all_heads(model, [layer])]
        if "mlps" in kinds:
            found.append(Node("mlp", HookPoint(layer, "mlp_out")))
    return found


def points_of(nodes: Sequence[Node], sae: Sae | None = None) -> list[HookPoint]:
    """Where to read for these nodes, and for the features of an SAE."""
    found = [node.point for node in nodes if node.kind != "feature"]
    found += [_before(node) for node in nodes if node.kind == "block"]
    if sae is not None:
        found += [sae.hook_point, sae.write_point]
    return list(dict.fromkeys(found))


def mean_baseline(
    model: PreTrainedModel, batches: Sequence[Batch], nodes: Sequence[Node], sae: Sae | None = None
) -> Means:
    """What each node, and each feature's activation, is on average over plain tokens."""
    sums: dict[Node, Tensor] = {}
    code = None if sae is None else torch.zeros(sae.d_sae, dtype=torch.float64)
    n = 0
    for batch in batches:
        own = activations(model, points_of(nodes, sae), batch.ids, batch.mask)
        n += int(batch.plain.sum())
        for node in nodes:
            part = value(node, own)[batch.plain].double().sum(0)
            sums[node] = sums[node] + part if node in sums else part
        if sae is not None and code is not None:
            codes = plain_codes(sae, own[sae.hook_point], batch)
            code.index_add_(0, codes.latents.cpu(), codes.values.cpu().double())
    return Means(
        {node: (total / n).float() for node, total in sums.items()},
        None if code is None else (code / n).float(),
    )


def baseline(
    model: PreTrainedModel, batch: Batch, points: Sequence[HookPoint], means: Means | None
) -> At | Means:
    """What nodes are replaced by: the means, or activations at `points` on the corrupt prompts.

    Raises:
        PairsError: there are neither.
    """
    if means is not None:
        return means
    if batch.corrupt is None:
        raise PairsError(
            "a batch without corrupt prompts, and no means in their place; give contrast_batches "
            "the corrupt prompts, or take a mean_baseline"
        )
    return activations(model, points, batch.corrupt, batch.mask)


def value(node: Node, at: At) -> Tensor:
    """What a node holds, [rows, seq, width], from activations at `points_of` it."""
    x = wide(at[node.point])
    return x - wide(at[_before(node)]) if node.kind == "block" else x


def changes(nodes: Sequence[Node], batch: Batch, own: At, other: At | Means) -> Iterator[Tensor]:
    """For each node what replacing it adds at its point, [rows, seq, width], 0 off plain tokens.

    own: activations of the pairs; other: of the corrupt ones, or the means.
    """
    plain = batch.plain[..., None]
    for node in nodes:
        new = other.nodes[node] if isinstance(other, Means) else value(node, other)
        # What stands on padding may be anything, NaN too.
        yield torch.where(plain, new - value(node, own), 0.0)


def feature_change(feature: int, sae: Sae, batch: Batch, own: At, other: At | Means) -> Tensor:
    """What replacing a feature's activation adds at the SAE's write point, [rows, seq, d_out].

    Raises:
        SteeringError: the means are of nodes alone.
    """
    x = torch.where(batch.plain[..., None], own[sae.hook_point], 0.0).to(sae.W_enc)
    if isinstance(other, Means):
        if other.code is None:
            raise SteeringError(
                f"no mean of feature {feature}: the means were taken without an SAE; give it to "
                "mean_baseline"
            )
        new = other.code[feature].to(x)
    else:
        new = sae.activation(other[sae.hook_point].to(sae.W_enc), [feature])
    change = sae.write(new - sae.activation(x, [feature]), [feature], x)
    return torch.where(batch.plain[..., None], change, 0.0)


def plain_codes(sae: Sae, x: Tensor, batch: Batch) -> Codes:
    """The sparse code of a batch's plain tokens, one row each, of x [rows, seq, d_in]."""
    return sae.encode(x[batch.plain].to(sae.W_enc))


def _before(node: Node) -> HookPoint:
    return HookPoint(node.point.layer, "resid_pre")
