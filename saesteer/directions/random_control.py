"""A random direction as long as the mean difference: what any push of that size does."""

import torch
from torch import Tensor

from saesteer.directions import sides


def fit(chosen: Tensor, rejected: Tensor, *, seed: int = 0) -> Tensor:
    """A direction drawn evenly from the sphere by `seed`: [d] float32.

    chosen, rejected: [n, d], of which only the width and the mean difference's norm are used.

    Raises:
        PairsError: bad activations, or the same mean on both sides.
    """
    a, b = sides.checked(chosen, rejected)
    generator = torch.Generator().manual_seed(seed)
    line = torch.randn(a.shape[1], generator=generator, dtype=torch.float64)
    return sides.as_long_as_the_shift(line, a, b)
