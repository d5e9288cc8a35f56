"""One training step: loss and gradients, sparse after the pre-activations.

    pre = (y - b_dec) encoderᵀ + b_enc,  a = choose(pre),  ŷ = a decoder + b_dec
    loss = Σ‖ŷ - y‖² / (batch · variance) + aux

The dense product that makes `pre` is the only one; everything after it touches the chosen
(row, latent) pairs alone. Gradients are written out: autograd would make dense ones.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saesteer.training.architectures import Chosen, topk


@dataclass(frozen=True)
class Weights:
    """encoder, decoder: [d_sae, d], one latent a row; b_enc: [d_sae]; b_dec: [d]."""

    encoder: Tensor
    b_enc: Tensor
    decoder: Tensor
    b_dec: Tensor

    def items(self) -> list[tuple[str, Tensor]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]

    def pre_activations(self, y: Tensor) -> Tensor:
        """[batch, d_sae] of y [batch, d]; b_dec is folded into the encoder's bias."""
        bias = self.b_enc - self.encoder @ self.b_dec
        return torch.addmm(bias, y, self.encoder.T)


class Step(NamedTuple):
    """loss, mse and aux are 0-dim: the loss and its two parts, in units of the variance.

    error: ŷ - y [batch, d]; chosen: what fired; gradients: of the loss, shaped as the weights.
    """

    loss: Tensor
    mse: Tensor
    aux: Tensor
    error: Tensor
    chosen: Chosen
    gradients: Weights


def loss_and_gradients(
    weights: Weights,
    y: Tensor,
    choose: Callable[[Tensor, int], Chosen],
    k: int,
    *,
    variance: float,
    dead: Tensor | None = None,
    aux_coefficient: float = 1 / 32,
) -> Step:
    """Loss and its exact gradients on a batch.

    Args:
        y: activations [batch, d], scaled to mean norm √d.
        choose: of `architectures`.
        variance: mean ‖y - mean‖² over the training set; it makes the loss a fraction.
        dead: int64 [n], latents that haven't fired for long. The AuxK loss (Gao et al. 2024,
            A.2) lets the d/2 most active of them explain the error that is left, with the error
            held constant; its weight falls in proportion where there are fewer than d/2.
        aux_coefficient: weight of that loss.
    """
    pre = weights.pre_activations(y)
    chosen = choose(pre, k)
    error = _decode(chosen, weights.decoder) + weights.b_dec - y
    scale = 1 / (len(y) * variance)
    mse = error.square().sum() * scale
    grad_output = error * (2 * scale)
    gradients = _gradients(weights, y, chosen, grad_output)
    b_dec = gradients.b_dec + grad_output.sum(0)
    aux = torch.zeros_like(mse)
    if dead is not None and len(dead) and aux_coefficient > 0:
        k_aux = max(1, y.shape[1] // 2)
        coefficient = aux_coefficient * scale * min(1.0, len(dead) / k_aux)
        among = topk(pre.index_select(1, dead), min(k_aux, len(dead)))
        revived = among._replace(latents=dead[among.latents])
        missing = _decode(revived, weights.decoder) + error
        aux = missing.square().sum() * coefficient
        extra = _gradients(weights, y, revived, missing * (2 * coefficient))
        gradients.encoder.add_(extra.encoder)
        gradients.decoder.add_(extra.decoder)
        gradients.b_enc.add_(extra.b_enc)
        b_dec = b_dec + extra.b_dec
    gradients = Weights(gradients.encoder, gradients.b_enc, gradients.decoder, b_dec)
    return Step(mse + aux, mse, aux, error, chosen, gradients)


def _decode(chosen: Chosen, decoder: Tensor) -> Tensor:
    """Σ values · decoder rows, [batch, d]."""
    return F.embedding_bag(
        chosen.latents, decoder, chosen.starts, mode="sum", per_sample_weights=chosen.values
    )


def _gradients(weights: Weights, y: Tensor, chosen: Chosen, grad_output: Tensor) -> Weights:
    """Gradients through decoder, choice and encoder, given that of the decoder's output.

    That of b_dec is only its part through the encoder's input.
    """
    d_sae = len(weights.encoder)
    by_latent = chosen.latents.argsort(stable=True)
    rows = chosen.rows[by_latent]
    counts = torch.bincount(chosen.latents, minlength=d_sae)
    starts = counts.cumsum(0) - counts

    def gathered(source: Tensor, values: Tensor) -> Tensor:
        """Σ over each latent's firings of values · source[row], [d_sae, d]."""
        return F.embedding_bag(
            rows, source, starts, mode="sum", per_sample_weights=values[by_latent]
        )

    grad_values = _products(chosen, grad_output, weights.decoder)
    b_enc = torch.zeros_like(weights.b_enc).index_add_(0, chosen.latents, grad_values)
    # The encoder saw y - b_dec: what y alone gives, less b_dec times each latent's total.
    encoder = gathered(y, grad_values).addr_(b_enc, weights.b_dec, alpha=-1)
    return Weights(encoder, b_enc, gathered(grad_output, chosen.values), -(b_enc @ weights.encoder))


def _products(chosen: Chosen, left: Tensor, right: Tensor) -> Tensor:
    """left[row] · right[latent] of every chosen pair, [nnz], without gathering the vectors."""
    ends = chosen.starts.new_full((1,), len(chosen.latents))
    pattern = torch.sparse_csr_tensor(
        torch.cat([chosen.starts, ends]),
        chosen.latents,
        torch.zeros_like(chosen.values),
        (len(left), len(right)),
    )
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()


# torch says once a process that its CSR tensors are in beta; it is of no use to our users.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.zeros(0, dtype=torch.long), torch.zeros(0))
