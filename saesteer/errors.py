"""Everything saesteer raises on purpose.

    SaesteerError            exit code 2: something the user can mend
    ├── ConfigError          a TOML file or a flag
    ├── TextError            a source of text, or what is in it
    ├── ModelError           a language model, its layers or its tokenizer
    │   └── HookPointError   a place in it
    ├── SaeError             a sparse autoencoder, its format or its fit to a model
    ├── CacheError           cached activations: missing, foreign, truncated, corrupt
    ├── TrainingError        a training run that went wrong (NaN, a foreign checkpoint)
    ├── IndexingError        a feature index: missing, foreign, truncated
    │   └── FeatureError     a feature id or a strength
    ├── SteeringError        an edit that cannot be made
    │   └── NothingSteeredError   an edit that touched no token
    ├── PairsError           contrast pairs
    └── RunError             a run folder: missing, unwritable, incomplete

Every message says what was wrong, what was expected and what to try next, in one line.
"""

import difflib
from collections.abc import Iterable


class SaesteerError(Exception):
    """Base of all errors that a user can mend; the command line prints it in one line."""


class ConfigError(SaesteerError):
    """A configuration file or flag is wrong."""


class TextError(SaesteerError):
    """A source of text is missing, empty or too short."""


class ModelError(SaesteerError):
    """A language model or tokenizer cannot be loaded or lacks something needed."""


class HookPointError(ModelError):
    """A hook point is malformed or does not exist in this model."""


class SaeError(SaesteerError):
    """A sparse autoencoder cannot be loaded, or does not fit the model."""


class CacheError(SaesteerError):
    """Cached activations are missing, foreign, truncated or corrupt."""


class TrainingError(SaesteerError):
    """A training run cannot go on."""


class IndexingError(SaesteerError):
    """A feature index is missing, foreign or damaged."""


class FeatureError(IndexingError):
    """A feature id or a strength is not valid."""


class SteeringError(SaesteerError):
    """An edit cannot be made."""


class NothingSteeredError(SteeringError):
    """No token was touched in some row, or no forward pass ran."""


class PairsError(SaesteerError):
    """Contrast pairs are missing or malformed."""


class RunError(SaesteerError):
    """A run folder is missing, unwritable or incomplete."""


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """' (did you mean X?)' for the candidate closest to `word`, or '' where none is close."""
    close = difflib.get_close_matches(word, list(candidates), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
