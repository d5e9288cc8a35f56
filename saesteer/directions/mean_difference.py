"""Mean difference, as in contrastive activation addition (Panickssery et al. 2024)."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.model import HookPoint, fingerprint
from saesteer.directions.answers import answer_activations
from saesteer.directions.direction import Direction
from saesteer.directions.pairs import Pair, warn_if_few


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    point: HookPoint,
    *,
    read: str = "answer-mean",
    batch_size: int = 32,
) -> Direction:
    """v = mean over pairs of act(chosen) − act(rejected), read on the answers.

    Prompts are shared by the two sides of a pair, so that what a prompt is about falls out of
    every difference. Warns under 32 pairs. Its provenance has "chosen_mean" and "rejected_mean",
    each side's mean of x·v/‖v‖.

    Args:
        read: "answer-mean" (over the answer's tokens) or "answer-last" (its last token; for A/B
            answers, the letter).
        batch_size: sequences a forward pass; the result doesn't depend on it beyond rounding.

    Raises:
        PairsError: no pairs, or one that can't be read; see `answer_activations`.
        HookPointError: the model has no such place.
    """
    chosen, rejected = answer_activations(
        model, tokenizer, pairs, point, read=read, batch_size=batch_size
    )
    warn_if_few(len(pairs))
    vector = (chosen.double() - rejected.double()).mean(0)
    unit = vector / vector.norm().clamp_min(1e-30)
    # x·v̂ of each side, on average: where a projection puts every token.
    means = {
        "chosen_mean": float((chosen.double() @ unit).mean()),
        "rejected_mean": float((rejected.double() @ unit).mean()),
    }
    return Direction(
        vector.float(), point, "mean-difference", len(pairs), read, fingerprint(model), means
    )
