"""A direction kept out of the stream, wherever the model writes to it (Arditi et al. 2024).

arXiv 2406.11717.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.model import HookPoint, decoder_layers, fingerprint
from saesteer.directions import sides
from saesteer.directions.answers import answer_activations
from saesteer.directions.direction import Direction, Use
from saesteer.directions.pairs import Pair, warn_if_few
from saesteer.errors import HookPointError


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
    """r = mean over pairs of act(chosen) − act(rejected), to be taken out at every write.

    Each direction [d_model] is fitted at one point of the stream and acts at all writes, which its
    provenance lists: what enters the first block, and what each block's halves add. Weights can
    do the same (`steering.bake`). Choose one point on validation rather than use several at once.

    Args:
        seed: not used: nothing is drawn.
        read, batch_size, cache: see `answers.answer_activations`.

    Raises:
        PairsError: no pairs or one that can't be read, or the same mean on both sides.
        HookPointError: a head, whose output isn't the stream, or a place the model doesn't have.
    """
    for point in points:
        if point.head is not None:
            raise HookPointError(
                f"{point}: only a direction of the stream can be ablated; use resid_post"
            )
    found = answer_activations(
        model, tokenizer, pairs, points, read=read, batch_size=batch_size, cache=cache
    )
    warn_if_few(len(pairs))
    name, places = fingerprint(model), [str(point) for point in writes(model)]
    directions = []
    for point in points:
        vector = sides.shift(*sides.checked(*found[point]))
        directions.append(
            Direction(
                vector.float(),
                point,
                "ablate",
                len(pairs),
                read,
                name,
                {"writes": places},
                Use("ablate"),
            )
        )
    return directions


def writes(model: nn.Module) -> list[HookPoint]:
    """Every place where something is added to the stream."""
    halves = [
        HookPoint(layer, site)
        for layer in range(len(decoder_layers(model)))
        for site in ("attn_out", "mlp_out")
    ]
    return [HookPoint(0, "resid_pre"), *halves]
