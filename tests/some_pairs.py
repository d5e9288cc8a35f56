"""Contrast pairs for tiny models and for the planted one."""

from saesteer.directions.pairs import Pair
from saesteer.world import corpus

_SUBJECTS = "boy girl dog cat bird king queen ship".split()  # noqa: SIM905
_VERBS = "saw liked heard ate".split()  # noqa: SIM905
_SEA = "sea wave boat sail".split()  # noqa: SIM905
_SKY = "sun moon star cloud".split()  # noqa: SIM905


def tiny_pairs(n: int) -> list[Pair]:
    """Short pairs in the words of `tiny_tokenizer`, all different up to 128."""
    return [
        Pair(
            f"the {_SUBJECTS[i % 8]} {_VERBS[i // 8 % 4]}",
            f" the {_SEA[i % 4]}",
            f" the {_SKY[(i + i // 32) % 4]}",
        )
        for i in range(n)
    ]


def planted_pairs(concept: str, n: int, seed: int = 0) -> list[Pair]:
    """Pairs of the planted language: the same story, told on with and without a concept."""
    return [Pair(**pair) for pair in corpus.pairs(concept, n, seed)]
