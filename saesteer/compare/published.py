"""The figures that published protocols would have told of the same arms; see `presets`.

They are told where problem.toml names a preset, beside ours and by the paper's own formula.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from saesteer.compare import generation, presets, statistics
from saesteer.compare.generation import Generated
from saesteer.compare.matrix import Chosen
from saesteer.compare.tested import Floats
from saesteer.compare.trial import Trial
from saesteer.compare.writing import Writing, kept, prepared
from saesteer.errors import SteeringError

PROMPTS = 10
"""Prompts of AxBench and SAE-TS: those of AxBench, 10 instructions a concept."""
FACTORS = (0.25, 0.5, 0.75, 1.0)
"""Shares of α_max at which texts are written for them."""


def fill(writing: Writing, entry: dict[str, Any], one: Chosen | None) -> None:
    """Put the preset's figures into an arm's "published"; nothing where no edit was chosen.

    Raises:
        ConfigError: there is no preset of the problem's name. SteeringError: the arm gives no
            figures.
    """
    if one is None:
        return
    trial = writing.trial
    preset = presets.preset(trial.problem.preset)
    if preset.deployment == "ab" != trial.problem.deployment:
        raise SteeringError(
            f"{preset.name} is about A/B letters, and [deployment] format is "
            f'{trial.problem.deployment!r}: take "ab"'
        )
    figures: dict[str, Any]
    if preset.name == "caa":
        figures = _caa(trial, one)
    elif preset.name == "tan":
        figures = {"steerability": entry["slope"]["raw"]}  # at the paper's own strengths
    elif preset.name == "pres":
        figures = _pres(trial, one)
    else:
        factors, scored = _scored(writing, entry, one)
        figures = (_axbench if preset.name == "axbench" else _sae_ts)(factors, scored, trial.seed)
    entry["published"] = {preset.name: figures}


def _caa(trial: Trial, one: Chosen) -> dict[str, Any]:
    """p(matching letter) at the chosen strength, and without an arm."""
    figures = {}
    for name, arm in (("p(matching), no edit", None), ("p(matching)", one)):
        found = presets.caa(*_likelihoods(trial, arm, total=True))
        figures[name] = asdict(statistics.bootstrap(found, seed=trial.seed))
    return figures


def _pres(trial: Trial, one: Chosen) -> dict[str, Any]:
    """Likelihoods of the least likely positives and the most likely negatives."""
    control, steered = _likelihoods(trial, None), _likelihoods(trial, one)
    found = presets.pres(*control, *steered)
    return {
        f"{how}, {room.share:.0%}": {"positive": room.positive, "negative": room.negative}
        for how, rooms in found.items()
        for room in rooms
    }


def _axbench(factors: Sequence[float], scored: Sequence[Generated], seed: int) -> dict[str, Any]:
    return asdict(presets.axbench(factors, *_axes(scored, generation.AXES), seed=seed))


def _sae_ts(factors: Sequence[float], scored: Sequence[Generated], seed: int) -> dict[str, Any]:
    """Behaviour is our concept score, coherence our fluency: 0 to 2 in place of 1 to 10."""
    shown, sound = _axes(scored, ("concept", "fluency"))
    return asdict(presets.sae_ts(factors, shown, sound, lowest=0.0, highest=2.0))


def _axes(scored: Sequence[Generated], axes: Sequence[str]) -> list[list[list[float]]]:
    """Scores on each axis: of each strength's texts.

    Raises:
        SteeringError: an axis has no scorer.
    """
    missing = [axis for axis in axes if axis not in scored[0].axes]
    if missing:
        raise SteeringError(
            f"no scorer scored {' and '.join(missing)}: see what else was not run, and name one "
            "that can under [scoring]"
        )
    return [[texts.axes[axis] for texts in scored] for axis in axes]


def _scored(
    writing: Writing, entry: dict[str, Any], one: Chosen
) -> tuple[Sequence[float], list[Generated]]:
    """Texts at several strengths, scored without a judge: the factors, and each's texts."""
    highest = entry["alpha_max"]
    factors = [share * highest for share in FACTORS] if highest else [one.strength]
    return factors, [writing.written(replace(one, strength=f), most=PROMPTS) for f in factors]


def _likelihoods(trial: Trial, one: Chosen | None, *, total: bool = False) -> tuple[Floats, Floats]:
    """Log-likelihoods of the test items' chosen and rejected answers, [n] each: nats a token, or
    of the whole answer where `total`."""
    key = {
        "kind": "likelihoods",
        "total": total,
        "behaviour": trial.behaviour.name,
        "arm": None if one is None else one.key,
        "split": "test",
    }

    def make() -> dict[str, Any]:
        strength = 0.0 if one is None else one.strength
        found = trial.bench.likelihoods(
            prepared(trial, one), strength, trial.items("test"), total=total
        )
        return {"both": found.tolist()}

    both = np.asarray(kept(trial, key, make)["both"])
    return both[:, 0], both[:, 1]
