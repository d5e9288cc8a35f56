"""The arms of the planted benchmark: what each may choose between, made from a draw of pairs.

An arm is given the pool of a concept and the numbers of the pairs that were drawn, and gives its
options by name, each a function of a strength to edits: a direction at each of the layers, or each
of the first candidate features, or numbers of features. Nothing is computed before it is used.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray

from saesteer.compare.world_pool import Dictionary, Pool
from saesteer.core.model import HookPoint
from saesteer.directions.direction import Direction, Map, Use
from saesteer.directions.methods import method
from saesteer.effects import apply
from saesteer.effects.calibrate import EditsAt
from saesteer.errors import SteeringError, did_you_mean
from saesteer.steering.edits import Add, Clamp

OPTIONS = 4
"""Settings that each arm chooses between, each at every strength: layers, or candidates."""

# As many for each arm: of a vector's own length, and of a feature's max_act.
VECTOR_STRENGTHS = tuple(0.4 * i for i in range(1, 15))
FEATURE_STRENGTHS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0)

Rows = NDArray[np.int64]
Options = dict[str, EditsAt]
Arm = Callable[[Pool, Rows, int], Options]
"""(pool, numbers of the pairs drawn, seed) → options by name."""


def _fitted(pool: Pool, rows: Rows, seed: int, *, name: str) -> Options:
    """A method of `directions.methods` at each point of the pool."""

    @cache  # fourteen strengths, one fit
    def part(point: HookPoint) -> Direction | Map:
        chosen, rejected = (side[rows] for side in pool.sides[point])
        common = (point, name, len(rows), "answer-mean", pool.fingerprint)
        if name == "refusal-projection":
            vector = method("mean-difference").fit(chosen, rejected)
            to = float((chosen.double() @ (vector.double() / vector.double().norm())).mean())
            return Direction(vector, *common, use=Use("project", to=to))
        if name == "leace":
            # Half a mean difference after the erasure puts both sides where the chosen one was.
            matrix, shift = method(name).fit(chosen, rejected, seed=seed, add=0.5)
            return Map(matrix, shift, *common)
        return Direction(method(name).fit(chosen, rejected, seed=seed), *common)

    return {
        str(point): partial(lambda p, strength: apply.edits(part(p), strength), point)
        for point in pool.sides
    }


def _one_feature(
    pool: Pool, rows: Rows, seed: int, *, clamp: bool, of: str = "sae", searched: bool = False
) -> Options:
    """One feature, of those most active on the chosen sides or of those that a search found."""
    dictionary = pool.random if of == "random" else pool.dictionary
    chosen = pool.found if searched else candidates(dictionary, pool.features[of][rows])
    sae, unit = dictionary.sae, dictionary.max_act

    def edits(feature: int, strength: float) -> list[Add | Clamp]:
        value = strength * float(unit[feature])
        if clamp:
            return [Clamp(sae, feature, value)]
        return [Add(sae.direction(feature), value, sae.write_point)]

    return {f"feature {f}": partial(edits, f) for f in chosen[:OPTIONS]}


def _several_features(pool: Pool, rows: Rows, seed: int) -> Options:
    """The first k candidates together, each as much as its activation differs (FGAA)."""
    sae, unit = pool.dictionary.sae, pool.dictionary.max_act
    differences = pool.features["sae"][rows].mean(0)
    ranked = candidates(pool.dictionary, pool.features["sae"][rows])

    def edits(k: int, strength: float) -> list[Add]:
        some = ranked[:k]
        shares = torch.from_numpy(differences[some] / differences[some[0]]).to(sae.W_dec)
        directions = torch.stack([sae.direction(feature) for feature in some])
        vector = float(unit[some[0]]) * (shares[:, None] * directions).sum(0)
        return [Add(vector.detach(), strength, sae.write_point)]

    return {f"k={k}": partial(edits, k) for k in (2, 4, 8, 16)} if ranked else {}


def candidates(dictionary: Dictionary, differences: NDArray[np.float64]) -> list[int]:
    """Features more active on the chosen sides, the most so first; differences: [n, d_sae]."""
    mean = differences.mean(0)
    order = np.argsort(-mean, kind="stable")
    return [int(f) for f in order if mean[f] > 0 and dictionary.allowed[f]]


ARMS: dict[str, Arm] = {
    "random": partial(_fitted, name="random"),
    "shuffled-labels": partial(_fitted, name="shuffled-labels"),
    "random-dictionary": partial(_one_feature, clamp=False, of="random"),
    "mean-difference": partial(_fitted, name="mean-difference"),
    "sae-clamp": partial(_one_feature, clamp=True),
    "sae-add": partial(_one_feature, clamp=False),
    "sae-search": partial(_one_feature, clamp=True, searched=True),
    "sae-topk": _several_features,
    **{
        name: partial(_fitted, name=name)
        for name in ("lat", "logistic-probe", "refusal-projection", "leace")
    },
}
"""Name → options; "none", which edits nothing, is not among them."""

SINGLE = ("sae-clamp", "sae-add", "sae-search")
"""Arms of one feature."""

VECTOR = "mean-difference"
"""The arm of the n-curve."""

# These push at random: more directions make up for how little one of them says.
_DRAWS = {"random": 20, "sae-search": 1}


def draws_of(arm: str, draws: int) -> int:
    """How many draws an arm is given: 20 random directions; a search by name needs no pairs."""
    return _DRAWS.get(arm, draws)


def strengths(arm: str) -> tuple[float, ...]:
    """The strengths that an arm is tried at, in its own unit."""
    of_features = arm.startswith("sae-") or arm == "random-dictionary"
    return FEATURE_STRENGTHS if of_features else VECTOR_STRENGTHS


def chosen_arms(names: Sequence[str] | None) -> list[str]:
    """The arms asked for, all where None; the vector of the n-curve is always among them.

    Raises:
        SteeringError: no such arm.
    """
    wanted = list(ARMS) if names is None else [name for name in names if name != "none"]
    for name in wanted:
        if name not in ARMS:
            raise SteeringError(
                f"no arm {name!r} in the planted benchmark{did_you_mean(name, ARMS)}: there are "
                f"none, {', '.join(ARMS)}"
            )
    return list(dict.fromkeys([*wanted, VECTOR]))
