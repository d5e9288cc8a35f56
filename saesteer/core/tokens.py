"""The tokens of one forward pass, as the clock tells them to an edit."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
from typing import cast

import torch
from torch import LongTensor, Tensor

from saesteer.errors import SteeringError

# So many ids are looked through in Python, which takes less time than one tensor operation.
_FEW = 256


@lru_cache(maxsize=64)
def _tensor(ids: frozenset[int], device: torch.device) -> Tensor:
    return torch.tensor(sorted(ids), dtype=torch.long, device=device)


@dataclass(
    eq=False
)  # not frozen: one is made for every token, and that would take five times as long
class Tokens:
    """What the clock knows of the tokens in one forward pass of `batch` rows and `seq` columns.

    "Absolute" counts from the start of the sequence, also where a KV cache holds its beginning.
    What an edit doesn't ask for is not worked out.
    """

    shape: torch.Size
    """batch, seq"""
    device: torch.device
    input_ids: LongTensor | None
    """[batch, seq], or None where the model was called with embeddings."""
    past_length: int
    """Columns in the KV cache before this pass."""
    prompt_length: int | None
    """Columns from this one on are generated; None where none are."""
    forward_index: int
    """Passes since the context was entered, from 0."""
    prompt_index: int
    """Prompts (batches of them) since the context was entered, from 0."""
    first_new: int
    """Columns of this pass before this one were seen before: without a cache, `generate` sends
    the whole sequence again at every step."""
    kept: int
    """Columns of this pass from this one on were guesses (an assistant's, or looked up in the
    prompt) that were not taken; known when the next pass begins, until then seq."""
    mask: Tensor | None
    """The attention mask from the very first column on [batch, past + seq]; None: no padding."""
    special_ids: frozenset[int]
    """Ids that count as special."""
    generating: bool
    """Whether the pass is one of `generate`'s."""
    rows: int
    """Rows that the caller gave; beams and return sequences make several of each."""
    reordered: bool
    """Whether rows may stand elsewhere than in the pass before: beam search with a cache."""
    ids_so_far: list[Tensor] | None
    """The ids of all columns up to this pass's last, or further, in pieces; None where they aren't
    known."""

    def on(self, device: torch.device) -> "Tokens":
        """The same for activations on another device, as in a model that is spread over several."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            ids = None if self.input_ids is None else self.input_ids.to(device)
            self._elsewhere[device] = replace(
                self, device=device, input_ids=cast(LongTensor | None, ids)
            )
        return self._elsewhere[device]

    def keep(self, kept: int) -> None:
        """Say how many of this pass's columns were kept, on all devices."""
        for each in (self, *self._elsewhere.values()):
            each.kept = kept

    @cached_property
    def _elsewhere(self) -> dict[torch.device, "Tokens"]:
        return {}

    @cached_property
    def source_rows(self) -> Tensor:
        """The caller's row that each row of this pass continues: int64 [batch]."""
        of_each = max(1, self.shape[0] // max(1, self.rows))
        return torch.arange(self.shape[0], device=self.device) // of_each

    @cached_property
    def history(self) -> Tensor:
        """Ids of the whole sequence so far: int64 [batch, past + seq].

        Raises:
            SteeringError: they can't be known: embeddings in place of ids, a cache that was filled
                outside of the context, or beams, which change places.
        """
        if self.ids_so_far is None or self.reordered:
            why = (
                "beam search moves rows about; generate with use_cache=False"
                if self.reordered
                else "the model was called with inputs_embeds, or with a cache filled elsewhere"
            )
            raise SteeringError(f"the text before this pass isn't known: {why}")
        return torch.cat(self.ids_so_far, 1)[:, : self.past_length + self.shape[1]].to(self.device)

    @cached_property
    def generated_columns(self) -> Tensor:
        """How many columns after the first generated one each is, 0 in the prompt: int64 [seq]."""
        if self.prompt_length is None:
            return torch.zeros_like(self.columns)
        return (self.columns - self.prompt_length).clamp(min=0)

    @cached_property
    def columns(self) -> Tensor:
        """Absolute column in the padded sequence: int64 [seq]."""
        return torch.arange(self.past_length, self.past_length + self.shape[1], device=self.device)

    @cached_property
    def positions(self) -> Tensor:
        """Absolute index among the row's tokens that are not padding: int64 [batch, seq]."""
        if self.mask is None:
            return self.columns.expand(self.shape)
        kept = (self.mask != 0).cumsum(-1)[:, self.past_length :]
        return (kept - 1).clamp(min=0).to(self.device)

    @cached_property
    def is_padding(self) -> Tensor:
        """Bool [batch, seq], from the attention mask; without one there is none."""
        if self.mask is None:
            return torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        return (self.mask[:, self.past_length :] == 0).to(self.device)

    @cached_property
    def is_special(self) -> Tensor:
        """Bool [batch, seq], by id; all False where the model was called with embeddings."""
        return self.special(self.input_ids)

    def special(self, ids: Tensor | None) -> Tensor:
        """Which of these ids [batch, any] are special, bool; none of embeddings."""
        if ids is None:
            return torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        return (ids[..., None] == _tensor(self.special_ids, ids.device)).any(-1)

    @property
    def unpadded(self) -> bool:
        """Whether it is known at no cost that there is no padding in this pass."""
        # What `generate` wrote is never masked; rows that have ended get pad tokens, special ones.
        written = self.generating and self.past_length >= (self.prompt_length or 0)
        return self.mask is None or written

    @property  # the lock of a cached one would cost as much as this
    def is_plain(self) -> Tensor | None:
        """Bool [batch, seq]: neither padding nor special; None where every one is, as at most
        steps of `generate`, where finding that out must cost next to nothing."""
        padded = not self.unpadded
        special = bool(self.special_ids) and self.input_ids is not None
        if special and self.device.type == "cpu" and self.shape.numel() <= _FEW:
            assert self.input_ids is not None
            special = not self.special_ids.isdisjoint(chain(*self.input_ids.tolist()))
        if not padded:
            return ~self.is_special if special else None
        return ~(self.is_padding | self.is_special) if special else ~self.is_padding

    @cached_property
    def is_generated(self) -> Tensor:
        """Bool [batch, seq]: columns that `generate` wrote, or those from `prompt_length` on."""
        if self.prompt_length is None:
            return torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        return (self.columns >= self.prompt_length).expand(self.shape)
