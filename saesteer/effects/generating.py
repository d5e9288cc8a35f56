"""What directions do to generation, side by side: what they cost, promote, and have a model write.

Each is shown at the strength at which it moves the next-token distribution by the same KL, so that
their texts compare; and, as long as each other, by the KL that they then cause, beside random
directions of that length: a direction that does no more than these does nothing of its own.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from saesteer.core.generate import Prompt, prompt_ids
from saesteer.core.model import HookPoint, d_model
from saesteer.core.progress import progress
from saesteer.directions.direction import Direction, Part, Use
from saesteer.effects import apply, output_score
from saesteer.effects.calibrate import check_budget, iso_kl, mean_norm
from saesteer.effects.continuations import Continuation, continuations
from saesteer.effects.damage import Reference, Text, distinct_n, repetition
from saesteer.effects.diagnose import lens_tokens
from saesteer.errors import ModelError, SteeringError
from saesteer.steering.edits import Add, Edit

PROMPTS = (*output_score.NEUTRAL, "Once upon a time", "In the morning", "The house was")
"""Neutral prompts, where none are given."""
KL_BUDGET = 0.5
"""Nats a token that a direction is shown at."""
SHARE = 0.5
"""Of the mean norm at its point: the length at which directions are compared."""
N_RANDOM = 20
"""Random directions of that length, at each point."""


@dataclass(frozen=True)
class Written:
    """Texts, one a prompt, with `damage.distinct_n` of 2 and `damage.repetition`."""

    texts: tuple[str, ...]
    distinct_2: float | None
    repetition: float | None


@dataclass(frozen=True)
class Chance:
    """The KL of `n` random directions as long as `length`: its mean and the highest, in nats."""

    length: float
    mean: float
    most: float
    n: int


@dataclass(frozen=True)
class Doing:
    """What one direction, or all parts of a method, does.

    Attributes:
        strength: times the method as it is.
        missed: whether no strength costs the KL asked for, so that it is shown at the length at
            which directions are compared.
        length: ‖strength · vector‖; None where it is more than one vector to add everywhere.
        kl, delta_ce: nats a token; ΔCE is None on text that the model wrote itself.
        kl_at_length: KL where the change is `SHARE` as long as the activations at its point, to the
            side of the strength's sign; None where `length` is.
        chance: the same of random directions.
        promotes: tokens with their logits, by the logit lens; None where it doesn't write into
            the stream.
    """

    name: str
    strength: float
    missed: bool
    length: float | None
    kl: float
    delta_ce: float | None
    kl_at_length: float | None
    chance: Chance | None
    promotes: tuple[tuple[str, float], ...] | None
    written: Written


@dataclass(frozen=True)
class Seen:
    """What directions do, those with the highest `kl_at_length` first.

    Attributes:
        failed: of each that couldn't be shown, why.
        plain: without any. n_tokens: predictions that the costs are means over.
        own_text: whether costs were measured on given text, not on what the model wrote.
    """

    rows: tuple[Doing, ...]
    failed: dict[str, str]
    plain: Written
    prompts: tuple[str, ...]
    n_tokens: int
    own_text: bool

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, lists and dictionaries, ready for JSON."""
        return asdict(self)


