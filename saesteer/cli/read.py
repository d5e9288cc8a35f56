"""read: which features fire on a text, token by token."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import tyro

from saesteer.cli.arguments import RunFolder
from saesteer.run import Run

if TYPE_CHECKING:
    from saesteer.features.reading import TokenReading

# Columns for a token.
_TOKEN = 14


def read(
    run: RunFolder,
    text: Annotated[str, tyro.conf.Positional],
    *,
    top: int = 3,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    device: str | None = None,
) -> None:
    """Show, token by token, which features fire on a text: those that tell most first.

    Args:
        run: The run folder.
        text: The text.
        top: Features listed a token.
        json_: Print one JSON array.
        device: Where the model runs.
    """
    opened = Run.open(run, device=device)
    tokens = opened.read(text, top)
    ids = dict.fromkeys(fired.feature for token in tokens for fired in token.fired)
    labels = {hit.id: hit.label for hit in opened.index.hits([(i, 0.0, "") for i in ids])}
    if json_:
        rows = [dataclasses.asdict(token) for token in tokens]
        for row in rows:
            for fired in row["fired"]:
                fired["label"] = labels[fired["feature"]]
        print(json.dumps(rows))
        return
    width = max(80, min(160, shutil.get_terminal_size().columns))
    print("\n".join(_line(token, labels, width) for token in tokens))


def _line(token: "TokenReading", labels: Mapping[int, str], width: int) -> str:
    """A token and what fires on it, most telling first: number, label, share of its max_act."""
    from saesteer.features.view_parts import clean, cut, fit, quoted

    # What each has beside its label: number, strength, a point between.
    room = max(12, (width - _TOKEN) // max(1, len(token.fired)) - 14)
    told = [
        f"{one.feature} {cut(clean(labels[one.feature]), room)}"
        + (f" {one.times:.2f}x" if one.times is not None else f" {one.activation:.3g}")
        for one in token.fired
    ]
    if token.special:
        told = ["(special: not read)"]
    elif token.n_fired > len(token.fired):
        told.append(f"+{token.n_fired - len(token.fired)}")
    return cut(f"{fit(quoted(token.text), _TOKEN)}  {' · '.join(told)}", width)
