"""For tests of arms: contrast pairs about the sea and the kitchen, and an index of an SAE."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from saesteer.core.sae import Sae
from saesteer.directions.pairs import Pair
from saesteer.features import store
from saesteer.features.search import Index
from tests.some_features import an_entry

SEA = ["ship", "sea", "wave", "sail", "boat", "harbour"]
KITCHEN = ["bread", "soup", "salt", "pepper", "cook", "kitchen"]


def some_pairs(n: int = 24, *, begin: int = 0) -> list[Pair]:
    """Pairs whose chosen answers are about the sea, and the rejected ones about the kitchen."""
    who = ["boy", "girl", "king", "queen", "dog", "cat", "moon", "star"]
    did = ["saw", "heard", "liked"]
    return [
        Pair(
            f"the {who[i % 8]} {did[i // 8 % 3]} the",
            f" {SEA[i % 6]} and {SEA[(i + 1 + i // 6) % 6]}",
            f" {KITCHEN[i % 6]} and {KITCHEN[(i + 1 + i // 6) % 6]}",
        )
        for i in range(begin, begin + n)
    ]


def an_index(
    folder: Path, sae: Sae, *, figures: Mapping[int, Mapping[str, float]] | None = None
) -> Index:
    """An index of the SAE, made up: density .005 and max_act 2, but for the figures given."""
    entries = []
    for number in range(sae.d_sae):
        entry = an_entry(number, word=1.0)
        given = {"density": 0.005, "max_act": 2.0} | dict((figures or {}).get(number, {}))
        entries.append(replace(entry, feature=replace(entry.feature, **given)))
    store.write(folder / "features.sqlite", entries, {"sae_hash": sae.hash})
    return Index.open(folder / "features.sqlite")
