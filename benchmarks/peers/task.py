"""What every trainer is given: the same activations, weights and rates."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Rows that are made at once, so that their code stays small.
_PIECE = 4096
# Of the activations' norm, how much is noise that no dictionary explains.
_NOISE = 0.1


@dataclass(frozen=True)
class Task:
    """One SAE to train; losses are fractions of the variance.

    Attributes:
        d, d_sae, k, batch: the shape.
        variance: mean squared distance of the activations from their mean.
        sparsity: weight of a penalised architecture's penalty, as in `trainer.Settings`.
        bandwidth: width of JumpReLU's window.
        widths: ends of matryoshka's nested dictionaries.
    """

    architecture: str
    d: int
    d_sae: int
    k: int
    batch: int
    lr: float
    variance: float
    sparsity: float
    bandwidth: float
    widths: tuple[int, ...]


class SparseFeatures:
    """Activations [n, d] that are a few of 4d true features, plus noise; their mean norm is √d.

    How often a feature is on falls with its rank to the power -0.7, and k are on in the mean, each
    by itself, with sizes between 0.5 and 1.5. The noise has a tenth of the norm.
    """

    def __init__(self, n: int, d: int, k: int, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        n_features = 4 * d
        features = F.normalize(torch.randn(n_features, d, generator=generator), dim=-1)
        shares = torch.arange(1.0, n_features + 1) ** -0.7
        often = (shares * (k / shares.sum())).clamp_max(0.5)
        middle = torch.randn(d, generator=generator) / d**0.5
        pieces = []
        for first in range(0, n, _PIECE):
            rows = min(_PIECE, n - first)
            sizes = torch.rand(rows, n_features, generator=generator) + 0.5
            on = torch.rand(rows, n_features, generator=generator) < often
            pieces.append((sizes * on) @ features + middle)
        x = torch.cat(pieces)
        spread = _NOISE * float(x.norm(dim=-1).mean()) / math.sqrt(d)
        x += spread * torch.randn(x.shape, generator=generator)
        self.x = x * (math.sqrt(d) / float(x.norm(dim=-1).mean()))

    def rows(self, indices: np.ndarray) -> Tensor:
        """float32 [n, d] of the rows `indices` [n]."""
        return self.x[torch.from_numpy(indices)]
