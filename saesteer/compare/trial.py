"""One behaviour of a comparison: arms made ready for it and evaluated, each thing once.

A draw of pairs is the same for all arms. All that is computed goes through the store, so that what
is there already is neither computed nor made ready again.
"""

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saesteer.compare import contenders
from saesteer.compare.contenders import Contender
from saesteer.compare.evaluate import Bench
from saesteer.compare.ledger import counting, parameters_up_to
from saesteer.compare.prepared import Material, Prepared, noisy
from saesteer.compare.problem import Behaviour, Problem
from saesteer.compare.splits import Item, Split, draw
from saesteer.compare.store import Store
from saesteer.core.blocks import decoder_layers
from saesteer.core.model import HookPoint
from saesteer.core.sae import Sae
from saesteer.directions.answers import answer_activations
from saesteer.directions.methods import METHODS
from saesteer.errors import SaesteerError
from saesteer.features.search import Index

_READS_PAIRS = ("refusal-projection", "ablate")
_KEPT = 8  # arms made ready that are held at once


def is_missing(error: SaesteerError) -> bool:
    """Whether something isn't installed here that an arm needs: such errors are of no class below.

    That says nothing of the arm, so that it is no result to keep.
    """
    return type(error) is SaesteerError


@dataclass(frozen=True)
class Made:
    """Which making of an arm: on how many pairs, of which draw, with how much label noise."""

    contender: Contender
    n: int
    noise: float = 0.0
    draw: int = 0

    @property
    def key(self) -> dict[str, Any]:
        """What its records in the store have in their keys."""
        return {
            "arm": self.contender.arm,
            "n": self.n,
            "noise": self.noise,
            "draw": self.draw,
        }


