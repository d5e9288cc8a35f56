"""Where an edit applies: a choice among the tokens that the clock describes."""

from dataclasses import dataclass

from torch import Tensor

from saesteer.core.tokens import Tokens
from saesteer.errors import SteeringError


@dataclass(frozen=True)
class Positions:
    """Which tokens an edit touches; padding never is.

    prompt: tokens of the prompt. generated: tokens that `generate` wrote (the last one of a text
    never passes through the model). special: BOS, EOS and other special tokens among them, which
    carry unlike activations and are left alone by default.
    """

    prompt: bool = True
    generated: bool = True
    special: bool = False

    def __post_init__(self) -> None:
        if not (self.prompt or self.generated):
            raise SteeringError(
                "neither prompt nor generated tokens are chosen: switch at least one of them on"
            )

    def mask(self, tokens: Tokens) -> Tensor:
        """The chosen tokens of one forward pass: bool [batch, seq]."""
        chosen = ~tokens.is_padding
        if not self.special:
            chosen = chosen & ~tokens.is_special
        if not self.prompt:
            chosen = chosen & tokens.is_generated
        if not self.generated:
            chosen = chosen & ~tokens.is_generated
        return chosen

    def __str__(self) -> str:
        text = " and ".join(name for name in ("prompt", "generated") if getattr(self, name))
        return f"{text} tokens" + (", special ones too" if self.special else "")
