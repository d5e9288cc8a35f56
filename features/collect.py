"""What each feature fires on: one pass over a stream of activations, through sparse codes only.

Memory does not grow with the number of tokens: a few numbers and `top_contexts` windows a feature,
and a pruned tally of (feature, token) pairs. Special tokens are left out of everything: BOS
activations are often an order of magnitude above all others, and "8x" would mean nothing.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from saesteer.core.progress import progress
from saesteer.core.sae import Codes
from saesteer.core.shards import ContextBatch
from saesteer.errors import IndexingError
from saesteer.features.examples import Block, Examples, Window
from saesteer.features.tally import TokenTally

# Firings and tokens gathered before they are worked in. The first block is small, so that the
# floor over which an example counts is up before the bulk arrives; each later one is twice as
# large.
_FIRST_BLOCK, _LARGEST_BLOCK = 2**16, 2**21


class Encoder(Protocol):
    """What is asked of an SAE here."""

    @property
    def d_sae(self) -> int: ...

    def encode(self, x: torch.Tensor) -> Codes: ...


@dataclass(frozen=True)
class Statistics:
    """What was seen of every feature, over the tokens that are not special.

    n_tokens: tokens counted; token_counts [vocab]: how often each occurred; before: where in an
    example's window its firing token stands; fired [d_sae]: tokens on which a feature fired; mass
    [d_sae]: the sum of its activations; examples: its strongest contexts; tally: (feature, token)
    pairs.
    """

    n_tokens: int
    token_counts: NDArray[np.int64]
    before: int
    fired: NDArray[np.int64]
    mass: NDArray[np.float64]
    examples: Examples
    tally: TokenTally

    @property
    def d_sae(self) -> int:
        return len(self.fired)

    @property
    def _shape(self) -> tuple[int, ...]:
        contexts, window = self.examples.tokens.shape[1:]
        return self.d_sae, len(self.token_counts), self.before, contexts, window

    @property
    def density(self) -> NDArray[np.float64]:
        """Share of the tokens on which each feature fires, [d_sae]."""
        return self.fired / max(1, self.n_tokens)

    @property
    def mean_act(self) -> NDArray[np.float64]:
        """Mean activation where it fires, 0 where it never does, [d_sae]."""
        return self.mass / np.maximum(1, self.fired)

    @property
    def max_act(self) -> NDArray[np.float32]:
        """Highest activation, 0 for a feature that never fires, [d_sae]."""
        return self.examples.values[:, 0]

    @classmethod
    def empty(
        cls, d_sae: int, vocab_size: int, *, top_contexts: int, window: Window
    ) -> "Statistics":
        return cls(
            0,
            np.zeros(vocab_size, np.int64),
            window.before,
            np.zeros(d_sae, np.int64),
            np.zeros(d_sae),
            Examples.empty(np.arange(d_sae), top_contexts, window.size),
            TokenTally.empty(d_sae, vocab_size),
        )

    def merge(self, other: "Statistics") -> "Statistics":
        """Statistics of both streams: associative, and the same as one pass over both.

        Documents and contexts must be numbered across the streams (as shards number them).

        Raises:
            IndexingError: of another SAE, vocabulary, or number of contexts.
        """
        if self._shape != other._shape:
            raise IndexingError(
                "statistics of (features, vocabulary, before, contexts, window) "
                f"{self._shape} and {other._shape} can't be merged; collect both with the same "
                "SAE, tokenizer and settings"
            )
        examples = self.examples.copy()
        examples.absorb(other.examples)
        return self._with(other, examples)

    def _with(self, other: "Statistics", examples: Examples) -> "Statistics":
        return Statistics(
            self.n_tokens + other.n_tokens,
            self.token_counts + other.token_counts,
            self.before,
            self.fired + other.fired,
            self.mass + other.mass,
            examples,
            self.tally.merge(other.tally),
        )


@torch.no_grad()
def collect(
    batches: Iterable[ContextBatch],
    sae: Encoder,
    *,
    special_ids: Collection[int],
    vocab_size: int,
    top_contexts: int = 20,
    before: int = 12,
    after: int = 8,
    n_tokens: int | None = None,
) -> Statistics:
    """Statistics of every feature of `sae` over a stream of activations.

    Args:
        batches: contexts with tokens, documents [c, s] and activations [c, s, d].
        special_ids: token ids that are left out.
        vocab_size: token ids are below it.
        top_contexts: examples kept a feature, each from another document.
        before, after: tokens kept around the token on which an example fires.
        n_tokens: how many tokens will come, where known: for the progress bar.

    Raises:
        IndexingError: no token but special ones, an id outside the vocabulary, or activations
            that are not finite.
    """
    window = Window(before, after)
    total = Statistics.empty(sae.d_sae, vocab_size, top_contexts=top_contexts, window=window)
    is_special = np.zeros(vocab_size, bool)
    is_special[[i for i in special_ids if 0 <= i < vocab_size]] = True
    waiting: list[Block] = []
    held, size = 0, _FIRST_BLOCK
    with progress("index", n_tokens) as bar:
        for batch in batches:
            waiting.append(_block(batch, sae, is_special))
            bar.update(batch.tokens.size)
            held += len(waiting[-1].rows) + batch.tokens.size
            if held >= size:
                total = _worked_in(total, waiting, is_special, window)
                waiting, held, size = [], 0, min(2 * size, _LARGEST_BLOCK)
        total = _worked_in(total, waiting, is_special, window)
    if total.n_tokens == 0:
        raise IndexingError(
            "there is no token to index: expected contexts with more than special tokens; "
            "cache some text first"
        )
    return total


def _block(batch: ContextBatch, sae: Encoder, is_special: NDArray[np.bool_]) -> Block:
    tokens = np.asarray(batch.tokens, np.int32)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < len(is_special):
        raise IndexingError(
            f"token ids {tokens.min()} to {tokens.max()} don't fit a vocabulary of "
            f"{len(is_special)}; the activations were cached with another tokenizer: cache again"
        )
    if not torch.isfinite(batch.activations).all():
        raise IndexingError(
            f"activations of contexts {batch.first_context} to "
            f"{batch.first_context + len(tokens) - 1} hold NaN or infinity; cache them in float32"
        )
    codes = sae.encode(batch.activations)
    rows, features, values = (
        part.cpu().numpy() for part in (codes.rows, codes.latents, codes.values.float())
    )
    keep = ~is_special[tokens.reshape(-1)[rows]]
    contexts = batch.first_context + np.arange(len(tokens), dtype=np.int64)
    # A token without a document (-1) is taken as of a document of its context's own.
    documents = np.asarray(batch.documents, np.int64)
    documents = np.where(documents < 0, -2 - contexts[:, None], documents)
    return Block(tokens, documents, contexts, rows[keep], features[keep], values[keep])


def _joined(blocks: list[Block]) -> Block:
    starts = np.cumsum([0, *(block.tokens.size for block in blocks)])
    rows = [block.rows + start for block, start in zip(blocks, starts, strict=False)]
    names = ("tokens", "documents", "contexts", "features", "values")
    return Block(
        rows=np.concatenate(rows),
        **{name: np.concatenate([getattr(block, name) for block in blocks]) for name in names},
    )


def _worked_in(
    total: Statistics, blocks: list[Block], is_special: NDArray[np.bool_], window: Window
) -> Statistics:
    """`total`, whose examples are changed in place, and the statistics of `blocks`."""
    # Contexts of different lengths can't stand in one block.
    for length in sorted({block.tokens.shape[1] for block in blocks}):
        block = _joined([block for block in blocks if block.tokens.shape[1] == length])
        d_sae, vocab_size = total.d_sae, len(is_special)
        flat = block.tokens.reshape(-1)
        n = total.examples.values.shape[1]
        counts = np.bincount(flat[~is_special[flat]], minlength=vocab_size)
        part = Statistics(
            int(counts.sum()),
            counts,
            window.before,
            np.bincount(block.features, minlength=d_sae),
            np.bincount(block.features, block.values, minlength=d_sae).astype(np.float64),
            Examples.of(block, n=n, window=window, d_sae=d_sae, floor=total.examples.values[:, -1]),
            TokenTally.of(
                block.features,
                flat[block.rows].astype(np.int64),
                block.values,
                d_sae=d_sae,
                vocab_size=vocab_size,
            ),
        )
        total.examples.absorb(part.examples)
        total = total._with(part, total.examples)
    return total
