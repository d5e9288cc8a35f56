"""Contrast-consistent search: reading without labels (Burns et al. 2022, arXiv 2212.03827).

It finds a direction on which a statement and its negation get probabilities that add up to one and
are not both a half. It reads; nothing says that it steers, and it never becomes an edit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from saesteer.directions import sides
from saesteer.errors import PairsError


@dataclass(frozen=True, eq=False)
class Reader:
    """A logistic reader of activations.

    weight: [d], bias and loss: what the search ended at; losses: [steps] of the kept start.
    """

    weight: Tensor
    bias: float
    losses: Tensor

    def score(self, x: Tensor) -> Tensor:
        """[m] float32 for x [m, d]: log-odds, higher the more like the chosen side."""
        return (x.detach().cpu().double() @ self.weight + self.bias).float()


def fit(
    chosen: Tensor,
    rejected: Tensor,
    *,
    seed: int = 0,
    steps: int = 1000,
    starts: int = 10,
    learning_rate: float = 0.01,
) -> Reader:
    """Minimise (p⁺ + p⁻ − 1)² + min(p⁺, p⁻)² over pairs, and keep the best of several starts.

    Which side of a pair is "+" is drawn by `seed`, so that the search knows no labels and both
    classes are on either side; each is standardised by itself, as the paper does. (Were the chosen
    sides all "+", that would take off the very difference that is sought.) The labels choose the
    sign alone, which the loss leaves open.

    Args:
        chosen, rejected: [n, d].
        steps, learning_rate: of AdamW, full batch. starts: random beginnings, by `seed`.

    Raises:
        PairsError: bad activations, fewer than two pairs, or no steps or starts.
    """
    if steps < 1 or starts < 1:
        raise PairsError(f"{steps} steps and {starts} starts; a search needs one of each at least")
    a, b = sides.checked(chosen, rejected, fewest=2)
    generator = torch.Generator().manual_seed(seed)
    swap = (torch.rand(len(a), generator=generator) < 0.5)[:, None]
    plus, minus = torch.where(swap, b, a), torch.where(swap, a, b)
    centre = (plus.mean(0) + minus.mean(0)) / 2
    plus, minus = plus - plus.mean(0), minus - minus.mean(0)
    spread = torch.cat([plus, minus]).std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    plus, minus = plus / spread, minus / spread

    d = a.shape[1]
    weights = torch.randn(d, starts, generator=generator, dtype=torch.float64) / d**0.5
    weights.requires_grad_()
    biases = torch.zeros(starts, dtype=torch.float64, requires_grad=True)
    # Adam looks at each number by itself, so all starts together do what each would do alone.
    optimiser = torch.optim.AdamW([weights, biases], lr=learning_rate, weight_decay=0.01)
    history = []
    with torch.enable_grad():
        for _ in range(steps):
            losses = _losses(plus @ weights + biases, minus @ weights + biases)
            history.append(losses.detach())
            optimiser.zero_grad()
            losses.sum().backward()
            optimiser.step()
    with torch.no_grad():
        history.append(_losses(plus @ weights + biases, minus @ weights + biases))
    best = int(history[-1].argmin())
    weight = weights.detach()[:, best] / spread
    bias = float(biases.detach()[best] - centre @ weight)
    if float(((a - b) @ weight).mean()) < 0:
        weight, bias = -weight, -bias
    return Reader(weight, bias, torch.stack(history)[:, best])


def _losses(plus: Tensor, minus: Tensor) -> Tensor:
    """The loss of each start [starts], of log-odds [n, starts]."""
    p, q = plus.sigmoid(), minus.sigmoid()
    return ((p + q - 1).square() + torch.minimum(p, q).square()).mean(0)