def seen(
    model: PreTrainedModel,
    tokenizer: Any,
    directions: Mapping[str, Sequence[Part]],
    *,
    prompts: Sequence[Prompt] = PROMPTS,
    texts: Sequence[Text] | None = None,
    strength: float | None = None,
    kl_budget: float = KL_BUDGET,
    max_new_tokens: int = 24,
    temperature: float = 1.0,
    seed: int = 0,
    top: int = 8,
) -> Seen:
    """Measure directions one after the other, each used as it is meant to be.

    Args:
        directions: by name, the parts that a method fitted together.
        prompts: what is continued, with and without, by the same noise.
        texts: on which KL and ΔCE are measured; None: on what the unsteered model writes.
        strength: of all; None: of what is added, the one that costs `kl_budget` (within 5%; where
            none does, that of one vector as long as those that are compared), and
            1 of what is projected, taken out, mapped or added to single tokens, which is a
            strength of its own.
        temperature: 0 is greedy. seed: of sampling, and of random directions.
        top: tokens listed of what a direction promotes.

    Raises:
        SteeringError: a strength or budget that is no such number. TextError: no prompts, one that
            leaves no room, or texts without a plain token.
    """
    check_budget(kl_budget)
    if strength is not None and not math.isfinite(strength):
        raise SteeringError(f"a strength of {strength}; give a finite number")
    rows, _ = prompt_ids(tokenizer, prompts, prepend_bos=True)

    def write(edits: Sequence[Edit]) -> list[Continuation]:
        return continuations(
            model,
            tokenizer,
            rows,
            [edits] * len(rows),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seeds=[seed + i for i in range(len(rows))],
        )

    plain = write([])
    costed: Sequence[Text] = texts or [[*one.prompt, *one.new] for one in plain]
    reference = Reference(model, tokenizer, costed)
    lengths = _Lengths(model, tokenizer, costed, reference, seed)

    def chosen(parts: Sequence[Part]) -> tuple[float, bool]:
        """The strength at which parts are shown, and whether it misses the KL asked for."""
        if strength is not None:
            return strength, False
        if not all(_has_no_strength_of_its_own(part.use) for part in parts):
            return 1.0, False
        edits_at = functools.partial(apply.edits, parts)
        try:
            at = iso_kl(model, tokenizer, edits_at, costed, kl_budget, grid=8, tolerance=0.05)
        except SteeringError:
            vector = _alone(parts)
            if vector is None:
                raise
            return lengths.at(vector.point) / float(vector.vector.norm()), True
        return at, False

    def doing(name: str, parts: Sequence[Part]) -> Doing:
        used, missed = chosen(parts)
        edits = apply.edits(parts, used)
        cost, vector = reference.cost(edits), _alone(parts)
        at_length, chance = (None, None) if vector is None else lengths.of(vector, used)
        return Doing(
            name,
            used,
            missed,
            None if vector is None else abs(used) * float(vector.vector.norm()),
            cost.kl,
            cost.delta_ce if texts else None,
            at_length,
            chance,
            _promoted(model, tokenizer, parts, used, top),
            _summed(write(edits)),
        )

    found, failed = [], {}
    with progress("directions", len(directions), unit="direction") as bar:
        for name, parts in directions.items():
            try:
                found.append(doing(name, parts))
            except SteeringError as error:  # the others can be shown all the same
                failed[name] = str(error)
            bar.update(1)
    found.sort(key=lambda one: -(-1.0 if one.kl_at_length is None else one.kl_at_length))
    told = tuple(tokenizer.decode(row, skip_special_tokens=True) for row in rows)
    return Seen(tuple(found), failed, _summed(plain), told, reference.n_tokens, bool(texts))


class _Lengths:
    """KL of directions that are all `SHARE` as long as the activations at their point."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        texts: Sequence[Text],
        reference: Reference,
        seed: int,
    ) -> None:
        self._given = (model, tokenizer, texts)
        self._reference, self._seed = reference, seed
        self._length: dict[HookPoint, float] = {}
        self._random: dict[HookPoint, Chance] = {}

    def of(self, direction: Direction, strength: float) -> tuple[float, Chance]:
        """KL of the direction, of the strength's sign, and of random ones at its point."""
        chance = self._chance(direction.point, len(direction.vector))
        signed = math.copysign(chance.length, strength)
        return self._kl(direction.vector.float().cpu(), direction.point, signed), chance

    def at(self, point: HookPoint) -> float:
        """The length at a point."""
        if point not in self._length:
            model, tokenizer, texts = self._given
            self._length[point] = SHARE * mean_norm(model, tokenizer, point, texts)
        return self._length[point]

    def _chance(self, point: HookPoint, width: int) -> Chance:
        if point not in self._random:
            rng = torch.Generator().manual_seed(self._seed)
            drawn = torch.randn(N_RANDOM, width, generator=rng)
            kls = [self._kl(each, point, self.at(point)) for each in drawn]
            self._random[point] = Chance(self.at(point), sum(kls) / len(kls), max(kls), len(kls))
        return self._random[point]

    def _kl(self, vector: torch.Tensor, point: HookPoint, length: float) -> float:
        return self._reference.cost([Add(vector, length / float(vector.norm()), point)]).kl


def _has_no_strength_of_its_own(use: Use) -> bool:
    # What is added to a token alone hardly moves a text's mean KL, however strong it is.
    return use.how in ("add", "icv") and use.position is None


def _alone(parts: Sequence[Part]) -> Direction | None:
    """The one direction that is added to every plain token; None of anything else, and of zero."""
    first = parts[0]
    if len(parts) > 1 or not isinstance(first, Direction) or first.use != Use():
        return None
    return first if bool(first.vector.any()) else None


def _promoted(
    model: PreTrainedModel, tokenizer: Any, parts: Sequence[Part], strength: float, top: int
) -> tuple[tuple[str, float], ...] | None:
    """What a direction of the stream promotes by the logit lens, as it is used."""
    first = parts[0]
    if len(parts) != 1 or not isinstance(first, Direction) or first.point.head is not None:
        return None
    if len(first.vector) != d_model(model) or not bool(first.vector.any()):
        return None
    try:
        tokens = lens_tokens(first.vector, model, tokenizer, top=top)
    except ModelError:  # of another width than the unembedding reads
        return None
    if strength < 0:
        return tuple((token, -logit) for token, logit in tokens.suppresses)
    return tokens.promotes


def _summed(texts: Sequence[Continuation]) -> Written:
    ids = [one.new for one in texts]
    return Written(tuple(one.text for one in texts), distinct_n(ids, 2), repetition(ids))
