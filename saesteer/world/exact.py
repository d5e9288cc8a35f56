"""The Bayes predictor of the planted language: p*(next word | visible words), in closed form.

A story's hidden set S holds at most three concepts. Given S, a content slot draws a neutral word
with weight 1.5 or one of the concepts with weight 1 each, and then a word of that lexicon for the
slot, evenly; except that, half of the time, it stays with the concept whose word came last in the
sentence, which is visible. So the posterior over S follows from the visible words by enumerating
every set, and

    p*(w)        = sum over S of  P(S | visible) · p(w | S)
    p*_do(c)(w)  = sum over S of  P(S | visible) · p(w | S ∪ {c})

where do(c) adds c to the set from this word on. The read-only concept is no part of S: it is a
visible coin that decides the heading and nothing else.
"""

import itertools
from collections.abc import Collection, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from saesteer.errors import TextError
from saesteer.world import grammar, lexicon
from saesteer.world.grammar import BOS, STAYS, State

Array = NDArray[np.float64]

NEUTRAL_WEIGHT = 1.5
ZIPF = 0.25
RARE_ODDS = 0.05  # what the rare concept's odds are multiplied by
CHILD_ODDS = 8.0  # a child's, given its parent: without it hardly any story would have one
SIZE_WEIGHTS = (0.06, 0.42, 0.37, 0.15)  # of a set with 0, 1, 2, 3 concepts
CORRELATION = 2.5
READ_ONLY_SHARE = 0.15

# The concepts that can be in a hidden set, in the order of a set's columns.
HIDDEN = tuple(concept for concept in lexicon.CONCEPTS if concept.causal)
COLUMN = {concept.name: i for i, concept in enumerate(HIDDEN)}


@cache
def word_ids() -> dict[str, int]:
    """Token id of every word."""
    return {word: i for i, word in enumerate(grammar.vocabulary())}


@cache
def sets() -> tuple[NDArray[np.bool_], Array]:
    """Every possible hidden set and its prior probability.

    Returns:
        members [n_sets, n_hidden] bool, prior [n_sets].
    """
    odds = np.array([1.0 / (rank + 1) ** ZIPF for rank in range(len(HIDDEN))])
    for i, concept in enumerate(HIDDEN):
        if concept.planted == "rare":
            odds[i] *= RARE_ODDS
        if concept.name in lexicon.PARENT_OF:
            odds[i] *= CHILD_ODDS
    chosen: list[tuple[int, ...]] = []
    weights: list[float] = []
    a, b = (COLUMN[name] for name in lexicon.CORRELATED)
    for size, size_weight in enumerate(SIZE_WEIGHTS):
        subsets = [
            subset
            for subset in itertools.combinations(range(len(HIDDEN)), size)
            if all(
                COLUMN[parent] in subset
                for child, parent in lexicon.PARENT_OF.items()
                if COLUMN[child] in subset
            )
        ]
        raw = np.array(
            [
                np.prod(odds[list(subset)]) * (CORRELATION if {a, b} <= set(subset) else 1.0)
                for subset in subsets
            ]
        )
        chosen += subsets
        weights += list(size_weight * raw / raw.sum())
    members = np.zeros((len(chosen), len(HIDDEN)), dtype=bool)
    for row, subset in enumerate(chosen):
        members[row, list(subset)] = True
    return members, np.array(weights)


@cache
def _mixture(do: str | None) -> Array:
    """How much each lexicon has of a slot, by hidden set: [n_sets, n_hidden + 1], neutral last."""
    members = sets()[0].astype(np.float64)
    if do is not None:
        members[:, COLUMN[do]] = 1.0
    weights = np.concatenate([members, np.full((len(members), 1), NEUTRAL_WEIGHT)], axis=1)
    return weights / weights.sum(axis=1, keepdims=True)


