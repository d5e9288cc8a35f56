"""What every method does first with the activations of the two sides of its pairs."""

import torch
from torch import Tensor

from saesteer.errors import PairsError


def checked(chosen: Tensor, rejected: Tensor, *, fewest: int = 1) -> tuple[Tensor, Tensor]:
    """Both sides in float64 on the CPU.

    chosen, rejected: [n, d], row i of both from pair i.

    Raises:
        PairsError: other shapes, fewer than `fewest` pairs, or numbers that are not finite.
    """
    if chosen.dim() != 2 or chosen.shape != rejected.shape:
        raise PairsError(
            f"chosen activations of shape {list(chosen.shape)} and rejected ones of shape "
            f"{list(rejected.shape)}; expected both [pairs, d]"
        )
    if len(chosen) < fewest:
        raise PairsError(
            f"{len(chosen)} contrast pairs, where this method needs {fewest} at least; 128 are a "
            "good number"
        )
    sides = chosen.detach().to("cpu", torch.float64), rejected.detach().to("cpu", torch.float64)
    if not all(bool(side.isfinite().all()) for side in sides):
        raise PairsError("activations hold NaN or infinity; load the model in float32")
    return sides


def shift(chosen: Tensor, rejected: Tensor) -> Tensor:
    """mean over pairs of chosen − rejected: [d], of `checked` sides.

    Raises:
        PairsError: it is zero, so that there is no direction between the sides.
    """
    mean = (chosen - rejected).mean(0)
    if not bool(mean.any()):
        raise PairsError(
            "the two sides have the same mean activation, so nothing points from one to the "
            "other; read where they differ (a pair's sides share their prompt), and check that "
            "the pairs aren't each other's mirror images"
        )
    return mean


def as_long_as_the_shift(line: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """`line` [d] with the norm of the mean difference, float32.

    Methods that find a line and not a length are given this one, so that one strength is as
    large a push for all of them.
    """
    return (line / line.norm() * shift(chosen, rejected).norm()).float()
