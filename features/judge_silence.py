"""Text in which a feature is silent, to be told from its examples.

Whoever judges a label must have nothing else to go by than what the feature fires on. So silent
windows are cut as examples are (`Block.firings`): from within one document of one context, as many
tokens, at the edge of a document where the example stands there; and special tokens are left out
of both.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from saesteer.core.shards import ContextBatch
from saesteer.errors import IndexingError
from saesteer.features.collect import Encoder
from saesteer.features.examples import Window
from saesteer.features.records import Example
from saesteer.features.words import Pieces


class Silence:
    """Stretches of text, and where in them each feature fires.

    A stretch is what one document has in one context, without special tokens. Best of text that
    the index wasn't made of.
    """

    @torch.no_grad()
    def __init__(
        self,
        batches: Iterable[ContextBatch],
        sae: Encoder,
        pieces: Pieces,
        special_ids: Collection[int],
    ) -> None:
        self._pieces, self._special = pieces, frozenset(special_ids)
        tokens, left = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        fires = [np.zeros((2, 0), np.int64)]
        start = 0
        for batch in batches:
            tokens.append(np.asarray(batch.tokens, np.int32).reshape(-1))
            special = np.isin(batch.tokens, list(self._special))
            left.append(_left(np.asarray(batch.documents), special).reshape(-1))
            codes = sae.encode(batch.activations)
            found = np.stack([codes.latents.cpu().numpy(), codes.rows.cpu().numpy() + start])
            fires.append(found)
            start += batch.tokens.size
        self._tokens, self._left = np.concatenate(tokens), np.concatenate(left)
        if not self._left.any():
            raise IndexingError("no text to take silent contexts from; give some with --text FILE")
        features, rows = np.concatenate(fires, axis=1)
        order = np.argsort(features, kind="stable")
        self._features, self._rows = features[order], rows[order]
        # A token begins a stretch where the one before it doesn't lead to it.
        self._begins = np.append(True, self._left[:-1] != self._left[1:] + 1) & (self._left > 0)

    def like(
        self, feature: int, examples: Sequence[Example], rng: np.random.Generator
    ) -> list[str]:
        """Windows in which the feature fires nowhere, one for each example and cut as it is.

        They are drawn at random and don't overlap; fewer where there are no more.

        Args:
            examples: without special tokens (`bare`).
        """
        low, high = np.searchsorted(self._features, [feature, feature + 1])
        taken = np.zeros(len(self._tokens), np.int64)
        taken[self._rows[low:high]] = 1
        texts = []
        for example in examples:
            n = len(example.tokens)
            free = self._left >= n
            if not free.any():
                continue
            before = np.append(0, np.cumsum(taken))
            free[: len(taken) - n + 1] &= before[n:] == before[:-n]
            if example.firing < Window.before:
                free &= self._begins
            elif n - 1 - example.firing < Window.after:
                free &= self._left == n
            places = np.flatnonzero(free)
            if len(places):
                place = int(rng.choice(places))
                taken[place : place + n] = 1
                texts.append(line(self._pieces.window(self._tokens[place : place + n].tolist())))
        return texts

    def bare(self, example: Example) -> Example:
        """An example without special tokens."""
        plain = [i for i, token in enumerate(example.tokens) if token not in self._special]
        return replace(
            example,
            firing=sum(i < example.firing for i in plain),
            tokens=tuple(example.tokens[i] for i in plain),
            pieces=tuple(example.pieces[i] for i in plain),
            activations=tuple(example.activations[i] for i in plain),
        )


def line(pieces: Sequence[str]) -> str:
    """Pieces as one line of text."""
    return " ".join("".join(pieces).split())


def _left(documents: NDArray[np.integer], special: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many tokens of its stretch each token has before it ends, itself included.

    Args:
        documents, special: [c, s]

    Returns:
        [c, s]; 0 for special tokens.
    """
    left = np.zeros(documents.shape, np.int64)
    left[:, -1] = 1
    for i in range(documents.shape[1] - 2, -1, -1):
        goes_on = (documents[:, i] == documents[:, i + 1]) & ~special[:, i + 1]
        left[:, i] = np.where(goes_on, left[:, i + 1] + 1, 1)
    left[special] = 0
    return left
