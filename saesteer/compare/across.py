"""What is told of several behaviours together: claims across them, and what one does to another."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saesteer.compare import claims, matrix, statistics
from saesteer.compare.protocol import Compared
from saesteer.compare.tested import Floats
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

    Below 16 behaviours the note says why nothing is claimed. None of one behaviour. Benjamini and
    Hochberg's correction over behaviours is put into their own comparisons, as "p_bh".
    """
    if len(trials) < 2:
        return None
    primary, seed = trials[0].problem.primary, trials[0].seed
    gains = [_gains(trial, one.rows) for trial, one in zip(trials, compared, strict=True)]
    everywhere = set.intersection(*(set(by_arm) for by_arm in gains))
    of = {arm: np.concatenate([by_arm[arm] for by_arm in gains], axis=1) for arm in everywhere}
    clusters = [i for i, trial in enumerate(trials) for _ in trial.items("test")]
    pairs = [pair for pair in primary.pairs if everywhere.issuperset(pair)]
    found = claims.family(of, pairs, primary.margin, seed=seed, clusters=clusters)
    note = statistics.claimable(len(trials)).note
    for a, b in primary.pairs:
        if (a, b) not in pairs:
            note += f" {a} and {b} did not both run for every behaviour."
    _correct(compared)
    return {
        "comparisons": [{**one, "primary": True} for one in found],
        "n_behaviours": len(trials),
        "note": note,
    }


def _gains(trial: Trial, rows: Sequence[Mapping[str, Any]]) -> dict[str, Floats]:
    """By arm, the test items' gains at the problem's δ on the headline's pairs, [draws, n]."""
    found: dict[str, list[float]] = {}
    for row in rows:
        headline = row["n"] in (0, trial.problem.headline_n) and not row["noise"]
        if headline and row["delta"] == trial.problem.delta_ce:
            found.setdefault(row["arm"], []).append(row["gain"])
    # Rows come draw by draw, in the order of the items.
    n = len(trial.items("test"))
    by_arm = {arm: np.array(gains).reshape(-1, n) for arm, gains in found.items()}
    return {"none": np.zeros((1, n)), **by_arm}


def _correct(compared: Sequence[Compared]) -> None:
    """Put p by Benjamini–Hochberg over behaviours into their comparisons of the declared pairs."""
    by_pair: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in compared:
        for claim in one.report["comparisons"]:
            if claim["primary"]:
                by_pair.setdefault((claim["a"], claim["b"]), []).append(claim)
    for each in by_pair.values():
        adjusted = statistics.benjamini_hochberg([claim["p"] for claim in each]).tolist()
        for claim, p_bh in zip(each, adjusted, strict=True):
            claim["p_bh"] = p_bh
