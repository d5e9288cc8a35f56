"""A result of a comparison as report.json holds it: two behaviours, one without an SAE's arms."""

import math
from typing import Any

import numpy as np

from saesteer.compare.problem_file import parse, to_dict

DELTAS = (0.05, 0.1, 0.25, 0.5)
N = (1, 3, 8, 32, 128, 256)
HOW = "95%, bootstrap-t over prompts and draws, 10,000 resamples"
# arm → kind, and how strong it is
ARMS = {
    "none": ("none", 0.0),
    "mean-difference": ("vector", 1.3),
    "logistic-probe": ("vector", 0.31),
    "random": ("control", 0.02),
    "few-shot": ("prompt", 0.9),
    "sft-lora": ("trained", 1.7),
    "sae-clamp": ("features", 0.82),
    "sae-topk": ("features", 1.05),
    "sae-output-filtered": ("features", 0.6),
}


def estimate(value: float, half: float | None = 0.07, n: int = 200) -> dict[str, Any]:
    """An estimate with an interval of ± half, or none."""
    low, high = (None, None) if half is None else (value - half, value + half)
    return {"value": value, "low": low, "high": high, "n": n, "how": HOW}


def report(*names: str, **changed: Any) -> dict[str, Any]:
    """A whole result. names: of the behaviours; the last has no arm of an SAE where there are two.

    changed: fields of the result to be replaced.
    """
    names = names or ("happy-sad", "day-night")
    problem = parse(
        {
            "behaviour": [
                {"name": name, "describe": f"The story is about {name}.", "template": "x.toml"}
                for name in names
            ],
            "affordances": {},
            "deployment": {"format": "completion"},
            "cost": {"delta_ce": 0.1},
            "splits": {},
            "grid": {"noise": [0.1]},
            "scoring": {},
            "primary": {
                "family": ["sae-clamp vs mean-difference", "sae-topk vs mean-difference"],
                "margin": 0.1,
            },
        },
        "here",
    )
    rng = np.random.default_rng(0)
    behaviours = [
        _behaviour(name, rng, sae=i == 0 or i < len(names) - 1) for i, name in enumerate(names)
    ]
    matrix = [
        [estimate(1.3 if i == j else -0.11) for j in range(len(names))] for i in range(len(names))
    ]
    if len(names) > 1:
        matrix[1][0] = None  # type: ignore[call-overload]
    result = {
        "saesteer": "0.1.0", "made": "2026-11-22T01:30:00", "seed": 7, "budget": 56,
        "looks_at_test": 1, "seconds": 1234.5, "problem": to_dict(problem),
        "run": {
            "model": "stories3M", "sae": "runs/s3/sae", "hook_point": "layers.3.resid_post",
            "d_sae": 4096, "explained_variance": 0.914,
        },
        "deltas": list(DELTAS), "behaviours": behaviours,
        "across": {"comparisons": [], "n_behaviours": len(names), "note": ""},
        "matrix": {"behaviours": list(names), "arms": {"mean-difference": matrix}},
        "interactions": [
            {
                "a": "sae-clamp", "b": "mean-difference", "first": estimate(0.82),
                "second": estimate(1.3),
                "together": estimate(1.66), "interaction": estimate(-0.46),
                "order": estimate(0.013),
            }
        ],
        "ledger": {
            "k_curve": [
                {"K": k, "costs": {"sae-clamp": 3.1e13 / k + 2e9, "mean-difference": 4.4e10,
                                   "few-shot": None}}
                for k in (1, 10, 100, 1000, 10_000)
            ],
            "k_star": {"a": "sae-clamp", "b": "mean-difference", "K": 738.0},
            "shared": {"sae_training": 3.0e13, "indexing": 1.0e12, "note": "Counted from steps."},
        },
        "not_run": [
            {"what": "context-distillation", "why": "it trains weights, which are not afforded"},
            {"what": "judge", "why": "no address was given"},
        ],
        "world": None,
    }  # fmt: skip
    return {**result, **changed}


def _behaviour(name: str, rng: np.random.Generator, *, sae: bool) -> dict[str, Any]:
    names = [arm for arm, (kind, _) in ARMS.items() if sae or kind != "features"]
    arms = [_arm(arm, *ARMS[arm], rng) for arm in names]
    arms.append({**_arm("mean-difference", "vector", 1.1, rng), "noise": 0.1})
    curve = [
        {
            "arm": arm, "n": n, "draws": 10, "delta_ce": 0.08 + 0.001 * n ** 0.5,
            "effect": estimate(top * (1 - 0.8 / (1 + n) ** power), 0.4 / (1 + n) ** 0.4 + 0.05),
            "anti_steerable": estimate(0.2 / n, 0.1 / n),
        }
        for arm, top, power in (("mean-difference", 1.35, 0.5), ("sae-clamp", 0.84, 0.8))
        for n in N
        if sae or arm != "sae-clamp"
    ]  # fmt: skip
    wins = [
        comparison("sae-clamp", "mean-difference", -0.48, "worse"),
        comparison("sae-topk", "mean-difference", -0.06, "undecided", p=0.21),
        {**comparison("few-shot", "logistic-probe", 0.59, "better"), "primary": False},
    ]
    return {
        "name": name, "describe": f"The story is about {name}.",
        "splits": {"fit": 512, "validation": 64, "test": 200, "ood": 0,
                   "groups": {"fit": 20, "validation": 5, "test": 25, "ood": 0}},
        "base": {"margin": estimate(-0.21), "ce": 2.011},
        "arms": arms, "n_curve": curve,
        "n_star": {"vector": "mean-difference", "feature": "sae-clamp", "n": 8, "margin": 0.1}
        if sae else None,
        "reading": [
            {"arm": arm, "labels": labels, "auroc": estimate(value, 0.03)}
            for arm, value in (("mean-difference", 0.93), ("logistic-probe", 0.97))
            for labels in ("contains", "about to be said")
        ],
        "comparisons": wins if sae else wins[2:],
    }  # fmt: skip


