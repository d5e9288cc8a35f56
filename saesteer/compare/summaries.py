"""From evaluations to figures: a behaviour's part of the report, and a row for each prompt."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saesteer.compare import metrics, statistics, tuning
from saesteer.compare.claims import comparisons, n_star_of
from saesteer.compare.contenders import CURVE
from saesteer.compare.problem import DELTAS
from saesteer.compare.splits import Item
from saesteer.compare.tested import Floats, Key, Tested, Value, margins_or
from saesteer.compare.trial import Trial
from saesteer.compare.tuned import Tuned

_WORST = 5
_HOW_NONE = "no edit: 0 by definition"


def summarised(
    trial: Trial, tested: Mapping[Key, Tested]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The behaviour's part of report.json, and the rows of per-prompt figures."""
    base, delta = trial.base_margins("test"), trial.problem.delta_ce
    headline = {
        one.arm: one
        for (_, n, noise), one in tested.items()
        if not noise and n in (0, trial.problem.headline_n)
    }
    split = trial.split
    parts = ("fit", "validation", "test", "ood")
    report = {
        "name": trial.behaviour.name,
        "describe": trial.behaviour.describe,
        "splits": {part: len(getattr(split, part)) for part in parts}
        | {"groups": {p: len({item.group for item in getattr(split, p)}) for p in parts}},
        "base": {
            "margin": _estimate(trial, base),
            "ce": trial.base("test")["cost"]["ce"],
        },
        "arms": [_none(base)]
        + [
            _entry(trial, one)
            for (arm, _, noise), one in tested.items()
            if noise or headline.get(arm) is one
        ],
        "n_curve": [
            _on_curve(trial, one)
            for (arm, _, noise), one in sorted(tested.items(), key=lambda pair: pair[0][:2])
            if arm in CURVE and not noise
        ],
        "n_star": n_star_of(trial, tested, headline),
        "reading": [],
        "comparisons": comparisons(
            trial, {arm: one.gains(delta, base) for arm, one in headline.items()}
        ),
    }
    rows = [row for one in tested.values() for row in _rows(trial, one)]
    return report, rows


def _none(base: Floats) -> dict[str, Any]:
    zero = asdict(statistics.Estimate(0.0, 0.0, 0.0, len(base), _HOW_NONE))
    by_delta: dict[str, Any] = {f"{d:g}": 0.0 for d in DELTAS}
    return _shape("none", "none", 0, 1, 0.0) | {
        "effect": dict.fromkeys(by_delta, zero),
        "delta_ce": dict(by_delta),
        "kl": dict(by_delta),
        "relative_size": dict(by_delta),
        "chosen": dict.fromkeys(by_delta),
        "ledger": {"labels": 0, "lm_tokens": 0, "flops": 0.0, "seconds": 0.0},
    }


def _shape(arm: str, kind: str, n: int, draws: int, noise: float) -> dict[str, Any]:
    """What every arm's entry has, with what other parts of a comparison fill in."""
    return {
        "arm": arm,
        "kind": kind,
        "n": n,
        "draws": draws,
        "noise": noise,
        "failed_draws": 0,
        "alpha_max": None,
        "alpha_max_reached": False,
        "slope": {"raw": None, "alpha_max": None},
        "slopes": [],
        "dose": [],
        "alpha_break": None,
        "generation": None,
        "ood": None,
        "relative_ood": None,
        "choices": None,
        "published": {},
        "worst": [],
        "validation_evaluations": 0,
    }


def _entry(trial: Trial, one: Tested) -> dict[str, Any]:
    tuned, base, delta = one.tuned, trial.base_margins("test"), trial.problem.delta_ce
    made = tuned.made
    contender = made.contender
    at = one.values[delta]
    gains = {d: one.gains(d, base) for d in one.values}
    setting = tuned.dose_setting(delta)
    ceiling = None if setting is None else tuned.ceilings[setting]
    slopes = [_slopes(sweep) for sweep in [*one.by_alpha[:1], one.raw] if sweep]
    by_alpha = slopes[0] if slopes else None
    raw = slopes[1] if len(slopes) > 1 else None
    ood_slopes = _slopes(one.ood_slopes) if one.ood_slopes else None
    return _shape(contender.arm, contender.kind, made.n, len(at), made.noise) | {
        "failed_draws": sum("failed" in value for value in at if value),
        "chosen": tuning.to_json(tuned.choices, tuned.settings),
        "alpha_max": ceiling and ceiling.strength,
        "alpha_max_reached": bool(ceiling and ceiling.reached),
        "effect": {f"{d:g}": _estimate(trial, found) for d, found in gains.items()},
        **{
            name: {f"{d:g}": _mean_cost(values, name) for d, values in one.values.items()}
            for name in ("delta_ce", "kl", "relative_size")
        },
        "slope": {"raw": _summary(raw), "alpha_max": _summary(by_alpha)},
        "slopes": [] if by_alpha is None else by_alpha.tolist(),
        "dose": [] if setting is None else list(_dose(trial, tuned, setting)),
        "alpha_break": ceiling and ceiling.above,
        "ood": _ood(trial, one),
        "relative_ood": _relative_ood(by_alpha, ood_slopes),
        "worst": list(_worst(trial.items("test"), gains[delta].mean(0))),
        "validation_evaluations": tuned.evaluations,
        "ledger": {
            "labels": (made.n if contender.fits else 0) + len(trial.items("validation")),
            "lm_tokens": tuned.tokens,
            "flops": tuned.flops,
            "seconds": tuned.seconds,
        },
    }


