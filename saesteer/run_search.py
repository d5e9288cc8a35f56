"""How a run finds features by what they do: on a text, between texts, beside another feature."""

import warnings
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

from saesteer import run_folder
from saesteer.errors import IndexingError
from saesteer.units import checked

if TYPE_CHECKING:
    from saesteer.features.hit import Hit
    from saesteer.features.reading import Encoded, TokenReading
    from saesteer.features.search import Index
    from saesteer.run import Run

# Matches whose effect is measured where the order by effect is asked for.
_MEASURED = 50


def search(
    run: "Run", query: str, limit: int = 10, sort: Literal["match", "effect"] = "match"
) -> "list[Hit]":
    """Features by keyword, best first; imports no torch.

    Args:
        query: in the language of `features.query`.
        sort: "effect" puts first what also causes what it fires on. Of the best matches those not
            measured yet are measured then, which needs the model.

    Warns:
        UserWarning: effects would have to be measured and can't be kept; the order is by those
            that are known.

    Raises:
        IndexingError: no index, a damaged one, or one of another SAE.
        SaeError: an effect is to be measured, and the run has no SAE.
    """
    index = run.index
    if sort == "effect":
        from saesteer.features.store import measured

        known = measured(index.path)
        first = index.search(query, max(limit, _MEASURED))
        if new := [hit.id for hit in first if hit.id not in known]:
            _measure(run, new)
    return index.search(query, limit, sort=sort)


def _measure(run: "Run", features: Sequence[int]) -> None:
    """Measure effects and keep them; where they can't be kept, say so and leave them."""
    from saesteer.enrich import effects
    from saesteer.features.database import locked

    path = _index(run).path
    try:
        # Before the work: where nothing can be written, it would be lost.
        with locked(path):
            pass
        effects(run, features)
    except IndexingError as error:
        warnings.warn(
            f"hits are in order of the effects known before, the others by match: those of "
            f"{len(features)} features can't be kept ({error})",
            stacklevel=2,
        )


def like(run: "Run", text: str, limit: int = 10) -> "list[Hit]":
    """Features that fire on a text more often than elsewhere; see `features.like.by_example`.

    Raises:
        TextError: a text without a token.
        SaeError: no SAE. IndexingError: no index, or one of another SAE or model.
    """
    from saesteer.features.like import by_example

    index = _index(run)
    (encoded,) = _encoded(run, [text])
    found = by_example(
        encoded.plain_codes(),
        density=index.column("density"),
        max_act=index.column("max_act"),
        n_tokens=index.meta["n_tokens"],
        limit=limit,
    )
    return index.hits(
        [
            (
                one.feature,
                one.score,
                f"fires on {one.rate:.0%} of the text, on {one.base:.2%} elsewhere, at "
                f"{one.strength:.2f} of its max",
            )
            for one in found
        ]
    )


def contrast(
    run: "Run", positive: Sequence[str], negative: Sequence[str], limit: int = 10
) -> "list[Hit]":
    """Features that tell two sets of texts apart; see `features.like.contrast`.

    A hit's score is its AUROC, or one less that where it is of the negative texts.

    Raises:
        TextError: a text without a token. SaeError: no SAE.
        IndexingError: fewer than two texts on a side; no index, or one of another SAE or model.
    """
    from saesteer.features.like import contrast as between

    index = _index(run)
    sides = [[one.plain_codes() for one in _encoded(run, texts)] for texts in (positive, negative)]
    found = []
    for one in between(*sides, limit=limit):
        side = "positive" if (one.auroc, one.effect_size or 0.0) > (0.5, 0.0) else "negative"
        d = "infinite" if one.effect_size is None else f"{one.effect_size:+.2f}"
        why = (
            f"more in the {side}: AUROC {one.auroc:.3f}, d {d}, fires in "
            f"{one.fires_positive:.0%} of the positive, {one.fires_negative:.0%} of the negative"
        )
        found.append((one.feature, max(one.auroc, 1 - one.auroc), why))
    return index.hits(found)


def near(run: "Run", feature: int, limit: int = 10) -> "list[Hit]":
    """A feature's neighbours by decoder and those that fire with it, in turn.

    Raises:
        FeatureError: there is none of that number. IndexingError: no index.
    """
    index = run.index
    found: dict[int, Hit] = {}
    for pair in zip_longest(index.neighbours(feature, limit), index.coactive(feature, limit)):
        for hit in pair:
            if hit is not None:
                found.setdefault(hit.id, hit)
    return list(found.values())[:limit]


def read(run: "Run", text: str, top: int = 5) -> "list[TokenReading]":
    """The features that fire on each token of a text; see `features.reading.read`.

    Raises:
        TextError: a text without a token.
        SaeError: no SAE. IndexingError: no index, or one of another SAE or model.
    """
    from saesteer.features import reading

    index = _index(run)
    (encoded,) = _encoded(run, [text])
    return reading.read(
        encoded,
        density=index.column("density"),
        max_act=index.column("max_act"),
        n_tokens=index.meta["n_tokens"],
        top=top,
    )


def _index(run: "Run") -> "Index":
    """The index, with an SAE and a model that it was made of."""
    run_folder.check_sae(run.path)
    return checked(run)


def _encoded(run: "Run", texts: Sequence[str]) -> "Iterator[Encoded]":
    from saesteer.features.reading import encode

    return encode(run.model, run.tokenizer, run.sae, texts)
