"""Attribution patching: how much each node, and each SAE feature, matters for a contrast.

The effect of replacing a node is m(replaced) − m, m being the contrast metric. To first order it is
the gradient of m at the node times the change, so that one forward and one backward pass tell it of
all nodes at once (Nanda 2023, "Attribution patching"; Syed et al. 2023, arXiv 2310.10348; of
features Marks et al. 2024, arXiv 2403.19647). `patching` makes the replacement and checks it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.hooks import edit
from saesteer.core.model import HookPoint
from saesteer.core.progress import progress
from saesteer.core.sae import Codes, Sae
from saesteer.directions.pairs import Pair
from saesteer.effects.contrast import Batch, contrast_batches, margins, wide
from saesteer.effects.nodes import (
    At,
    Means,
    Node,
    baseline,
    changes,
    mean_baseline,
    plain_codes,
    points_of,
)
from saesteer.errors import SteeringError

# Elements of one chunk of decoder rows: 64 MB in float32.
_CHUNK = 2**24


@dataclass(frozen=True)
class Score:
    """A mean over pairs, in nats, and its standard error (None of one pair)."""

    mean: float
    se: float | None


@dataclass(frozen=True)
class Effect:
    """What replacing a node does to the contrast metric.

    attribution: to first order; patched: measured, None where it was not.
    """

    node: Node
    attribution: Score
    patched: Score | None = None


@dataclass(frozen=True)
class Attribution:
    """What matters for a contrast, the largest effect first.

    Attributes:
        replaced_by: "corrupt", each node's activation on the corrupt prompts, or "mean".
        margin: the metric as it is; corrupt_margin: after the corrupt prompts, None without.
        nodes: effects of hook points; features: of the SAE's strongest features, of n_features
            that it has.
    """

    n_pairs: int
    replaced_by: Literal["corrupt", "mean"]
    margin: Score
    corrupt_margin: Score | None
    nodes: tuple[Effect, ...]
    features: tuple[Effect, ...]
    n_features: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, lists and dictionaries, ready for JSON."""
        found = asdict(self)
        for name in ("nodes", "features"):
            for row, effect in zip(found[name], getattr(self, name), strict=True):
                row["node"]["point"] = str(effect.node.point)
        return found


def attribute(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    nodes: Sequence[Node],
    *,
    sae: Sae | None = None,
    corrupt: Sequence[str] | None = None,
    top_features: int = 20,
    batch_size: int = 8,
) -> Attribution:
    """Rank nodes and features by attribution patching.

    Args:
        nodes: hook points, see `nodes.model_nodes`.
        sae: whose features are ranked too, at its own place; None: none are.
        corrupt: for each pair a prompt that asks for the other answer, of as many tokens; None:
            nodes are replaced by their means.
        top_features: how many features are listed.
        batch_size: pairs a pass; the result doesn't depend on it beyond rounding.

    Raises:
        PairsError: see `contrast_batches`. HookPointError: the model has no such place.
        SteeringError: neither nodes nor an SAE, or gradients that are not finite.
    """
    if not nodes and sae is None:
        raise SteeringError("nothing to rank; give some nodes, or an SAE with features")
    batches = contrast_batches(model, tokenizer, pairs, corrupt=corrupt, batch_size=batch_size)
    points = points_of(nodes, sae)
    means = None if corrupt is not None else mean_baseline(model, batches, nodes, sae)
    clean, dirty, effects = [], [], []
    of_features = _Sums(sae.d_sae) if sae is not None else None
    for batch in progress("attribute", len(batches), unit="batch", iterable=batches):
        found, own, slopes = gradients(model, batch, points)
        clean.append(found)
        if batch.corrupt is not None:
            with torch.no_grad():
                dirty.append(margins(model, batch, batch.corrupt).cpu())
        other = baseline(model, batch, points, means)
        products = [
            _by_pair((wide(slopes[node.point]) * change).sum((1, 2)))
            for node, change in zip(nodes, changes(nodes, batch, own, other), strict=True)
        ]
        effects.append(torch.stack(products, 1) if products else torch.zeros(len(found), 0))
        if sae is not None and of_features is not None:
            of_features.add(_feature_effects(sae, batch, own, slopes, other))
    table = torch.cat(effects).double()
    if not bool(table.isfinite().all()):
        raise SteeringError(
            "gradients of the contrast hold NaN or infinity; load the model with --dtype float32"
        )
    scored = [Effect(node, score(column)) for node, column in zip(nodes, table.T, strict=True)]
    return Attribution(
        n_pairs=len(pairs),
        replaced_by="mean" if corrupt is None else "corrupt",
        margin=score(torch.cat(clean)),
        corrupt_margin=score(torch.cat(dirty)) if dirty else None,
        nodes=tuple(sorted(scored, key=lambda one: -abs(one.attribution.mean))),
        features=of_features.strongest(sae, top_features) if sae and of_features else (),
        n_features=sae.d_sae if sae is not None else 0,
    )