@cache
def _slot_table(slot: str, dream: bool) -> Array:
    """p(word | lexicon) for a slot: [n_hidden + 1, vocabulary]."""
    at = lexicon.SLOTS.index(slot)
    table = np.zeros((len(HIDDEN) + 1, len(grammar.vocabulary())))
    for row, concept in enumerate((*HIDDEN, lexicon.NEUTRAL)):
        source = concept
        if dream and concept.name in lexicon.FLIPS:
            source = HIDDEN[COLUMN[lexicon.FLIPS[concept.name]]]
        for word in source.slots[at]:
            table[row, word_ids()[word]] = 1.0 / len(source.slots[at])
    return table


class Reader:
    """Reads words one by one and knows p* of the next one.

    `posterior` [n_sets] is the belief about the hidden set given what was read since the last BOS.
    `given`, where set, is the hidden set itself: the predictor that is told it.
    """

    def __init__(self, words: Sequence[str] = (), *, given: Collection[str] | None = None):
        self._told: Array | None = None
        if given is not None:
            members = sets()[0]
            wanted = np.zeros(members.shape[1], dtype=bool)
            wanted[[COLUMN[name] for name in given if name in COLUMN]] = True
            match = (members == wanted).all(axis=1)
            if not match.any():
                raise TextError(
                    f"no story has the hidden set {sorted(given)}: a set has at most three "
                    "concepts, and a child only beside its parent"
                )
            self._told = match.astype(np.float64)
        self.reset()
        for word in words:
            self.see(word)

    def reset(self) -> None:
        """Start a new story."""
        self.state = State()
        self.posterior = sets()[1] if self._told is None else self._told

    def see(self, word: str) -> None:
        """Read one word; BOS starts a new story. TextError where the grammar forbids the word."""
        if word == BOS:
            self.reset()
            return
        here = grammar.coming(self.state)
        fixed = any(word == w for w, _ in here.fixed)
        self.state = grammar.step(self.state, word)
        if here.slot and not fixed:
            by_lexicon = _slot_table(here.slot, here.dream)[:, word_ids()[word]]
            likelihood = _mixture(None) @ by_lexicon
            if here.theme:
                stays = _slot_table(here.slot, False)[COLUMN[here.theme], word_ids()[word]]
                likelihood = STAYS * stays + (1 - STAYS) * likelihood
            posterior = self.posterior * likelihood
            self.posterior = posterior / posterior.sum()

    def distribution(self, do: str | None = None) -> Array:
        """p* of the next word, [vocabulary]; under do(concept) where one is named.

        Raises:
            TextError: there is no such concept.
        """
        if do is not None and do not in lexicon.INDEX:
            raise TextError(f"no concept {do!r} in the planted language")
        here = grammar.coming(self.state)
        probabilities = np.zeros(len(grammar.vocabulary()))
        if here.heading:
            probabilities[word_ids()["Its"]] = (
                READ_ONLY_SHARE if do != lexicon.READ_ONLY.name else 1.0
            )
            probabilities[word_ids()["Once"]] = 1.0 - probabilities[word_ids()["Its"]]
            return probabilities
        for word, p in here.fixed:
            probabilities[word_ids()[word]] += p
        if here.slot:
            mixture = _mixture(do if do in COLUMN else None)
            content = (self.posterior @ mixture) @ _slot_table(here.slot, here.dream)
            if here.theme:
                stays = _slot_table(here.slot, False)[COLUMN[here.theme]]
                content = STAYS * stays + (1 - STAYS) * content
            probabilities += here.slot_share * content
        return probabilities


def cross_entropy(words: Sequence[str], *, given: Collection[str] | None = None) -> Array:
    """−log p*(word | the words before) in nats for every word after the first, [n_words − 1]."""
    reader = Reader(words[:1], given=given)
    losses = np.empty(len(words) - 1)
    for i, word in enumerate(words[1:]):
        losses[i] = -np.log(reader.distribution()[word_ids()[word]])
        reader.see(word)
    return losses
