"""The figures that published protocols would have told of the same arms; see `presets`.

They are told where problem.toml names a preset, beside ours and by the paper's own formula.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from saesteer.compare import generation, presets, scorers, statistics
from saesteer.compare.matrix import Chosen
from saesteer.compare.prepared import Prepared
from saesteer.compare.protocol import Compared
from saesteer.compare.tested import Floats
from saesteer.compare.trial import Trial
from saesteer.core.progress import progress
from saesteer.errors import SaesteerError

PROMPTS = 10
"""Prompts of AxBench and SAE-TS: those of AxBench, 10 instructions a concept."""
FACTORS = (0.25, 0.5, 0.75, 1.0)
"""Shares of α_max at which texts are written for them."""


def fill(
    trial: Trial,
    compared: Compared,
    entries: Sequence[dict[str, Any]],
    at: Mapping[str, Chosen | None],
) -> None:
    """Put the preset's figures into the arms' "published"; what can't be told into not_run.

    Raises:
        ConfigError: there is no preset of the problem's name.
    """
    if not trial.problem.preset:
        return
    preset = presets.preset(trial.problem.preset)
    told = {"caa": _caa, "tan": _tan, "pres": _pres, "axbench": _axbench, "sae-ts": _sae_ts}
    title = f"{preset.name} {trial.behaviour.name}"
    for entry in progress(title, len(entries), unit="arm", iterable=entries):
        one = at[entry["arm"]]
        if one is None:
            continue
        try:
            entry["published"] = {preset.name: told[preset.name](trial, entry, one)}
        except SaesteerError as error:
            what = f"{trial.behaviour.name}: {preset.name} of {entry['arm']}"
            compared.not_run.append({"what": what, "why": str(error)})


def _caa(trial: Trial, entry: dict[str, Any], one: Chosen) -> dict[str, Any]:
    """p(matching letter) at the chosen strength, and without an arm."""
    figures = {}
    for name, arm in (("p(matching), no edit", None), ("p(matching)", one)):
        chosen, rejected = _likelihoods(trial, arm, total=True)
        found = presets.caa(chosen, rejected)
        figures[name] = asdict(statistics.bootstrap(found, seed=trial.seed))
    return figures


def _tan(trial: Trial, entry: dict[str, Any], one: Chosen) -> dict[str, Any]:
    """Steerability at the paper's seven strengths, which the protocol has evaluated."""
    return {"steerability": entry["slope"]["raw"]}


def _pres(trial: Trial, entry: dict[str, Any], one: Chosen) -> dict[str, Any]:
    """Likelihoods of the least likely positives and the most likely negatives."""
    control, steered = _likelihoods(trial, None), _likelihoods(trial, one)
    found = presets.pres(*control, *steered)
    return {how: [asdict(room) for room in rooms] for how, rooms in found.items()}


def _axbench(trial: Trial, entry: dict[str, Any], one: Chosen) -> dict[str, Any]:
    factors, scored = _scored(trial, entry, one)
    axes = [[texts["axes"][axis] for texts in scored] for axis in generation.AXES]
    return asdict(presets.axbench(factors, *axes, seed=trial.seed))


def _sae_ts(trial: Trial, entry: dict[str, Any], one: Chosen) -> dict[str, Any]:
    """Behaviour is our concept score, coherence our fluency: 0 to 2 in place of 1 to 10."""
    factors, scored = _scored(trial, entry, one)
    shown, sound = ([texts["axes"][axis] for texts in scored] for axis in ("concept", "fluency"))
    return asdict(presets.sae_ts(factors, shown, sound, lowest=0.0, highest=2.0))


def _scored(
    trial: Trial, entry: dict[str, Any], one: Chosen
) -> tuple[Sequence[float], list[dict[str, Any]]]:
    """Texts at several strengths, scored without a judge: the factors, and each's texts."""
    prompts = generation.prompts_for(trial.behaviour, trial.items("test"), most=PROMPTS)
    base = generation.baseline(trial.bench, prompts, seed=trial.seed)
    pairs = [item.pair for item in trial.items("fit")]
    basis = scorers.Basis(
        trial.bench.model, trial.bench.tokenizer, trial.behaviour, base.texts, pairs
    )
    made, _ = scorers.make([s for s in trial.problem.scorers if s != "judge"], basis)
    highest = entry["alpha_max"]
    factors = [share * highest for share in FACTORS] if highest else [one.strength]
    found = []
    for factor in factors:
        strong = replace(one, strength=factor)

        def make(strong: Chosen = strong) -> dict[str, Any]:
            return asdict(
                generation.generate_and_score(base, strong.prepared(), strong.strength, made)
            )

        key = {"kind": "published texts", **strong.key, "split": "test"}
        found.append(trial.store.once(key, make))
    return factors, found


def _likelihoods(trial: Trial, one: Chosen | None, *, total: bool = False) -> tuple[Floats, Floats]:
    """Log-likelihoods of the test items' chosen and rejected answers, [n] each: nats a token, or
    `total`."""
    key = {
        "kind": "likelihoods",
        "total": total,
        "behaviour": trial.behaviour.name,
        "arm": None if one is None else one.key,
        "split": "test",
    }

    def make() -> dict[str, Any]:
        prepared = Prepared("none", trial.bench.model) if one is None else one.prepared()
        found = trial.bench.likelihoods(
            prepared, 0.0 if one is None else one.strength, trial.items("test"), total=total
        )
        return {"both": found.tolist()}

    both = np.asarray(trial.store.once(key, make)["both"])
    return both[:, 0], both[:, 1]
