"""What arms write to a behaviour's prompts, with scores; each text is written once and kept."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

from saesteer.compare import generation, scorers
from saesteer.compare.generation import Baseline, Generated
from saesteer.compare.matrix import Chosen
from saesteer.compare.prepared import Prepared
from saesteer.compare.trial import Trial
from saesteer.errors import RunError, SaesteerError, SteeringError

NEW_TOKENS = 40


def kept(
    trial: Trial, key: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """The value under the key of the trial's store, of `make` where it isn't there yet.

    Raises:
        SteeringError: `make` failed, now or in an earlier pass: that is kept too. RunError: the
            store or a cache can't be written.
    """

    def told() -> Mapping[str, Any]:
        try:
            return make()
        except RunError:
            raise
        except SaesteerError as error:
            return {"failed": str(error)}

    found = trial.store.once(key, told)
    if "failed" in found:
        raise SteeringError(str(found["failed"]))
    return found


def prepared(trial: Trial, one: Chosen | None) -> Prepared:
    """An arm as it was chosen; None is no edit.

    Raises:
        SaesteerError: it can't be made.
    """
    return Prepared("none", trial.bench.model) if one is None else one.prepared()


class Writing:
    """How every arm writes: to the same prompts, with the same seeds, scored by the same scorers.

    What it takes is made when a text is wanted that isn't kept.

    Args:
        prompts: to continue.
    """

    def __init__(self, trial: Trial, prompts: list[str]) -> None:
        self.trial, self.prompts = trial, prompts

    @cached_property
    def base(self) -> Baseline:
        """What the unsteered model writes."""
        return generation.baseline(
            self.trial.bench, self.prompts, seed=self.trial.seed, max_new_tokens=NEW_TOKENS
        )

    @cached_property
    def _made(self) -> tuple[dict[str, scorers.Scorer], list[dict[str, str]]]:
        trial = self.trial
        pairs = [item.pair for item in trial.split.fit]
        bench = trial.bench
        basis = scorers.Basis(bench.model, bench.tokenizer, trial.behaviour, self.base.texts, pairs)
        return scorers.make([one for one in trial.problem.scorers if one != "judge"], basis)

    def scorers(self) -> dict[str, Any]:
        """{"scorers": {name: {"axis", "fixed": what scores 0 and 2}}, "not_run": [what and why]}.

        Raises:
            SteeringError, TextError: the unsteered model can't write, see `generation.baseline`.
        """

        def make() -> dict[str, Any]:
            made, not_run = self._made
            fixed = {n: {"axis": s.axis, "fixed": dict(s.fixed)} for n, s in made.items()}
            return {"scorers": fixed, "not_run": not_run}

        key = {"kind": "scorers", "behaviour": self.trial.behaviour.name, "split": "test"}
        return self.trial.store.once(key, make)

    def written(self, one: Chosen | None, *, most: int | None = None) -> Generated:
        """What an arm writes to the first `most` prompts, or to all; None is no edit.

        Raises:
            SteeringError: it can't write.
        """

        def make() -> dict[str, Any]:
            base = replace(self.base, texts=self.base.texts[:most], seeds=self.base.seeds[:most])
            arm = prepared(self.trial, one)
            strength = 0.0 if one is None else one.strength
            return asdict(generation.generate_and_score(base, arm, strength, self._made[0]))

        key = {
            "kind": "texts",
            "behaviour": self.trial.behaviour.name,
            "arm": None if one is None else one.key,
            "prompts": most,
            "split": "test",
        }
        return Generated(**kept(self.trial, key, make))
