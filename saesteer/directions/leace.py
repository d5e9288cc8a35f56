"""LEACE: least-squares concept erasure (Belrose et al. 2023, arXiv 2306.03819)."""

import math
import warnings

import torch
from torch import Tensor

from saesteer.directions import sides
from saesteer.errors import PairsError


def fit(
    chosen: Tensor, rejected: Tensor, *, seed: int = 0, add: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The smallest affine change after which no linear probe tells the sides apart.

    Returns (matrix [d, d], shift [d]) float32: x becomes matrix · x + shift, computed by the
    concept-erasure library with its shrunk covariance. Nothing is drawn by `seed`.

    Args:
        chosen, rejected: [n, d].
        add: so many times the mean difference is added after the erasure, which puts both sides'
            means in their middle: .5 then puts them where the mean of the chosen side was.

    Raises:
        PairsError: bad activations, fewer than two pairs, or `add` not finite.
    """
    with warnings.catch_warnings():
        # It still uses torch.jit.script, as it is imported.
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)
        from concept_erasure import LeaceEraser

    if not math.isfinite(add):
        raise PairsError(f"add={add}: give a finite number of mean differences")
    a, b = sides.checked(chosen, rejected, fewest=2)
    mean = sides.shift(a, b)
    labels = torch.cat([a.new_ones(len(a)), a.new_zeros(len(b))])
    eraser = LeaceEraser.fit(torch.cat([a, b]), labels)
    matrix, centre = eraser.P, eraser.bias
    shift = centre - matrix @ centre + add * mean
    return matrix.float(), shift.float()
