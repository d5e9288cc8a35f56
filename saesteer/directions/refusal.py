"""Projection to a class's mean along a mean difference, as for refusal.

Affine concept editing (Marshall et al. 2024, arXiv 2411.09003) with α = 1; the direction is the
difference of means that mediates refusal (Arditi et al. 2024, arXiv 2406.11717). These
compare prompts of two kinds; a pair has one prompt, so here its two answers are compared.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.model import HookPoint, fingerprint
from saesteer.directions import sides
from saesteer.directions.answers import answer_activations
from saesteer.directions.direction import Direction, Use
from saesteer.directions.pairs import Pair, warn_if_few
from saesteer.directions.places import check_sides_read


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    points: Sequence[HookPoint],
    *,
    seed: int = 0,
    read: str = "answer-mean",
    batch_size: int = 32,
    cache: Path | None = None,
) -> list[Direction]:
    """r = mean over pairs of act(chosen) − act(rejected); x becomes x − (x·r̂)r̂ + avg·r̂.

    avg is the mean of x·r̂ over the chosen side, so that every token projects where that side does
    on average. At one point or at several, each with its own r [d] and avg; a plain addition of
    the same r is `mean-difference`.

    Args:
        seed: not used: nothing is drawn.
        read, batch_size, cache: see `answers.answer_activations`.

    Raises:
        PairsError: no pairs or one that can't be read, the end of the prompt as the place to
            read, or the same mean on both sides.
        HookPointError: the model has no such place.
    """
    check_sides_read(read)
    found = answer_activations(
        model, tokenizer, pairs, points, read=read, batch_size=batch_size, cache=cache
    )
    warn_if_few(len(pairs))
    name = fingerprint(model)
    directions = []
    for point in points:
        both = sides.checked(*found[point])
        vector = sides.shift(*both)
        unit = vector / vector.norm()
        target, other = (float((side @ unit).mean()) for side in both)
        directions.append(
            Direction(
                vector.float(),
                point,
                "refusal-projection",
                len(pairs),
                read,
                name,
                {"chosen_mean": target, "rejected_mean": other},
                Use("project", to=target),
            )
        )
    return directions
