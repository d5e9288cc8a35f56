"""What an arm chooses on the validation items of a behaviour, with its share of the budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saesteer.compare import contenders, tuning
from saesteer.compare.ledger import parameters_up_to
from saesteer.compare.problem import DELTAS
from saesteer.compare.trial import Made, Trial, is_missing
from saesteer.compare.tuning import Ceiling, Tried
from saesteer.errors import SaesteerError


@dataclass(frozen=True)
class Tuned:
    """An arm on n pairs after its choice.

    Attributes:
        made: the draw that was chosen by, number 0.
        settings: what it came to, with features where they are chosen.
        ceilings: α_max of each setting; None for an arm without a strength.
        tried: all validation evaluations that gave numbers.
        choices: by δ; None is no edit.
        dropped: settings that couldn't be made, and why.
        evaluations: spent on validation items, looks that the arm took for itself included.
        tokens, flops, seconds: spent on making and tuning it.
    """

    made: Made
    settings: tuple[dict[str, Any], ...]
    ceilings: tuple[Ceiling | None, ...]
    tried: tuple[Tried, ...]
    choices: dict[float, Tried | None]
    dropped: tuple[str, ...]
    evaluations: int
    tokens: int
    flops: float
    seconds: float

    def dose_setting(self, delta: float) -> int | None:
        """The setting that dose curves and slopes are of: what is chosen at δ, or else at the
        nearest larger or smaller one, or else what gained most; None where nothing was measured."""
        at = sorted(DELTAS, key=lambda other: (other != delta, other < delta, abs(other - delta)))
        for other in at:
            if choice := self.choices[other]:
                return choice.setting
        best = max(self.tried, key=lambda one: one.gain, default=None)
        return None if best is None else best.setting

    def dose(self, setting: int) -> list[Tried]:
        """What was tried of a setting, by strength."""
        return sorted((t for t in self.tried if t.setting == setting), key=lambda t: t.strength)


def tune(trial: Trial, made: Made, step: Callable[[], object]) -> Tuned:
    """Try every setting of an arm at its share of the budget's strengths, and choose.

    Settings that can't be made leave their share to the others. α_max is found on clean text
    alone, and costs nothing of the budget.

    Args:
        step: called after each validation evaluation.

    Raises:
        SaesteerError: no setting can be made; the message is that of the first.
    """
    contender = made.contender
    wanted = contender.settings[: trial.budget]
    inner = contenders.inner_budget(contender, tuning.shares(trial.budget, len(wanted))[-1])
    facts, asked, dropped = [], [], []
    for setting in wanted:
        found = trial.facts(made, setting, inner)
        if "failed" not in found and contender.strengths:
            ceiling = _ceiling(trial, made, found["setting"], inner)
            found = {**found, **ceiling}
        if "failed" in found:
            dropped.append(str(found["failed"]))
        else:
            facts.append(found)
            asked.append(setting)
    if not facts:
        raise SaesteerError(dropped[0])
    base = trial.base_margins("validation")
    tried: list[Tried] = []
    evaluations, tokens, flops, seconds = 0, 0, 0.0, 0.0
    each = 2.0 * parameters_up_to(trial.bench.model)  # FLOPs of a token in a whole pass
    failed = ""
    for i, (found, share) in enumerate(
        zip(facts, tuning.shares(trial.budget, len(facts)), strict=True)
    ):
        looks = int(found["notes"].get("validation_looks", 0))
        evaluations += looks
        ceiling_tokens = int(found.get("ceiling_tokens", 0))
        tokens += int(found["tokens"]) + ceiling_tokens
        flops += float(found["flops"]) + each * ceiling_tokens
        seconds += float(found["seconds"])
        steps: Sequence[tuple[float | None, float]] = [(None, 1.0)]
        if contender.strengths:
            steps = tuning.ladder(found["ceiling"]["strength"], max(1, share - looks))
        for u, strength in steps:
            value = trial.evaluate(made, found["setting"], strength, "validation", budget=inner)
            evaluations += 1
            step()
            if "failed" in value:
                failed = failed or str(value["failed"])
                continue
            tokens += int(value["tokens"])
            flops += each * int(value["tokens"])
            seconds += float(value["seconds"])
            gain = float(np.mean(np.asarray(value["margins"]) - base))
            tried.append(Tried(i, strength, u, gain, float(value["cost"]["delta_ce"])))
    if not tried:
        raise SaesteerError(failed)
    choose = tuning.hardest if contender.kind == "control" else tuning.choose
    return Tuned(
        made,
        tuple(found["setting"] for found in facts),
        tuple(Ceiling(**found["ceiling"]) if "ceiling" in found else None for found in facts),
        tuple(tried),
        choose(tried, DELTAS),
        tuple(dropped),
        evaluations,
        tokens,
        flops,
        seconds,
    )


def _ceiling(trial: Trial, made: Made, setting: dict[str, Any], inner: int) -> dict[str, Any]:
    """{"ceiling": …, "ceiling_tokens": …}, or {"failed": why}."""

    def make() -> dict[str, Any]:
        try:
            prepared = trial.prepared(made, setting, inner)
            # Refused now with the reason, where every strength would only look broken.
            trial.bench.validation_text.cost(prepared, trial.bench.edits(prepared, 2.0**-10))
            found = tuning.alpha_max(lambda strength: trial.delta_ce(prepared, strength))
        except SaesteerError as error:
            if is_missing(error):
                raise
            return {"failed": str(error)}
        # What the search may take is charged to every arm alike: how soon it ends is luck, and K*
        # would be about that.
        tokens = (tuning.MOST + 1) * trial.bench.validation_text.n_tokens
        return {"ceiling": found.to_dict(), "ceiling_tokens": tokens}

    return trial.ceiling(made, setting, make)
