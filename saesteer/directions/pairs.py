"""Contrast pairs: what a model should say, and what it should not, after the same prompt."""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saesteer.core.files import written_aside
from saesteer.directions.pair_chat import answers_in_chat
from saesteer.directions.pair_files import FORMAT, records
from saesteer.errors import PairsError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEWEST = 32
"""Pairs below which a direction is mostly noise."""
ENOUGH = 128
"""Pairs that are asked for where nothing else is said."""

KEYS = ("prompt", "chosen", "rejected")
# The A/B sets of contrastive activation addition and the persona sets (Perez et al. 2022) name the
# same three things otherwise.
_AB_KEYS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")


@dataclass(frozen=True)
class Pair:
    """One prompt with two answers. The text of a side is the prompt followed by the answer.

    The prompt may be empty; the answers may not, and they differ.
    """

    prompt: str
    chosen: str
    rejected: str


def read_pairs(
    source: str | Path,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    split: str = "train",
) -> tuple[Pair, ...]:
    """Read pairs of `{"prompt", "chosen", "rejected"}`; other keys are ignored.

    A pair that occurs more than once is taken once, with a warning that counts the repeats; fewer
    than 32 pairs are warned of too. See `parse_pairs` for what is read.

    Raises:
        PairsError: the source is missing, empty or can't be read, or a record is not a pair.
    """
    pairs = []
    for where, pair in parse_pairs(source, tokenizer, split=split):
        for problem in problems(pair):
            raise PairsError(f"{where}: {problem}")
        pairs.append(pair)
    unique = tuple(dict.fromkeys(pairs))
    if len(unique) < len(pairs):
        warnings.warn(
            f"{source}: {len(pairs) - len(unique)} of {len(pairs)} pairs are repeats and were left "
            "out: a repeated pair counts double and adds nothing",
            UserWarning,
            stacklevel=2,
        )
    warn_if_few(len(unique))
    return unique


def parse_pairs(
    source: str | Path,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    split: str = "train",
) -> Iterator[tuple[str, Pair]]:
    """Each pair as it stands in `source`, with where it stood: repeats and empty sides as well.

    Read are JSON lines, a .json array, .parquet and `datasets` names (`pair_files.records`). A
    record has three texts under "prompt", "chosen" and "rejected"; or the keys of the CAA and
    persona A/B sets, where a space is put between a question and an answer that would touch; or
    lists of chat messages (`{"role", "content"}`), which the tokenizer's chat template writes.

    Raises:
        PairsError: as `read_pairs`; chat messages and no tokenizer with a chat template.
    """
    for where, value in records(source, split=split):
        yield where, _pair(value, where, tokenizer)


def write_pairs(path: str | Path, pairs: Iterable[Pair]) -> None:
    """Write pairs as JSONL that `read_pairs` reads, aside and renamed."""
    with written_aside(Path(path)) as aside, aside.open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(vars(pair), ensure_ascii=False)}\n" for pair in pairs)


def as_chat(pairs: Iterable[Pair], tokenizer: "PreTrainedTokenizerBase") -> tuple[Pair, ...]:
    """Plain pairs in the tokenizer's chat format: the prompt as the user's turn, then the answers.

    Raises:
        PairsError: the tokenizer has no chat template, or one that can't be split at the answer.
    """
    written = []
    for i, pair in enumerate(pairs, 1):
        prompt = [{"role": "user", "content": pair.prompt}]
        chosen, rejected = (
            [{"role": "assistant", "content": text}] for text in (pair.chosen, pair.rejected)
        )
        written.append(Pair(*answers_in_chat(prompt, chosen, rejected, tokenizer, f"pair {i}")))
    return tuple(written)


def warn_if_few(n: int) -> None:
    """Warn of fewer than 32 pairs.

    What one pair's difference holds besides the behaviour (its topic, its words) shrinks as
    1/√n: at few pairs the direction is mostly that, and steers some prompts the wrong way.
    """
    if n < FEWEST:
        # One line of ours, so that Python shows it once however often it is raised.
        warnings.warn(
            f"{n} contrast pair{'s' * (n != 1)}: under {FEWEST} a mean difference is mostly "
            "what these pairs happen to say and steers a part of the prompts the wrong way; "
            f"{ENOUGH} are a good number",
            UserWarning,
            stacklevel=1,
        )


def problems(pair: Pair) -> Iterator[str]:
    """What makes a pair unusable, in words; nothing where it is fine."""
    if not pair.chosen.strip() or not pair.rejected.strip():
        side = "chosen" if not pair.chosen.strip() else "rejected"
        yield f"{side!r} is empty; both answers need text"
    if pair.chosen == pair.rejected:
        yield "'chosen' and 'rejected' are the same; the two answers must differ"


def _pair(value: Any, where: str, tokenizer: "PreTrainedTokenizerBase | None") -> Pair:
    if not isinstance(value, dict):
        raise PairsError(f"{where}: a JSON {type(value).__name__}; expected {FORMAT}")
    if isinstance(value.get("chosen"), list):
        return _chat_pair(value, where, tokenizer)
    is_ab = set(_AB_KEYS) <= set(value)
    keys: Sequence[str] = _AB_KEYS if is_ab else KEYS
    texts = []
    for key in keys:
        if key not in value:
            hint = did_you_mean(key, (k for k in value if k not in KEYS))
            raise PairsError(f"{where}: {key!r} is missing{hint}; expected {FORMAT}")
        if not isinstance(value[key], str):
            raise PairsError(
                f"{where}: {key!r} is a {type(value[key]).__name__}, expected a string"
            )
        texts.append(value[key])
    if is_ab and texts[0][-1:].strip() and all(text[:1].strip() for text in texts[1:]):
        texts[1:] = [f" {text}" for text in texts[1:]]
    return Pair(*texts)


def _chat_pair(
    value: Mapping[str, Any], where: str, tokenizer: "PreTrainedTokenizerBase | None"
) -> Pair:
    """A pair of chats, as preference data sets hold them.

    "chosen" and "rejected" are whole conversations that begin alike, or, beside a "prompt" of
    messages, only what is said after it. A "prompt" that is a string is the user's turn.
    """
    prompt = value.get("prompt") or []
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    sides = [value["chosen"], value.get("rejected")]
    for key, messages in zip(KEYS, [prompt, *sides], strict=True):
        if not isinstance(messages, list) or not all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in messages
        ):
            raise PairsError(
                f"{where}: {key!r} is no list of chat messages, but 'chosen' is one; expected "
                '[{"role": "user", "content": "…"}, …] on both sides'
            )
    whole = [
        [(m["role"], m["content"]) for m in ([] if _begins(side, prompt) else prompt) + side]
        for side in sides
    ]
    shared = 0
    for one, other in zip(*whole, strict=False):
        if one != other:
            break
        shared += 1
    # Where one side goes on after the other has ended, or both are the same, the last turn differs.
    shared = min(shared, len(whole[0]) - 1, len(whole[1]) - 1)
    if shared < 1:
        raise PairsError(
            f"{where}: the two chats share no message, or a side has no answer; both begin with "
            "the same prompt and end with an assistant's turn"
        )
    messages = [[{"role": r, "content": c} for r, c in side] for side in whole]
    return Pair(
        *answers_in_chat(
            messages[0][:shared], messages[0][shared:], messages[1][shared:], tokenizer, where
        )
    )


def _begins(side: Sequence[Mapping[str, str]], prompt: Sequence[Mapping[str, str]]) -> bool:
    return bool(prompt) and list(side[: len(prompt)]) == list(prompt)
