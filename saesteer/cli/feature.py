"""feature: one feature, in the terminal or on a page."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import tyro

from saesteer.cli.arguments import RunFolder
from saesteer.core.files import written_aside
from saesteer.run import Run

_WIDEST = 120


def feature(
    run: RunFolder,
    id: Annotated[int, tyro.conf.Positional],
    *,
    html: Path | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Show one feature: label, figures, top tokens, highlighted examples, what it promotes.

    Args:
        run: The run folder.
        id: The feature's number.
        html: Write one page that opens offline to this file, in place of printing.
        json_: Print one JSON object.
    """
    from saesteer.features import outputs, view

    index = Run.open(run).index
    record = index.feature(id)
    how = outputs.measured_with(index.path, [id]).get(id)
    if json_:
        print(json.dumps(dataclasses.asdict(record) | {"measured_with": how}))
        return
    beside = {hit.id: hit.label for hit in index.hits([(i, 0.0, "") for i in view.others(record)])}
    if html is None:
        width = max(view.WIDTH, min(_WIDEST, shutil.get_terminal_size().columns))
        colour = sys.stdout.isatty()
        print(view.feature(record, beside=beside, measured_with=how, colour=colour, width=width))
        return
    from saesteer.cli.index import about
    from saesteer.features import page

    with written_aside(html) as aside:
        text = page.page(record, beside=beside, about=about(index.meta), measured_with=how)
        aside.write_text(text, encoding="utf-8", errors="replace")
    print(html)
