"""The protocol of a comparison for one behaviour: choose on validation, then test once.

`choose_all` makes and keeps the choices of all arms, and looks at no test item; `test_all` is for
afterwards. Of several behaviours all choose before any is tested. METHODS, section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from saesteer.compare import contenders, summaries
from saesteer.compare.contenders import Contender
from saesteer.compare.problem import DELTAS
from saesteer.compare.tested import Key, Tested
from saesteer.compare.trial import Made, Trial, is_missing
from saesteer.compare.tuned import Tuned, tune
from saesteer.core.progress import progress
from saesteer.errors import PairsError, SaesteerError

SLOPE_STRENGTHS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
"""Of Tan et al. 2024, arXiv 2407.12404: once as they are, once in units of α_max."""
OTHER_DRAWS = 3
"""Draws on what is out of distribution, and of slopes on the curve."""


@dataclass(frozen=True)
class Choices:
    """What every arm chose.

    Attributes:
        tuned: by (arm, n, noise).
        not_run: {"what", "why"} of arms, and of parts of arms, that can't be tested.
    """

    tuned: dict[Key, Tuned]
    not_run: list[dict[str, str]]


@dataclass(frozen=True)
class Compared:
    """What came of a behaviour.

    Attributes:
        report: its part of report.json.
        rows: a row for each prompt, arm, draw and δ, for a table.
        not_run: {"what", "why"} of arms, and of parts of arms, that were not run.
        tuned: what every arm chose, by (arm, n, noise), to make the arms ready again by.
    """

    report: dict[str, Any]
    rows: list[dict[str, Any]]
    not_run: list[dict[str, str]]
    tuned: dict[Key, Tuned]


def choose_all(trial: Trial) -> Choices:
    """Tune every arm that applies on a behaviour, as the problem says, on validation items alone.

    An arm that can't take part, or fails, is told with the reason and doesn't end the comparison.

    Raises:
        SteeringError: an arm of the problem that there is not.
        PairsError: fewer pairs to fit on than the headline takes.
        TextError, RunError: see `evaluate.Bench` and `store.Store`.
    """
    not_run: list[dict[str, str]] = []
    name = trial.behaviour.name
    taking_part: list[Contender] = []
    for arm in contenders.names(trial.problem):
        found = contenders.contender(
            arm, trial.problem, trial.behaviour, trial.bench.model, trial.sae, trial.index
        )
        if isinstance(found, str):
            not_run.append({"what": f"{name}: {arm}", "why": found})
        else:
            taking_part.append(found)
    trial.base("validation")
    tuned: dict[Key, Tuned] = {}
    for contender in taking_part:
        for made in _makings(trial, contender, not_run):
            title = _titled(made)
            try:
                with progress(f"tune {title}", trial.budget, unit="eval") as bar:
                    tuned[contender.arm, made.n, made.noise] = tune(trial, made, bar.update)
            except SaesteerError as error:
                not_run.append({"what": f"{name}: {title}", "why": str(error)})
            else:
                one = tuned[contender.arm, made.n, made.noise]
                if one.dropped:
                    why = f"{len(one.dropped)} of its settings can't be made: {one.dropped[0]}"
                    not_run.append({"what": f"{name}: settings of {title}", "why": why})
    return Choices(tuned, not_run)


def test_all(trial: Trial, choices: Choices) -> Compared:
    """Evaluate what every arm chose on the test items.

    An arm that was chosen with a package that is missing now is told with the reason, like those
    that couldn't be tuned.

    Raises:
        TextError, RunError: see `evaluate.Bench` and `store.Store`.
    """
    tested: dict[Key, Tested] = {}
    not_run = list(choices.not_run)
    for key, one in choices.tuned.items():
        try:
            tested[key] = test(trial, one)
        except SaesteerError as error:
            if not is_missing(error):
                raise
            what = f"{trial.behaviour.name}: {_titled(one.made)}"
            not_run.append({"what": what, "why": str(error)})
    report, rows = summaries.summarised(trial, tested)
    return Compared(report, rows, not_run, {key: one.tuned for key, one in tested.items()})


def test(trial: Trial, tuned: Tuned) -> Tested:
    """Evaluate an arm's choices on the test items, draw by draw, and its slopes.

    Choices of several δ that coincide are evaluated once. Off the headline, only what is chosen at
    the problem's δ is evaluated.
    """
    made, delta = tuned.made, trial.problem.delta_ce
    headline = _is_headline(trial, made)
    contender = made.contender
    deltas = DELTAS if headline else (delta,)
    chosen = {d: tuned.choices[d] for d in deltas}
    at = {(c.setting, c.strength) for c in chosen.values() if c is not None}
    slope_draws = 1 if headline else min(OTHER_DRAWS, contender.draws)
    slopes = contender.strengths and not made.noise and tuned.dose_setting(delta) is not None
    kinds = 2 if headline else 1
    ood_draws = min(OTHER_DRAWS, contender.draws) if headline and trial.items("ood") else 0
    total = contender.draws * len(at) + slopes * slope_draws * kinds * len(SLOPE_STRENGTHS)
    total += ood_draws + (slopes and ood_draws > 0) * len(SLOPE_STRENGTHS)
    with progress(f"test {_titled(made)}", total, unit="eval") as bar:
        values: dict[float, list[dict[str, Any] | None]] = {d: [] for d in deltas}
        for number in range(contender.draws):
            drawn = replace(made, draw=number)
            found = {
                (s, strength): trial.evaluate(drawn, tuned.settings[s], strength, "test")
                for s, strength in sorted(at)
            }
            bar.update(len(found))
            for d, choice in chosen.items():
                values[d].append(None if choice is None else found[choice.setting, choice.strength])
        ood: list[dict[str, Any] | None] = []
        for number in range(ood_draws):
            choice = chosen[delta]
            drawn = replace(made, draw=number)
            if choice is None:
                ood.append(None)
            else:
                setting = tuned.settings[choice.setting]
                ood.append(trial.evaluate(drawn, setting, choice.strength, "ood"))
            bar.update()
        by_alpha: list[dict[float, dict[str, Any]]] = []
        raw: dict[float, dict[str, Any]] = {}
        ood_slopes: dict[float, dict[str, Any]] = {}
        if slopes:
            for number in range(slope_draws):
                drawn = replace(made, draw=number)
                by_alpha.append(_sweep(trial, tuned, drawn, "test", bar, of_alpha=True))
            if headline:
                raw = _sweep(trial, tuned, made, "test", bar, of_alpha=False)
            if ood_draws:
                ood_slopes = _sweep(trial, tuned, made, "ood", bar, of_alpha=True)
    return Tested(tuned, values, ood, by_alpha, raw, ood_slopes)


def _sweep(
    trial: Trial, tuned: Tuned, made: Made, part: str, bar: Any, *, of_alpha: bool
) -> dict[float, dict[str, Any]]:
    """Evaluations at the seven strengths of the setting that the dose curve is of."""
    setting = tuned.dose_setting(trial.problem.delta_ce)
    assert setting is not None  # the caller has looked
    ceiling = tuned.ceilings[setting]
    unit = ceiling.strength if of_alpha and ceiling else 1.0
    found = {}
    for strength in SLOPE_STRENGTHS:
        found[strength] = trial.evaluate(
            made, tuned.settings[setting], strength * unit, part, text=False
        )
        bar.update()
    return found


def _makings(trial: Trial, contender: Contender, not_run: list[dict[str, str]]) -> Sequence[Made]:
    """Every n and label noise at which an arm is tuned, the headline first."""
    problem, arm = trial.problem, contender.arm
    if not contender.fits:
        return [Made(contender, 0)]
    if problem.headline_n > len(trial.split.fit):
        raise PairsError(
            f"{trial.behaviour.name}: the headline takes {problem.headline_n} pairs, and there are "
            f"{len(trial.split.fit)} to fit on; give more pairs, or lower [grid] headline_n"
        )
    found = [Made(contender, problem.headline_n)]
    if arm in contenders.CURVE:
        for n in problem.n:
            if n > len(trial.split.fit):
                why = f"there are {len(trial.split.fit)} pairs to fit on"
                not_run.append({"what": f"{trial.behaviour.name}: {arm} on {n} pairs", "why": why})
            elif n != problem.headline_n:
                found.append(Made(contender, n))
    if any(arm in pair for pair in problem.primary.pairs):
        found += [Made(contender, problem.headline_n, share) for share in problem.noise if share]
    return found


def _is_headline(trial: Trial, made: Made) -> bool:
    return not made.noise and made.n in (0, trial.problem.headline_n)


def _titled(made: Made) -> str:
    noise = f", {made.noise:.0%} noise" if made.noise else ""
    return f"{made.contender.arm} n={made.n}{noise}" if made.contender.fits else made.contender.arm
