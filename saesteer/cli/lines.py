"""Lines for a terminal: as wide as it is, and numbers of things."""

import shutil
import sys
import textwrap


def columns() -> int:
    """Columns of the terminal; 80 where the output is none."""
    return shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else 80


def wrapped(text: str) -> list[str]:
    """A text over as many lines as it needs, indented from the second on; paths stay whole."""
    return textwrap.wrap(
        text, columns(), subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )


def number_of(n: int, what: str) -> str:
    """ "1 pair", "2 pairs"."""
    return f"{n} {what}{'s' * (n != 1)}"
