"""The tokens of one forward pass, as the clock tells them to an edit."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import LongTensor, Tensor


@dataclass(frozen=True, eq=False)
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
    mask: Tensor | None
    """The attention mask from the very first column on [batch, past + seq]; None: no padding."""
    special_ids: Tensor
    """Ids that count as special [n]."""

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
        if self.input_ids is None:
            return torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        return (self.input_ids[..., None] == self.special_ids).any(-1)

    @cached_property
    def is_generated(self) -> Tensor:
        """Bool [batch, seq]: columns that `generate` wrote, or those from `prompt_length` on."""
        if self.prompt_length is None:
            return torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        return (self.columns >= self.prompt_length).expand(self.shape)
