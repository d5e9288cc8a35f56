"""What an arm does beside what it was chosen for: other behaviours, and other edits.

Everything is on the test items, with draw 0 of the headline's pairs, at the setting and strength
that validation chose at the problem's δ; nothing is chosen here. It goes through the store of the
behaviour whose items are looked at.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from saesteer.compare import statistics
from saesteer.compare.combine import at, combined
from saesteer.compare.prepared import Prepared
from saesteer.compare.tested import Floats
from saesteer.compare.trial import Made, Trial
from saesteer.compare.tuned import Tuned
from saesteer.errors import SaesteerError, SteeringError

Tunes = Mapping[tuple[str, int, float], Tuned]
"""What the arms of one behaviour chose, by (arm, n, noise): `protocol.Compared.tuned`."""


@dataclass(frozen=True)
class Chosen:
    """An arm as it was chosen for the behaviour of a trial."""

    trial: Trial
    made: Made
    setting: Mapping[str, Any]
    strength: float

    @property
    def name(self) -> str:
        """As the report names it."""
        return f"{self.made.contender.arm} ({self.trial.behaviour.name})"

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from all others in a store."""
        behaviour = self.trial.behaviour.name
        setting = {"setting": dict(self.setting), "strength": self.strength}
        return {"for": behaviour, **self.made.key, **setting}

    def prepared(self) -> Prepared:
        """The arm made ready, at its strength whatever strength it is asked for.

        Raises:
            SaesteerError: it can't be made.
        """
        return at(self.trial.prepared(self.made, self.setting), self.strength)


def chosen(trial: Trial, tunes: Tunes, arm: str) -> Chosen | None:
    """What an arm chose at the problem's δ on the headline's pairs; None where no edit was."""
    headline = trial.problem.headline_n
    tuned = tunes.get((arm, headline, 0.0)) or tunes.get((arm, 0, 0.0))
    choice = tuned and tuned.choices[trial.problem.delta_ce]
    if not tuned or not choice:
        return None
    return Chosen(trial, tuned.made, tuned.settings[choice.setting], choice.strength)


def off_target(
    trials: Sequence[Trial],
    tunes: Sequence[Tunes],
    arms: Sequence[str] | None = None,
) -> dict[str, Any] | None:
    """Gains of every behaviour's test items under each arm as chosen for every behaviour.

    Args:
        trials, tunes: of each behaviour.
        arms: None: all that were tuned on the headline's pairs.

    Returns:
        The "matrix" of report.json: {"behaviours": names, "arms": {arm: rows}}, where row i,
        column j is the gain on behaviour j when steered for behaviour i, an `Estimate` as JSON, or
        None where no edit was chosen for i or it gives no numbers on j. None with one behaviour.
    """
    if len(trials) < 2:
        return None
    if arms is None:
        arms = list(
            dict.fromkeys(
                arm
                for trial, own in zip(trials, tunes, strict=True)
                for arm, n, noise in own
                if not noise and n in (0, trial.problem.headline_n)
            )
        )
    found: dict[str, list[list[dict[str, Any] | None]]] = {}
    for arm in arms:
        rows = []
        for trial, own in zip(trials, tunes, strict=True):
            one = chosen(trial, own, arm)
            rows.append([_cell(one, on) for on in trials])
        found[arm] = rows
    return {"behaviours": [trial.behaviour.name for trial in trials], "arms": found}


def interactions(
    trials: Sequence[Trial],
    tunes: Sequence[Tunes],
    pairs: Sequence[tuple[str, str]] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Two edits at once: pairs of arms for each behaviour, pairs of behaviours for each such arm.

    With E the mean gain over the test items, all of them where there are two behaviours, the
    interaction is E(A+B) − E(A) − E(B), and the order E(A, then B) − E(B, then A).

    Args:
        pairs: of arms; None: the problem's primary family.

    Returns:
        The "interactions" of report.json, [{"a", "b", "first", "second", "together",
        "interaction", "order"}] with `Estimate`s as JSON; and what was not run, [{"what", "why"}].
    """
    both: list[tuple[Chosen | None, Chosen | None, str]] = []
    arms: dict[str, None] = {}
    for trial, own in zip(trials, tunes, strict=True):
        for a, b in trial.problem.primary.pairs if pairs is None else pairs:
            arms |= {a: None, b: None}
            what = f"{trial.behaviour.name}: {a} and {b} together"
            both.append((chosen(trial, own, a), chosen(trial, own, b), what))
    for arm in arms:
        of = [(t.behaviour.name, chosen(t, own, arm)) for t, own in zip(trials, tunes, strict=True)]
        for (i, first), (j, second) in itertools.combinations(of, 2):
            both.append((first, second, f"{arm} for {i} and {j} together"))
    found, not_run = [], []
    for first_one, second_one, what in both:
        if first_one is None or second_one is None:
            not_run.append({"what": what, "why": "no edit was chosen for one of them"})
            continue
        try:
            found.append(_interaction(first_one, second_one))
        except SaesteerError as error:
            not_run.append({"what": what, "why": str(error)})
    return found, not_run


def _interaction(a: Chosen, b: Chosen) -> dict[str, Any]:
    """Of every test item of the behaviours that the two were chosen for.

    SaesteerError where the two can't be combined, or the model breaks under them.
    """
    on = [a.trial] if a.trial is b.trial else [a.trial, b.trial]
    first, second, together, reversed_ = (
        np.concatenate([_gained(some, trial) for trial in on])
        for some in ([a], [b], [a, b], [b, a])
    )
    figures = {
        "first": first,
        "second": second,
        "together": together,
        "interaction": together - first - second,
        "order": together - reversed_,
    }
    told = {name: _estimate(values, a.trial.seed) for name, values in figures.items()}
    return {"a": a.name, "b": b.name, **told}


def _gained(some: Sequence[Chosen], on: Trial) -> Floats:
    """Margins of a behaviour's test items under arms at once, less those without any: [n].

    SaesteerError: they can't be made or combined, or give no numbers.
    """
    if len(some) == 1 and some[0].trial is on:  # the comparison has it already
        one = some[0]
        found = on.evaluate(one.made, one.setting, one.strength, "test")
    else:
        key = {
            "kind": "together",
            "behaviour": on.behaviour.name,
            "split": "test",
            "arms": [one.key for one in some],
        }
        found = on.store.once(key, lambda: _evaluation(some, on))
    if "failed" in found:
        raise SteeringError(str(found["failed"]))
    return np.asarray(found["margins"]) - on.base_margins("test")


def _evaluation(some: Sequence[Chosen], on: Trial) -> dict[str, Any]:
    try:
        together = combined(*(one.prepared() for one in some))
        return on.bench.evaluate(together, 1.0, on.items("test")).to_dict()
    except SaesteerError as error:
        return {"failed": str(error)}


def _cell(one: Chosen | None, on: Trial) -> dict[str, Any] | None:
    if one is None:
        return None
    try:
        return _estimate(_gained([one], on), on.seed)
    except SteeringError:
        return None


def _estimate(values: Floats, seed: int) -> dict[str, Any]:
    return asdict(statistics.bootstrap(values, seed=seed))
