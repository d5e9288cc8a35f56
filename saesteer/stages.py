"""The stages that fill a run, each resting on the ones before: cache, train, evaluate, index."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saesteer.config import Config
from saesteer.core.blocks import d_model, site_module
from saesteer.core.files import write_json
from saesteer.core.model import EMBEDDED, HookPoint, fingerprint
from saesteer.core.shards import ContextBatch, Shards
from saesteer.directions import Direction, mean_difference
from saesteer.directions.pairs import read_pairs
from saesteer.effects import planted_recovery
from saesteer.errors import CacheError, ConfigError
from saesteer.features.build import build_index
from saesteer.features.search import Index
from saesteer.run import Run
from saesteer.training import cache as caching
from saesteer.training import evaluate as evaluation
from saesteer.training import packing, rows
from saesteer.training import text as reading
from saesteer.training.ranks import ALONE, Ranks


def cache(run: Run, ranks: Ranks = ALONE) -> list[Shards]:
    """Cache the activations that the configuration asks for; keep what is there.

    Args:
        ranks: the processes that share the work; all must call this.

    Returns:
        The cache at the hook point and, for a transcoder, that at its output. Those of
        `cache.also` are made too, in the same pass, and lie beside them.

    Raises:
        TextError, CacheError, HookPointError, RunError: see `training.cache` and `.text`.
    """
    about, source = run.config.cache, text_source(run)
    points = hook_points(run)
    places = list(dict.fromkeys([*points, *map(HookPoint.parse, about.also)]))
    check_points(run, places)
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
        places,
        run.path / "activations",
        n_contexts=max(1, about.tokens // about.context_size),
        context_size=about.context_size,
        d_model=d_model(run.model),
        dtype=about.dtype,
        made_from=made_from,
        batch_size=about.batch_size,
        ranks=ranks,
    )[: len(points)]


def hook_points(run: Run) -> list[HookPoint]:
    """Where the SAE reads and, for a transcoder, where it writes."""
    out = run.config.sae.hook_point_out
    return [run.hook_point, *([HookPoint.parse(out)] if out else [])]


def check_points(run: Run, points: Sequence[HookPoint]) -> None:
    """Tell a wrong hook point or context size before anything runs.

    Raises:
        HookPointError: the model doesn't have one of the points.
        ConfigError: a context doesn't fit into the model.
    """
    for point in points:
        site_module(run.model, point)
    _check_context_size(run, run.config.cache.context_size)


def live_held_out(config: Config) -> int:
    """Contexts held out, the text's first, where activations come straight from the model."""
    contexts = config.cache.tokens // config.cache.context_size
    return min(512, max(1, math.ceil(config.cache.held_out * contexts)))


def evaluate(
    run: Run, *, text: str | None = None, tokens: int = 200_000, seed: int = 0
) -> dict[str, Any]:
    """Measure the SAE on held-out text; the figures are also kept in evaluation.json.

    They are those of `training.evaluate`, with text (what it was measured on), sae_hash (of what
    was measured) and, on the embedded model, planted (see `effects.planted_recovery`).

    Args:
        text: a file, folder or `datasets` name; by default the run's held-out activations.
        tokens: at most so many tokens; the baselines are fitted on as many of the training ones.
        seed: of the random dictionary and the planted stories.

    Raises:
        SaeError: no SAE. CacheError, TextError: nothing to measure it on.
    """
    sae, training = run.sae, None
    if _has_cache(run):
        first = rows.first_held_out(run.shards.n_contexts, run.config.cache.held_out)
        training = run.shards.contexts(0, min(first, math.ceil(tokens / run.shards.context_size)))
    figures = evaluation.evaluate(
        run.model,
        sae,
        list(_batches(run, text, tokens, held_out=True)),
        special_ids=run.special_ids,
        training=training,
        seed=seed,
    )
    figures |= {"text": text or "held-out activations of the run", "sae_hash": sae.hash}
    if run.config.model.id == EMBEDDED:
        figures["planted"] = dataclasses.asdict(planted_recovery.measure(run.model, sae, seed=seed))
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
    # A live run holds out other contexts: a cache from before holds what it was trained on.
    return not run.config.rows.live and (run.path / "activations" / "manifest.json").exists()


def text_source(run: Run, source: str | None = None) -> dict[str, str]:
    """The arguments of `training.text.documents` for the run's text, or for another source."""
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
            first = rows.first_evaluated(shards.n_contexts, run.config.cache.held_out)
        most = math.ceil(tokens / shards.context_size)
        yield from shards.contexts(first, first + most)
        return
    skip = 0
    if text is None and held_out and run.config.rows.live:
        n_held_out = live_held_out(run.config)
        skip = n_held_out // 2  # on these the threshold was calibrated
        tokens = min(tokens, (n_held_out - skip) * run.config.cache.context_size)
    source = text or run.config.text.source
    if not source:
        raise CacheError(
            f"{run.path} has no cached activations; give text to read with --text FILE"
        )
    size = run.config.cache.context_size
    _check_context_size(run, size)
    contexts = packing.pack(
        reading.documents(**text_source(run, source)),
        run.tokenizer,
        size,
        prepend_bos=run.sae.prepend_bos,
        n_contexts=skip + max(1, tokens // size),
    )
    contexts = itertools.islice(contexts, skip, None)
    yield from caching.activation_batches(run.model, contexts, run.sae.hook_point)
