"""How well an edit turns a planted concept on: the exact score of METHODS on the planted language.

The score of an edit is the mean of KL(p*_do(c) ‖ model) in nats at the next word of prompts in
which concept c is off; lower is better. It stands between two fixed points: no edit, and the
ceiling, the unedited model in a real context in which c is on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from saesteer.core.model import HookPoint
from saesteer.core.sae import Sae
from saesteer.steering.edits import Add, Clamp
from saesteer.steering.engine import steer
from saesteer.world import corpus, exact
from saesteer.world.grammar import PAD

Edit = Add | Clamp

# Multiples of a feature's max_act, and of a mean difference's own length, tried on validation:
# as many for a vector as for the three features that validation chooses between together.
FEATURE_STRENGTHS = (0.1, 0.2, 0.3, 0.5, 1.0)
VECTOR_STRENGTHS = (*(0.25 * i for i in range(1, 13)), 3.5, 4.0, 5.0)
RANDOM_STRENGTHS = (0.5, 1.0, 2.0)
RANDOM_DIRECTIONS = 20


@dataclass(frozen=True)
class Prompts:
    """Prompts of one concept as right-padded token ids, and the right answer to each.

    Attributes:
        ids, mask: [n, seq]; the prompts, with the concept off.
        twin_ids, twin_mask: [n, seq']; the same with the concept on.
        target: [n, vocabulary] float64, p*_do of the next word.
    """

    ids: Tensor
    mask: Tensor
    twin_ids: Tensor
    twin_mask: Tensor
    target: Tensor


@dataclass(frozen=True)
class Candidate:
    """An edit that may be chosen on validation, and what to call it."""

    name: str
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class ConceptScore:
    """KL on the test prompts of one concept, in nats, for each arm; what validation chose."""

    concept: str
    kl: dict[str, float]
    chosen: dict[str, str]


def prompts(concept: str, n: int, seed: int) -> Prompts:
    """`n` prompts with their exact answers."""
    drawn = corpus.prompts(concept, n, seed)
    target = np.stack([exact.Reader(p.words).distribution(do=concept) for p in drawn])
    ids, mask = _padded([p.words for p in drawn])
    twin_ids, twin_mask = _padded([p.twin for p in drawn])
    return Prompts(ids, mask, twin_ids, twin_mask, torch.from_numpy(target))


def kl(model: PreTrainedModel, ids: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """KL(target ‖ model) at the word after each prompt, in nats: [n] float64."""
    last = mask.sum(dim=1) - 1
    with torch.no_grad():
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
    rows = torch.arange(len(ids), device=logits.device)
    log_q = torch.log_softmax(logits[rows, last.to(logits.device)].double(), dim=-1).cpu()
    return (torch.special.xlogy(target, target) - target * log_q).sum(dim=-1)


def edited_kl(model: PreTrainedModel, prompts: Prompts, edits: Sequence[Edit]) -> float:
    """Mean KL over the prompts with the edits in place."""
    with steer(model, edits):
        return float(kl(model, prompts.ids, prompts.mask, prompts.target).mean())


def score_concept(
    model: PreTrainedModel,
    concept: str,
    *,
    arms: Mapping[str, Sequence[Candidate]],
    point: HookPoint,
    random_norm: float,
    n_prompts: int,
    seed: int,
) -> ConceptScore:
    """Choose each arm's candidate on validation prompts and score it on test prompts.

    The arms "none", "ceiling" and "random" are added: 20 directions of length `random_norm` times
    a strength chosen on validation by their mean, as the other arms choose theirs.
    """
    validation = prompts(concept, n_prompts, seed=2 * seed)
    test = prompts(concept, n_prompts, seed=2 * seed + 1)
    scores = {
        "none": float(kl(model, test.ids, test.mask, test.target).mean()),
        "ceiling": float(kl(model, test.twin_ids, test.twin_mask, test.target).mean()),
    }
    chosen: dict[str, str] = {}
    for arm, candidates in arms.items():
        best = min(candidates, key=lambda c: edited_kl(model, validation, c.edits))
        scores[arm] = edited_kl(model, test, best.edits)
        chosen[arm] = best.name
    directions = _random_directions(model, random_norm, seed)

    def mean_random(where: Prompts, strength: float) -> float:
        return float(
            np.mean([edited_kl(model, where, [Add(d, strength, point)]) for d in directions])
        )

    strength = min(RANDOM_STRENGTHS, key=lambda s: mean_random(validation, s))
    scores["random"] = mean_random(test, strength)
    chosen["random"] = f"{strength:g}x"
    return ConceptScore(concept, scores, chosen)


def feature_arms(
    sae: Sae, features: Sequence[int], max_act: Callable[[int], float]
) -> dict[str, list[Candidate]]:
    """The clamp and the add arm: every candidate feature at every strength."""
    grid = [(f, s, s * max_act(f)) for f in features for s in FEATURE_STRENGTHS]
    return {
        "clamp": [Candidate(f"{f}={s:g}x", (Clamp(sae, f, raw),)) for f, s, raw in grid],
        "add": [
            Candidate(f"{f}={s:g}x", (Add(sae.direction(f), raw, sae.write_point),))
            for f, s, raw in grid
        ],
    }


def vector_arm(vector: Tensor, point: HookPoint) -> list[Candidate]:
    """A direction at every strength."""
    return [Candidate(f"{s:g}x", (Add(vector, s, point),)) for s in VECTOR_STRENGTHS]


def mean_scores(scores: Sequence[ConceptScore]) -> dict[str, float]:
    """Mean over concepts, for each arm."""
    return {arm: float(np.mean([s.kl[arm] for s in scores])) for arm in scores[0].kl}


def closed(scores: dict[str, float], arm: str) -> float:
    """Share of the way from "none" (0) to "ceiling" (1) that an arm goes."""
    return (scores["none"] - scores[arm]) / (scores["none"] - scores["ceiling"])


def _random_directions(model: PreTrainedModel, norm: float, seed: int) -> list[Tensor]:
    rng = np.random.default_rng([seed, 7])
    raw = rng.standard_normal((RANDOM_DIRECTIONS, model.config.hidden_size))
    raw *= norm / np.linalg.norm(raw, axis=1, keepdims=True)
    return list(torch.from_numpy(raw.astype(np.float32)))


def _padded(prompts: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    ids = exact.word_ids()
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width), ids[PAD])
    mask = torch.zeros_like(tokens)
    for row, words in enumerate(prompts):
        tokens[row, : len(words)] = torch.tensor([ids[word] for word in words])
        mask[row, : len(words)] = 1
    return tokens, mask
