"""The main job measured on the planted language: does search find, and does steering steer?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.hooks import activations
from saesteer.core.progress import progress
from saesteer.core.sae import Sae
from saesteer.directions.fitting import fit_direction
from saesteer.directions.pairs import Pair
from saesteer.effects import planted_causes, planted_score, planted_search
from saesteer.effects.planted_score import ConceptScore
from saesteer.effects.planted_search import SearchScore
from saesteer.errors import IndexingError
from saesteer.features.search import Index
from saesteer.world import corpus, exact, lexicon
from saesteer.world.grammar import BOS

PAIRS = 128
PROMPTS = 12  # validation prompts a concept, and as many test prompts
CANDIDATES = 3  # hits of the search for a concept's name that validation chooses from
Sort = Literal["match", "effect"]
SORTS: tuple[Sort, ...] = ("match", "effect")
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


@dataclass(frozen=True)
class ReadOnly:
    """A concept that can be read and changes nothing: found by match, ranked down by effect?

    Attributes:
        feature, auroc: the best feature by "fires on"; right: whether it is right for it by that.
        own_effect: the feature's, see `effects.output_score`.
        mrr: of that feature over the concept's queries, by sort ("match", "effect").
    """

    concept: str
    feature: int
    auroc: float
    right: bool
    own_effect: float | None
    mrr: dict[Sort, float]


@dataclass(frozen=True)
class SearchReport:
    """How well search does over all concepts.

    Attributes:
        fires_on: hits by match, held against "fires on".
        causes: hits by each sort ("match", "effect"), held against "causes", causal concepts only:
            for the others no feature is right.
        read_only: the others.
    """

    fires_on: SearchScore
    causes: dict[Sort, SearchScore]
    read_only: tuple[ReadOnly, ...]


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
    table = _fires_on(model, sae, seed)
    search = planted_search.score_search(
        lambda query: [hit.id for hit in index.search(query)],
        lambda concept: planted_search.right_features(table, concept),
        lexicon.ordinary(),
        seed=seed,
    )
    scores, vectors = [], {}
    names = lexicon.causal() if concepts is None else list(concepts)
    for concept in progress("score", len(names), unit="concept", iterable=names):
        pairs = [Pair(**pair) for pair in corpus.pairs(concept, PAIRS, seed)]
        vector = fit_direction("mean-difference", model, tokenizer, pairs, sae.hook_point).vector
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


def measure_search(
    model: PreTrainedModel, sae: Sae, index: Index, *, seed: int = 0
) -> SearchReport:
    """Score search over all concepts, planted failures included, by "fires on" and by "causes".

    The index must hold output scores (see `effects.output_score`); neutral prompts of the planted
    language are `planted_causes.neutral_prompts`.

    Raises:
        IndexingError: it holds none.
    """
    if not any(hit.own_effect is not None for hit in index.search(lexicon.CONCEPTS[0].name)):
        raise IndexingError(
            f"{index.path} holds no output scores; measure them with `saesteer index --effects`"
        )

    def search(query: str, sort: Sort) -> list[int]:
        return [hit.id for hit in index.search(query, sort=sort)]

    table = _fires_on(model, sae, seed)
    right = {}
    for concept in progress("causes", None, unit="concept", iterable=lexicon.causal()):
        found = {
            feature
            for query in planted_search.queries(concept, seed)
            for sort in SORTS
            for feature in search(query, sort)
        }
        shares = planted_causes.closed(model, sae, concept, sorted(found), index.max_act, seed=seed)
        right[concept] = planted_causes.right_features(shares)
    causes = {
        sort: planted_search.score_search(
            lambda query, sort=sort: search(query, sort),  # type: ignore[misc]
            right.__getitem__,
            lexicon.causal(),
            seed=seed,
        )
        for sort in SORTS
    }
    return SearchReport(
        planted_search.score_search(
            lambda query: search(query, "match"),
            lambda concept: planted_search.right_features(table, concept),
            [concept.name for concept in lexicon.CONCEPTS],
            seed=seed,
        ),
        causes,
        tuple(
            _read_only(index, search, table, concept.name, seed)
            for concept in lexicon.CONCEPTS
            if not concept.causal
        ),
    )


def _read_only(
    index: Index,
    search: Callable[[str, Sort], list[int]],
    table: NDArray[np.float64],
    concept: str,
    seed: int,
) -> ReadOnly:
    column = np.nan_to_num(table[:, lexicon.INDEX[concept]])
    feature = int(column.argmax())
    words = planted_search.queries(concept, seed)
    mrr = {
        sort: float(
            np.mean([planted_search.reciprocal_rank(search(w, sort), {feature}) for w in words])
        )
        for sort in SORTS
    }
    return ReadOnly(
        concept,
        feature,
        float(column[feature]),
        feature in planted_search.right_features(table, concept),
        index.feature(feature).own_effect,
        mrr,
    )


def _fires_on(model: PreTrainedModel, sae: Sae, seed: int) -> NDArray[np.float64]:
    return planted_search.auroc(*_fresh_activations(model, sae, seed))


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
