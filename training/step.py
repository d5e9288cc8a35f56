"""One training step: loss and exact gradients of a batch, sparse wherever few pairs take part.

The product that makes the pre-activations is the only dense one where an architecture chooses its k
latents; everything after it touches the chosen (row, latent) pairs alone. Penalised architectures
go the same way once few of their latents fire, and through dense products before.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from saesteer.training.architectures import Architecture, Problem, Solved, Weights, takes_part
from saesteer.training.choose import Chosen, Encoder, batch_topk, topk
from saesteer.training.pairs import DensePairs, Pairs, SparsePairs
from saesteer.training.ranks import ALONE, Ranks

# Share of pairs below which a list of them is faster than dense products.
_FEW = 1 / 40


@dataclass(frozen=True)
class Plan:
    """What stays the same from step to step.

    Attributes:
        architecture: one of `ARCHITECTURES`.
        batch_size: rows of a batch, over all ranks.
        variance: mean ‖target - mean‖² over the training set; it makes the loss a fraction.
        k: latents a row, where the architecture chooses them.
        widths: ends of the nested dictionaries, ascending, d_sae last.
        bandwidth: of a threshold's window, in units of the scaled activations.
        aux_coefficient: weight of the AuxK loss.
        subtract_b_dec: an autoencoder's input loses b_dec; a transcoder's does not.
        dtype: that large products are made in.
        ranks: the processes that work on a batch; by_features: they share the latents rather
            than the rows, and first_latent is the first of this one's.
    """

    architecture: Architecture
    batch_size: int
    variance: float
    k: int
    widths: tuple[int, ...]
    bandwidth: float = 1.0
    aux_coefficient: float = 1 / 32
    subtract_b_dec: bool = True
    dtype: torch.dtype = torch.float32
    ranks: Ranks = ALONE
    by_features: bool = False
    first_latent: int = 0

    @property
    def latent_ranks(self) -> Ranks:
        """Those that hold the other latents of the same rows."""
        return self.ranks if self.by_features else ALONE

    @property
    def row_ranks(self) -> Ranks:
        """Those that hold the other rows of the same batch."""
        return ALONE if self.by_features else self.ranks


class Step(NamedTuple):
    """loss and its parts (0-dim, over all ranks): fvu the fraction of variance, penalty, aux.

    l0: latents a row (0-dim); fired: bool [d_sae], this rank's latents that fired on any rank's
    rows; gradients: of the loss over all ranks, named and shaped as the weights.
    """

    loss: Tensor
    fvu: Tensor
    penalty: Tensor
    aux: Tensor
    l0: Tensor
    fired: Tensor
    gradients: Weights


def encoder_of(plan: Plan, weights: Weights, x: Tensor) -> Encoder:
    """How pre-activations of x [n, d_in] are made; b_dec is folded into the bias."""
    bias = weights["b_enc"]
    if plan.subtract_b_dec:
        bias = bias - weights["encoder"] @ weights["b_dec"]
    return Encoder(x, weights["encoder"], bias, plan.dtype)


def loss_and_gradients(
    plan: Plan,
    weights: Weights,
    x: Tensor,
    target: Tensor,
    *,
    sparsity: float = 0.0,
    dead: Tensor | None = None,
) -> Step:
    """Loss and its exact gradients on a batch.

    Args:
        weights: this rank's.
        x: [n, d_in], this rank's rows, scaled to mean norm √d; target: [n, d_out], x itself for an
            autoencoder.
        sparsity: weight of a penalised architecture's penalty.
        dead: int64 [m], this rank's latents that haven't fired for long. The AuxK loss (Gao et
            al. 2024, A.2) lets the d/2 most active of them explain the error that is left, with
            the error held constant; its weight falls in proportion where there are fewer.
    """
    before = weights["b_dec"] - target
    if "skip" in weights:
        before = torch.addmm(before, x, weights["skip"].T)
    sums = _Sums(plan, weights, x)
    encoder = encoder_of(plan, weights, x)
    if plan.architecture.chooses:
        error = _chosen(sums, encoder, before)
    else:
        error = _penalised(sums, encoder, before, sparsity)
    if plan.aux_coefficient > 0 and plan.architecture.revives and dead is not None:
        _revive(sums, encoder, error, dead)
    return sums.step()


class _Sums:
    """The parts of a batch's loss and gradients, added up as they are found."""

    def __init__(self, plan: Plan, weights: Weights, x: Tensor):
        self.plan, self.weights, self.x = plan, weights, x
        self.scale = 1 / (plan.batch_size * plan.variance)
        self.fvu = self.penalty = self.common = self.aux = x.new_zeros(())
        self.firings = x.new_zeros(())
        self.fired = torch.zeros_like(weights["b_enc"], dtype=torch.bool)
        self.gradients: Weights = {}
        self.shared: Weights = {}  # alike on ranks that share the latents, where others are parts

    def add(self, name: str, gradient: Tensor) -> None:
        known = self.gradients.get(name)
        self.gradients[name] = gradient if known is None else known.add_(gradient)

    def encoder(self, pairs: Pairs, grad_u: Tensor, x: Tensor) -> None:
        """What the gradient of u, by pair, is worth to the encoder and to b_dec."""
        self.add("encoder", pairs.gathered(grad_u, x))
        if self.plan.subtract_b_dec:
            # The encoder saw x - b_dec: what x alone gives, less b_dec times each latent's total.
            total = pairs.per_latent(grad_u)
            self.gradients["encoder"].addr_(total, self.weights["b_dec"], alpha=-1)
            self.add("b_dec", -(total @ self.weights["encoder"]))

    def output(self, grad_error: Tensor, x: Tensor) -> None:
        """What the gradient of the error [n, d_out] is worth to b_dec and to the skip."""
        for name, gradient in (
            ("b_dec", grad_error.sum(0)),
            *([("skip", grad_error.T @ x)] if "skip" in self.weights else []),
        ):
            known = self.shared.get(name)
            self.shared[name] = gradient if known is None else known + gradient

    def step(self) -> Step:
        plan = self.plan
        if "b_dec" in self.gradients:
            plan.latent_ranks.sum_(self.gradients["b_dec"])
        for name, gradient in self.shared.items():
            self.add(name, gradient)
        for name in self.weights:
            plan.row_ranks.sum_(self.gradients[name])
        own = torch.stack([self.penalty, self.firings / plan.batch_size])
        common = torch.stack([self.fvu, self.common, self.aux])
        parts = plan.row_ranks.sum_(torch.cat([plan.latent_ranks.sum_(own), common]))
        fired = plan.row_ranks.max_(self.fired.to(torch.uint8)).bool()
        penalty, l0, fvu, by_gate, aux = parts
        penalty = penalty + by_gate
        return Step(fvu + penalty + aux, fvu, penalty, aux, l0, fired, self.gradients)


