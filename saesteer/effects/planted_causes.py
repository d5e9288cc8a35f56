"""Which features cause a planted concept: adding one closes a quarter of the way to the ceiling.

A feature that fires on a concept need not cause it. `closed` says how far adding a feature's
direction turns the concept on: 0 is no edit, 1 the unedited model in a real context in which the
concept is on (METHODS, section 4). The strength is chosen on validation prompts, the share is
measured on test prompts.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from saesteer.core.sae import Sae
from saesteer.effects import planted_score
from saesteer.effects.planted_score import FEATURE_STRENGTHS, Prompts
from saesteer.errors import TextError
from saesteer.steering.edits import Add
from saesteer.steering.engine import steer
from saesteer.world import corpus, lexicon

# Right for "causes": this share of the way, or more.
RIGHT_SHARE = 0.25
PROMPTS = 12
# Prompts in one pass of the model.
_ROWS = 240
# Stories on whose openings output scores are measured: each cut before a content word, where a
# concept could speak next. They are other stories than those that tell what is right.
_NEUTRAL, _NEUTRAL_SEED = 16, 77


def closed(
    model: PreTrainedModel,
    sae: Sae,
    concept: str,
    features: Sequence[int],
    max_act: Callable[[int], float],
    *,
    n_prompts: int = PROMPTS,
    seed: int = 0,
) -> dict[int, float]:
    """Share of the way to the ceiling that adding each feature goes: feature → share; 1 is there.

    Below 0 an edit does harm. A feature that never fired has no strength to be added at: 0.

    Args:
        max_act: of a feature; it is added at `FEATURE_STRENGTHS` times that.
        n_prompts: validation prompts, and as many test prompts.

    Raises:
        TextError: no such concept, or one that changes nothing: its ceiling is no edit, and no
            share of that way can be told.
    """
    if concept not in lexicon.causal():
        raise TextError(
            f"{concept!r} is no causal concept of the planted language; those are "
            f"{', '.join(lexicon.causal())}"
        )
    validation = planted_score.prompts(concept, n_prompts, seed=2 * seed)
    test = planted_score.prompts(concept, n_prompts, seed=2 * seed + 1)
    none = float(planted_score.kl(model, test.ids, test.mask, test.target).mean())
    ceiling = float(planted_score.kl(model, test.twin_ids, test.twin_mask, test.target).mean())

    alive = [feature for feature in dict.fromkeys(features) if max_act(feature) > 0]
    directions = {feature: sae.direction(feature) for feature in alive}

    def added(feature: int, strength: float) -> Add:
        return Add(directions[feature], strength * max_act(feature), sae.write_point)

    tried = [added(feature, strength) for feature in alive for strength in FEATURE_STRENGTHS]
    on_validation = edited_kl(model, validation, tried).reshape(len(alive), -1)
    best = on_validation.argmin(axis=1) if alive else []
    chosen = [added(f, FEATURE_STRENGTHS[at]) for f, at in zip(alive, best, strict=True)]
    shares = (none - edited_kl(model, test, chosen)) / (none - ceiling)
    return dict.fromkeys(features, 0.0) | dict(zip(alive, shares.tolist(), strict=True))


def neutral_prompts() -> tuple[str, ...]:
    """Neutral text of the planted language for output scores: stories cut before a content word."""
    names = lexicon.causal()
    each = [
        corpus.prompts(names[i % len(names)], 1, seed=_NEUTRAL_SEED + i)[0] for i in range(_NEUTRAL)
    ]
    return tuple(corpus.text(prompt.words) for prompt in each)


def right_features(shares: dict[int, float]) -> set[int]:
    """The features that are right for a concept by "causes", from what `closed` gave."""
    return {feature for feature, share in shares.items() if share >= RIGHT_SHARE}


def edited_kl(
    model: PreTrainedModel, prompts: Prompts, edits: Sequence[Add]
) -> NDArray[np.float64]:
    """Mean KL(p*_do ‖ model) over the prompts under each edit alone, in nats: [len(edits)].

    The same as `planted_score.edited_kl` of one after the other; here each row has its own edit.
    """
    n = len(prompts.ids)
    found = [np.zeros(0)]
    at_once = max(1, _ROWS // n)
    for start in range(0, len(edits), at_once):
        some = edits[start : start + at_once]
        ids, mask = prompts.ids.repeat(len(some), 1), prompts.mask.repeat(len(some), 1)
        target = prompts.target.repeat(len(some), 1)
        with torch.no_grad(), steer(model, [[edit] for edit in some for _ in range(n)]):
            rows = planted_score.kl(model, ids, mask, target)
        found.append(rows.view(len(some), n).mean(dim=1).numpy())
    return np.concatenate(found)
