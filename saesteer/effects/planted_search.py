"""How well search finds planted concepts, where the truth is known.

A feature is right for a concept by "fires on" when its activation tells the concept's own words
from all others with AUROC ≥ .9, and no other concept's words are told better by it; what is right
by "causes" stands in `planted_causes`.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from saesteer.world import exact, lexicon

RIGHT_AUROC = 0.9
HELD_OUT_WORDS = 3


@dataclass(frozen=True)
class SearchScore:
    """precision@1, mean reciprocal rank, and the queries whose first hit is not a right feature.

    distinct: different first hits of the concepts' names, over the number of concepts.
    concepts: how many were asked for; without: those that no feature is right for, so that all
    their queries miss, whatever the search does.
    """

    precision_at_1: float
    mrr: float
    misses: tuple[tuple[str, str], ...]  # (concept, query)
    distinct: float
    concepts: int
    without: tuple[str, ...]

    def over_the_rest(self) -> tuple[float, float] | None:
        """precision@1 and MRR over the concepts that a feature is right for; None: there is none.

        Every concept has as many queries, and those of the others count 0.
        """
        rest = self.concepts - len(self.without)
        if rest == 0:
            return None
        return self.precision_at_1 * self.concepts / rest, self.mrr * self.concepts / rest


def auroc(activations: Tensor, tokens: NDArray[Any]) -> NDArray[np.float64]:
    """AUROC of every feature as a detector of every concept's own words.

    Args:
        activations: [n_tokens, d_sae].
        tokens: [n_tokens] ids in the planted vocabulary.

    Returns:
        [d_sae, n_concepts]; NaN for a concept that never occurs. Ties count one half
        (Mann–Whitney U by mid-ranks).
    """
    ids = exact.word_ids()
    ranks = rankdata(activations.float().cpu().numpy(), axis=0)  # [n, d_sae]
    table = np.full((ranks.shape[1], len(lexicon.CONCEPTS)), np.nan)
    for column, concept in enumerate(lexicon.CONCEPTS):
        positive = np.isin(tokens, [ids[word] for word in concept.words])
        n_pos, n_neg = int(positive.sum()), int((~positive).sum())
        if n_pos and n_neg:
            rank_sum = ranks[positive].sum(axis=0)
            table[:, column] = (rank_sum - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg)
    return table


def right_features(table: NDArray[np.float64], concept: str) -> set[int]:
    """The features that are right for a concept by "fires on"; see the module's text."""
    column = lexicon.INDEX[concept]
    filled = np.nan_to_num(table, nan=0.0)
    right = (filled[:, column] >= RIGHT_AUROC) & (filled.argmax(axis=1) == column)
    return set(np.flatnonzero(right).tolist())


def queries(concept: str, seed: int) -> list[str]:
    """The concept's name, and three other words of its lexicon drawn by seed."""
    others = [w for w in lexicon.CONCEPTS[lexicon.INDEX[concept]].words if w != concept]
    rng = np.random.default_rng([seed, 5, lexicon.INDEX[concept]])
    return [concept, *rng.choice(others, HELD_OUT_WORDS, replace=False).tolist()]


def score_search(
    search: Callable[[str], Sequence[int]],
    right: Callable[[str], Collection[int]],
    concepts: Sequence[str],
    *,
    seed: int,
) -> SearchScore:
    """Score `search` (query → feature ids, best first) over the concepts' queries.

    right: concept → the features that are right for it; where there are none, all its queries miss.
    """
    ranks: list[float] = []
    misses: list[tuple[str, str]] = []
    first: set[int] = set()
    without: list[str] = []
    for concept in concepts:
        features = right(concept)
        if not features:
            without.append(concept)
        for query in queries(concept, seed):
            hits = search(query)
            ranks.append(reciprocal_rank(hits, features))
            if ranks[-1] < 1.0:
                misses.append((concept, query))
            if query == concept:
                first.update(hits[:1])
    return SearchScore(
        float(np.mean([r == 1.0 for r in ranks])),
        float(np.mean(ranks)),
        tuple(misses),
        len(first) / len(concepts),
        len(concepts),
        tuple(without),
    )


def reciprocal_rank(hits: Sequence[int], right: Collection[int]) -> float:
    """1 / the place of the first hit that is right, counted from 1; 0 where none is."""
    return next((1.0 / (i + 1) for i, hit in enumerate(hits) if hit in right), 0.0)
