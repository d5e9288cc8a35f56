"""A comparison on a run: from a problem to a folder with everything that was asked and measured.

problem.toml       the exact configuration
evaluations.jsonl  what was evaluated, each once; a killed comparison goes on from it
prompts.csv        every per-prompt figure
texts.jsonl        every generated text, with its scores
report.json        all figures
report.html        the report, one file

The run's own looks.json counts how many passes looked at each test split, in whatever folder.
"""

import csv
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saesteer import __version__
from saesteer.compare import (
    across,
    afterwards,
    contenders,
    generation,
    ledger,
    presets,
    report,
    sae_cost,
    splits,
)
from saesteer.compare.arms import ARMS
from saesteer.compare.evaluate import Bench
from saesteer.compare.problem import DELTAS, Problem
from saesteer.compare.problem_file import to_dict
from saesteer.compare.protocol import Compared, choose_all, test_all
from saesteer.compare.store import Store
from saesteer.compare.trial import Trial
from saesteer.core import tables
from saesteer.core.files import alone, write_json, written_aside
from saesteer.core.model import fingerprint
from saesteer.errors import (
    ConfigError,
    IndexingError,
    SaeError,
    SteeringError,
    TextError,
    did_you_mean,
)
from saesteer.run import Run
from saesteer.run_text import has_cache, text_source

if TYPE_CHECKING:
    from saesteer.compare.afterwards import Judge
    from saesteer.core.sae import Sae
    from saesteer.features.search import Index

# Clean texts on which damage is measured, half of them for validation.
_TEXTS = 64


def compare(
    run: Run,
    problem: Problem,
    out: Path,
    *,
    seed: int = 0,
    budget: int | None = None,
    judge: "Judge | None" = None,
) -> dict[str, Any]:
    """Run a comparison, or go on with one, and write its folder; what report.json holds.

    Args:
        out: the folder; it may hold a comparison of the same problem that was stopped.
        seed: of splits, draws, arms and intervals.
        budget: validation evaluations of each arm; None: four settings at the problem's strengths.
        judge: a language model that scores texts as well, see `compare.judge`.

    Raises:
        ConfigError: the budget is under 1, or there is no such preset. RunError: the folder holds
            another comparison, or another process works in it. SteeringError: there is no such
            arm. TextError: no clean text. PairsError: see `splits.split`.
    """
    if budget is not None and budget < 1:
        raise ConfigError(f"--budget {budget}: 1 or more validation evaluations an arm")
    begin = time.monotonic()
    if problem.preset:
        presets.preset(problem.preset)
    _check_arms(problem)
    texts = clean_texts(run, problem.text)
    parts = [
        splits.split(
            behaviour,
            problem.splits,
            seed=seed,
            tokenizer=run.tokenizer,
            deployment=problem.deployment,
        )
        for behaviour in problem.behaviours
    ]
    sae, index, why = _features(run)
    config = {
        # What a published protocol would tell changes nothing in what is evaluated.
        "problem": to_dict(replace(problem, preset="")),
        "data": _digest(run, problem, parts, texts),
        "seed": seed,
        "budget": budget or 0,
        "model": fingerprint(run.model),
        "sae": None if sae is None else sae.hash,
    }
    with alone(out):
        store = Store(out, config, run.path / "looks.json", _held_out(parts))
        with written_aside(out / "problem.toml") as aside:
            aside.write_text(tables.written(to_dict(problem)), encoding="utf-8")
        bench = Bench(run.model, run.tokenizer, texts, positions=problem.positions)
        trials = [
            Trial(problem, behaviour, part, bench, store, sae, index, seed=seed, budget=budget or 0)
            for behaviour, part in zip(problem.behaviours, parts, strict=True)
        ]
        # Not the test items of one behaviour either, before all have chosen.
        choices = [choose_all(trial) for trial in trials]
        compared = [test_all(*each) for each in zip(trials, choices, strict=True)]
        written = [
            afterwards.complete(trial, one, texts=texts[1::2], judge=judge)
            for trial, one in zip(trials, compared, strict=True)
        ]
        result = _result(run, problem, trials, compared)
        if why:
            result["not_run"].insert(0, {"what": "features of the SAE", "why": why})
        result["not_run"] += [entry for one in written for entry in one.not_run]
        result["looks_at_test"] = store.looks
        result["seconds"] = round(time.monotonic() - begin, 1)
        _write(out, result, compared, [record for one in written for record in one.records])
        store.finish()
    return result


def _check_arms(problem: Problem) -> None:
    known = (*ARMS, contenders.SEARCH)
    for name in contenders.names(problem):
        if name not in known:
            raise SteeringError(
                f"no arm {name!r}{did_you_mean(name, known)}: there are {', '.join(known)}"
            )


