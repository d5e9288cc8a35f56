"""search: features by keyword, by example, by contrast, beside another."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from saesteer.cli.arguments import RunFolder
from saesteer.errors import ConfigError
from saesteer.run import Run

if TYPE_CHECKING:
    from saesteer.features.query import Query

_WIDEST = 120


def search(
    run: RunFolder,
    query: Annotated[str | None, tyro.conf.Positional] = None,
    *,
    like: str | None = None,
    pos: Path | None = None,
    neg: Path | None = None,
    near: int | None = None,
    sort: Literal["match", "effect"] = "match",
    limit: int = 10,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    device: str | None = None,
) -> None:
    """Find features: by keyword, or with --like, --pos and --neg, or --near.

    Of plain words any may match. "a phrase", AND, OR, NOT, -without, (...), begin* and label:,
    token:, promotes:, context: decide what is found; density<1%, max_act>3, output_score>.1,
    own_effect>0, tag:x, is:starred and is:dead filter. A list says `output` for the output score
    and `own` for the own effect.

    Args:
        run: The run folder.
        query: Words, or an expression.
        like: Features that fire on this text more than elsewhere.
        pos: A file of texts, one a line: features that tell them from those of --neg.
        neg: The texts to tell them from, one a line.
        near: Features beside this one: alike in direction, or firing with it.
        sort: Of keywords: by match, or by match and effect (measured where it is not known yet).
        limit: At most so many features.
        json_: Print one JSON array.
        device: Where the model runs, where it is needed.
    """
    ways = [query is not None, like is not None, pos is not None or neg is not None]
    if sum([*ways, near is not None]) != 1:
        raise ConfigError(
            "what is to be found? give one of: words, --like TEXT, --pos FILE with --neg FILE, "
            "--near FEATURE"
        )
    if (pos is None) != (neg is None):
        raise ConfigError("--pos and --neg go together: give a file of texts for each")
    if sort != "match" and query is None:
        raise ConfigError(f"--sort {sort} orders what words find; leave it out here")
    if limit < 1:
        raise ConfigError(f"--limit {limit}; expected 1 or more")
    opened = Run.open(run, device=device)
    if query is not None:
        hits, asked = opened.search(query, limit=limit, sort=sort), query
    elif like is not None:
        hits, asked = opened.like(like, limit), like
    elif near is not None:
        hits, asked = opened.near(near, limit), f"near {near}"
    else:
        from saesteer.cli.steer_options import read_prompts

        assert pos is not None and neg is not None
        hits = opened.contrast(read_prompts(pos), read_prompts(neg), limit)
        asked = f"{pos} against {neg}"
    if json_:
        from saesteer.features import outputs

        how = outputs.measured_with(opened.index.path, [hit.id for hit in hits])
        rows = [dataclasses.asdict(hit) | {"measured_with": how.get(hit.id)} for hit in hits]
        print(json.dumps(rows))
        return
    from saesteer.features import view
    from saesteer.features.query import parse

    read, suggestions = None, []
    if query is not None:
        read = parse(query)
        suggestions = opened.index.suggest(query)
    shown = view.hits(
        hits,
        asked,
        suggestions=suggestions,
        advice=_advice(read),
        note=read.note if read else None,
        colour=sys.stdout.isatty(),
        width=max(view.WIDTH, min(_WIDEST, shutil.get_terminal_size().columns)),
    )
    print(shown)


def _advice(query: "Query | None") -> str:
    """What to try where nothing was found."""
    if query is None:
        return "try a longer text, or another feature"
    if query.filters and not query.words and query.expression is None:
        return "loosen a filter or leave it out; `saesteer notes` lists stars and tags"
    filters = ", or leave the filters out" if query.filters else ""
    return f"try a word that the text is likely to hold, or a shorter one{filters}"
