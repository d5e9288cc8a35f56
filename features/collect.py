"""One pass over a stream of activations, through sparse codes only; see `Statistics`."""

import itertools
from collections.abc import Collection, Iterable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from saesteer.core.progress import progress
from saesteer.core.sae import Codes
from saesteer.core.shards import ContextBatch
from saesteer.errors import IndexingError
from saesteer.features.block import Block
from saesteer.features.checkpoint import Checkpoint, Progress
from saesteer.features.statistics import Settings, Statistics
from saesteer.features.words_in import NONE, Lexicon

__all__ = ["Encoder", "Statistics", "collect"]

# Firings and tokens gathered before they are worked in. The first block is small, so that the
# floor over which an example counts is up before the bulk arrives; each later one is twice as
# large. Where there are many features larger ones pay: each block goes through all of them.
_FIRST_BLOCK, _LARGEST_BLOCK, _A_FEATURE = 2**16, 2**18, 8
# The highest activation whose mass can be added up, half a million times.
_HIGHEST = 2.0**24


class Encoder(Protocol):
    """What is asked of an SAE here."""

    @property
    def d_sae(self) -> int: ...

    def encode(self, x: torch.Tensor) -> Codes: ...


@torch.no_grad()
def collect(
    batches: Iterable[ContextBatch],
    sae: Encoder,
    *,
    special_ids: Collection[int],
    lexicon: Lexicon,
    top_contexts: int = 20,
    sampled: int = 30,
    before: int = 12,
    after: int = 8,
    n_tokens: int | None = None,
    checkpoint: Checkpoint | None = None,
) -> Statistics:
    """Statistics of every feature of `sae` over a stream of activations.

    Args:
        batches: contexts with tokens, documents [c, s] and activations [c, s, d], in the order of
            their numbers.
        special_ids: token ids that are left out.
        lexicon: what words tokens are part of; token ids are below its `vocab_size`.
        top_contexts: strongest examples kept a feature, each from another document.
        sampled: firings kept a feature as a fair sample of all of them.
        before, after: tokens kept around the token on which an example fires.
        n_tokens: how many tokens will come, where known: for the progress bar.
        checkpoint: where to keep what was counted so far. The same call goes on from it: batches
            that were worked in are passed over, and a finished pass is not made again.

    Raises:
        IndexingError: no token but special ones, an id outside the vocabulary, activations that
            are not finite, or a checkpoint of something else.
    """
    vocab_size = lexicon.vocab_size
    special = tuple(sorted({int(i) for i in special_ids if 0 <= i < vocab_size}))
    settings = Settings(sae.d_sae, vocab_size, special, top_contexts, sampled, before, after)
    found = checkpoint and checkpoint.load(settings)
    start = found or Progress(Statistics.empty(settings), 0, done=False)
    total, next_context = start.statistics, start.next_context
    if start.done:
        return total
    is_special = np.isin(np.arange(vocab_size), special)
    largest = min(max(_LARGEST_BLOCK, _A_FEATURE * sae.d_sae), 2**21)
    waiting: list[Block] = []
    held, size = 0, _FIRST_BLOCK
    with progress("index", n_tokens) as bar:
        bar.update(total.n_tokens)
        for batch in batches:
            new = _from(batch, next_context)
            if len(new.tokens) == 0:
                continue
            lexicon.forget(0)
            waiting.append(_block(new, sae, is_special, lexicon, total.spellings))
            bar.update(new.tokens.size)
            next_context = new.first_context + len(new.tokens)
            held += len(waiting[-1].rows) + new.tokens.size
            if held >= size:
                _work_in(total, waiting)
                waiting, held, size = [], 0, min(2 * size, largest)
                if checkpoint is not None:
                    checkpoint.save_if_due(Progress(total, next_context, done=False))
        _work_in(total, waiting)
    total.settle()
    if total.n_tokens == 0:
        raise IndexingError(
            "there is no token to index: expected contexts with more than special tokens; "
            "cache some text first"
        )
    if checkpoint is not None:
        checkpoint.save(Progress(total, next_context, done=True))
    return total


def _from(batch: ContextBatch, first: int) -> ContextBatch:
    """What of a batch is numbered from `first` on."""
    skip = max(0, first - batch.first_context)
    return ContextBatch(
        batch.tokens[skip:],
        batch.documents[skip:],
        batch.activations[skip:],
        batch.first_context + skip,
    )


def _block(
    batch: ContextBatch,
    sae: Encoder,
    is_special: NDArray[np.bool_],
    lexicon: Lexicon,
    spellings: dict[int, str],
) -> Block:
    tokens = np.asarray(batch.tokens, np.int32)
    where = f"contexts {batch.first_context} to {batch.first_context + len(tokens) - 1}"
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < len(is_special):
        raise IndexingError(
            f"token ids {tokens.min()} to {tokens.max()} don't fit a vocabulary of "
            f"{len(is_special)}; the activations were cached with another tokenizer: cache again"
        )
    if not torch.isfinite(batch.activations).all():
        raise IndexingError(f"activations of {where} hold NaN or infinity; cache them in float32")
    codes = sae.encode(batch.activations)
    rows, features, values = (
        part.cpu().numpy() for part in (codes.rows, codes.latents, codes.values.float())
    )
    if not values.max(initial=0.0) < _HIGHEST:
        raise IndexingError(
            f"a feature's activation in {where} is {values.max():.3g}, expected below "
            f"{_HIGHEST:.0e}; the SAE's weights don't fit these activations"
        )
    keep = ~is_special[tokens.reshape(-1)[rows]]
    contexts = batch.first_context + np.arange(len(tokens), dtype=np.int64)
    # A token without a document (-1) is taken as of a document of its context's own.
    documents = np.asarray(batch.documents, np.int64)
    documents = np.where(documents < 0, -2 - contexts[:, None], documents)
    found = lexicon.occurrences(np.where(is_special[tokens], NONE, tokens), documents, spellings)
    return Block(
        tokens,
        documents,
        found.words,
        found.begins,
        contexts,
        rows[keep],
        features[keep],
        values[keep],
    )


def _work_in(total: Statistics, blocks: list[Block]) -> None:
    # Contexts of different lengths can't stand in one block.
    for _, alike in itertools.groupby(blocks, key=lambda block: block.tokens.shape[1]):
        total.add(Block.joined(list(alike)))
