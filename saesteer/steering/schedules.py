"""How the size of an edit changes over the tokens that `generate` writes.

A schedule is a factor on the change that an edit makes: with factor f, h' = h + f · (edited − h),
so 1 is the edit as it is and 0 none. Tokens of the prompt have the factor of the first generated.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saesteer.core.tokens import Tokens
from saesteer.errors import SteeringError


@dataclass(frozen=True)
class Linear:
    """From `begin` to `end` over so many generated tokens, and `end` from there on."""

    begin: float = 1.0
    end: float = 0.0
    over: int = 20

    def __post_init__(self) -> None:
        if not (math.isfinite(self.begin) and math.isfinite(self.end)) or self.over < 1:
            raise SteeringError(f"{self!r}: expected finite factors, and over 1 token or more")

    def factor(self, tokens: Tokens) -> Tensor:
        """[seq], float32."""
        part = (tokens.generated_columns.float() / self.over).clamp(max=1)
        return self.begin + (self.end - self.begin) * part


@dataclass(frozen=True)
class Decay:
    """1 at first, and half of that after every so many generated tokens."""

    half_life: float = 20.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.half_life) and self.half_life > 0):
            raise SteeringError(f"{self!r}: expected a half-life above 0 tokens")

    def factor(self, tokens: Tokens) -> Tensor:
        """[seq], float32."""
        return torch.exp2(-tokens.generated_columns.float() / self.half_life)


Schedule = Linear | Decay
