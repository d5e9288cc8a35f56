"""Contrast pairs: what a model should say, and what it should not, after the same prompt."""

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saesteer.core.files import written_aside
from saesteer.errors import PairsError, did_you_mean

FEWEST = 32
"""Pairs below which a direction is mostly noise."""

KEYS = ("prompt", "chosen", "rejected")
# The A/B data sets of contrastive activation addition name the same three things otherwise.
_AB_KEYS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
_FORMAT = '{"prompt": "…", "chosen": "…", "rejected": "…"}'


@dataclass(frozen=True)
class Pair:
    """One prompt with two answers. The text of a side is the prompt followed by the answer.

    The prompt may be empty; the answers may not, and they differ.
    """

    prompt: str
    chosen: str
    rejected: str


def read_pairs(path: str | Path) -> tuple[Pair, ...]:
    """Read a JSONL file of `{"prompt", "chosen", "rejected"}`, one pair a line.

    Other keys are ignored, and the keys of the CAA A/B data sets are understood. A pair that
    occurs more than once is taken once, with a warning that counts the repeats; fewer than 32
    pairs are warned of too.

    Raises:
        PairsError: the file is missing, empty or not text, or a line is not a pair.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise PairsError(
            f"there is no file of pairs {path}; expected JSON lines of {_FORMAT}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise PairsError(f"{path} can't be read as UTF-8 text: {error}") from error
    # Not splitlines: JSON strings may hold U+2028 and the like as they are.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    pairs = [_pair(line, f"{path}, line {n}") for n, line in lines]
    if not pairs:
        raise PairsError(f"{path} is empty; expected JSON lines of {_FORMAT}")
    unique = tuple(dict.fromkeys(pairs))
    if len(unique) < len(pairs):
        warnings.warn(
            f"{path}: {len(pairs) - len(unique)} of {len(pairs)} pairs are repeats and were left "
            "out: a repeated pair counts double and adds nothing",
            UserWarning,
            stacklevel=2,
        )
    warn_if_few(len(unique))
    return unique


def write_pairs(path: str | Path, pairs: Iterable[Pair]) -> None:
    """Write pairs as JSONL that `read_pairs` reads, aside and renamed."""
    with written_aside(Path(path)) as aside, aside.open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(vars(pair), ensure_ascii=False)}\n" for pair in pairs)


def warn_if_few(n: int) -> None:
    """Warn of fewer than 32 pairs.

    What one pair's difference holds besides the behaviour (its topic, its words) shrinks as
    1/√n: at few pairs the direction is mostly that, and steers some prompts the wrong way.
    """
    if n < FEWEST:
        # One line of ours, so that Python shows it once however often it is raised.
        warnings.warn(
            f"{n} contrast pair{'s' * (n != 1)}: under {FEWEST} a mean difference is mostly "
            "what these pairs happen to say and steers a part of the prompts the wrong way; 128 "
            "are a good number",
            UserWarning,
            stacklevel=1,
        )


def _pair(line: str, where: str) -> Pair:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PairsError(f"{where}: no JSON ({error}); expected {_FORMAT}") from error
    if not isinstance(value, dict):
        raise PairsError(f"{where}: a JSON {type(value).__name__}; expected {_FORMAT}")
    keys: Sequence[str] = _AB_KEYS if set(_AB_KEYS) <= set(value) else KEYS
    texts = []
    for key in keys:
        if key not in value:
            hint = did_you_mean(key, (k for k in value if k not in KEYS))
            raise PairsError(f"{where}: {key!r} is missing{hint}; expected {_FORMAT}")
        if not isinstance(value[key], str):
            raise PairsError(
                f"{where}: {key!r} is a {type(value[key]).__name__}, expected a string"
            )
        texts.append(value[key])
    pair = Pair(*texts)
    for problem in _problems(pair):
        raise PairsError(f"{where}: {problem}")
    return pair


def _problems(pair: Pair) -> Iterator[str]:
    if not pair.chosen.strip() or not pair.rejected.strip():
        side = "chosen" if not pair.chosen.strip() else "rejected"
        yield f"{side!r} is empty; both answers need text"
    if pair.chosen == pair.rejected:
        yield "'chosen' and 'rejected' are the same; the two answers must differ"
