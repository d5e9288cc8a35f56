"""What is measured of a behaviour's arms once all is chosen: texts, reading, choices, presets."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from saesteer.compare import generation, published, reading, scorers, statistics
from saesteer.compare.agreement import agreement
from saesteer.compare.generation import Baseline, Generated
from saesteer.compare.judge import judged
from saesteer.compare.matrix import Chosen, chosen
from saesteer.compare.prepared import Prepared
from saesteer.compare.protocol import Compared
from saesteer.compare.splits import Item
from saesteer.compare.trial import Trial
from saesteer.core.progress import progress
from saesteer.core.writers import Write
from saesteer.directions.pairs import Pair, read_pairs
from saesteer.errors import SaesteerError

PROMPTS = 32
"""Test prompts that every arm continues."""
NEW_TOKENS = 40
_SHOWN = 3  # worst prompts of an arm whose texts are shown


@dataclass(frozen=True)
class Judge:
    """A language model that scores texts as well: how it is asked, its name, where it is kept."""

    write: Write
    name: str
    path: Path


@dataclass(frozen=True)
class Texts:
    """What was generated: a record for each text, and what could not be."""

    records: list[dict[str, Any]]
    not_run: list[dict[str, str]]


def complete(
    trial: Trial,
    compared: Compared,
    *,
    texts: Sequence[str],
    judge: Judge | None = None,
) -> Texts:
    """Fill in what report.json has of a behaviour beside margins; the texts that were generated.

    texts: clean ones that nothing was chosen on, for reading.

    Raises:
        TextError: a file of prompts that can't be read. PairsError: one of choices.
        SteeringError: an unknown scorer.
    """
    entries = [e for e in compared.report["arms"] if not e["noise"]]
    at = {e["arm"]: chosen(trial, compared.tuned, e["arm"]) for e in entries}
    found = _generated(trial, entries, at, judge)
    _worst(trial, entries, at)
    if trial.problem.choices:
        _choices(trial, entries, at)
    compared.report["reading"] = _reading(trial, at, texts, found.not_run)
    published.fill(trial, compared, entries, at)
    return found


def _generated(
    trial: Trial,
    entries: Sequence[dict[str, Any]],
    at: Mapping[str, Chosen | None],
    judge: Judge | None,
) -> Texts:
    """Every arm continues the same prompts at its chosen strength."""
    name = trial.behaviour.name
    prompts = generation.prompts_for(trial.behaviour, trial.items("test"), most=PROMPTS)
    base = generation.baseline(trial.bench, prompts, seed=trial.seed, max_new_tokens=NEW_TOKENS)
    pairs = [item.pair for item in trial.items("fit")]
    basis = scorers.Basis(
        trial.bench.model, trial.bench.tokenizer, trial.behaviour, base.texts, pairs
    )
    free = [one for one in trial.problem.scorers if one != "judge"]
    made, not_run = scorers.make(free, basis)
    not_run = [{"what": f"{name}: {one['what']}", "why": one["why"]} for one in not_run]
    records: list[dict[str, Any]] = []
    for entry in progress(f"texts {name}", len(entries), unit="arm", iterable=entries):
        try:
            one = _texts(trial, entry["arm"], at[entry["arm"]], base, made)
        except SaesteerError as error:
            not_run.append({"what": f"{name}: texts of {entry['arm']}", "why": str(error)})
            continue
        summary = one.summary(seed=trial.seed)
        lines = list(one.lines())
        if judge is not None:
            summary |= _judged(trial, one, judge)
        entry["generation"] = summary
        records += [{"behaviour": name, **line} for line in lines]
    return Texts(records, not_run)


def _texts(
    trial: Trial,
    arm: str,
    one: Chosen | None,
    base: Baseline,
    made: Mapping[str, scorers.Scorer],
) -> Generated:
    """An arm's texts with their scores, kept in the store."""

    def make() -> dict[str, Any]:
        prepared = Prepared(arm, trial.bench.model) if one is None else one.prepared()
        return asdict(generation.generate_and_score(base, prepared, _strength(one), made))

    key = {"kind": "texts", "behaviour": trial.behaviour.name, "arm": arm, "split": "test"}
    return Generated(**trial.store.once(key, make))