def _arm(name: str, kind: str, top: float, rng: np.random.Generator) -> dict[str, Any]:
    """An arm; "sft-lora" is one on which little was measured."""
    steered, bare = kind not in ("none", "prompt", "trained"), name == "sft-lora"
    slopes = (top / 2 + 0.35 * rng.standard_normal(200)).tolist() if steered else []
    summary = {
        "mean": top / 2, "sd": 0.35,
        "quantiles": {q: top / 2 + z for q, z in
                      zip(("5", "25", "50", "75", "95"), (-0.57, -0.23, 0.0, 0.23, 0.57),
                          strict=True)},
        "anti_steerable": estimate(float(np.mean(np.asarray(slopes or [1]) < 0)), 0.02),
    }  # fmt: skip
    us = [i / 14 for i in range(1, 15)] if steered else []
    return {
        "arm": name, "kind": kind, "n": 0 if kind == "none" else 128, "draws": 10, "noise": 0.0,
        "chosen": {
            f"{d:g}": None if name == "random" and d < 0.1 else {
                "setting": {"layer": "layers.3.resid_post"}, "strength": 2.5 * d ** 0.5,
                "u": d ** 0.5 if steered else None, "validation_gain": top * d ** 0.3,
                "validation_delta_ce": 0.9 * d,
            }
            for d in DELTAS
        } if kind != "none" else {},
        "alpha_max": 4.2 if steered else None, "alpha_max_reached": name != "logistic-probe",
        "effect": {f"{d:g}": None if bare and d < 0.1 else estimate(
            top * (d / 0.1) ** 0.3, None if bare else 0.07) for d in DELTAS},
        "delta_ce": {f"{d:g}": 1.07 * d if name == "sae-topk" else 0.87 * d for d in DELTAS},
        "kl": {f"{d:g}": None if bare else 0.8 * d for d in DELTAS},
        "relative_size": {f"{d:g}": d ** 0.5 if steered else None for d in DELTAS},
        "slope": {"raw": None, "alpha_max": summary} if steered else None,
        "slopes": slopes,
        "dose": [
            {"u": u, "strength": 4.2 * u, "gain": estimate(
                top * math.sin(2.2 * u) * 1.2, 0.04 + 0.1 * u, 64), "delta_ce": 0.5 * u ** 1.8,
             "kl": 0.4 * u ** 2, "entropy": 2.0 + u, "relative_size": 0.3 * u}
            for u in us
        ],
        "alpha_break": 4.2 if steered and name != "logistic-probe" else None,
        "generation": {
            **{k: estimate(v, 0.1) for k, v in
               (("concept", 1.2), ("relevance", 1.6), ("fluency", 1.4), ("harmonic", 1.37))},
            "distinct_2": 0.81, "repetition": 0.03, "texts": 100,
        } if steered else None,
        "ood": None, "relative_ood": None, "choices": estimate(0.55, 0.06) if steered else None,
        "published": {"caa": {"matching": estimate(0.61, 0.05), "steps": 3}} if steered else {},
        "worst": [
            {"prompt": "Tom walked to the park and", "chosen": " smiled.", "rejected": " cried.",
             "gain": -0.412, "before": " sat on a bench.", "after": " laughed and laughed."},
            {"prompt": "The dog", "chosen": " ran.", "rejected": " hid.", "gain": -0.205,
             "before": None, "after": None},
        ] if steered else [],
        "validation_evaluations": 56 if kind != "none" else 0, "failed_draws": 0,
        "ledger": {"labels": 128, "lm_tokens": 81_920, "flops": 4.4e10, "seconds": 12.25},
    }  # fmt: skip


def comparison(a: str, b: str, difference: float, verdict: str, p: float = 0.012) -> dict[str, Any]:
    """A primary comparison that came out so."""
    return {
        "a": a, "b": b, "difference": estimate(difference, 0.1), "p": p / 2, "p_holm": p,
        "tost_p": 0.034, "tost_p_holm": 0.041, "by_group": None, "verdict": verdict,
        "primary": True,
    }  # fmt: skip
