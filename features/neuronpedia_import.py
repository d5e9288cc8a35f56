"""A Neuronpedia export (see `neuronpedia`) as an index that can be searched and looked at.

An export has the examples of each feature, not the counts that a pass over text makes. So the words
that a feature fires on, their shares and their lift are worked out from its examples; base rates
are those of the words in all examples together, which is text on which some feature fires. The
SAE and the model aren't there: what needs them needs an index of one's own.
"""

import gzip
import json
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from saesteer.core.progress import progress
from saesteer.errors import IndexingError
from saesteer.features import labels, store
from saesteer.features.entries import texts
from saesteer.features.firing_words import OWN_LIFT
from saesteer.features.neuronpedia_example import Spelled, spelled
from saesteer.features.neuronpedia_figures import (
    finite,
    histogram,
    logits,
    max_act,
    mean,
    pairs,
    share,
)
from saesteer.features.records import Entry, Example, Feature, Neighbour, WordStat

ABSENT = "(not in the export)"
# Of a feature that fires, or may: the export doesn't show on what.
NO_WORDS = "(no words in the export)"
# Larger numbers are no features: gaps below the largest are filled.
_MOST = 2**24
# Words kept a feature.
_WORDS = 40
_EXPECTED = "expected a folder of Neuronpedia's exports: features/, activations/, explanations/"


def load(folder: Path, path: Path) -> Path | None:
    """Write an index of an export; its meta has `imported_from`.

    Features are numbered as in the export; numbers that it lacks are filled with features of which
    nothing is known, labelled `ABSENT`. Memory is bounded but for the words of the examples,
    counted.

    Args:
        folder: MODEL/SOURCE of the exports: `features/*.jsonl.gz` and, if any, `activations/` and
            `explanations*/`; unpacked `.jsonl` files do as well.
        path: of the index; one that is there is replaced, but notes are kept (see `store.write`).

    Returns:
        What `store.write` does: the file that holds notes which couldn't be carried over, if any.

    Raises:
        IndexingError: it is no such folder, a line is malformed, a feature comes twice, what fires
            has no frac_nonzero, or the index can't be written.
    """
    # A database without a name lives in a temporary file that vanishes with it.
    with closing(sqlite3.connect("")) as spool:
        about, common = _spooled(folder, spool)
        last = spool.execute("SELECT max(feature) FROM features").fetchone()[0]
        if last is None:
            raise IndexingError(f"{folder} holds no features; {_EXPECTED}")
        return store.write(path, _entries(spool, last + 1, common), about)


def _spooled(folder: Path, spool: sqlite3.Connection) -> tuple[dict[str, Any], Counter[str]]:
    """Lay an export's lines into tables by feature: the files are in no order that could be used.

    Returns what the export says of itself, and how often each word stands in its examples.
    """
    spool.executescript(
        "CREATE TABLE features (feature INTEGER PRIMARY KEY, data TEXT);"
        "CREATE TABLE examples (feature INTEGER, data TEXT);"
        "CREATE TABLE explanations (feature INTEGER, data TEXT)"
    )
    about: dict[str, Any] = {}
    for row in _rows(folder, "features"):
        try:
            _insert(spool, "features", row, row.about)
        except sqlite3.IntegrityError as error:
            raise IndexingError(
                f"{row.where}: feature {row.feature} comes a second time; expected each once: "
                "leave out the line that is not of this export"
            ) from error
        place = "/".join(str(row.about.get(key, "?")) for key in ("modelId", "layer"))
        about = about or {
            "imported_from": f"neuronpedia {place}",
            "model_id": row.about.get("modelId"),
            "hook_point": row.about.get("hookName"),
            "sae_hash": None,
            "n_tokens": None,
        }
    common: Counter[str] = Counter()
    for row in _rows(folder, "activations"):
        try:
            example, words = spelled(row.about)
        except (ValueError, TypeError, LookupError) as error:
            raise IndexingError(f"{row.where}: a malformed example ({error})") from error
        common.update(word.casefold() for word in words)
        _insert(spool, "examples", row, example._asdict())
    for row in _rows(folder, "explanations*"):
        said = {key: row.about.get(key) for key in ("description", "explanationModelName")}
        _insert(spool, "explanations", row, said)
    for table in ("examples", "explanations"):
        spool.execute(f"CREATE INDEX of_{table} ON {table} (feature)")
    return about, common


class _Row(NamedTuple):
    where: str
    feature: int
    about: dict[str, Any]


def _rows(folder: Path, name: str) -> Iterator[_Row]:
    """The lines of all files of one kind."""
    files = [*folder.glob(f"{name}/*.jsonl"), *folder.glob(f"{name}/*.jsonl.gz")]
    for file in progress(name.rstrip("*"), len(files), unit="file", iterable=sorted(files)):
        where = str(file)
        try:
            with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    where = f"{file}, line {number}"
                    about = json.loads(line, parse_constant=_refused)
                    feature = int(about["index"])
                    if not 0 <= feature < _MOST:
                        raise ValueError(f"index {feature} is no feature's number")
                    yield _Row(where, feature, about)
        except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError) as error:
            said = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise IndexingError(f"{where}: {said}; {_EXPECTED}") from error


def _refused(constant: str) -> float:
    """NaN and infinities, which Python's JSON knows and no measured figure is."""
    raise ValueError(f"{constant} is no number")


