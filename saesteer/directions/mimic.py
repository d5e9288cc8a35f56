"""MiMiC: minimally changed counterfactuals (Singh et al. 2024, arXiv 2402.09631)."""

import torch
from torch import Tensor

from saesteer.directions import sides
from saesteer.errors import PairsError

# Activations a dimension from which a covariance needs no shrinking.
_ENOUGH = 10


def fit(chosen: Tensor, rejected: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The affine map that moves the rejected side's mean and covariance onto the chosen side's.

    x becomes μ_b + Σ_a^{-½} (Σ_a^{½} Σ_b Σ_a^{½})^{½} Σ_a^{-½} (x − μ_a), a the rejected and b the
    chosen side: of all maps that do it, the one that moves points least in the mean square
    (optimal transport between Gaussians). A covariance is the plain one from n = 10 d on; under
    that, or where it is all but singular, it is Ledoit and Wolf's, shrunk towards a multiple of
    the identity (with n ≤ d the plain one is singular), and then it is this one that is matched.

    Returns (matrix [d, d], shift [d]) float32. chosen, rejected: [n, d]. Nothing is drawn by
    `seed`.

    Raises:
        PairsError: bad activations, fewer than two pairs, or a side whose activations are all one.
    """
    b, a = sides.checked(chosen, rejected, fewest=2)
    for side, name in ((b, "chosen"), (a, "rejected")):
        if not bool((side != side[0]).any()):
            raise PairsError(
                f"the activations of the {name} side are all the same, so they have no covariance "
                "to match; give pairs that differ, or read elsewhere"
            )
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = _covariance(a), _covariance(b)
    root, inverse = _root(cov_a), _root(cov_a, inverse=True)
    matrix = inverse @ _root(root @ cov_b @ root) @ inverse
    return matrix.float(), (mean_b - matrix @ mean_a).float()


def _covariance(x: Tensor) -> Tensor:
    """[d, d] of activations [n, d]."""
    from sklearn.covariance import ledoit_wolf

    n, d = x.shape
    if n >= _ENOUGH * d:
        plain = torch.atleast_2d(torch.cov(x.T, correction=0))
        values = torch.linalg.eigvalsh(plain)
        if values[0] > 1e-8 * values[-1]:
            return plain
    shrunk: Tensor = torch.from_numpy(ledoit_wolf(x.numpy())[0])
    return shrunk


def _root(matrix: Tensor, *, inverse: bool = False) -> Tensor:
    """The symmetric square root of a positive definite matrix, or its inverse."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    # Rounding may put the smallest a little below zero.
    values = values.clamp_min(values[-1] * 1e-12)
    roots = values.rsqrt() if inverse else values.sqrt()
    return vectors * roots @ vectors.T