@dataclass(eq=False)
class Trial:
    """A behaviour with what its arms may use.

    Attributes:
        seed: of draws and of whatever arms draw.
        budget: validation evaluations of each arm.
    """

    problem: Problem
    behaviour: Behaviour
    split: Split
    bench: Bench
    store: Store
    sae: Sae | None = None
    index: Index | None = None
    seed: int = 0
    budget: int = 0
    _held: dict[str, Prepared] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.budget < 1:
            self.budget = contenders.SETTINGS * self.problem.strengths
        n = len(decoder_layers(self.bench.model))
        self.everywhere = [HookPoint(layer, "resid_post") for layer in range(n)]
        self.layers = contenders.layers(self.problem, self.bench.model, self.sae)

    def items(self, part: str) -> tuple[Item, ...]:
        """The items of "validation", "test" or "ood"."""
        found: tuple[Item, ...] = getattr(self.split, part)
        return found

    def base(self, part: str) -> dict[str, Any]:
        """The evaluation without any arm."""
        unsteered = Prepared("none", self.bench.model)
        text = self.bench.validation_text if part == "validation" else self.bench.test_text
        key = {"behaviour": self.behaviour.name, "arm": "none", "split": part}

        def make() -> dict[str, Any]:
            return self.bench.evaluate(unsteered, 0.0, self.items(part), text=text).to_dict()

        return self.store.once(key, make)

    def base_margins(self, part: str) -> NDArray[np.float64]:
        """Margins without any arm, [n]."""
        return np.asarray(self.base(part)["margins"])

    def material(self, made: Made, budget: int = 1) -> Material:
        """What an arm is made from. The random control has the same pairs in all its draws.

        Raises:
            PairsError: there are fewer than n pairs to fit on.
        """
        number = 0 if made.contender.arm == "random" else made.draw
        items = draw(self.split.fit, made.n or 1, number, self.seed)
        material = Material(
            self.bench.model,
            self.bench.tokenizer,
            [item.pair for item in items],
            [item.pair for item in self.split.validation],
            self.sae,
            self.index,
            seed=self.seed + made.draw,
            budget=budget,
        )
        return noisy(material, made.noise) if made.noise else material

    def facts(self, made: Made, setting: Mapping[str, Any], budget: int = 1) -> dict[str, Any]:
        """What came of making an arm: its setting, notes, tokens, FLOPs, seconds; or "failed".

        Raises:
            SaesteerError: what it needs isn't installed; nothing is kept.
        """
        key = self._key(made, setting, kind="making")

        def make() -> dict[str, Any]:
            begin = time.perf_counter()
            try:
                with counting(self.bench.model) as count:
                    prepared, setting_then = self._make(made, setting, budget)
                contenders.check_tokens(self.problem, self._longer(prepared))
            except SaesteerError as error:
                if is_missing(error):
                    raise
                return {"failed": str(error)}
            self._hold(made, setting_then, prepared)
            read, reading = self._reading(made)
            return {
                "setting": setting_then,
                "notes": dict(prepared.notes),
                # Activations that another arm's making has left in the cache count here as well.
                "tokens": max(count.tokens, read),
                "flops": max(count.flops, reading),
                "seconds": time.perf_counter() - begin,
            }

        return self.store.once(key, make)

    def prepared(self, made: Made, setting: Mapping[str, Any], budget: int = 1) -> Prepared:
        """The arm made ready, held for a while.

        Raises:
            SaesteerError: it can't be made.
        """
        held = self._held.get(str(self._key(made, setting)))
        if held is None:
            held = self._make(made, setting, budget)[0]
            self._hold(made, setting, held)
        return held

    def evaluate(
        self,
        made: Made,
        setting: Mapping[str, Any],
        strength: float,
        part: str,
        *,
        text: bool = True,
        budget: int = 1,
    ) -> dict[str, Any]:
        """An `Evaluation` as JSON with its "seconds", or {"failed": why}.

        Raises:
            SaesteerError: what the arm needs isn't installed; nothing is kept.
        """
        key = self._key(made, setting, strength=strength, split=part, text=text)
        if not text and (
            other := self._key(made, setting, strength=strength, split=part, text=True)
        ):
            key = other if other in self.store else key
        clean = self.bench.validation_text if part == "validation" else self.bench.test_text

        def make() -> dict[str, Any]:
            begin = time.perf_counter()
            try:
                found = self.bench.evaluate(
                    self.prepared(made, setting, budget),
                    strength,
                    self.items(part),
                    text=clean if text else None,
                ).to_dict()
            except SaesteerError as error:
                if is_missing(error):
                    raise
                return {"failed": str(error)}
            return {**found, "seconds": time.perf_counter() - begin}

        return self.store.once(key, make)

    def delta_ce(self, prepared: Prepared, strength: float) -> float:
        """ΔCE on the validation text; infinite where the strength breaks the model."""
        try:
            edits = self.bench.edits(prepared, strength)
            return self.bench.validation_text.cost(prepared, edits).delta_ce
        except SaesteerError:
            return float("inf")

    def ceiling(self, made: Made, setting: Mapping[str, Any], make: Any) -> dict[str, Any]:
        """α_max of a setting as `make` finds it, kept."""
        return self.store.once(self._key(made, setting, kind="ceiling"), make)

    def _key(self, made: Made, setting: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        return {"behaviour": self.behaviour.name, **made.key, "setting": dict(setting), **more}

    def _hold(self, made: Made, setting: Mapping[str, Any], prepared: Prepared) -> None:
        while len(self._held) >= _KEPT:
            del self._held[next(iter(self._held))]
        self._held[str(self._key(made, setting))] = prepared

    def _make(
        self, made: Made, setting: Mapping[str, Any], budget: int
    ) -> tuple[Prepared, dict[str, Any]]:
        material = self.material(made, budget)
        name = made.contender.arm
        method = METHODS.get(name)
        how: dict[str, Any] = {}
        with warnings.catch_warnings():
            # Few pairs are on the curve on purpose.
            warnings.filterwarnings("ignore", r"\d+ contrast pairs?: under", UserWarning)
            if method and name != "act-add":
                how["cache"] = self.store.folder / "activations"
                if method.kind in ("pairs", "pairs-many", "map") or name in _READS_PAIRS:
                    # All layers in one pass, for every arm and setting of this draw.
                    answer_activations(
                        material.model, material.tokenizer, material.pairs, self.layers, **how
                    )
            return contenders.prepare(
                made.contender, setting, material, model_points=self.everywhere, **how
            )

    def _reading(self, made: Made) -> tuple[int, float]:
        """Tokens and FLOPs of reading both sides of its pairs, up to the last place it may read;
        of features, also of encoding them."""
        if not made.contender.fits:
            return 0, 0.0
        tokens = self.bench.tokens(self.material(made).pairs)
        of_features = made.contender.kind == "features" and self.sae is not None
        points = [self.sae.hook_point] if of_features and self.sae else self.layers
        up_to = parameters_up_to(self.bench.model, max(points, key=lambda point: point.layer))
        encoding = self.sae.d_in * self.sae.d_sae if of_features and self.sae else 0
        return tokens, 2.0 * (up_to + encoding) * tokens

    def _longer(self, prepared: Prepared) -> float:
        """Tokens that an arm adds to a prompt, mean over validation items."""
        encode = self.bench.tokenizer.encode
        added = [
            len(encode(prepared.prompt_transform(item.pair.prompt), add_special_tokens=False))
            - len(encode(item.pair.prompt, add_special_tokens=False))
            for item in self.split.validation
            if prepared.prompt_transform(item.pair.prompt) != item.pair.prompt
        ]
        return sum(added) / len(added) if added else 0.0
