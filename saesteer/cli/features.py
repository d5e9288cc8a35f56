"""index, search, feature: what the features are."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from saesteer.run import Run

RunFolder = Annotated[Path, tyro.conf.Positional]


def index(
    run: RunFolder,
    *,
    text: str | None = None,
    tokens: int = 1_000_000,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Describe every feature: what it fires on, what it promotes, a label.

    Args:
        run: The run folder.
        text: A file, folder or `datasets` name; by default the run's cached activations.
        tokens: At most so many tokens of `text`.
        device: Where the model runs.
        dtype: float32, bfloat16 or float16.
    """
    from saesteer import stages

    built = stages.index(Run.open(run, device=device, dtype=dtype), text=text, tokens=tokens)
    print(f"{built.n_features} features in {run / 'features.sqlite'}")
    print(f'next: saesteer search {run} "a word"')


def search(
    run: RunFolder,
    query: Annotated[str, tyro.conf.Positional],
    *,
    limit: int = 10,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Find features by keyword, in their labels, tokens and contexts.

    Args:
        run: The run folder.
        query: One or more words.
        limit: At most so many features.
        json_: Print one JSON array.
    """
    from saesteer.features import view

    hits = Run.open(run).search(query, limit=limit)
    if json_:
        print(json.dumps([dataclasses.asdict(hit) for hit in hits]))
        return
    print(view.hits(hits, query, colour=sys.stdout.isatty()))


def feature(
    run: RunFolder,
    id: Annotated[int, tyro.conf.Positional],
    *,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Show one feature: label, figures, top tokens, highlighted examples, what it promotes.

    Args:
        run: The run folder.
        id: The feature's number.
        json_: Print one JSON object.
    """
    from saesteer.features import view

    record = Run.open(run).index.feature(id)
    if json_:
        print(json.dumps(dataclasses.asdict(record)))
        return
    print(view.feature(record, colour=sys.stdout.isatty()))
