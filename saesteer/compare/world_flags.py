"""The planted failures and the controls, measured on one model, its SAE and its index."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.compare import failures, world_arms
from saesteer.compare.circle import day_means
from saesteer.compare.failures import Flag
from saesteer.compare.world_pool import random_dictionary
from saesteer.compare.world_score import edited_kl
from saesteer.core.sae import Sae
from saesteer.directions.fitting import fit_direction
from saesteer.directions.pairs import Pair
from saesteer.effects import apply, planted_recovery, planted_score
from saesteer.effects.calibrate import EditsAt
from saesteer.features.search import Index
from saesteer.steering.edits import Add
from saesteer.world import corpus, lexicon

PAIRS = 128
_STORIES = 300


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: Sae,
    index: Index,
    *,
    seed: int = 0,
) -> tuple[list[Flag], list[Flag]]:
    """(a flag for each planted failure, a flag for each control); see `failures`."""
    recovery = planted_recovery.measure(model, sae, stories=_STORIES, seed=seed)
    spurious = [Pair(**p) for p in corpus.pairs("sea", PAIRS, seed + 1, spurious=True)]
    followed = fit_direction("mean-difference", model, tokenizer, spurious, sae.hook_point)
    found = [
        _read_only(model, sae, index, recovery, seed),
        _sign_flip(model, tokenizer, sae, seed),
        failures.spurious_token(
            model, tokenizer, "sea", followed.vector, sae.hook_point, seed=seed
        ),
        failures.rare(recovery, _planted("rare"), occurrences=_occurrences("rare", seed)),
        failures.absorbed_child(recovery.absorption[0]),
        failures.circle(day_means(model, sae.hook_point, seed=seed)),
    ]
    k = max(1, round(float(index.column("density").sum())))
    drawn = random_dictionary(sae, k=k, seed=seed)
    control = planted_recovery.measure(model, drawn, stories=_STORIES, seed=seed)
    controls = [
        failures.untrained(model, lexicon.causal(), seed=seed),
        failures.random_dictionary(recovery, control),
    ]
    return found, controls


def _planted(failure: str) -> str:
    return next(concept.name for concept in lexicon.CONCEPTS if concept.planted == failure)


def _occurrences(failure: str, seed: int) -> int:
    own = set(lexicon.CONCEPTS[lexicon.INDEX[_planted(failure)]].words)
    told = corpus.stories(_STORIES, seed=seed + 10_000)
    return sum(word in own for story in told for word in story.words)


def _read_only(
    model: PreTrainedModel,
    sae: Sae,
    index: Index,
    recovery: planted_recovery.Recovery,
    seed: int,
) -> Flag:
    concept = lexicon.READ_ONLY.name
    best = next(c for c in recovery.concepts if c.concept == concept)
    feature = best.feature or 0
    unit = index.max_act(feature)
    return failures.read_only(
        model,
        concept,
        lambda strength: [Add(sae.direction(feature), strength * unit, sae.write_point)],
        world_arms.FEATURE_STRENGTHS,
        auroc=best.auroc or 0.0,
        seed=seed,
    )


def _sign_flip(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sae: Sae, seed: int
) -> Flag:
    """The mean differences of the two concepts, as strong as validation outside dreams has it."""
    edits: dict[str, EditsAt] = {}
    strength: dict[str, float] = {}
    for concept in lexicon.FLIPS:
        pairs = [Pair(**p) for p in corpus.pairs(concept, PAIRS, seed)]
        direction = fit_direction("mean-difference", model, tokenizer, pairs, sae.hook_point)
        edits[concept] = partial(apply.edits, direction)
        strength[concept] = _best(model, concept, edits[concept], seed)
    return failures.sign_flip(model, edits, strength, lexicon.FLIPS, seed=seed)


def _best(model: PreTrainedModel, concept: str, edits: EditsAt, seed: int) -> float:
    looked_at = planted_score.prompts(concept, 12, seed=2 * seed)
    grid: Sequence[float] = world_arms.VECTOR_STRENGTHS
    looks = edited_kl(model, looked_at, [edits(s) for s in grid]).mean(1)
    return grid[int(np.argmin(looks))]
