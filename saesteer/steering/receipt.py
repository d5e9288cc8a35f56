"""What a steer did: positions edited, activations before and after, the size of the change."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from textwrap import wrap
from typing import Any

from saesteer.steering.record import EditReceipt, Record, TokenTrace

# Columns that a table leaves to names of edits, however narrow it is to be.
_SHORTEST = 16


class Receipt:
    """What a steer did, edit by edit. It fills while the context runs and can be read any time."""

    def __init__(
        self, records: Sequence[tuple[Record, int]], passes: Callable[[], tuple[int, int]]
    ) -> None:
        # Of each edit in the order written: the record that it is in, and its place there.
        self._records = records
        self._passes = passes

    @property
    def forwards(self) -> int:
        """Forward passes so far."""
        return self._passes()[0]

    @property
    def prompts(self) -> int:
        """Prompts so far: `generate` calls, and bare forward passes with an empty cache."""
        return self._passes()[1]

    def traces(self, edit: int = 0) -> list[list[list[TokenTrace]]]:
        """What the edit of that number did token by token: of the first 16 prompts, of each row."""
        record, at = self._records[edit]
        return record.traces(at)

    @property
    def edits(self) -> tuple[EditReceipt, ...]:
        """One receipt an edit, in the order written."""
        return tuple(record.summary(at) for record, at in self._records)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, lists and dictionaries, ready for JSON."""
        edits = [asdict(edit) for edit in self.edits]
        return {"forwards": self.forwards, "prompts": self.prompts, "edits": edits}

    def __str__(self) -> str:
        return self.table()

    def table(self, width: int = 80) -> str:
        """A line an edit, in so many columns; names that are too long for it are wrapped."""
        header = ("edit", "positions", "changed", "before", "after", "‖Δ‖/‖x‖")
        rows = [header, *(_cells(edit) for edit in self.edits)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        gap = 2 if sum(widths) + 2 * len(widths[1:]) <= width else 1
        name = max(_SHORTEST, min(widths[0], width - sum(widths[1:]) - gap * len(widths[1:])))
        lines = []
        for row in rows:
            first, *others = wrap(row[0], name, subsequent_indent="  ")
            numbers = [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
            lines += [(" " * gap).join([first.ljust(name), *numbers]), *others]
        if any(record.together for record, _ in self._records):
            lines.append("‖Δ‖/‖x‖ of clamps of one SAE: of their changes together")
        return "\n".join(lines)


def _cells(edit: EditReceipt) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    return (
        edit.edit,
        str(edit.n_edited),
        str(edit.n_changed),
        number(edit.before_mean),
        number(edit.after_mean),
        number(edit.relative_size),
    )
