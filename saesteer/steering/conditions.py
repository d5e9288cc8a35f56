"""When an edit applies: a feature or a projection is read, token by token, and compared.

Readings are of the activation as it reaches the context at that place, before its edits there
(edits at earlier places have acted).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from saesteer.core.model import HookPoint
from saesteer.core.sae import Sae
from saesteer.core.tokens import Tokens
from saesteer.errors import FeatureError, SteeringError

Lasting = Literal["while", "from", "until"]


@dataclass(frozen=True, eq=False)
class Feature:
    """The activation of an SAE's feature. point: by default where the SAE was trained."""

    sae: Sae
    feature: int
    point: HookPoint | str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.feature < self.sae.d_sae:
            raise FeatureError(
                f"feature {self.feature} does not exist: this SAE has features 0 to "
                f"{self.sae.d_sae - 1}"
            )
        object.__setattr__(self, "point", _point(self.point or self.sae.hook_point))

    @property
    def width(self) -> int:
        return self.sae.d_in

    def __str__(self) -> str:
        return f"feature {self.sae.trained_number(self.feature)}"


@dataclass(frozen=True, eq=False)
class Projection:
    """x · vector + offset: a projection, or a linear probe's logit. vector: [d], as it is."""

    vector: Tensor
    point: HookPoint | str
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.vector.dim() != 1 or not bool(self.vector.isfinite().all()):
            raise SteeringError("a projection needs a vector [d_model] of finite numbers")
        object.__setattr__(self, "point", _point(self.point))

    @property
    def width(self) -> int:
        return len(self.vector)

    def __str__(self) -> str:
        return "projection"


@dataclass(frozen=True, eq=False)
class When:
    """Where what is read exceeds a number, row by row.

    Attributes:
        reads: a `Feature` or a `Projection`, at the edit's own place or an earlier one.
        above: the number.
        lasting: "while": on the tokens on which it holds; "from": from the first of them on;
            "until": on all tokens before the first of them. Padding and special tokens don't
            count as first.
    """

    reads: Feature | Projection
    above: float = 0.0
    lasting: Lasting = "while"

    def __post_init__(self) -> None:
        if not isinstance(self.reads, Feature | Projection):
            raise SteeringError(
                f"a condition reads a Feature or a Projection, not {type(self.reads).__name__}"
            )
        if self.lasting not in get_args(Lasting):
            raise SteeringError(
                f"lasting={self.lasting!r}: use one of {', '.join(get_args(Lasting))}"
            )

    @property
    def point(self) -> HookPoint:
        return _point(self.reads.point)

    def __str__(self) -> str:
        return f"{self.lasting} {self.reads} > {self.above:g} at {self.point}"


class Gate:
    """A condition at work: reads at its own place, answers at the edits' places."""

    def __init__(self, when: When, device: torch.device) -> None:
        self.when = when
        if isinstance(when.reads, Feature):
            sae = when.reads.sae
            self._features: Tensor | slice = torch.tensor([when.reads.feature], device=device)
            if sae.architecture != "topk":
                sae, self._features = sae.narrowed([when.reads.feature]), slice(None)
            self._sae: Sae | None = sae.to(device, torch.float32)
        else:
            self._sae = None
            self._vector = when.reads.vector.detach().to(device, torch.float32)
        self._pass = -1  # the forward pass that was read last
        self._open: Tensor | None = None
        self._prompt = -1
        self._first: Tensor | None = None  # column of the first firing, by row

    def read(self, x: Tensor, tokens: Tokens) -> None:
        """x [batch, seq, d] of this pass, at the condition's place, on whatever device that is."""
        reads = self.when.reads
        x = x.detach().float()
        if self._sae is not None:
            if self._sae.W_dec.device != x.device:
                self._sae = self._sae.to(x.device)
                if isinstance(self._features, Tensor):
                    self._features = self._features.to(x.device)
            holds = self._sae.activation(x, self._features)[..., 0] > self.when.above
        else:
            assert isinstance(reads, Projection)
            if self._vector.device != x.device:
                self._vector = self._vector.to(x.device)
            holds = x @ self._vector + reads.offset > self.when.above
        holds = holds.to(tokens.device)
        self._pass = tokens.forward_index
        self._open = holds if self.when.lasting == "while" else self._lasting(holds, tokens)

    def holds(self, tokens: Tokens) -> Tensor:
        """The tokens of this pass on which the edit applies: bool [batch, seq] on tokens.device.

        Raises:
            SteeringError: the pass hasn't come by the condition's place.
        """
        # By number: the same pass has tokens of its own on each device that a model is spread over.
        if self._pass != tokens.forward_index or self._open is None:
            raise SteeringError(
                f"the condition {self.when} was not read before the edit that asks for it: this "
                "model's parts run in another order"
            )
        return self._open.to(tokens.device)

    def _lasting(self, holds: Tensor, tokens: Tokens) -> Tensor:
        """Tokens from the first firing on, or before it."""
        if tokens.reordered:
            raise SteeringError(
                f"{self.when}: beam search with a cache moves rows about, so what fired before "
                "isn't known; generate with use_cache=False, num_beams=1, or lasting='while'"
            )
        never = torch.iinfo(torch.long).max
        if tokens.is_plain is not None:
            holds = holds & tokens.is_plain
        here = tokens.columns.where(holds, never).amin(1)
        if tokens.past_length > 0:
            if self._first is None or self._prompt != tokens.prompt_index:
                raise SteeringError(
                    f"{self.when}: the cache was filled elsewhere, or for other rows, so what "
                    "fired before isn't known; run the whole text within the context"
                )
            # What lies at or after this pass's beginning is read anew: an assistant's guesses
            # that were not taken.
            known = self._first.to(here.device)
            here = torch.minimum(here, known.where(known < tokens.past_length, never))
        self._prompt, self._first = tokens.prompt_index, here
        begun = tokens.columns >= here[:, None]
        return begun if self.when.lasting == "from" else ~begun


def _point(point: HookPoint | str | None) -> HookPoint:
    return point if isinstance(point, HookPoint) else HookPoint.parse(str(point))