def _on_curve(trial: Trial, one: Tested) -> dict[str, Any]:
    delta = trial.problem.delta_ce
    found = [s for sweep in one.by_alpha if (s := _slopes(sweep)) is not None]
    return {
        "arm": one.arm,
        "n": one.tuned.made.n,
        "draws": len(one.values[delta]),
        "effect": _estimate(trial, one.gains(delta, trial.base_margins("test"))),
        "delta_ce": _mean_cost(one.values[delta], "delta_ce"),
        "anti_steerable": _share(np.stack(found) < 0) if found else None,
    }


def _rows(trial: Trial, one: Tested) -> Iterator[dict[str, Any]]:
    base, items = trial.base_margins("test"), trial.items("test")
    made = one.tuned.made
    for delta, values in one.values.items():
        choice = one.tuned.choices[delta]
        for number, value in enumerate(values):
            margins = margins_or(value, base)
            for item, margin, before in zip(items, margins.tolist(), base.tolist(), strict=True):
                yield {
                    "behaviour": trial.behaviour.name,
                    "arm": one.arm,
                    "n": made.n,
                    "noise": made.noise,
                    "draw": number,
                    "split": "test",
                    "item": item.id,
                    "group": item.group,
                    "delta": delta,
                    "strength": choice.strength if choice else None,
                    "margin": margin,
                    "base_margin": before,
                    "gain": margin - before,
                }


def _dose(trial: Trial, tuned: Tuned, setting: int) -> Iterator[dict[str, Any]]:
    base = trial.base_margins("validation")
    for one in tuned.dose(setting):
        value = trial.evaluate(tuned.made, tuned.settings[setting], one.strength, "validation")
        cost = value["cost"]
        yield {
            "u": one.u,
            "strength": one.strength,
            "gain": _estimate(trial, np.asarray(value["margins"]) - base),
            **{name: cost[name] for name in ("delta_ce", "kl", "entropy", "relative_size")},
        }


def _worst(items: Sequence[Item], gains: Floats) -> Iterator[dict[str, Any]]:
    for i in np.argsort(gains, kind="stable")[:_WORST]:
        yield {**vars(items[i].pair), "gain": float(gains[i]), "before": None, "after": None}


def _ood(trial: Trial, one: Tested) -> dict[str, Any] | None:
    if not one.ood:
        return None
    base = trial.base_margins("ood")
    return _estimate(trial, np.stack([margins_or(value, base) - base for value in one.ood]))


def _mean_cost(values: Sequence[Value | None], name: str) -> float | None:
    """The mean over the draws that gave numbers; None where none did.

    No edit costs nothing. What a failed draw would have cost is not known: 0 would flatter the arm.
    """
    costs = [
        0.0 if value is None else float(value["cost"][name])
        for value in values
        if value is None or "failed" not in value
    ]
    return float(np.mean(costs)) if costs else None


def _slopes(sweep: Mapping[float, Value]) -> Floats | None:
    """Each item's slope over the strengths, [n]; None where a strength gave no numbers."""
    if any("failed" in value for value in sweep.values()):
        return None
    margins = np.array([value["margins"] for value in sweep.values()])
    return np.asarray(metrics.slopes(list(sweep), margins))


def _relative_ood(inside: Floats | None, outside: Floats | None) -> float | None:
    if inside is None or outside is None:
        return None
    return metrics.relative_ood(float(inside.mean()), float(outside.mean()))


def _summary(slopes: Floats | None) -> dict[str, Any] | None:
    return None if slopes is None else asdict(metrics.slope_summary(slopes))


def _share(negative: NDArray[np.bool_]) -> dict[str, Any]:
    """The share over draws [draws, n], with Wilson's interval as of n prompts: draws of one prompt
    are no new prompts."""
    n = negative.shape[1]
    found = statistics.wilson(round(float(negative.mean()) * n), n)
    return {**asdict(found), "value": float(negative.mean())}


def _estimate(trial: Trial, values: Any) -> dict[str, Any]:
    return asdict(statistics.bootstrap(np.asarray(values, dtype=np.float64), seed=trial.seed))
