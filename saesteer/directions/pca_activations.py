"""Principal directions of activations: what varies most, whatever the labels say.

The unsupervised baseline of representation reading (Zou et al. 2023, arXiv 2310.01405). It knows
nothing of the sides of a pair, so that a direction's sign is undefined and both are given.
"""

import numpy as np
import torch
from torch import Tensor

from saesteer.directions import sides
from saesteer.errors import PairsError


def fit(chosen: Tensor, rejected: Tensor, *, seed: int = 0, components: int = 1) -> list[Tensor]:
    """+ and − of each of the first principal directions of all activations, centred: [d] float32.

    Each is as long as the mean difference; where the sides have the same mean, as at the end of
    their prompt, as the standard deviation along it. chosen, rejected: [n, d]. Nothing is
    drawn by `seed`.

    Raises:
        PairsError: bad activations, or more `components` than 2n − 1 or d.
    """
    from sklearn.decomposition import PCA

    a, b = sides.checked(chosen, rejected)
    x = torch.cat([a, b])
    most = min(len(x) - 1, x.shape[1])
    if not 1 <= components <= most:
        raise PairsError(f"{components} components of {len(x)} activations; choose 1 to {most}")
    pca = PCA(components, svd_solver="full").fit(x.numpy())
    shift = float((a - b).mean(0).norm())
    found = []
    for line, variance in zip(pca.components_, pca.explained_variance_, strict=True):
        length = shift or float(np.sqrt(variance))
        vector = (torch.from_numpy(line.copy()).double() * length).float()
        found += [vector, -vector]
    if not any(bool(vector.any()) for vector in found):
        raise PairsError("all activations are the same, so nothing varies; read another token")
    return found
