"""Linear artificial tomography: representation engineering (Zou et al. 2023, arXiv 2310.01405)."""

import torch
from torch import Tensor

from saesteer.directions import sides


def fit(chosen: Tensor, rejected: Tensor, *, seed: int = 0, centred: bool = False) -> Tensor:
    """The first principal direction of the pairs' differences: [d] float32.

    Its sign is the labels': the chosen sides lie further along it. It is as long as the mean
    difference. Nothing is drawn by `seed`.

    Args:
        chosen, rejected: [n, d].
        centred: take the mean off the differences first, as PCA does. That takes off what the
            pairs have in common, the contrast itself: on a planted shift what is left is noise.

    Raises:
        PairsError: bad activations, no difference, or with `centred` fewer than two pairs.
    """
    a, b = sides.checked(chosen, rejected, fewest=2 if centred else 1)
    differences = a - b
    mean = sides.shift(a, b)
    # scikit-learn's PCA always centres, so the singular vectors are taken here.
    if centred:
        differences = differences - mean
    line = torch.linalg.svd(differences, full_matrices=False)[2][0]
    return sides.as_long_as_the_shift(-line if line @ mean < 0 else line, a, b)
