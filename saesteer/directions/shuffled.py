"""The mean difference with labels shuffled: what the same pairs give without the contrast."""

import torch
from torch import Tensor

from saesteer.directions import sides


def fit(chosen: Tensor, rejected: Tensor, *, seed: int = 0) -> Tensor:
    """Mean difference after half of the pairs, drawn by `seed`, swap sides: [d] float32.

    What the pairs have in common cancels (but for 1/n of it where n is odd); the pairs' own noise
    stays. Its norm is left as it comes out. chosen, rejected: [n, d].

    Raises:
        PairsError: bad activations, or fewer than two pairs.
    """
    a, b = sides.checked(chosen, rejected, fewest=2)
    signs = torch.ones(len(a), 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    signs[torch.randperm(len(a), generator=generator)[: len(a) // 2]] = -1
    return (signs * (a - b)).mean(0).float()
