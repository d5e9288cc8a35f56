"""The difference of two classes' means, which needs no pairs (Marks & Tegmark 2023, 2310.06824)."""

from torch import Tensor

from saesteer.errors import PairsError


def fit(chosen: Tensor, rejected: Tensor, *, seed: int = 0) -> Tensor:
    """v = mean of chosen − mean of rejected: [d] float32, in units of activation.

    chosen: [n, d], rejected: [m, d], with n and m as they come. Of whole pairs it is the mean
    difference. Nothing is drawn by `seed`.

    Raises:
        PairsError: an empty side, widths that don't agree, NaN, or the same mean on both sides.
    """
    if chosen.dim() != 2 or rejected.dim() != 2 or chosen.shape[1] != rejected.shape[1]:
        raise PairsError(
            f"chosen activations of shape {list(chosen.shape)} and rejected ones of shape "
            f"{list(rejected.shape)}; expected [n, d] and [m, d]"
        )
    if not len(chosen) or not len(rejected):
        raise PairsError("a side has no activations; both need one at least, 128 are a good number")
    vector = chosen.detach().double().mean(0).cpu() - rejected.detach().double().mean(0).cpu()
    if not bool(vector.isfinite().all()):
        raise PairsError("activations hold NaN or infinity; load the model in float32")
    if not bool(vector.any()):
        raise PairsError("the two sides have the same mean activation; read where they differ")
    return vector.float()
