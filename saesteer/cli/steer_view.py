"""What `saesteer steer` prints: texts beside one another, figures, tables, JSON."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from saesteer.effects.side_by_side import Comparison, Side
    from saesteer.steering.receipt import Receipt

# Below so many columns two texts stand one under the other.
_NARROW = 60
_LABEL = 10


@dataclass(frozen=True)
class Batch:
    """Prompts as they were given, what was compared for each, the receipt of all, and whether
    strengths were swept."""

    texts: list[str]
    comparisons: "list[Comparison]"
    receipt: "Receipt"
    swept: bool = False


@dataclass
class View:
    """How texts are shown.

    Args:
        title: what they are steered with.
        chat: whether prompts are turns of a chat, so that the reply alone is shown.
        show: whether tokens are marked.
    """

    tokenizer: Any
    title: str
    chat: bool = False
    show: bool = False
    _streamed: int = 0

    @property
    def width(self) -> int:
        """Columns of the terminal, or 80."""
        return shutil.get_terminal_size((80, 24)).columns

    @property
    def _wrap(self) -> int | None:
        """Columns to wrap texts at; None where the output isn't a terminal."""
        return self.width if sys.stdout.isatty() else None

    def batch(self, batch: Batch) -> str:
        """All comparisons of a batch, and its receipt."""
        several = len({one.seed for one in batch.comparisons}) > 1
        blocks = []
        for text, one in zip(batch.texts, batch.comparisons, strict=True):
            head = [f"seed {one.seed}"] if several else []
            if self.chat or batch.swept:
                head.append(_labelled("prompt", text, self._wrap))
            body = self._sweep(one) if batch.swept else self._pair(one)
            blocks.append("\n".join([*head, body]))
        return "\n\n".join([*blocks, self._receipt(batch.receipt)]) + "\n"

    def stream(self, side: str) -> "BaseStreamer":
        """Writes a text to the terminal while it is generated."""
        from saesteer.core.generate import Stream

        if self._streamed:
            print()
        self._streamed += 1
        return Stream(self.tokenizer, _Hanging(side, self.width).write, skip_prompt=self.chat)

    def after_stream(self, batch: Batch) -> str:
        """What stands under texts that have been streamed: their figures, and the receipt."""
        return f"\n{figures(batch.comparisons[0])}\n\n{self._receipt(batch.receipt)}\n"

    def page(self, batches: Sequence[Batch], facts: Mapping[str, str]) -> str:
        """A page with all of it."""
        from saesteer.effects.side_by_side_page import page

        return page(
            [(list(zip(b.texts, b.comparisons, strict=True)), b.receipt) for b in batches],
            self.tokenizer,
            title=self.title,
            facts=facts,
        )

    def _receipt(self, receipt: "Receipt") -> str:
        """As a table, or where the terminal is too narrow for it, two lines an edit."""
        if not sys.stdout.isatty():
            return str(receipt)
        table = receipt.table(self.width)
        if max(map(len, table.split("\n"))) <= self.width:
            return table
        lines = []
        for edit in receipt.edits:
            told = f"    {edit.n_edited} positions, {edit.n_changed} changed"
            if edit.before_mean is not None:
                told += f", {_number(edit.before_mean)} → {_number(edit.after_mean)}"
            lines += [edit.edit, f"{told}, ‖Δ‖/‖x‖ {_number(edit.relative_size)}"]
        return "\n".join(lines)

    def _text(self, side: "Side") -> str:
        return side.written.reply if self.chat else side.written.text

    def _pair(self, one: "Comparison") -> str:
        from saesteer.steering.show import column_width, columns, wrapped

        wide = sys.stdout.isatty() and self.width >= _NARROW
        titles = ("baseline", "steered")
        if not (self.show or wide):
            pairs = zip(titles, one.sides, strict=True)
            texts = [_labelled(title, self._text(side), self._wrap) for title, side in pairs]
            return "\n".join([*texts, figures(one)])
        half = column_width(self.width) if wide else self.width
        blocks = [
            [title, "─" * half, *(self._marked(side, one, half).split("\n"))]
            if self.show
            else [title, "─" * half, *wrapped(self._text(side), half)]
            for title, side in zip(titles, one.sides, strict=True)
        ]
        beside = columns(*blocks, width=self.width) if wide else "\n".join(blocks[0] + blocks[1])
        return "\n".join(
            [beside, figures(one, 2 if wide else 0), *([self._legend(one)] if self.show else [])]
        )

    def _marked(self, side: "Side", one: "Comparison", width: int) -> str:
        from saesteer.steering.show import terminal

        colour = sys.stdout.isatty()
        return terminal(side.trace, self.tokenizer, colour=colour, width=width, top=one.top)

    def _legend(self, one: "Comparison") -> str:
        marks = "underlined" if sys.stdout.isatty() else "between « and »"
        bars = f"; bars: {one.reading}, █ = {one.top:.3g}" if one.reading else ""
        return f"{'  ' if sys.stdout.isatty() else ''}steered tokens {marks}{bars}"

    def _sweep(self, one: "Comparison") -> str:
        told = f"{self.title}, times each strength; seed {one.seed}"
        parts = [_labelled("edits", told, self._wrap)]
        parts += ["", table(one, self._wrap)]
        parts += [f"CE, {one.reading or 'dist2'}: of the generated text, read unsteered"]
        if self.show:
            for side in one.sides:
                parts += ["", strength(side), self._marked(side, one, self.width)]
            parts += ["", self._legend(one)]
        return "\n".join(parts)