def _insert(spool: sqlite3.Connection, table: str, row: _Row, value: Mapping[str, Any]) -> None:
    spool.execute(f"INSERT INTO {table} VALUES (?, ?)", (row.feature, json.dumps(value)))


def _entries(spool: sqlite3.Connection, n: int, common: Counter[str]) -> Iterator[Entry]:
    total = max(1, common.total())
    # The export has no ids of tokens: their texts are numbered as they come.
    numbers: dict[str, int] = {}
    for i in progress("write", n, unit="feature", iterable=range(n)):
        row = spool.execute("SELECT data FROM features WHERE feature = ?", (i,)).fetchone()
        if row is None:
            yield Entry(Feature(i, ABSENT, 0.0, 0.0, 0.0, 0.0, 0, 0.0, 0.0), {})
            continue
        examples, said = (
            spool.execute(f"SELECT data FROM {table} WHERE feature = ? ORDER BY rowid", (i,))
            for table in ("examples", "explanations")
        )
        found = [Spelled(**json.loads(data)) for (data,) in examples]
        description: dict[str, Any] = next((json.loads(data) for (data,) in said), {})
        words = _word_stats(found, common, total)
        try:
            yield _entry(i, json.loads(row[0]), found, words, description, numbers)
        except (ValueError, TypeError, LookupError) as error:
            raise IndexingError(f"feature {i} is malformed ({error}); {_EXPECTED}") from error


def _entry(
    number: int,
    about: Mapping[str, Any],
    found: Sequence[Spelled],
    words: tuple[WordStat, ...],
    said: Mapping[str, Any],
    numbers: dict[str, int],
) -> Entry:
    activations = histogram(about, "freq_hist_data")
    examples = _examples(found, numbers)
    around = [(x.around[0], x.around[1], x.around[2]) for x in found if x.low is None]
    highest = max_act(about, examples, activations)
    density = share(about, "frac_nonzero")
    # How often it fired is in no field. What is known of it is a bound.
    n_fired = max(
        sum(activations.counts) if activations else 0,
        len(examples),
        int(highest > 0 or bool(density)),
    )
    if n_fired and density is None:
        raise ValueError(
            "it fires and has no frac_nonzero, the share of tokens on which it does; add that or "
            "leave the feature out"
        )
    label, confidence = labels.label(words, around)
    if not words and (n_fired or density is None):
        label = NO_WORDS
    description = said.get("description")
    feature = Feature(
        number,
        str(description) if description else label,
        confidence,
        density or 0.0,
        mean(activations) if activations else 0.0,
        highest,
        n_fired,
        labels.breadth(words),
        _company(found, words),
        label_source="judge" if description and said.get("explanationModelName") else "evidence",
        words=words,
        promotes=logits(about, "pos"),
        suppresses=logits(about, "neg"),
        examples=examples,
        activations=activations,
        logits=histogram(about, "logits_hist_data"),
        neighbours=tuple(
            Neighbour(int(other), finite(cosine))
            for other, cosine in pairs(about, "topkCosSimIndices", "topkCosSimValues")
        ),
    )
    return Entry(feature, texts(feature, around))


def _word_stats(
    found: Sequence[Spelled], common: Mapping[str, int], total: int
) -> tuple[WordStat, ...]:
    """The words of a feature's examples that it fires on, heaviest first; case is merged."""
    counts: Counter[str] = Counter()
    mass: dict[str, float] = {}
    written: dict[str, str] = {}
    for word, value in (pair for example in found for pair in example.fired):
        key = word.casefold()
        counts[key] += 1
        mass[key] = mass.get(key, 0.0) + value
        written.setdefault(key, word)
    n, every = counts.total(), sum(mass.values())
    stats = []
    for key in sorted(mass, key=lambda key: (-mass[key], key))[:_WORDS]:
        base = common[key] / total
        stats.append(WordStat(written[key], mass[key] / every, counts[key] / n / base, base))
    return tuple(stats)


def _company(found: Sequence[Spelled], words: Sequence[WordStat]) -> float:
    """How many different own words it fires on within one of the strongest, on average."""
    own = {word.text.casefold() for word in words if word.lift >= OWN_LIFT}
    strongest = [x for x in found if x.low is None]
    together = sum(len(own & {word.casefold() for word, _ in x.fired}) for x in strongest)
    return together / max(1, len(strongest))


def _examples(found: Sequence[Spelled], numbers: dict[str, int]) -> tuple[Example, ...]:
    """The strongest first, then those of intervals, the highest first. The intervals of an export
    aren't tenths: they are spread over the ten groups in their order."""
    intervals = sorted({x.low for x in found if x.low is not None})
    spread = max(1, len(intervals) - 1)
    groups = {low: 9 * i // spread for i, low in enumerate(intervals)}
    examples = [
        Example(
            x.values[x.firing],
            context,
            x.position,
            None,
            x.firing,
            tuple(numbers.setdefault(piece, len(numbers)) for piece in x.pieces),
            tuple(x.pieces),
            tuple(x.values),
            "top" if x.low is None else groups[x.low],
        )
        for context, x in enumerate(found)
        if x.values[x.firing] > 0
    ]
    place = {"top": 0} | {group: 10 - group for group in range(10)}
    return tuple(sorted(examples, key=lambda x: (place[x.group], -x.value)))
