"""Mean difference: contrastive activation addition (Panickssery et al. 2024, arXiv 2312.06681)."""

from torch import Tensor

from saesteer.directions import sides


def fit(chosen: Tensor, rejected: Tensor, *, seed: int = 0) -> Tensor:
    """v = mean over pairs of chosen − rejected: [d] float32, in units of activation.

    Prompts are shared by the two sides of a pair, so that what a prompt is about falls out of
    every difference. chosen, rejected: [n, d]. Nothing is drawn by `seed`.

    Raises:
        PairsError: shapes that don't agree, NaN, or the same mean on both sides.
    """
    return sides.shift(*sides.checked(chosen, rejected)).float()
