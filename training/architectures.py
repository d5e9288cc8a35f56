"""Every architecture: what it learns besides the four common tensors, what it costs, its gradients.

    u = (x - b_dec) encoderᵀ,  pre = u + b_enc,  ŷ = code decoder + b_dec

Losses are fractions of the variance. With e = ŷ - target, a batch costs Σ‖e‖² / (batch · variance)
plus the architecture's own penalty, which `sparsity` weighs. Gradients are written out, over the
pairs that take part: autograd would make dense ones. A decoder row keeps norm 1 (`trainer`), so a
penalty weighted by decoder norms is the plain one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saesteer.training.pairs import Pairs

# encoder, decoder: [d_sae, d], one latent a row; b_enc: [d_sae]; b_dec: [d_out]; and, by
# architecture, threshold, r_mag, b_mag: [d_sae], skip: [d_out, d_in].
Weights = dict[str, Tensor]


class Problem(NamedTuple):
    """What a penalised architecture is given of some rows of a batch.

    target: [n, d_out]; before: what is added to the decoded code, less the target (b_dec - target,
    and the skip of a transcoder), [n, d_out]; scale: 1 / (batch · variance); spread: the square
    root of the variance; sparsity: the penalty's weight, over the batch's rows; bandwidth: width of
    the window in which a threshold learns.
    """

    before: Tensor
    scale: float
    spread: float
    sparsity: float
    bandwidth: float


class Solved(NamedTuple):
    """code, by pair; its error [n, d_out]; what it costs besides; and gradients.

    penalty: the cost of these pairs; common: what is the same on ranks that share the latents.
    grad_error: of the error [n, d_out]; grad_u: of u, by pair; grad_parameters: of the [d_sae]
    parameters by name.
    """

    code: Tensor
    error: Tensor
    penalty: Tensor
    common: Tensor
    grad_error: Tensor
    grad_u: Tensor
    grad_parameters: dict[str, Tensor]


def standard(pairs: Pairs, pre: Tensor, weights: Weights, problem: Problem) -> Solved:
    """ReLU with an L1 penalty, sparsity · Σ a / √variance (Bricken et al. 2023)."""
    code = pre.relu()
    error = pairs.decode(code, weights["decoder"]) + problem.before
    grad_error = error * (2 * problem.scale)
    cost = problem.sparsity / problem.spread
    grad = (pairs.products(grad_error, weights["decoder"]) + cost) * (pre > 0)
    grads = {"b_enc": pairs.per_latent(grad)}
    nothing = error.new_zeros(())
    return Solved(code, error, code.sum() * cost, nothing, grad_error, grad, grads)


def jumprelu(pairs: Pairs, pre: Tensor, weights: Weights, problem: Problem) -> Solved:
    """A threshold for each latent and an L0 penalty (Rajamanoharan et al. 2024b, 2407.14435).

    The step's derivative in the threshold is estimated in a window of the bandwidth around it
    (equations 11 and 12), with a rectangle as kernel. The threshold is learnt as it is, not as its
    logarithm, which Adam hardly moves.
    """
    threshold = pairs.of(weights["threshold"])
    fires = pre > threshold
    code = pre * fires
    error = pairs.decode(code, weights["decoder"]) + problem.before
    grad_error = error * (2 * problem.scale)
    grad_code = pairs.products(grad_error, weights["decoder"])
    window = ((pre - threshold).abs() < problem.bandwidth / 2).to(pre.dtype) / problem.bandwidth
    grad_threshold = -(threshold * grad_code + problem.sparsity) * window
    grad = grad_code * fires
    penalty = fires.sum().to(pre.dtype) * problem.sparsity
    grads = {"b_enc": pairs.per_latent(grad), "threshold": pairs.per_latent(grad_threshold)}
    return Solved(code, error, penalty, error.new_zeros(()), grad_error, grad, grads)


def gated(pairs: Pairs, pre: Tensor, weights: Weights, problem: Problem) -> Solved:
    """One path says whether a latent fires, another how much (Rajamanoharan et al. 2024a).

    arXiv 2404.16014, equations 6 to 8: code = 1[pre > 0] · relu(exp(r_mag) u + b_mag), an L1
    penalty on relu(pre), and the error of what relu(pre) alone reconstructs with the decoder held
    constant.
    """
    u = pre - pairs.of(weights["b_enc"])
    gain = pairs.of(weights["r_mag"]).exp()
    magnitude = gain * u + pairs.of(weights["b_mag"])
    gate = pre > 0
    fires = gate & (magnitude > 0)
    code = magnitude * fires
    error = pairs.decode(code, weights["decoder"]) + problem.before
    grad_error = error * (2 * problem.scale)
    grad_magnitude = pairs.products(grad_error, weights["decoder"]) * fires

    opened = pre.relu()
    by_gate = pairs.decode(opened, weights["decoder"]) + problem.before
    cost = problem.sparsity / problem.spread
    grad_gate = (pairs.products(by_gate * (2 * problem.scale), weights["decoder"]) + cost) * gate
    grads = {
        "b_enc": pairs.per_latent(grad_gate),
        "b_mag": pairs.per_latent(grad_magnitude),
        "r_mag": pairs.per_latent(grad_magnitude * gain * u),
    }
    grad_u = grad_gate + grad_magnitude * gain
    common = by_gate.square().sum() * problem.scale
    return Solved(code, error, opened.sum() * cost, common, grad_error, grad_u, grads)


@dataclass(frozen=True)
class Architecture:
    """What there is to know of one.

    saved_as: `Sae.architecture`. chooses: "row" or "batch" where the k largest pre-activations
    fire, of a row or on average; None where `solve` makes a code of its own. nested: prefixes of
    its latents are dictionaries of their own. extra: the [d_sae] parameters it has besides b_enc,
    with what they start from. revives: dead latents are given the error to explain.
    """

    saved_as: str
    chooses: str | None = None
    solve: Callable[[Pairs, Tensor, Weights, Problem], Solved] | None = None
    nested: bool = False
    extra: tuple[tuple[str, float], ...] = ()
    revives: bool = True


ARCHITECTURES: dict[str, Architecture] = {
    "topk": Architecture("topk", chooses="row"),
    "batchtopk": Architecture("jumprelu", chooses="batch"),
    "matryoshka": Architecture("jumprelu", chooses="batch", nested=True),
    "standard": Architecture("standard", solve=standard, revives=False),
    "jumprelu": Architecture("jumprelu", solve=jumprelu, extra=(("threshold", 0.1),)),
    "gated": Architecture(
        "gated", solve=gated, extra=(("r_mag", 0.0), ("b_mag", 0.0)), revives=False
    ),
}


def takes_part(architecture: Architecture, weights: Weights, bandwidth: float) -> Tensor:
    """The pre-activation [d_sae] above which a pair has a value or a gradient."""
    if "threshold" in architecture_extras(architecture):
        return weights["threshold"] - bandwidth / 2
    return torch.zeros_like(weights["b_enc"])


def architecture_extras(architecture: Architecture) -> tuple[str, ...]:
    """Names of the parameters that an architecture has besides the four common tensors."""
    return tuple(name for name, _ in architecture.extra)
