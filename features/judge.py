"""Labels written by a language model, from the same evidence that the plain labels are made of.

A writer is any function that takes prompts and gives as many texts (see `core.writers`). What it
wrote is kept in the index under a key of the evidence and the writer's name, so that the work goes
on where it stopped, and nothing is asked twice while the evidence stays the same.
"""

import hashlib
import re
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from saesteer.core.progress import progress
from saesteer.core.writers import Write
from saesteer.errors import IndexingError
from saesteer.features import notes
from saesteer.features.migrate import reading, writing
from saesteer.features.records import Example, Feature

# Of a window's tokens those are marked on which the activation is this part of the highest.
_MARKED = 0.5
_EXAMPLES, _TOKENS, _PROMOTED = 8, 8, 8
_LONGEST = 80  # letters of a label
_ASK = """\
Each text below has words between « and » on which one feature of a language model fires.

{texts}

It fires most on: {tokens}
It makes these tokens likelier to come next: {promoted}

What do the marked words have in common? Answer with one phrase of at most eight words and nothing
else.
Phrase:"""


@dataclass(frozen=True)
class Judged:
    """A label that a model wrote.

    Attributes:
        key: of the evidence and the writer.
        asked: False where the index had it already.
    """

    feature: int
    key: str
    label: str
    asked: bool


def label_features(
    path: Path,
    features: Iterable[Feature],
    write: Write,
    *,
    model: str,
    batch_size: int = 16,
    n_features: int | None = None,
) -> Iterator[Judged]:
    """Have features labelled, and keep each batch of labels in the index at `path`.

    Features that never fired are left out, and so is one that the writer had no words for.

    Args:
        features: full records, in any order; they are taken as they are needed.
        write: asked for `batch_size` labels at a time.
        model: the writer's name; another one's labels are asked for anew.
        n_features: how many will come, where known: for the progress bar.

    Raises:
        IndexingError: the writer gave another number of texts; the index can't be written.
    """
    waiting = iter(features)
    with progress("judge", n_features, unit="feature") as bar:
        while some := list(islice(waiting, batch_size)):
            asked = {one.id: prompt(one) for one in some if one.examples}
            keys = {i: key(text, model) for i, text in asked.items()}
            known = _known(path, keys)
            new = [i for i in asked if i not in known]
            texts = answers(write, [asked[i] for i in new]) if new else []
            found = {i: text for i, raw in zip(new, texts, strict=True) if (text := cleaned(raw))}
            with writing(path) as connection:
                for i, text in (known | found).items():
                    if i in found:
                        connection.execute(
                            "INSERT OR REPLACE INTO judged (feature, key, label, model) "
                            "VALUES (?, ?, ?, ?)",
                            (i, keys[i], text, model),
                        )
                    lay_label(connection, i, text, keys[i])
            bar.update(len(some))
            for i in asked:
                if i in known or i in found:
                    yield Judged(i, keys[i], known.get(i) or found[i], i in found)


def lay_label(connection: sqlite3.Connection, feature: int, label: str, key: str) -> None:
    """Make a label that is kept under `key` a feature's own, with the score it has."""
    connection.execute(
        "UPDATE features SET label = ?, label_source = 'judge', label_score = "
        "(SELECT (detection + fuzzing) / 2 FROM judged WHERE feature = ? AND key = ?) WHERE id = ?",
        (label, feature, key, feature),
    )
    notes.lay(connection, feature)


def prompt(feature: Feature) -> str:
    """What a writer is asked about a feature.

    It is shown every other example: the others are kept for scoring the label.
    """
    shown = feature.examples[::2][:_EXAMPLES]
    texts = "\n".join(f"{i}. {example_text(example)}" for i, example in enumerate(shown, 1))
    tokens = ", ".join(repr(token.text) for token in feature.tokens[:_TOKENS]) or "nothing"
    promoted = ", ".join(repr(text) for text, _ in feature.promotes[:_PROMOTED]) or "nothing"
    return _ASK.format(texts=texts, tokens=tokens, promoted=promoted)


def key(prompt: str, model: str) -> str:
    """16 hex digits of what was asked, and of whom."""
    return hashlib.sha256(f"{model}\0{prompt}".encode("utf-8", "replace")).hexdigest()[:16]


def example_text(example: Example) -> str:
    """An example on one line, the tokens on which the feature fires strongly marked."""
    return marked(example.pieces, strong(example))


def strong(example: Example) -> list[int]:
    """Where the feature fires strongly in an example: on half of its highest activation or more."""
    least = _MARKED * max(example.activations)
    return [i for i, a in enumerate(example.activations) if a > 0 and a >= least]


def marked(pieces: Sequence[str], where: Collection[int]) -> str:
    """Pieces as one line of text; those at `where` stand between « and », neighbours together."""
    out, open_ = "", False
    for i, piece in enumerate(pieces):
        chosen = i in where
        if chosen and not open_:
            bare = piece.lstrip()
            piece = f"{piece[: len(piece) - len(bare)]}«{bare}"
        elif open_ and not chosen:
            out += "»"
        open_ = chosen
        out += piece
    return " ".join((out + "»" * open_).split())


def cleaned(text: str) -> str:
    """A label from what a model wrote: its first line with words, bare; "" where it has none."""
    for line in text.splitlines():
        line = re.sub(r"^\W*(?:phrase|label|answer)\s*:", "", line.strip(), flags=re.IGNORECASE)
        line = " ".join(line.strip(" \t\"'`*«».-").split())
        if any(character.isalnum() for character in line):
            if len(line) <= _LONGEST:
                return line
            return line[: _LONGEST - 1].rsplit(" ", 1)[0] + "…"
    return ""


def answers(write: Write, prompts: Sequence[str]) -> list[str]:
    """What the writer wrote to each prompt. IndexingError where it isn't one text each."""
    texts = list(write(prompts))
    if len(texts) != len(prompts):
        raise IndexingError(
            f"the writer gave {len(texts)} texts for {len(prompts)} prompts; expected one each"
        )
    return texts


def _known(path: Path, keys: dict[int, str]) -> dict[int, str]:
    """The labels that the index has for these features and keys."""
    with reading(path) as connection:
        rows = (
            connection.execute(
                "SELECT feature, label FROM judged WHERE feature = ? AND key = ?", pair
            ).fetchone()
            for pair in keys.items()
        )
        return {row[0]: row[1] for row in rows if row}
