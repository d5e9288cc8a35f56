"""From statistics to an index: the record of every feature, and its searchable text."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.model import fingerprint, special_token_ids
from saesteer.core.progress import progress
from saesteer.core.sae import Sae
from saesteer.core.shards import ContextBatch
from saesteer.errors import IndexingError
from saesteer.features import labels, store
from saesteer.features.collect import Statistics, collect
from saesteer.features.examples import NO_TOKEN
from saesteer.features.store import Entry, Example, Feature, TokenStat
from saesteer.features.weights import LogitLens, logit_lens
from saesteer.features.words import Pieces, word_at

# Tokens and words kept a feature.
_TOKENS, _WORDS = 40, 40
# Windows read to learn what words tokens are parts of.
_WINDOWS = 10_000
# How often the field of words repeats a word: its share of the activation, in this many parts.
_REPEATS = 10


def build_index(
    path: Path,
    batches: Iterable[ContextBatch],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: Sae,
    *,
    n_tokens: int | None = None,
    top_contexts: int = 20,
    made_from: Mapping[str, Any] | None = None,
) -> Statistics:
    """Collect, look at the weights, label, and write the index to `path`.

    Args:
        batches: contexts with activations at the SAE's hook point.
        n_tokens: how many tokens will come, where known: for the progress bar.
        top_contexts: examples kept a feature.
        made_from: what else is worth keeping in the index's meta table (text, when); JSON.

    Raises:
        IndexingError: nothing to index, or the index can't be written.
    """
    special = special_token_ids(model, tokenizer)
    vocab_size = max(model.get_input_embeddings().weight.shape[0], len(tokenizer))
    statistics = collect(
        batches,
        sae,
        special_ids=special,
        vocab_size=vocab_size,
        top_contexts=top_contexts,
        n_tokens=n_tokens,
    )
    # Ids past the tokenizer's are padding of the embedding matrix: they are no tokens.
    unused = range(len(tokenizer), vocab_size)
    lens = logit_lens(model, sae.W_dec, exclude={*special, *unused})
    meta = {
        **(made_from or {}),
        "sae_hash": sae.hash,
        "model_id": sae.model_id,
        "model_fingerprint": fingerprint(model),
        "hook_point": str(sae.hook_point),
        "n_tokens": statistics.n_tokens,
    }
    store.write(path, entries(statistics, lens, tokenizer), meta)
    return statistics


def entries(
    statistics: Statistics, lens: LogitLens | None, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Entry]:
    """The record and the searchable text of every feature, in order."""
    if lens is not None and len(lens.promoted) != statistics.d_sae:
        raise IndexingError(
            f"a logit lens of {len(lens.promoted)} features and statistics of "
            f"{statistics.d_sae} don't belong together; make both from one SAE"
        )
    pieces = Pieces(tokenizer)
    completions = labels.Completions.of(_windows(statistics, pieces))
    tokens = _heaviest_tokens(statistics)
    values = (statistics.density, statistics.mean_act, statistics.max_act, statistics.fired)
    columns = list(zip(*(v.tolist() for v in values), strict=True))
    with progress("label", statistics.d_sae, unit="feature") as bar:
        for i, (density, mean_act, max_act, n_fired) in enumerate(columns):
            examples = _examples(statistics, i, pieces)
            own = [
                TokenStat(id_, text, share, count, lift, base)
                for (id_, share, count, lift, base), text in zip(
                    tokens[i], pieces.texts(t[0] for t in tokens[i]), strict=True
                )
            ]
            words = labels.words_of(own, examples, completions)[:_WORDS]
            label, confidence = labels.label(words, examples)
            feature = Feature(
                i,
                label,
                _rounded(confidence),
                _rounded(density),
                _rounded(mean_act),
                max_act,
                n_fired,
                _rounded(labels.breadth(words)),
                _rounded(labels.company(words, examples)),
                tokens=tuple(own),
                words=tuple(words),
                promotes=_logits(lens and (lens.promoted[i], lens.promoted_logits[i]), pieces),
                suppresses=_logits(
                    lens and (lens.suppressed[i], lens.suppressed_logits[i]), pieces
                ),
                examples=tuple(examples),
            )
            yield Entry(feature, texts(feature))
            bar.update()


def texts(feature: Feature) -> dict[str, str]:
    """What a feature can be found by, by field of `store.FIELDS`.

    `words` repeats a word by its share of the activation, so that BM25 counts it by that.
    """
    near: list[str] = []
    far: list[str] = []
    for example in feature.examples:
        left, right = labels.neighbours(example.pieces, example.firing)
        near += [left, word_at(example.pieces, example.firing), right]
        far.append("".join(example.pieces))
    return {
        "label": feature.label if feature.n_fired else "",
        "words": " ".join(
            word.text for word in feature.words for _ in range(1 + int(_REPEATS * word.share))
        ),
        "near": " ".join(near),
        "promotes": " ".join(text for text, _ in feature.promotes),
        "contexts": " ".join(far),
    }


def _heaviest_tokens(statistics: Statistics) -> list[list[tuple[int, float, int, float, float]]]:
    """Of each feature: (token, share of its mass, count, lift, base rate), heaviest first."""
    tally, vocab = statistics.tally, len(statistics.token_counts)
    order, rank = tally.heaviest_first()
    order = order[rank < _TOKENS]
    features, tokens = np.divmod(tally.keys[order], vocab)
    base = statistics.token_counts[tokens] / statistics.n_tokens
    share = tally.mass[order] / np.maximum(statistics.mass[features], 1e-30)
    lift = tally.counts[order] / statistics.fired[features] / base
    found: list[list[tuple[int, float, int, float, float]]] = [[] for _ in range(statistics.d_sae)]
    for feature, *row in zip(
        features.tolist(),
        tokens.tolist(),
        share.tolist(),
        tally.counts[order].tolist(),
        lift.tolist(),
        base.tolist(),
        strict=True,
    ):
        token, s, count, ratio, b = row
        found[feature].append((token, _rounded(s), count, _rounded(ratio), _rounded(b)))
    return found


def _examples(statistics: Statistics, feature: int, pieces: Pieces) -> list[Example]:
    table = statistics.examples
    found = []
    for j in np.flatnonzero(table.values[feature] > 0).tolist():
        inside = np.flatnonzero(table.tokens[feature, j] != NO_TOKEN)
        ids = table.tokens[feature, j, inside].tolist()
        document = int(table.documents[feature, j])
        found.append(
            Example(
                _rounded(float(table.values[feature, j])),
                int(table.contexts[feature, j]),
                int(table.positions[feature, j]),
                document if document >= 0 else None,
                int(np.searchsorted(inside, statistics.before)),
                tuple(ids),
                tuple(pieces.window(ids)),
                tuple(_rounded(a) for a in table.activations[feature, j, inside].tolist()),
            )
        )
    return found


def _windows(statistics: Statistics, pieces: Pieces) -> list[tuple[list[int], list[str]]]:
    """Windows spread over the features, to learn what words tokens are parts of."""
    table = statistics.examples
    where = np.argwhere(table.values > 0)
    where = where[:: max(1, len(where) // _WINDOWS)]
    found = []
    for feature, j in where.tolist():
        row = table.tokens[feature, j]
        ids = row[row != NO_TOKEN].tolist()
        found.append((ids, pieces.window(ids)))
    return found


def _logits(pair: Any, pieces: Pieces) -> tuple[tuple[str, float], ...]:
    if pair is None:
        return ()
    ids, logits = pair
    return tuple(
        (text, _rounded(logit))
        for text, logit in zip(pieces.texts(ids.tolist()), logits.tolist(), strict=True)
    )


def _rounded(value: float) -> float:
    """Four significant digits: what is shown never needs more, and the index stays small."""
    return float(f"{value:.4g}")
