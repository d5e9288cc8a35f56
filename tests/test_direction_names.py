"""Methods under the other names that they have."""

import pytest

from saesteer.directions.methods import ALIASES, METHODS, method
from saesteer.errors import ConfigError


def test_both_names_of_a_method_work() -> None:
    assert method("affine") is METHODS["mimic"]
    assert method("orthogonalise") is METHODS["ablate"]
    assert not ALIASES.keys() & METHODS.keys()
    with pytest.raises(ConfigError, match="did you mean 'orthogonalise'"):
        method("orthogonalize")
