"""The two sides of a contrast pair as tokens, and which of them are read."""

from collections.abc import Collection
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from saesteer.directions.pairs import Pair
from saesteer.errors import PairsError, did_you_mean

READS = ("answer-mean", "answer-last", "answer-token", "prompt-last")
AFTER = "after:"


class Side(NamedTuple):
    """One side of a pair as token ids; the answer's begin at `start`."""

    ids: list[int]
    start: int


def check_read(read: str) -> None:
    """PairsError for a read position that there is not."""
    if read in READS or (read.startswith(AFTER) and read != AFTER):
        return
    raise PairsError(
        f"unknown read {read!r}{did_you_mean(read, READS)}; use one of {READS} or 'after:TEXT', "
        "the token after a text"
    )


def check_sides_read(read: str | None) -> None:
    """PairsError where a method that contrasts the sides is to read what they share."""
    if read == "prompt-last":
        raise PairsError(
            "read='prompt-last': the two sides of a pair share their prompt, so that its last "
            "token is the same on both. It is for methods without a contrast (pca-activations); "
            "read answer-mean, answer-last or answer-token, and put what tells prompts of two "
            "kinds apart into the answers"
        )


def text_of(prompt: str, answer: str) -> str:
    """A prompt and its answer as one text: a space is put between them where neither has one.

    `side_tokens` tokenises them apart, so that the answer begins with a token of its own whether
    or not it is written with a space; in one text "the road.At" would be other tokens.
    """
    apart = not prompt or prompt[-1].isspace() or answer[:1].isspace()
    return f"{prompt}{'' if apart else ' '}{answer}"


def side_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> Side:
    """Token ids of BOS (where the tokenizer has one), the prompt, and the answer.

    Prompt and answer are tokenised apart and joined, so that no token straddles the boundary and
    the prompt's tokens are the same on both sides of a pair. Write the space between them at the
    beginning of the answer; a tokenizer that puts a space before every text (SentencePiece) gets
    the answer without it, so that there is one and not two. A chat template that already begins
    with BOS doesn't get another.
    """
    ids = list(tokenizer.encode(prompt, add_special_tokens=False)) if prompt else []
    if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    answer = answer[_dropped(tokenizer, answer) :]
    return Side([*ids, *tokenizer.encode(answer, add_special_tokens=False)], len(ids))


def places(
    tokenizer: PreTrainedTokenizerBase,
    pair: Pair,
    both: tuple[Side, Side],
    read: str,
    special: Collection[int],
    where: str,
) -> tuple[list[int], list[int]]:
    """Which tokens of the chosen and of the rejected side are read: columns, in order.

    Raises:
        PairsError: there are none; `where` names the pair in it.
    """
    if read == "prompt-last":
        if not pair.prompt:
            raise PairsError(f"{where} has no prompt to read the last token of; read the answer")
        return [both[0].start - 1], [both[1].start - 1]
    if read.startswith(AFTER):
        text = read.removeprefix(AFTER)
        first, second = (
            _after(tokenizer, pair.prompt, answer, side, text, where)
            for answer, side in zip((pair.chosen, pair.rejected), both, strict=True)
        )
        return [first], [second]
    plain = []
    for answer, side in zip((pair.chosen, pair.rejected), both, strict=True):
        found = [j for j in range(side.start, len(side.ids)) if side.ids[j] not in special]
        if not found:
            raise PairsError(f"{where}: {answer!r} has no tokens to read; give it some text")
        plain.append(found)
    if read == "answer-mean":
        return plain[0], plain[1]
    if read == "answer-last":
        return plain[0][-1:], plain[1][-1:]
    # Of "(A)" and "(B)" the first token is the same on both sides, and says nothing.
    for i, j in zip(*plain, strict=False):
        if both[0].ids[i] != both[1].ids[j]:
            return [i], [j]
    raise PairsError(
        f"{where}: one answer begins with the whole other one, so there is no token at which they "
        "part; read answer-mean or answer-last"
    )


def _after(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, side: Side, text: str, where: str
) -> int:
    """The column of the token that holds the first character after the last `text`."""
    begin = (prompt + answer).rfind(text)
    if begin < 0:
        raise PairsError(f"{where} holds no {text!r} to read after; check the template")
    if not tokenizer.is_fast:
        raise PairsError(
            "reading after a text needs a tokenizer that knows where its tokens stand (a fast "
            "one); read answer-mean or answer-last"
        )
    end = begin + len(text)
    dropped = _dropped(tokenizer, answer)
    ends = [stop for _, stop in _spans(tokenizer, prompt)]
    ends += [stop + len(prompt) + dropped for _, stop in _spans(tokenizer, answer[dropped:])]
    bos = len(side.ids) - len(ends)
    for column, stop in enumerate(ends, bos):
        if stop > end:
            return column
    raise PairsError(f"{where}: nothing follows {text!r}; choose a text with a token after it")


def _spans(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """Where each token of `text` begins and ends in it, in characters."""
    if not text:
        return []
    told = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(told["offset_mapping"])


def _dropped(tokenizer: PreTrainedTokenizerBase, answer: str) -> int:
    """Characters left out at the beginning of an answer, see `side_tokens`: 0 or 1."""
    if not answer.startswith(" "):
        return 0
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))
    return int(bool(tokens) and str(tokens[0]).startswith("▁"))