def gradients(
    model: PreTrainedModel, batch: Batch, points: Sequence[HookPoint]
) -> tuple[Tensor, At, At]:
    """The metric of each pair [n], and at each point the activations and the metric's gradient.

    Both are [rows, seq, width]; the gradient is that of the row's own pair.
    """
    with torch.enable_grad(), _tapped(model, points) as found:
        each = margins(model, batch)
        slopes = torch.autograd.grad(each.sum(), [found[p] for p in points], allow_unused=True)
    own = {point: found[point].detach() for point in points}
    given = {
        point: torch.zeros_like(own[point]) if slope is None else slope
        for point, slope in zip(points, slopes, strict=True)
    }
    return each.detach().cpu(), own, given


@contextmanager
def _tapped(
    model: PreTrainedModel, points: Sequence[HookPoint]
) -> Iterator[dict[HookPoint, Tensor]]:
    """Activations that the model goes on with, so that gradients reach them."""
    found: dict[HookPoint, Tensor] = {}

    def tap(point: HookPoint) -> Any:
        def keep(x: Tensor, _: Any) -> Tensor:
            # The weights are frozen: below the first point there is nothing to differentiate.
            found[point] = x.clone() if x.requires_grad else x.clone().requires_grad_()
            return found[point]

        return keep

    with edit(model, {point: tap(point) for point in points}):
        yield found


def _by_pair(rows: Tensor) -> Tensor:
    """Sums over the two rows of each pair: [2n, …] → [n, …]."""
    return rows.unflatten(0, (-1, 2)).sum(1).cpu()


@torch.no_grad()
def _feature_effects(sae: Sae, batch: Batch, own: At, slopes: At, other: At | Means) -> Tensor:
    """Gradient times change of activation of every feature, by pair: [n, d_sae] float32."""
    x = own[sae.hook_point][batch.plain].to(sae.W_enc)
    slope = slopes[sae.write_point][batch.plain].to(sae.W_enc)
    # What a unit of activation adds is `scale` times the row, where the SAE normalises its input.
    scale = sae.prepare(x).scale if sae.hook_point_out is None else None
    slope = slope if scale is None else slope * scale
    pair = batch.plain.nonzero()[:, 0] // 2
    out = slope.new_zeros(batch.n_pairs, sae.d_sae)
    _add_codes(out, plain_codes(sae, own[sae.hook_point], batch), slope, pair, sae, -1.0)
    if isinstance(other, Means):
        assert other.code is not None
        total = slope.new_zeros(batch.n_pairs, slope.shape[1]).index_add(0, pair, slope)
        mean = other.code.to(out)
        fires = mean.nonzero()[:, 0]
        for some in fires.split(max(1, _CHUNK // sae.d_out)):
            out[:, some] += total @ _rows(sae, some).T * mean[some]
    else:
        _add_codes(out, plain_codes(sae, other[sae.hook_point], batch), slope, pair, sae, 1.0)
    return out.cpu()


def _add_codes(
    out: Tensor, codes: Codes, slope: Tensor, pair: Tensor, sae: Sae, sign: float
) -> None:
    """Add, in place, sign · value · slope·row of what fired to its pair and feature."""
    step = max(1, _CHUNK // sae.d_out)
    for start in range(0, len(codes.rows), step):
        part = slice(start, start + step)
        rows, latents = codes.rows[part], codes.latents[part]
        product = (slope[rows] * _rows(sae, latents)).sum(1) * codes.values[part] * sign
        out.view(-1).index_add_(0, pair[rows] * sae.d_sae + latents, product)


def _rows(sae: Sae, latents: Tensor) -> Tensor:
    """What a unit of each feature adds to the stream, [n, d_out]."""
    rows = sae.W_dec[latents]
    if sae.conventions.rescale_acts_by_decoder_norm:
        rows = rows / rows.norm(dim=-1, keepdim=True)
    return rows


class _Sums:
    """Means and standard errors over pairs, of many features."""

    def __init__(self, d_sae: int) -> None:
        self._n = 0
        self._sum, self._squares = torch.zeros(2, d_sae, dtype=torch.float64)

    def add(self, effects: Tensor) -> None:
        """Take in effects [n, d_sae]."""
        self._n += len(effects)
        self._sum += effects.double().sum(0)
        self._squares += effects.double().square().sum(0)

    def strongest(self, sae: Sae, most: int) -> tuple[Effect, ...]:
        means = self._sum / self._n
        spread = (self._squares / self._n - means.square()).clamp(min=0).sqrt()
        found = []
        for i in means.abs().argsort(descending=True, stable=True)[:most].tolist():
            se = float(spread[i]) / math.sqrt(self._n - 1) if self._n > 1 else None
            if float(means[i]) != 0:
                node = Node("feature", sae.write_point, i)
                found.append(Effect(node, Score(float(means[i]), se)))
        return tuple(found)


def score(values: Tensor) -> Score:
    """The mean of values [n] over pairs, with its standard error."""
    values = values.double()
    se = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return Score(float(values.mean()), se)