def _judged(trial: Trial, one: Generated, judge: Judge) -> dict[str, Any]:
    """The judge's mean score, how many texts it could score, and whether it agrees with ours."""
    ratings = judged(one.written, trial.behaviour, judge.write, name=judge.name, path=judge.path)
    theirs = [rating.harmonic for rating in ratings]
    read = [score for score in theirs if score is not None]
    told: dict[str, Any] = {
        "judge": asdict(statistics.bootstrap(np.array(read), seed=trial.seed)) if read else None,
        "judge_unread": len(theirs) - len(read),
    }
    if one.harmonic is not None:
        told["agreement"] = asdict(agreement(theirs, one.harmonic, seed=trial.seed))
    return told


def _worst(
    trial: Trial, entries: Sequence[dict[str, Any]], at: Mapping[str, Chosen | None]
) -> None:
    """The texts before and after of the prompts on which an arm did worst."""
    name = trial.behaviour.name
    for entry in progress(f"worst {name}", len(entries), unit="arm", iterable=entries):
        one = at[entry["arm"]]
        shown = entry["worst"][:_SHOWN]
        if one is None or not shown:
            continue

        def make(one: Chosen = one, shown: Any = shown) -> dict[str, Any]:
            prompts = [worst["prompt"] for worst in shown]
            base = generation.baseline(
                trial.bench, prompts, max_new_tokens=NEW_TOKENS, temperature=0.0
            )
            try:
                after = generation.generate_and_score(base, one.prepared(), one.strength, {})
            except SaesteerError as error:
                return {"before": [], "after": [], "failed": str(error)}
            return {"before": [text.text for text in base.texts], "after": after.texts}

        key = {"kind": "worst", "behaviour": name, "arm": entry["arm"], "split": "test"}
        texts = trial.store.once(key, make)
        for worst, before, after in zip(shown, texts["before"], texts["after"], strict=False):
            worst |= {"before": before, "after": after}


def _choices(
    trial: Trial, entries: Sequence[dict[str, Any]], at: Mapping[str, Chosen | None]
) -> None:
    """The share of multiple-choice questions that an arm leaves the model right on."""
    pairs: Sequence[Pair] = read_pairs(trial.problem.choices, trial.bench.tokenizer)
    items = [Item(i, pair, "") for i, pair in enumerate(pairs)]
    for entry in entries:
        one = at[entry["arm"]]

        def make(entry: dict[str, Any] = entry, one: Chosen | None = one) -> dict[str, Any]:
            prepared = Prepared(entry["arm"], trial.bench.model) if one is None else one.prepared()
            return trial.bench.evaluate(prepared, _strength(one), items).to_dict()

        key = {"kind": "choices", "behaviour": trial.behaviour.name, "arm": entry["arm"]}
        right = int((np.asarray(trial.store.once(key, make)["margins"]) > 0).sum())
        entry["choices"] = asdict(statistics.wilson(right, len(items)))


def _reading(
    trial: Trial,
    at: Mapping[str, Chosen | None],
    texts: Sequence[str],
    not_run: list[dict[str, str]],
) -> list[dict[str, Any]]:
    """How well each direction and feature tells texts and answers apart, which is no steering."""
    found = []
    for arm, one in at.items():
        read = None if one is None else reading.reading_of(one.prepared(), trial.sae)
        if read is not None:
            found.append(replace(read, name=arm))
    fitted = next((one for one in at.values() if one is not None and one.made.n), None)
    if fitted is not None and trial.sae is not None:
        try:
            found += reading.readers_of(
                trial.bench.model,
                trial.bench.tokenizer,
                trial.material(fitted.made).pairs,
                trial.sae.write_point,
                seed=trial.seed,
                cache=trial.store.folder / "activations",
            )
        except SaesteerError as error:
            not_run.append({"what": f"{trial.behaviour.name}: readers", "why": str(error)})
    if not found:
        return []
    key = {"kind": "reading", "behaviour": trial.behaviour.name, "split": "test"}

    def make() -> dict[str, Any]:
        return {
            "reading": reading.read(
                trial.bench.model,
                trial.bench.tokenizer,
                found,
                texts=texts,
                pairs=[item.pair for item in trial.items("test")],
                words=trial.behaviour.lexicon,
                seed=trial.seed,
            )
        }

    told: list[dict[str, Any]] = trial.store.once(key, make)["reading"]
    return told


def _strength(one: Chosen | None) -> float:
    return 0.0 if one is None else one.strength