def _chosen(sums: _Sums, encoder: Encoder, before: Tensor) -> Tensor:
    """The k largest fire; each nested dictionary has an error of its own, all weigh the same."""
    plan, weights = sums.plan, sums.weights
    if plan.architecture.chooses == "row":
        all_chosen = topk(encoder, plan.k, plan.latent_ranks)
    else:
        all_chosen = batch_topk(encoder, plan.k * plan.batch_size, plan.ranks)
    sums.firings = sums.firings + len(all_chosen.values)
    sums.fired[all_chosen.latents] = True
    levels = list(_levels(plan, all_chosen, len(encoder.encoder)))
    errors = []
    error = before
    for chosen, low, high in levels:
        pairs = SparsePairs(
            chosen.rows, chosen.latents, chosen.starts, high - low, plan.latent_ranks
        )
        error = error + pairs.decode(chosen.values, weights["decoder"][low:high])
        errors.append(error)
        sums.fvu = sums.fvu + error.square().sum() * (sums.scale / len(levels))
    # What a level decodes is part of its own error and of those of all after it.
    grad = torch.zeros_like(error)
    grad_u = torch.empty_like(all_chosen.values)
    decoder = []
    for (chosen, low, high), level_error in zip(reversed(levels), reversed(errors), strict=True):
        grad = grad + level_error * (2 * sums.scale / len(levels))
        pairs = SparsePairs(
            chosen.rows, chosen.latents, chosen.starts, high - low, plan.latent_ranks
        )
        here = (all_chosen.latents >= low) & (all_chosen.latents < high)
        grad_u[here] = pairs.products(grad, weights["decoder"][low:high])
        decoder.append(pairs.gathered(chosen.values, grad))
    sums.add("decoder", torch.cat(decoder[::-1]))
    pairs = SparsePairs(
        all_chosen.rows, all_chosen.latents, all_chosen.starts, len(encoder.encoder),
        plan.latent_ranks,
    )  # fmt: skip
    sums.add("b_enc", pairs.per_latent(grad_u))
    sums.encoder(pairs, grad_u, sums.x)
    sums.output(grad, sums.x)
    return error


def _levels(plan: Plan, chosen: Chosen, d_sae: int) -> Iterator[tuple[Chosen, int, int]]:
    """The part of what fires that each level adds, with this rank's latents of the level."""
    if len(plan.widths) == 1:
        yield chosen, 0, d_sae
        return
    ends = [min(max(width - plan.first_latent, 0), d_sae) for width in plan.widths]
    for low, high in pairwise([0, *ends]):
        part = chosen.where((chosen.latents >= low) & (chosen.latents < high))
        yield part._replace(latents=part.latents - low), low, high