class _Hanging:
    """Writes a text to the terminal piece by piece, wrapped beside its label."""

    def __init__(self, label: str, width: int) -> None:
        self._width, self._used = width, _LABEL
        print(f"{label:<{_LABEL}}", end="", flush=True)

    def write(self, text: str) -> None:
        from saesteer.steering.show import clean

        for n, line in enumerate(clean(text).split("\n")):
            if n:
                self._new_line()
            for m, word in enumerate(line.split(" ")):
                self._word(" " if m else "", word)
        sys.stdout.flush()

    def _word(self, space: str, word: str) -> None:
        if self._used + len(space) + len(word) > self._width and self._used > _LABEL:
            self._new_line()
            space = ""
        print(space + word, end="")
        self._used += len(space) + len(word)

    def _new_line(self) -> None:
        print("\n" + " " * _LABEL, end="")
        self._used = _LABEL


def strength(side: "Side") -> str:
    """A side's name: baseline, or how often its edits were taken."""
    return "baseline" if side.strength is None else f"{side.strength:g}×"


def figures(one: "Comparison", indent: int = _LABEL) -> str:
    """A pair's measures in a line, baseline → steered, as the unsteered model reads the texts."""
    before, after = (side.measures for side in one.sides)
    parts = [
        f"CE {_number(before.ce)} → {_number(after.ce)}",
        f"dist2 {_number(before.distinct_2)} → {_number(after.distinct_2)}",
    ]
    if one.reading:
        parts.append(f"{one.reading} {_number(before.activation)} → {_number(after.activation)}")
    return f"{'':{indent}}unsteered {', '.join(parts)}"


def table(one: "Comparison", width: int | None) -> str:
    """A line a strength: measures and the generated text, cut to so many columns; None: whole."""
    from saesteer.steering.show import clean

    header = ["strength", "CE", "dist2", *([one.reading] if one.reading else []), "text"]
    rows = [header]
    for side in one.sides:
        found = side.measures
        cells = [strength(side), _number(found.ce), _number(found.distinct_2)]
        cells += [_number(found.activation)] if one.reading else []
        rows.append([*cells, " ".join(clean(side.written.reply).split())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(w) for cell, w in zip(row[1:-1], widths[1:], strict=True)]
        lines.append(_cut("  ".join([*cells, row[-1]]), width))
    return "\n".join(lines)


def rows(batch: Batch, *, chat: bool) -> list[dict[str, Any]]:
    """A batch as JSON: one object a comparison, with the receipt of all in the last."""
    found: list[dict[str, Any]] = []
    for text, one in zip(batch.texts, batch.comparisons, strict=True):
        row: dict[str, Any] = {"prompt": text, "seed": one.seed, "reading": one.reading}
        shown = [side.written.reply if chat else side.written.text for side in one.sides]
        if not batch.swept:
            row |= {"baseline": shown[0], "steered": shown[1]}
            sides = zip(("baseline", "steered"), one.sides, strict=True)
            row["measures"] = {name: asdict(side.measures) for name, side in sides}
        else:
            row["sweep"] = [
                {"strength": side.strength, "text": said, **asdict(side.measures)}
                for side, said in zip(one.sides, shown, strict=True)
            ]
        found.append(row)
    found[-1]["receipt"] = batch.receipt.to_dict()
    return found


def _labelled(label: str, text: str, width: int | None) -> str:
    """A text beside its label, wrapped to so many columns; None: not wrapped."""
    from saesteer.steering.show import clean, wrapped

    if width is None:
        return f"{label:<{_LABEL}}{clean(text)}"
    lines = wrapped(text, max(20, width - _LABEL))
    return "\n".join(f"{label if n == 0 else '':<{_LABEL}}{x}" for n, x in enumerate(lines))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}"


def _cut(text: str, width: int | None) -> str:
    """A line of at most so many columns, cut between words."""
    from saesteer.steering.show import wrapped

    if width is None or len(wrapped(text, width)) == 1:
        return text
    return wrapped(text, width - 2)[0] + " …"
