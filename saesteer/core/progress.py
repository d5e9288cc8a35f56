"""One look for every progress bar: what, how far, how fast, how long still."""

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(
    what: str, total: int | None, *, unit: str = "tok", iterable: Iterable[Any] | None = None
) -> Any:
    """A tqdm bar on stderr with rate and ETA, redrawn rarely where stderr is a file."""
    return tqdm(
        iterable,
        total=total,
        desc=f"{what:<10}",
        unit=unit,
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
        file=sys.stderr,
        disable=os.environ.get("RANK", "0") != "0",  # of torchrun's processes the first shows it
    )
