"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import tyro

from saesteer.errors import ConfigError

RunFolder = Annotated[Path, tyro.conf.Positional]

# scikit-learn takes no larger seed.
_MOST = 2**32 - 1


def check_seed(seed: int) -> None:
    """ConfigError for a seed that some random generator can't take."""
    if not 0 <= seed <= _MOST:
        raise ConfigError(f"--seed {seed}: expected a whole number from 0 to {_MOST}")
