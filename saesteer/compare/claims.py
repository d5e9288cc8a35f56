"""What is claimed of a behaviour: arms held against one another, and n*."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from saesteer.compare import statistics
from saesteer.compare.contenders import CURVE
from saesteer.compare.ledger import n_star
from saesteer.compare.resampling import differences
from saesteer.compare.tested import Floats, Key, Tested
from saesteer.compare.trial import Trial

LEVEL = 0.05
"""Of every claim, after its correction."""
_RANDOM = "random"


def comparisons(trial: Trial, gains: Mapping[str, Floats]) -> list[dict[str, Any]]:
    """The declared family, and every arm held against no edit, each with its own correction."""
    of = {"none": np.zeros((1, len(trial.items("test")))), **gains}
    primary, seed = trial.problem.primary, trial.seed
    declared = [pair for pair in primary.pairs if set(pair) <= set(of)]
    others = [(arm, "none") for arm in gains if (arm, "none") not in declared]
    groups = [item.group for item in trial.items("test")]
    return [
        {**one, "primary": pairs is declared}
        for pairs, grouped in ((declared, groups), (others, None))
        for one in family(of, pairs, primary.margin, seed=seed, groups=grouped)
    ]


def family(
    of: Mapping[str, Floats],
    pairs: Sequence[tuple[str, str]],
    margin: float,
    *,
    seed: int,
    clusters: Sequence[int] | None = None,
    groups: Sequence[Hashable] | None = None,
) -> list[dict[str, Any]]:
    """Pairs of arms held against each other, with Holm's correction over them.

    The tests of equality are a family of their own, with the same correction.

    Args:
        of: gains of each arm, [draws, n]; all 0 where validation chose no edit, and two such arms
            are "no edit by either", which is no finding.
        clusters: the behaviour of each prompt, [n].
        groups: the group of each prompt, [n]: what is found over these stands beside the rest as
            "by_group", and changes no verdict.
    """
    sides = [_sides(of, a, b) for a, b in pairs]
    made = [statistics.paired(*both, clusters, seed=seed) for both in sides]
    tosts = [
        float(statistics.tost(differences(*both), margin, clusters, seed=seed)) for both in sides
    ]
    adjusted = statistics.holm([one.p for one in made]).tolist()
    adjusted_tosts = statistics.holm(tosts).tolist()
    found = []
    for (a, b), both, one, p_holm, tost, tost_holm in zip(
        pairs, sides, made, adjusted, tosts, adjusted_tosts, strict=True
    ):
        verdict = "as good as" if tost_holm < LEVEL else "undecided"
        if p_holm < LEVEL:
            verdict = "better" if one.difference.value > 0 else "worse"
        if not np.any(of[a]) and not np.any(of[b]):
            verdict = "no edit by either"
        found.append(
            {
                "a": a,
                "b": b,
                "difference": asdict(one.difference),
                "p": float(one.p),
                "p_holm": float(p_holm),
                "tost_p": tost,
                "tost_p_holm": tost_holm,
                "by_group": _by_group(both, groups, seed=seed),
                "verdict": verdict,
            }
        )
    return found


def _sides(of: Mapping[str, Floats], a: str, b: str) -> tuple[Floats, Floats]:
    """The gains to be paired, [draws, n] each.

    A draw of the random control is a seed, not pairs: it goes with no draw of another arm, and the
    mean of all of them, [1, n], is held against each of the other's.
    """
    first, second = of[a], of[b]
    if min(len(first), len(second)) > 1:
        if a == _RANDOM:
            first = first.mean(0, keepdims=True)
        if b == _RANDOM:
            second = second.mean(0, keepdims=True)
    return first, second


def _by_group(
    both: tuple[Floats, Floats], groups: Sequence[Hashable] | None, *, seed: int
) -> dict[str, Any] | None:
    """The difference with groups resampled; None where no group has two prompts, or all are one."""
    count = len(set(groups or ()))
    if groups is None or not 2 <= count < len(groups):
        return None
    found = statistics.paired(*both, groups, seed=seed)
    return {"groups": count, "difference": asdict(found.difference), "p": float(found.p)}


def n_star_of(
    trial: Trial, tested: Mapping[Key, Tested], headline: Mapping[str, Tested]
) -> dict[str, Any] | None:
    """The least n from which on the vector is no worse than the feature by more than the margin.

    The vector is the mean difference. The feature is the arm of features with the highest gain on
    validation, on the headline's pairs.
    """
    delta, margin = trial.problem.delta_ce, trial.problem.primary.margin
    base = trial.base_margins("test")
    features = {
        arm: choice.gain
        for arm, one in headline.items()
        if one.tuned.made.contender.kind == "features" and (choice := one.tuned.choices[delta])
    }
    curve = {n: one for (arm, n, noise), one in tested.items() if arm == CURVE[0] and not noise}
    if not features or not curve:
        return None
    feature = max(features, key=lambda arm: features[arm])
    against = headline[feature].gains(delta, base)
    apart = {n: differences(one.gains(delta, base), against) for n, one in curve.items()}
    least = n_star(apart, margin, seed=trial.seed)
    return {"vector": CURVE[0], "feature": feature, "n": least, "margin": margin}
