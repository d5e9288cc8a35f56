"""The stages that fill a run, each resting on the ones before: cache, train, evaluate, index."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saesteer.core.blocks import d_model, site_module
from saesteer.core.files import alone, write_json
from saesteer.core.model import HookPoint, fingerprint
from saesteer.core.sae import Sae
from saesteer.core.shards import ContextBatch, Shards
from saesteer.directions import Direction, mean_difference
from saesteer.directions.pairs import read_pairs
from saesteer.errors import CacheError, ConfigError
from saesteer.features.build import build_index
from saesteer.features.search import Index
from saesteer.run import Run
from saesteer.training import cache as caching
from saesteer.training import evaluate as evaluation
from saesteer.training import loop, packing, rows
from saesteer.training import text as reading


def cache(run: Run) -> Shards:
    """Cache the activations that the configuration asks for; keep what is there.

    Raises:
        TextError, CacheError, HookPointError, RunError: see `training.cache` and `.text`.
    """
    about, source = run.config.cache, _text_source(run)
    site_module(run.model, run.hook_point)  # a wrong hook point is told before anything runs
    _check_context_size(run, about.context_size)
    made_from = {
        "model": run.config.model.id,
        "revision": run.config.model.revision,
        "fingerprint": fingerprint(run.model),
        "hook_point": str(run.hook_point),
        "context_size": about.context_size,
        "text": reading.fingerprint(**source),
        "special_ids": sorted(run.special_ids),
    }
    run.refresh()
    return caching.cache_activations(
        run.model,
        lambda: packing.pack(reading.documents(**source), run.tokenizer, about.context_size),
        run.hook_point,
        run.path / "activations",
        n_contexts=max(1, about.tokens // about.context_size),
        context_size=about.context_size,
        d_model=d_model(run.model),
        dtype=about.dtype,
        made_from=made_from,
        batch_size=about.batch_size,
    )


def train(run: Run) -> Sae:
    """Cache what is missing and train the SAE; a killed run goes on where it stopped.

    Raises:
        TrainingError: bad settings, or a loss that is not finite.
        TextError, CacheError, HookPointError, RunError: see `cache`.
    """
    shards = cache(run)
    with alone(run.path / "checkpoints"):
        return _fit(run, shards)


def _fit(run: Run, shards: Shards) -> Sae:
    settings, sae = run.config.train, run.config.sae
    train_rows, held_out_rows = rows.split_rows(
        shards.tokens, run.special_ids, run.config.cache.held_out
    )
    steps = max(1, settings.tokens // settings.batch_size)
    trained = loop.fit(
        shards,
        train_rows,
        held_out_rows,
        architecture=sae.architecture,
        d_sae=sae.d_sae,
        k=sae.k,
        steps=steps,
        batch_size=settings.batch_size,
        identity={
            "hook_point": run.hook_point,
            "model_id": run.config.model.id,
            "model_fingerprint": fingerprint(run.model),
            "prepend_bos": run.tokenizer.bos_token_id is not None,
            "context_size": shards.context_size,
        },
        lr=settings.lr,
        warm_up_steps=int(settings.warmup * steps),
        decay=settings.decay,
        seed=settings.seed,
        checkpoints=run.path / "checkpoints",
        metrics=run.path / "metrics.jsonl",
        log_every=settings.log_every,
        checkpoint_steps=settings.checkpoint_every,
        device=run.model.device,
    )
    if (run.path / "features.sqlite").exists() and run.index.meta["sae_hash"] != trained.hash:
        # They tell of another SAE: a feature's number would mean something else in them.
        (run.path / "features.sqlite").unlink()
        (run.path / "evaluation.json").unlink(missing_ok=True)
    trained.save(run.path / "sae")
    run.save_config()
    run.refresh()
    return trained


def evaluate(run: Run, *, text: str | None = None, tokens: int = 200_000) -> dict[str, Any]:
    """Measure the SAE on held-out text; the figures are also kept in evaluation.json.

    Args:
        text: a file, folder or `datasets` name; by default the run's held-out activations.
        tokens: at most so many tokens.

    Raises:
        SaeError: no SAE. CacheError, TextError: nothing to measure it on.
    """
    figures = evaluation.evaluate(
        run.model,
        run.sae,
        list(_batches(run, text, tokens, held_out=True)),
        special_ids=run.special_ids,
    )
    figures["text"] = text or "held-out activations of the run"
    write_json(run.path / "evaluation.json", figures)
    return figures


def index(run: Run, *, text: str | None = None, tokens: int = 1_000_000) -> Index:
    """Describe every feature from the cached activations, or from `text`.

    Raises:
        SaeError: no SAE. CacheError, TextError: nothing to index.
    """
    cached = text is None and _has_cache(run)
    n_tokens = run.shards.n_tokens if cached else tokens
    build_index(
        run.path / "features.sqlite",
        _batches(run, text, n_tokens, held_out=False),
        run.model,
        run.tokenizer,
        run.sae,
        n_tokens=n_tokens,
        made_from={"text": text or run.config.text.source},
    )
    run.refresh()
    return run.index


def fit_vector(
    run: Run, pairs: str | Path, *, name: str, point: str | None = None, read: str = "answer-mean"
) -> tuple[Direction, Path]:
    """Fit a mean-difference direction on a JSONL of pairs and keep it as steers/NAME.

    Raises:
        PairsError: the pairs are missing or malformed. RunError: the name is not a file name.
    """
    path = run.vector_path(name)
    place = HookPoint.parse(point) if point else run.hook_point
    direction = mean_difference.fit(run.model, run.tokenizer, read_pairs(pairs), place, read=read)
    direction.save(path)
    return direction, path


def _has_cache(run: Run) -> bool:
    return (run.path / "activations" / "manifest.json").exists()


def _text_source(run: Run, source: str | None = None) -> dict[str, str]:
    about = run.config.text
    return {
        "source": source or about.source,
        "column": about.column,
        "split": about.split,
        "separator": about.document_separator,
    }


def _check_context_size(run: Run, size: int) -> None:
    room = getattr(run.model.config, "max_position_embeddings", None)
    if room is not None and size > room:
        raise ConfigError(
            f"a context of {size} tokens does not fit into the model's {room} positions; "
            f"set cache.context_size to {room} or less"
        )


def _batches(run: Run, text: str | None, tokens: int, *, held_out: bool) -> Iterator[ContextBatch]:
    """Contexts with activations: from the cache, or from `text` straight through the model."""
    if text is None and _has_cache(run):
        shards = run.shards
        shards.verify()
        first = 0
        if held_out:
            first = rows.first_held_out(shards.n_contexts, run.config.cache.held_out)
        most = math.ceil(tokens / shards.context_size)
        yield from shards.contexts(first, first + most)
        return
    source = text or run.config.text.source
    if not source:
        raise CacheError(
            f"{run.path} has no cached activations; give text to read with --text FILE"
        )
    size = run.config.cache.context_size
    _check_context_size(run, size)
    contexts = packing.pack(
        reading.documents(**_text_source(run, source)),
        run.tokenizer,
        size,
        prepend_bos=run.sae.prepend_bos,
        n_contexts=max(1, tokens // size),
    )
    yield from caching.activation_batches(run.model, contexts, run.sae.hook_point)
