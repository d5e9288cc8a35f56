"""Where an edit applies: a choice among the tokens that the clock describes."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from saesteer.core.tokens import Tokens
from saesteer.errors import SteeringError

Span = tuple[int, int | None]


@dataclass(frozen=True)
class Positions:
    """Which tokens an edit touches; padding never is. What is given narrows the choice.

    Attributes:
        prompt: tokens of the prompt.
        generated: tokens that `generate` wrote (the last one of a text never passes through the
            model).
        special: BOS, EOS and other special tokens among them, which carry unlike activations and
            are left alone by default.
        first, last: of the prompt's tokens that are left, only the first or last so many (both
            given: the first and the last). Generated tokens are not narrowed by it.
        spans: only tokens from start up to (not including) end, counted from 0 among the row's
            tokens that are not padding, BOS and generated ones included; an end of None is open.
        after: only tokens after the first place where the text so far holds this string; `steer`
            then needs a tokenizer. Special tokens are in that text only where the string names one.
        every: only tokens whose number, counted like `spans`, it divides.
        optional: a row without such a token is no error, unless no optional edit of a context has
            one in any row.
    """

    prompt: bool = True
    generated: bool = True
    special: bool = False
    first: int | None = None
    last: int | None = None
    spans: tuple[Span, ...] | None = None
    after: str | None = None
    every: int = 1
    optional: bool = False

    def __post_init__(self) -> None:
        if not (self.prompt or self.generated):
            raise SteeringError(
                "neither prompt nor generated tokens are chosen: switch at least one of them on"
            )
        for name in ("first", "last", "every"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or value < 1):
                raise SteeringError(f"{name}={value!r} tokens: expected a whole number from 1 up")
        if (self.first or self.last) and not self.prompt:
            raise SteeringError(
                "first and last choose among the prompt's tokens, which are switched off"
            )
        if self.after == "":
            raise SteeringError("after='' holds everywhere: give the string to wait for")
        for start, end in self.spans or ():
            if start < 0 or (end is not None and end <= start):
                raise SteeringError(f"no token lies from {start} up to {end}: give start < end")

    def mask(
        self, tokens: Tokens, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Tensor | None:
        """The chosen tokens of one forward pass: bool [batch, seq]; None for all of them.

        Raises:
            SteeringError: `after` without a tokenizer, or the text so far can't be known; `last`
                of a prompt that comes in pieces.
        """
        chosen = self._eligible(tokens)
        if not self.prompt:
            chosen = _both(chosen, tokens.is_generated)
        if not self.generated and tokens.prompt_length is not None:
            chosen = _both(chosen, ~tokens.is_generated)
        if self.spans is not None:
            chosen = _both(chosen, self._within(tokens))
        if self.every > 1:
            chosen = _both(chosen, tokens.positions % self.every == 0)
        if self.after is not None:
            chosen = _both(chosen, tokens.columns > _columns_of(self.after, tokens, tokenizer))
        if self.first or self.last:
            chosen = _both(chosen, self._at_the_ends(tokens, chosen))
        return chosen

    def _eligible(self, tokens: Tokens) -> Tensor | None:
        if not self.special:
            return tokens.is_plain
        return None if tokens.mask is None else ~tokens.is_padding

    def _within(self, tokens: Tokens) -> Tensor:
        here = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
        for start, end in self.spans or ():
            inside = tokens.positions >= start
            here |= inside if end is None else inside & (tokens.positions < end)
        return here

    def _at_the_ends(self, tokens: Tokens, chosen: Tensor | None) -> Tensor:
        """Of the prompt, only the ends; generated tokens as they are."""
        width = tokens.past_length + tokens.shape[1]
        end = width if tokens.prompt_length is None else tokens.prompt_length
        if tokens.past_length >= end:
            return tokens.is_generated
        if tokens.past_length > 0 or width < end:
            raise SteeringError(
                "first and last need the whole prompt in one pass, and it comes in pieces: give "
                "spans instead"
            )
        inside = ~tokens.is_generated
        if chosen is not None:
            inside = inside & chosen
        count = inside.cumsum(1)
        here = torch.zeros_like(inside)
        if self.first:
            here |= inside & (count <= self.first)
        if self.last:
            here |= inside & (count > count[:, -1:] - self.last)
        return here | tokens.is_generated

    def __str__(self) -> str:
        text = " and ".join(name for name in ("prompt", "generated") if getattr(self, name))
        parts = [f"{text} tokens" + (", special ones too" if self.special else "")]
        ends = [f"{name} {n}" for name in ("first", "last") if (n := getattr(self, name))]
        if ends:
            parts.append(f"the prompt's {' and '.join(ends)}")
        if self.spans is not None:
            parts.append(" and ".join(f"{a} to {'…' if b is None else b}" for a, b in self.spans))
        if self.after is not None:
            parts.append(f"after {self.after!r}")
        if self.every > 1:
            parts.append(f"every {self.every}th")
        return ", ".join(parts)


def _both(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first & second


def _columns_of(text: str, tokens: Tokens, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """The column in which the text of each row first holds `text`, [batch, 1]; else a huge one."""
    if tokenizer is None:
        raise SteeringError(f"after={text!r} needs the tokenizer: steer(…, tokenizer=tokenizer)")
    history = tokens.history
    skip = not any(name in text for name in tokenizer.all_special_tokens)

    def written(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=skip))

    never = torch.iinfo(torch.long).max
    found = []
    for row in range(tokens.shape[0]):
        ids = history[row].tolist()
        low, high = 0, len(ids)
        if tokens.mask is not None:
            kept = (tokens.mask[row] != 0).tolist()
            low = kept.index(True) if True in kept else 0
        begin = low
        if text not in written(ids[begin:]):
            found.append(never)
            continue
        while low < high:  # the least n for which ids[begin:n] holds it
            middle = (low + high) // 2
            if text in written(ids[begin:middle]):
                high = middle
            else:
                low = middle + 1
        found.append(low - 1)
    return torch.tensor(found, device=tokens.device)[:, None]
