"""What is measured of a behaviour's arms once all is chosen: texts, reading, choices, presets."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from saesteer.compare import generation, published, reading, statistics
from saesteer.compare.agreement import agreement
from saesteer.compare.generation import Generated
from saesteer.compare.judge import judged
from saesteer.compare.matrix import Chosen, chosen
from saesteer.compare.problem import Problem
from saesteer.compare.protocol import Compared
from saesteer.compare.splits import Item, draw
from saesteer.compare.trial import Trial
from saesteer.compare.writing import NEW_TOKENS, Writing, kept, prepared
from saesteer.core.progress import progress
from saesteer.core.writers import Write
from saesteer.directions.pairs import read_pairs
from saesteer.effects.readings import Reading
from saesteer.errors import ModelError, SaesteerError, SteeringError

PROMPTS = 32
"""Test prompts that every arm continues."""
_SHOWN = 3  # worst prompts of an arm whose texts are shown

Entry = dict[str, Any]


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
        TextError: a file of prompts that can't be read, or no room to go on from a prompt.
        PairsError: a file of choices that can't be read.
    """
    name = trial.behaviour.name
    entries = [entry for entry in compared.report["arms"] if not entry["noise"]]
    prompts = generation.prompts_for(trial.behaviour, trial.items("test"), most=PROMPTS)
    writing = Writing(trial, prompts)
    told = writing.scorers()
    compared.report["scorers"] = told["scorers"]
    not_run = [{"what": f"{name}: {one['what']}", "why": one["why"]} for one in told["not_run"]]
    records: list[dict[str, Any]] = []

    def write(entry: Entry, one: Chosen | None) -> None:
        found = replace(writing.written(one), arm=entry["arm"])
        records.extend({"behaviour": name, **line} for line in found.lines())
        entry["generation"] = found.summary(seed=trial.seed)
        if judge is not None:
            entry["generation"] |= _judged(trial, found, judge)

    parts: dict[str, Callable[[Entry, Chosen | None], None]] = {
        "texts": write,
        "texts of the worst prompts": lambda entry, one: _worst(trial, entry, one),
    }
    if items := choices(trial.problem, trial.bench.tokenizer):
        parts["choices"] = lambda entry, one: _choices(trial, entry, one, items)
    if preset := trial.problem.preset:
        parts[preset] = lambda entry, one: published.fill(writing, entry, one)
    # All of one arm before the next, so that it is made ready once.
    for entry in progress(f"after {name}", len(entries), unit="arm", iterable=entries):
        one = chosen(trial, compared.tuned, entry["arm"])
        for what, fill in parts.items():
            try:
                fill(entry, one)
            except (SteeringError, ModelError) as error:
                not_run.append({"what": f"{name}: {what} of {entry['arm']}", "why": str(error)})
    read = _reading(trial, compared, [entry["arm"] for entry in entries], texts)
    compared.report["reading"] = read["reading"]
    return Texts(records, not_run + read["not_run"])


def _judged(trial: Trial, one: Generated, judge: Judge) -> dict[str, Any]:
    """The judge's mean score, how many texts it could score, and whether it agrees with ours."""
    ratings = judged(one.written, trial.behaviour, judge.write, name=judge.name, path=judge.path)
    theirs = [rating.harmonic for rating in ratings]
    read = [score for score in theirs if score is not None]
    told: dict[str, Any] = {
        "judge": asdict(statistics.bootstrap(np.array(read), seed=trial.seed)) if read else None,
        "judge_unread": len(theirs) - len(read),
        "agreement": None,
    }
    if one.harmonic is not None:
        told["agreement"] = asdict(agreement(theirs, one.harmonic, seed=trial.seed))
    return told


