"""The text and the activations that a run's stages read."""

import itertools
import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from saesteer import run_folder
from saesteer.config import Config
from saesteer.core.shards import ContextBatch
from saesteer.errors import CacheError, ConfigError
from saesteer.run import Run
from saesteer.training import cache as caching
from saesteer.training import packing, rows
from saesteer.training import text as reading
from saesteer.training.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from saesteer.features.statistics import Statistics

# Contexts that one of several processes takes together.
_BLOCK = 64


def has_cache(run: Run) -> bool:
    """Whether the run's stages read cached activations, where no other text is given."""
    # A live run holds out other contexts: a cache from before holds what it was trained on.
    return not run.config.rows.live and (run.path / "activations" / "manifest.json").exists()


def live_held_out(config: Config) -> int:
    """Contexts held out, the text's first, where activations come straight from the model."""
    contexts = config.cache.tokens // config.cache.context_size
    return min(512, max(1, math.ceil(config.cache.held_out * contexts)))


def named_source(run: Run, text: str | None) -> str:
    """The text that is read where there is no cache: `text`, else the run's own.

    Raises:
        CacheError: neither is there. SaeError: nor is an SAE, for which text would be read.
    """
    source = text or run.config.text.source
    if not source:
        run_folder.check_sae(run.path)
        raise CacheError(
            f"{run.path} has no cached activations; give text to read with --text FILE"
        )
    return source


def text_source(run: Run, source: str | None = None) -> dict[str, str]:
    """The arguments of `training.text.documents` for the run's text, or for another source."""
    about = run.config.text
    return {
        "source": source or about.source,
        "column": about.column,
        "split": about.split,
        "separator": about.document_separator,
    }


def warn_of_one_document(run: Run, seen: "Statistics") -> None:
    """Say it where all text that was indexed came as one document.

    Examples are each from another document, so that every feature has one strongest example then.
    """
    examples = seen.examples
    documents = np.unique(examples.documents[examples.values > 0])
    if len(documents) == 1 and seen.n_contexts > 1:
        warnings.warn(
            "the text came as one document, so each feature has one strongest example only; say "
            f"what stands between documents (now {run.config.text.document_separator!r}) with "
            f"document_separator under [text] in {run.path / 'config.toml'}, and where the text "
            "is cached, cache it again",
            stacklevel=2,
        )


def check_context_size(run: Run, size: int) -> None:
    """ConfigError where a context doesn't fit into the model."""
    room = getattr(run.model.config, "max_position_embeddings", None)
    if room is not None and size > room:
        raise ConfigError(
            f"a context of {size} tokens does not fit into the model's {room} positions; "
            f"set cache.context_size to {room} or less"
        )


def batches(
    run: Run,
    text: str | None,
    tokens: int,
    *,
    held_out: bool,
    first: int = 0,
    ranks: Ranks = ALONE,
) -> Iterator[ContextBatch]:
    """Contexts with activations: from the cache, or from `text` straight through the model.

    first: contexts before it are left out; ranks: of several, each gets every so many-th block.
    """
    if text is None and has_cache(run):
        shards = run.shards
        if ranks.first:
            shards.verify()
        begin = 0
        if held_out:
            begin = rows.first_evaluated(shards.n_contexts, run.config.cache.held_out)
        end = min(shards.n_contexts, begin + math.ceil(tokens / shards.context_size))
        for start in range(begin + ranks.rank * _BLOCK, end, ranks.size * _BLOCK):
            yield from shards.contexts(max(start, first), min(end, start + _BLOCK))
        return
    skip = 0
    if text is None and held_out and run.config.rows.live:
        n_held_out = live_held_out(run.config)
        skip = n_held_out // 2  # on these the threshold was calibrated
        tokens = min(tokens, (n_held_out - skip) * run.config.cache.context_size)
    source = named_source(run, text)
    size = run.config.cache.context_size
    check_context_size(run, size)
    contexts = packing.pack(
        reading.documents(**text_source(run, source)),
        run.tokenizer,
        size,
        prepend_bos=run.sae.prepend_bos,
        n_contexts=skip + max(1, tokens // size),
    )
    contexts = itertools.islice(contexts, skip, None)
    for start in itertools.count(0, _BLOCK):
        block = list(itertools.islice(contexts, _BLOCK))
        if not block:
            return
        if start // _BLOCK % ranks.size == ranks.rank and start + len(block) > first:
            late = max(0, first - start)
            yield from caching.activation_batches(
                run.model, block[late:], run.sae.hook_point, first_context=start + late
            )