def _digest(run: Run, problem: Problem, parts: Sequence[splits.Split], texts: Sequence[str]) -> str:
    """Of all that a problem only names: its pairs, clean text, prompts and choices. 16 hex digits.

    Raises:
        TextError: prompts that can't be read. PairsError: choices that can't be.
    """
    prompts = [
        generation.prompts_for(behaviour, part.test, most=afterwards.PROMPTS)
        for behaviour, part in zip(problem.behaviours, parts, strict=True)
    ]
    choices = afterwards.choices(problem, run.tokenizer)
    return _hashed([parts, list(texts), prompts, choices])


def _held_out(parts: Sequence[splits.Split]) -> str:
    """Of the held-out items alone: with other clean text or choices it is the same test split."""
    return _hashed([(part.test, part.ood) for part in parts])


def _hashed(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "replace")).hexdigest()[:16]


def clean_texts(run: Run, source: str) -> list[str]:
    """Texts on which damage is measured: of a file, or else the run's held-out text.

    Raises:
        TextError: there is none.
    """
    from saesteer import units
    from saesteer.training import text as reading

    if source:
        found = []
        for document in reading.documents(**text_source(run, source)):
            found.append(document)
            if len(found) == _TEXTS:
                break
        return found
    if not has_cache(run):
        raise TextError(
            f"{run.path} has no held-out text to measure damage on; name some in the problem: "
            '[cost] text = "FILE"'
        )
    rows = units.neutral_tokens(run, _TEXTS)
    return [run.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def _features(run: Run) -> "tuple[Sae | None, Index | None, str]":
    """The run's SAE and index, where it has them; why not."""
    why = ""
    sae, index = None, None
    try:
        sae = run.sae
        index = run.index
    except (SaeError, IndexingError) as error:
        why = str(error)
    return sae, index, why


def _result(
    run: Run, problem: Problem, trials: Sequence[Trial], compared: Sequence[Compared]
) -> dict[str, Any]:
    sae = trials[0].sae
    behaviours = [one.report for one in compared]
    matrix, interactions, not_run = across.crossed(trials, compared)
    return {
        "saesteer": __version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": trials[0].seed,
        "budget": trials[0].budget,
        "problem": to_dict(problem),
        "run": {
            "model": run.config.model.id,
            "sae": None if sae is None else sae.hash,
            "hook_point": None if sae is None else str(sae.hook_point),
            "d_sae": None if sae is None else sae.d_sae,
            "explained_variance": _explained(run),
        },
        "deltas": list(DELTAS),
        "behaviours": behaviours,
        "across": across.over_behaviours(trials, compared),
        "matrix": matrix,
        "interactions": interactions,
        "ledger": ledger.ledger(behaviours, _shared(run, trials[0]), problem.primary.pairs[0]),
        "not_run": [entry for one in compared for entry in one.not_run] + not_run,
        "world": None,
    }


def _explained(run: Run) -> float | None:
    with suppress(OSError, ValueError, KeyError):
        return float(json.loads((run.path / "evaluation.json").read_text())["explained_variance"])
    return None


def _shared(run: Run, trial: Trial) -> ledger.Shared | None:
    """What the SAE and its index cost, counted from what the run says of its training."""
    sae, index = trial.sae, trial.index
    if sae is None or index is None:
        return None
    config, model = run.config, trial.bench.model
    up_to = ledger.parameters_up_to(model, sae.hook_point)
    read = int(index.meta.get("tokens", 0))
    indexing = 2.0 * up_to * read + sae_cost.indexing_flops(
        tokens=read,
        d_in=sae.d_in,
        d_out=sae.W_dec.shape[1],
        d_sae=sae.d_sae,
        vocabulary=model.config.vocab_size,
    )
    metrics = run.path / "metrics.jsonl"
    if config.sae.source is not None or not metrics.exists():
        return ledger.Shared(None, indexing, "The SAE was trained elsewhere.")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    training = sae_cost.training_flops(
        [line for line in lines if "l0" in line],
        config.sae.architecture,
        d_in=sae.d_in,
        d_out=sae.W_dec.shape[1],
        d_sae=sae.d_sae,
        aux=config.train.aux > 0,
    )
    made = config.cache.tokens
    note = f"Counted from {made:,} cached and {config.train.tokens:,} trained tokens."
    return ledger.Shared(sae_cost.sae_flops(up_to, made, training), indexing, note)


def _write(
    out: Path,
    result: Mapping[str, Any],
    compared: Sequence[Compared],
    texts: Sequence[Mapping[str, Any]],
) -> None:
    rows = [row for one in compared for row in one.rows]
    with (
        written_aside(out / "prompts.csv") as aside,
        aside.open("w", encoding="utf-8", newline="") as file,
    ):
        if rows:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    with written_aside(out / "texts.jsonl") as aside, aside.open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(record, ensure_ascii=False)}\n" for record in texts)
    write_json(out / "report.json", result)
    with written_aside(out / "report.html") as aside:
        aside.write_text(report.render(result), encoding="utf-8")