def _penalised(sums: _Sums, encoder: Encoder, before: Tensor, sparsity: float) -> Tensor:
    """What fires is what exceeds a bound; it is paid for."""
    plan, weights = sums.plan, sums.weights
    assert plan.architecture.solve is not None
    bound = takes_part(plan.architecture, weights, plan.bandwidth)

    def solve(pairs: Pairs, pre: Tensor, first: int, n: int) -> Solved:
        problem = Problem(
            before[first : first + n], sums.scale, plan.variance**0.5,
            sparsity / plan.batch_size, plan.bandwidth,
        )  # fmt: skip
        solved = plan.architecture.solve(pairs, pre, weights, problem)  # type: ignore[misc]
        x = encoder.x[first : first + n]
        fires = solved.code > 0
        sums.firings = sums.firings + fires.sum()
        sums.fired |= pairs.fired(fires)
        sums.fvu = sums.fvu + solved.error.square().sum() * sums.scale
        sums.penalty = sums.penalty + solved.penalty
        sums.common = sums.common + solved.common
        sums.add("decoder", pairs.gathered(solved.code, solved.grad_error))
        for name, gradient in solved.grad_parameters.items():
            sums.add(name, gradient)
        sums.encoder(pairs, solved.grad_u, x)
        sums.output(solved.grad_error, x)
        return solved

    found: list[tuple[Tensor, Tensor]] = []
    errors = []
    few = False
    for first, pre in encoder.pieces():
        takes = pre > bound
        if first == 0:
            part = torch.tensor([int(takes.sum()), takes.numel()], device=pre.device)
            taken, of = plan.latent_ranks.sum_(part).tolist()  # all ranks go the same way
            few = taken < _FEW * of
        if few:
            at = takes.view(-1).nonzero()[:, 0]
            found.append((at + first * pre.shape[1], pre.view(-1)[at]))
        else:
            errors.append(
                solve(DensePairs(plan.dtype, plan.latent_ranks), pre, first, len(pre)).error
            )
    if not few:
        return torch.cat(errors)
    place, pre = (torch.cat(part) for part in zip(*found, strict=True))
    d_sae = len(encoder.encoder)
    rows, latents = place // d_sae, place % d_sae
    if encoder.approximate:
        pre = encoder.exactly(rows, latents)
    counts = torch.bincount(rows, minlength=len(encoder.x))
    pairs = SparsePairs(rows, latents, counts.cumsum(0) - counts, d_sae, plan.latent_ranks)
    return solve(pairs, pre, 0, len(encoder.x)).error


def _revive(sums: _Sums, encoder: Encoder, error: Tensor, dead: Tensor) -> None:
    """The AuxK loss: the dead latents' best explain the error, which is held constant."""
    plan, weights = sums.plan, sums.weights
    n_dead = int(plan.latent_ranks.sum_(torch.tensor([len(dead)], device=error.device)))
    if n_dead == 0:
        return
    k_aux = min(max(1, error.shape[1] // 2), n_dead)
    weight = plan.aux_coefficient * sums.scale * min(1.0, n_dead / max(1, error.shape[1] // 2))
    asleep = encoder._replace(encoder=encoder.encoder[dead], bias=encoder.bias[dead])
    decoder = weights["decoder"][dead]

    def solve(pairs: Pairs, code: Tensor, first: int, n: int) -> None:
        x = encoder.x[first : first + n]
        missing = pairs.decode(code, decoder) + error[first : first + n]
        sums.aux = sums.aux + missing.square().sum() * weight
        grad = missing * (2 * weight)
        grad_code = pairs.products(grad, decoder) * (code > 0)
        total = pairs.per_latent(grad_code)
        sums.gradients["decoder"].index_add_(0, dead, pairs.gathered(code, grad))
        rows = pairs.gathered(grad_code, x)
        if plan.subtract_b_dec:
            rows.addr_(total, weights["b_dec"], alpha=-1)
            sums.add("b_dec", -(total @ asleep.encoder))
        sums.gradients["encoder"].index_add_(0, dead, rows)
        sums.gradients["b_enc"].index_add_(0, dead, total)

    # So many pairs that dense products over the dead latents alone are faster than a list.
    if plan.latent_ranks.size == 1 and n_dead <= 16 * k_aux:
        for first, pre in asleep.pieces():
            if k_aux < n_dead:
                values, at = pre.topk(k_aux, dim=-1, sorted=False)
                pre = torch.zeros_like(pre).scatter_(1, at, values)
            solve(DensePairs(plan.dtype, plan.latent_ranks), pre.relu(), first, len(pre))
        return
    chosen = topk(asleep, k_aux, plan.latent_ranks)
    pairs = SparsePairs(chosen.rows, chosen.latents, chosen.starts, len(dead), plan.latent_ranks)
    solve(pairs, chosen.values, 0, len(encoder.x))
