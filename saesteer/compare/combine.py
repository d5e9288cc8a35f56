"""Two arms at once, and what they do to one another."""

from collections.abc import Callable
from dataclasses import dataclass

from saesteer.compare.prepared import Prepared
from saesteer.errors import SteeringError
from saesteer.steering.edits import Edit

Effect = Callable[[Prepared], float]
"""How strong the effect of an arm is, such as its mean margin less that without it."""


@dataclass(frozen=True)
class Interaction:
    """Effects of two arms alone and together, in the units of the effect.

    together: the first, then the second; reversed: the other way round.
    """

    first: float
    second: float
    together: float
    reversed: float

    @property
    def interaction(self) -> float:
        """E(A+B) − E(A) − E(B): above 0 they help one another, at 0 they add up."""
        return self.together - self.first - self.second

    @property
    def order(self) -> float:
        """E(A, then B) − E(B, then A): 0 where the order doesn't matter."""
        return self.together - self.reversed


def combined(*arms: Prepared) -> Prepared:
    """Arms at once: edits in their order, each prompt transform around those before it.

    A strength is that of all of them; `at` fixes an arm's. An arm that trained its model brings it
    along (finetuning and steering together); directions and features are then those of the model
    before training.

    Raises:
        SteeringError: no arm, or several that trained models of their own.
    """
    if not arms:
        raise SteeringError("no arms to combine; give at least one")
    trained = [arm for arm in arms if arm.notes.get("trained")]
    models = {id(arm.model) for arm in (trained or arms)}
    if len(models) > 1:
        names = " and ".join(arm.arm for arm in (trained or arms))
        raise SteeringError(
            f"{names} each bring a model of their own, "
            "and a text can run through one only: combine one with edits or prompts"
        )

    def transform(prompt: str) -> str:
        for arm in arms:
            prompt = arm.prompt_transform(prompt)
        return prompt

    def edits(strength: float) -> list[Edit]:
        return [edit for arm in arms for edit in arm.edits(strength)]

    return Prepared(
        " + ".join(arm.arm for arm in arms),
        (trained or arms)[0].model,
        transform,
        edits,
        {
            "arms": [dict(arm.notes) for arm in arms],
            "trained": bool(trained),
            "validation_looks": sum(arm.notes.get("validation_looks", 0) for arm in arms),
        },
    )


def at(prepared: Prepared, strength: float) -> Prepared:
    """An arm at a strength of its own, whatever strength it is asked for."""
    return Prepared(
        prepared.arm,
        prepared.model,
        prepared.prompt_transform,
        lambda _: list(prepared.edits(strength)),
        {**prepared.notes, "strength": strength},
    )


def interaction(effect: Effect, first: Prepared, second: Prepared) -> Interaction:
    """The effects of two arms alone, together, and together in the other order.

    Raises:
        SteeringError: they can't be combined.
    """
    return Interaction(
        effect(first),
        effect(second),
        effect(combined(first, second)),
        effect(combined(second, first)),
    )
