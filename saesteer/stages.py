"""The stages that fill a run, each resting on the ones before: cache, train, evaluate, index."""

import dataclasses
import math
import shutil
import warnings
from collections.abc import Sequence
from typing import Any

from saesteer import run_folder
from saesteer.core.blocks import d_model, site_module
from saesteer.core.files import alone, write_json
from saesteer.core.model import EMBEDDED, HookPoint, fingerprint
from saesteer.core.shards import Shards
from saesteer.effects import planted_recovery
from saesteer.errors import ConfigError
from saesteer.features.build import lexicon, write_index
from saesteer.features.checkpoint import Checkpoint, gathered
from saesteer.features.collect import collect
from saesteer.features.search import Index
from saesteer.features.statistics import Statistics
from saesteer.run import Run
from saesteer.run_text import (
    batches,
    check_context_size,
    has_cache,
    named_source,
    text_source,
    warn_of_one_document,
)
from saesteer.training import cache as caching
from saesteer.training import evaluate as evaluation
from saesteer.training import packing, rows
from saesteer.training import text as reading
from saesteer.training.cache_fill import on_every
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
    check_context_size(run, run.config.cache.context_size)


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
    if has_cache(run):
        first = rows.first_held_out(run.shards.n_contexts, run.config.cache.held_out)
        training = run.shards.contexts(0, min(first, math.ceil(tokens / run.shards.context_size)))
    figures = evaluation.evaluate(
        run.model,
        sae,
        list(batches(run, text, tokens, held_out=True)),
        special_ids=run.special_ids,
        training=training,
        seed=seed,
    )
    figures |= {"text": text or "held-out activations of the run", "sae_hash": sae.hash}
    if run.config.model.id == EMBEDDED:
        figures["planted"] = dataclasses.asdict(planted_recovery.measure(run.model, sae, seed=seed))
    write_json(run.path / "evaluation.json", figures)
    return figures


def index(
    run: Run,
    *,
    text: str | None = None,
    tokens: int = 1_000_000,
    top: int = 20,
    neighbours: int = 10,
    restart: bool = False,
    ranks: Ranks = ALONE,
) -> Index:
    """Describe every feature from the cached activations, or from `text`.

    What was counted is kept in features.partial/ from time to time, and the same call goes on from
    there.

    Args:
        top: strongest examples kept a feature, each from another document.
        neighbours: nearest decoder rows kept a feature; 0 where looking for them takes too long.
        restart: begin anew where an unfinished index of something else was left.
        ranks: the processes that share the text; all must call this, and the first one writes.

    Raises:
        SaeError: no SAE. CacheError, TextError: nothing to index. IndexingError: an unfinished
        index of something else, and not `restart`. RunError: another process is at it.
    """
    for value, least, name in (
        (tokens, 1, "tokens"),
        (top, 1, "top"),
        (neighbours, 0, "neighbours"),
    ):
        if value < least:
            raise ConfigError(f"{name} is {value}; expected {least} or more")
    cached = text is None and has_cache(run)
    n_tokens = run.shards.n_tokens if cached else tokens
    if cached:
        size, source = run.shards.context_size, run.config.text.source
        read_from = run.shards.manifest["made_from"]
    else:
        size, source = run.config.cache.context_size, named_source(run, text)
        read_from = reading.fingerprint(**text_source(run, source))
    made_from = {
        "sae_hash": run.sae.hash,
        "text": read_from,
        "context_size": size,
        "tokens": n_tokens,
        "ranks": ranks.size,
    }
    folder = run.path / "features.partial"
    passes = [
        Checkpoint(folder / f"rank-{rank}" / "pass.npz", {**made_from, "rank": rank})
        for rank in range(ranks.size)
    ]
    own = passes[ranks.rank]
    with alone(own.path.parent):
        collected: list[Statistics] = []

        def collect_share() -> None:
            if restart:
                own.path.unlink(missing_ok=True)
            before = own.load()
            first = before.next_context if before else 0
            share = collect(
                batches(run, text, n_tokens, held_out=False, first=first, ranks=ranks),
                run.sae,
                special_ids=run.special_ids,
                lexicon=lexicon(run.model, run.tokenizer),
                top_contexts=top,
                n_tokens=n_tokens // ranks.size,
                checkpoint=own,
            )
            if ranks.size == 1:
                collected.append(share)

        def write() -> None:
            if not ranks.first:
                return
            seen = collected.pop() if collected else gathered(passes)
            warn_of_one_document(run, seen)
            kept = write_index(
                run.path / "features.sqlite",
                seen,
                run.model,
                run.tokenizer,
                run.sae,
                neighbours=neighbours,
                made_from={"text": source, "sae_stamp": run_folder.sae_stamp(run.path)},
            )
            if kept is not None:
                warnings.warn(
                    f"what was noted in the index before is of another SAE, or can't be read; it "
                    f"was put into {kept}",
                    stacklevel=2,
                )
            shutil.rmtree(folder)

        on_every(ranks, collect_share)
        on_every(ranks, write)
    run.refresh()
    return run.index
