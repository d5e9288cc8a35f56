"""One added vector trained by gradient, the model itself left alone.

Steering vectors by gradient: Subramani et al. 2022 (arXiv 2205.05124); with both sides of pairs:
Cao et al. 2024 (BiPO, arXiv 2406.00045).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.blocks import point_width
from saesteer.core.clock import TokenClock
from saesteer.core.hooks import activations, edit
from saesteer.core.model import HookPoint, device_of, fingerprint, special_token_ids
from saesteer.directions.direction import Direction
from saesteer.directions.margin import margins
from saesteer.directions.pairs import Pair, warn_if_few
from saesteer.directions.places import Side
from saesteer.directions.rows import added, both_sides, padded
from saesteer.errors import PairsError, TrainingError

# Pairs whose activations say how large the stream is: a number of its own, since the size of an
# update may not depend on that of a batch.
_MEASURED = 32


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    points: Sequence[HookPoint],
    *,
    seed: int = 0,
    steps: int = 100,
    learning_rate: float = 0.01,
    pairs_a_step: int = 8,
    batch_size: int = 32,
) -> list[Direction]:
    """The vector that, added to every plain token, makes the chosen answers likelier.

    Adam on the vector alone, from zero, lowers −log σ(m), with m a pair's margin: mean-token
    log p(chosen) − log p(rejected). No weight of the model changes. Each point gets a vector [d]
    of its own, trained by itself.

    Args:
        seed: of the order in which pairs are drawn.
        steps, pairs_a_step: updates, and the pairs of each.
        learning_rate: a share of the stream's norm at the point: an update moves the vector by
            about so much of it.
        batch_size: sequences a forward pass where nothing is trained.

    Raises:
        PairsError: no pairs or one that can't be read, or a count below 1.
        TrainingError: gradients that are no finite numbers.
        HookPointError: the model has no such place.
    """
    for name, value in (("steps", steps), ("pairs_a_step", pairs_a_step)):
        if value < 1:
            raise PairsError(f"{name}={value}: expected a whole number from 1 up")
    sides = both_sides(model, tokenizer, pairs)
    warn_if_few(len(pairs))
    special = special_token_ids(model, tokenizer)
    name = fingerprint(model)
    found = []
    for point in points:
        size = _usual_norm(model, point, sides[:_MEASURED], special, batch_size)
        width = point_width(model, point)
        vector = torch.zeros(width, device=device_of(model), requires_grad=True)
        # Adam's updates are about its learning rate in every dimension.
        adam = torch.optim.Adam([vector], lr=learning_rate * size / width**0.5)
        with torch.no_grad():
            before = float(margins(model, tokenizer, pairs, batch_size=batch_size).mean())
        for rows in _batches(len(sides), pairs_a_step, steps, seed):
            with torch.enable_grad(), _adding(model, point, vector, special):
                told = margins(model, tokenizer, [pairs[i] for i in rows], batch_size=2 * len(rows))
                loss = -torch.nn.functional.logsigmoid(told).mean()
                (vector.grad,) = torch.autograd.grad(loss, [vector])
            if not bool(vector.grad.isfinite().all()):
                raise TrainingError(
                    f"training at {point} gave NaN or infinity; load the model in float32 or "
                    "lower the learning rate"
                )
            adam.step()
        trained = vector.detach()
        with torch.no_grad(), _adding(model, point, trained, special):
            after = float(margins(model, tokenizer, pairs, batch_size=batch_size).mean())
        found.append(
            Direction(
                trained.cpu().float(),
                point,
                "bias-only",
                len(pairs),
                "answer-mean",
                name,
                {
                    "steps": steps,
                    "learning_rate": learning_rate,
                    "margin_before": before,
                    "margin_after": after,
                },
            )
        )
    return found


def _adding(
    model: PreTrainedModel, point: HookPoint, vector: Tensor, special: frozenset[int]
) -> AbstractContextManager[TokenClock]:
    return edit(model, {point: lambda x, tokens: added(x, vector, tokens)}, special_ids=special)


def _batches(n: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """Rows of each step: all of them in a drawn order, then again in another."""
    rng = torch.Generator().manual_seed(seed)
    size = min(size, n)
    queue: list[int] = []
    found = []
    for _ in range(steps):
        if len(queue) < size:
            queue = torch.randperm(n, generator=rng).tolist()
        found.append(queue[:size])
        queue = queue[size:]
    return found


def _usual_norm(
    model: PreTrainedModel,
    point: HookPoint,
    sides: Sequence[tuple[Side, Side]],
    special: frozenset[int],
    batch_size: int,
) -> float:
    """The mean norm of the plain tokens' activations at a point."""
    rows = [side.ids for both in sides for side in both]
    norms = []
    for first in range(0, len(rows), batch_size):
        ids, mask = padded(rows[first : first + batch_size])
        x = activations(model, [point], ids, mask)[point].float().cpu()
        plain = (mask > 0) & ~torch.isin(ids, torch.tensor(sorted(special), dtype=torch.long))
        norms.append(x[plain].norm(dim=-1))
    return float(torch.cat(norms).mean())
