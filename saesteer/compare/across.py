"""What is told of several behaviours together: claims across them, and what one does to another."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saesteer.compare import matrix, statistics
from saesteer.compare.claims import LEVEL
from saesteer.compare.protocol import Compared
from saesteer.compare.trial import Trial


def crossed(
    trials: Sequence[Trial], compared: Sequence[Compared]
) -> tuple[dict[str, Any] | None, list[dict[str, Any]], list[dict[str, str]]]:
    """The "matrix" and the "interactions" of report.json, and what of them was not run.

    The arms are those of the primary family.
    """
    tunes = [one.tuned for one in compared]
    took_part = {arm for tuned in tunes for arm, _, _ in tuned}
    pairs = [pair for pair in trials[0].problem.primary.pairs if took_part.issuperset(pair)]
    ran = list(dict.fromkeys(arm for pair in pairs for arm in pair))
    found, not_run = matrix.interactions(trials, tunes, pairs)
    return matrix.off_target(trials, tunes, ran), found, not_run


def over_behaviours(trials: Sequence[Trial], compared: Sequence[Compared]) -> dict[str, Any] | None:
    """The "across" of report.json: the primary family over behaviours, then prompts within them.

    Below 16 behaviours the note says why nothing is claimed. None of one behaviour.
    """
    if len(trials) < 2:
        return None
    problem, seed = trials[0].problem, trials[0].seed
    note = statistics.claimable(len(trials)).note
    gains = [_gains(trial, one.rows) for trial, one in zip(trials, compared, strict=True)]
    made, pairs = [], []
    for a, b in problem.primary.pairs:
        if all(a in by_arm and b in by_arm for by_arm in gains):
            sides = [np.concatenate([by_arm[arm] for by_arm in gains]) for arm in (a, b)]
            groups = np.concatenate([np.full(len(g[a]), i) for i, g in enumerate(gains)])
            made.append(statistics.paired(sides[0], sides[1], clusters=groups, seed=seed))
            pairs.append((a, b, statistics.tost(
                sides[0] - sides[1], problem.primary.margin, clusters=groups, seed=seed
            )))  # fmt: skip
    adjusted = statistics.holm([one.p for one in made]).tolist() if made else []
    comparisons = []
    for (a, b, tost), one, p_holm in zip(pairs, made, adjusted, strict=True):
        verdict = "as good as" if tost < LEVEL else "undecided"
        if p_holm < LEVEL:
            verdict = "better" if one.difference.value > 0 else "worse"
        comparisons.append(
            {
                "a": a,
                "b": b,
                "difference": asdict(one.difference),
                "p": float(one.p),
                "p_holm": float(p_holm),
                "tost_p": float(tost),
                "verdict": verdict,
                "primary": True,
            }
        )
    return {
        "comparisons": comparisons,
        "n_behaviours": len(trials),
        "note": note,
        "per_behaviour": _per_behaviour(compared),
    }


def _gains(trial: Trial, rows: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """By arm, each test prompt's gain at the problem's δ on the headline's pairs, mean of draws."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        headline = row["n"] in (0, trial.problem.headline_n) and not row["noise"]
        if headline and row["delta"] == trial.problem.delta_ce:
            found.setdefault(row["arm"], {}).setdefault(row["item"], []).append(row["gain"])
    order = [item.id for item in trial.items("test")]
    return {
        arm: np.array([np.mean(by_item[item]) for item in order]) for arm, by_item in found.items()
    }


def _per_behaviour(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """Which behaviours show a difference of each declared pair: Benjamini–Hochberg over them."""
    by_pair: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for one in compared:
        for claim in one.report["comparisons"]:
            if claim["primary"]:
                of = by_pair.setdefault((claim["a"], claim["b"]), [])
                of.append((one.report["name"], claim["p"]))
    told = []
    for (a, b), each in by_pair.items():
        adjusted = statistics.benjamini_hochberg([p for _, p in each]).tolist()
        told += [
            {"a": a, "b": b, "behaviour": name, "p": p, "p_bh": float(p_bh)}
            for (name, p), p_bh in zip(each, adjusted, strict=True)
        ]
    return told
