"""The weights of a logistic probe (Alain & Bengio 2016, arXiv 1610.01644).

Probes read well and steer badly: their weights undo the covariance of the activations, and point
where the classes are told apart best, not where they lie (AxBench, Wu et al. 2025, 2501.17148).
"""

import numpy as np
import torch
from torch import Tensor

from saesteer.directions import sides
from saesteer.errors import PairsError


def fit(chosen: Tensor, rejected: Tensor, *, seed: int = 0, C: float = 1.0) -> Tensor:
    """Weights of an L2-regularised logistic regression of chosen against rejected: [d] float32.

    They are as long as the mean difference. Nothing is drawn by `seed`.

    Args:
        chosen, rejected: [n, d]; centred, and divided by one number so that the mean square of
            their entries is 1, lest the regularisation depend on the size of a model's stream.
        C: inverse strength of the regularisation, scikit-learn's.

    Raises:
        PairsError: bad activations, or C not above 0.
    """
    from sklearn.linear_model import LogisticRegression

    if not C > 0:
        raise PairsError(f"C={C}: the inverse strength of a regularisation is above 0; 1 is usual")
    a, b = sides.checked(chosen, rejected)
    sides.shift(a, b)  # where there is none there is nothing to scale by either
    x = torch.cat([a, b])
    x = x - x.mean(0)
    x = x / x.square().mean().sqrt()
    labels = np.repeat([1, 0], [len(a), len(b)])
    probe = LogisticRegression(C=C, max_iter=2000).fit(x.numpy(), labels)
    return sides.as_long_as_the_shift(torch.from_numpy(probe.coef_[0].copy()), a, b)