def _worst(trial: Trial, entry: Entry, one: Chosen | None) -> None:
    """The texts before and after of the prompts on which an arm did worst."""
    shown = entry["worst"][:_SHOWN]
    if one is None or not shown:
        return

    def make() -> dict[str, Any]:
        base = generation.baseline(
            trial.bench,
            [worst["prompt"] for worst in shown],
            max_new_tokens=NEW_TOKENS,
            temperature=0.0,
        )
        after = generation.generate_and_score(base, one.prepared(), one.strength, {})
        return {"before": [text.text for text in base.texts], "after": after.texts}

    key = {"kind": "worst", "behaviour": trial.behaviour.name, "arm": one.key, "split": "test"}
    texts = kept(trial, key, make)
    for worst, before, after in zip(shown, texts["before"], texts["after"], strict=True):
        worst |= {"before": before, "after": after}


def choices(problem: Problem, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
    """The problem's multiple-choice questions, if it names any.

    Raises:
        PairsError: they can't be read.
    """
    if not problem.choices:
        return []
    with warnings.catch_warnings():
        # Nothing is fitted on them, and so they may be few.
        warnings.filterwarnings("ignore", r"\d+ contrast pairs?: under", UserWarning)
        pairs = read_pairs(problem.choices, tokenizer)
    return [Item(i, pair, "") for i, pair in enumerate(pairs)]


def _choices(trial: Trial, entry: Entry, one: Chosen | None, items: Sequence[Item]) -> None:
    """The share of multiple-choice questions that an arm leaves the model right on."""

    def make() -> dict[str, Any]:
        strength = 0.0 if one is None else one.strength
        return trial.bench.evaluate(prepared(trial, one), strength, items).to_dict()

    arm = None if one is None else one.key
    found = kept(trial, {"kind": "choices", "behaviour": trial.behaviour.name, "arm": arm}, make)
    right = int((np.asarray(found["margins"]) > 0).sum())
    entry["choices"] = asdict(statistics.wilson(right, len(items)))


def _reading(
    trial: Trial, compared: Compared, arms: Sequence[str], texts: Sequence[str]
) -> dict[str, Any]:
    """How well each direction and feature tells texts and answers apart, which is no steering.

    "reading" of report.json, and "not_run".
    """
    name = trial.behaviour.name

    def make() -> dict[str, Any]:
        found, not_run = _readings(trial, compared, arms)
        told = reading.read(
            trial.bench.model,
            trial.bench.tokenizer,
            found,
            texts=texts,
            pairs=[item.pair for item in trial.items("test")],
            words=trial.behaviour.lexicon,
            seed=trial.seed,
        ) if found else []  # fmt: skip
        return {"reading": told, "not_run": not_run}

    return trial.store.once({"kind": "readings", "behaviour": name, "split": "test"}, make)


def _readings(
    trial: Trial, compared: Compared, arms: Sequence[str]
) -> tuple[list[Reading], list[dict[str, str]]]:
    """What reads a token: the arms' directions and features, and the methods that only read.

    An arm that steers too badly for any edit to be chosen may still read well, and is among them.
    """
    found, not_run = [], []
    for arm in arms:
        tuned = compared.tuned.get((arm, trial.problem.headline_n, 0.0))
        tuned = tuned or compared.tuned.get((arm, 0, 0.0))
        if tuned is None or tuned.made.contender.kind in ("prompt", "trained"):
            continue
        setting = tuned.dose_setting(trial.problem.delta_ce)
        if setting is None:
            continue
        try:
            made = trial.prepared(tuned.made, tuned.settings[setting])
            one = reading.reading_of(made, trial.sae)
        except SaesteerError as error:
            not_run.append({"what": f"{trial.behaviour.name}: reading of {arm}", "why": str(error)})
        else:
            found += [] if one is None else [replace(one, name=arm)]
    point = trial.layers[len(trial.layers) // 2] if trial.sae is None else trial.sae.write_point
    drawn = draw(trial.split.fit, trial.problem.headline_n, 0, trial.seed)
    try:
        found += reading.readers_of(
            trial.bench.model,
            trial.bench.tokenizer,
            [item.pair for item in drawn],
            point,
            seed=trial.seed,
            cache=trial.store.folder / "activations",
        )
    except SaesteerError as error:
        not_run.append({"what": f"{trial.behaviour.name}: readers", "why": str(error)})
    return found, not_run
