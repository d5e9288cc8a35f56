"""From a stream of activations to a searchable index."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.model import fingerprint, special_token_ids
from saesteer.core.sae import Sae
from saesteer.core.shards import ContextBatch
from saesteer.features import store
from saesteer.features.checkpoint import Checkpoint
from saesteer.features.collect import collect
from saesteer.features.entries import entries
from saesteer.features.statistics import Statistics
from saesteer.features.weights import describe
from saesteer.features.words import Pieces
from saesteer.features.words_in import Lexicon


def build_index(
    path: Path,
    batches: Iterable[ContextBatch],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: Sae,
    *,
    n_tokens: int | None = None,
    top_contexts: int = 20,
    neighbours: int = 10,
    made_from: Mapping[str, Any] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Path | None:
    """Collect, look at the weights, label, and write the index to `path`.

    Args:
        batches: contexts with activations at the SAE's hook point.
        n_tokens: how many tokens will come, where known: for the progress bar.
        top_contexts: examples kept a feature.
        checkpoint: where the pass keeps what it has seen, to go on from there.
        neighbours, made_from: as of `write_index`.

    Returns:
        As `write_index`.

    Raises:
        IndexingError: nothing to index, or the index can't be written.
    """
    statistics = collect(
        batches,
        sae,
        special_ids=special_token_ids(model, tokenizer),
        lexicon=lexicon(model, tokenizer),
        top_contexts=top_contexts,
        n_tokens=n_tokens,
        checkpoint=checkpoint,
    )
    return write_index(
        path, statistics, model, tokenizer, sae, neighbours=neighbours, made_from=made_from
    )


def write_index(
    path: Path,
    statistics: Statistics,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: Sae,
    *,
    neighbours: int = 10,
    made_from: Mapping[str, Any] | None = None,
) -> Path | None:
    """Look at the weights, label, and write the index to `path`.

    Args:
        statistics: of `sae` on text of `tokenizer`, from one pass or merged from many.
        neighbours: nearest decoder rows kept a feature; 0 where looking for them takes too long.
        made_from: what else is worth keeping in the index's meta table (text, tokens); JSON.

    Returns:
        The file that holds what a user had written into an older index and could not be carried
        over, if anything.

    Raises:
        IndexingError: the statistics are of another number of features, or the index can't be
            written.
    """
    weights = describe(
        model,
        sae.W_dec,
        Pieces(tokenizer).texts(range(len(tokenizer))),
        neighbours=neighbours,
        exclude=special_token_ids(model, tokenizer),
    )
    meta = {
        **(made_from or {}),
        "sae_hash": sae.hash,
        "model_id": sae.model_id,
        "model_fingerprint": fingerprint(model),
        "hook_point": str(sae.hook_point),
        "n_tokens": statistics.n_tokens,
        "n_contexts": statistics.n_contexts,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return store.write(path, entries(statistics, weights, tokenizer), meta)


def lexicon(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Lexicon:
    """For `collect`; a model may have more token ids than its tokenizer."""
    n_ids = max(int(model.get_input_embeddings().weight.shape[0]), len(tokenizer))
    return Lexicon(Pieces(tokenizer), n_ids)
