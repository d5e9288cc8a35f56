"""The main job measured on the planted language: does search find, and does steering steer?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.hooks import activations
from saesteer.core.progress import progress
from saesteer.core.sae import Sae
from saesteer.directions import mean_difference
from saesteer.directions.pairs import Pair
from saesteer.effects import planted_score, planted_search
from saesteer.effects.planted_score import ConceptScore
from saesteer.effects.planted_search import SearchScore
from saesteer.features.search import Index
from saesteer.world import corpus, exact, lexicon
from saesteer.world.grammar import BOS

PAIRS = 128
PROMPTS = 12  # validation prompts a concept, and as many test prompts
CANDIDATES = 3  # hits of the search for a concept's name that validation chooses from
FRESH_STORIES = 400  # stories on which a feature is judged; none of them was trained on


@dataclass(frozen=True)
class PlantedReport:
    """What the planted language says of an SAE, its index and steering with them.

    Attributes:
        steer: mean over all causal concepts of KL(p*_do ‖ model) in nats on test prompts, by arm:
            none, random, ceiling, clamp, add, mean_difference_128.
        concepts: the same for each concept, with what validation chose.
        vectors: the mean-difference vector of each concept, float32 [d_model].
    """

    search: SearchScore
    steer: dict[str, float]
    concepts: tuple[ConceptScore, ...]
    vectors: dict[str, torch.Tensor]


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: Sae,
    index: Index,
    *,
    concepts: Sequence[str] | None = None,
    seed: int = 0,
) -> PlantedReport:
    """Score search over the ordinary concepts, and steering over the causal ones.

    The clamp and the add arm choose among the first hits of the search for the concept's name, so
    what is measured is the whole path from a word to a steered model. All arms choose on the same
    validation prompts.
    """
    table = planted_search.auroc(*_fresh_activations(model, sae, seed))
    search = planted_search.score_search(
        lambda query: [hit.id for hit in index.search(query)],
        table,
        lexicon.ordinary(),
        seed=seed,
    )
    scores, vectors = [], {}
    names = lexicon.causal() if concepts is None else list(concepts)
    for concept in progress("score", len(names), unit="concept", iterable=names):
        pairs = [Pair(**pair) for pair in corpus.pairs(concept, PAIRS, seed)]
        vector = mean_difference.fit(model, tokenizer, pairs, sae.hook_point).vector
        vectors[concept] = vector
        found = [hit.id for hit in index.search(concept, limit=CANDIDATES)]
        arms = planted_score.feature_arms(sae, found, index.max_act)
        arms["mean_difference_128"] = planted_score.vector_arm(vector, sae.hook_point)
        scores.append(
            planted_score.score_concept(
                model,
                concept,
                arms=arms,
                point=sae.hook_point,
                random_norm=float(vector.norm()),
                n_prompts=PROMPTS,
                seed=seed,
            )
        )
    return PlantedReport(search, planted_score.mean_scores(scores), tuple(scores), vectors)


def _fresh_activations(
    model: PreTrainedModel, sae: Sae, seed: int
) -> tuple[torch.Tensor, np.ndarray]:
    """Every feature's activation on every word of fresh stories: [n, d_sae], and the word ids."""
    ids = exact.word_ids()
    found, words = [], []
    for story in corpus.stories(FRESH_STORIES, seed=seed + 10_000):
        tokens = torch.tensor([[ids[BOS], *(ids[w] for w in story.words)]])
        tokens = tokens[:, : model.config.max_position_embeddings]
        x = activations(model, [sae.hook_point], tokens)[sae.hook_point][0, 1:]
        found.append(sae.encode(x.float()).dense(sae.d_sae).cpu())
        words.append(tokens[0, 1:].numpy())
    return torch.cat(found), np.concatenate(words)
