"""Features as CSV, one row a feature: for a spreadsheet or a data frame."""

import csv
import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, TextIO

from saesteer.features.hit import marked
from saesteer.features.records import Feature
from saesteer.features.view_parts import clean

COLUMNS = (
    "id",
    "label",
    "name",
    "starred",
    "tags",
    "confidence",
    "label_source",
    "label_score",
    "density",
    "n_fired",
    "mean_act",
    "max_act",
    "breadth",
    "company",
    "decoder_norm",
    "output_score",
    "own_effect",
    "measured_with",
    "token_set",
    "token_set_score",
    "words",
    "promotes",
    "suppresses",
    "example",
)
# What makes a spreadsheet take a cell for a formula.
_FORMULA = ("=", "+", "-", "@")


def write(
    file: TextIO,
    features: Iterable[Feature],
    measured_with: Mapping[int, Mapping[str, Any]] = MappingProxyType({}),
) -> int:
    """Write a header and one row a feature, and say how many features there were.

    Features are read one by one. What was not measured is an empty cell. Words and tokens stand
    with a space between them, strongest first. Texts that a spreadsheet would run as a formula
    begin with an apostrophe.

    Args:
        file: open for writing; newline="" where it is a file.
        measured_with: of a feature, the settings of its effects (see `outputs`): a cell of JSON.
    """
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(COLUMNS)
    n = 0
    for record in features:
        rows.writerow(_cell(value) for value in _row(record, measured_with.get(record.id)))
        n += 1
    return n


def _row(f: Feature, how: Mapping[str, Any] | None) -> list[object]:
    note = f.note
    return [
        f.id,
        f.label,
        note.name if note else None,
        int(bool(note and note.starred)),
        " ".join(note.tags) if note else "",
        f.confidence,
        f.label_source,
        f.label_score,
        f.density,
        f.n_fired,
        f.mean_act if f.n_fired else None,
        f.max_act if f.n_fired else None,
        f.breadth,
        f.company,
        f.decoder_norm,
        f.output_score,
        f.own_effect,
        None if how is None else json.dumps(how, sort_keys=True),
        f.token_set,
        f.token_set_score,
        " ".join(word.text for word in f.words),
        " ".join(text.strip() for text, _ in f.promotes),
        " ".join(text.strip() for text, _ in f.suppresses),
        marked(f.examples[0]) if f.examples else "",
    ]


def _cell(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.6g}")  # what an index keeps
    if not isinstance(value, str):
        return value  # the writer leaves None empty
    # What UTF-8 can't hold reads ?.
    text = clean(value.encode("utf-8", "replace").decode())
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text
