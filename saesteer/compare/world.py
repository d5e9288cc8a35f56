"""The planted benchmark: every arm scored where the right answer is known exactly (METHODS, 4).

On held-out prompts in which a concept is off, an arm turns it on, and the next word's distribution
is held against the exact one: KL(p*_do ‖ model) in nats. A score is the share of the way from no
edit (0) to the ceiling (1), the unedited model in a real context in which the concept is on. What
an arm chooses (a layer or a feature, and a strength) it chooses on validation prompts, every arm
with the same number of evaluations; test prompts are then scored with it for every draw of pairs.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.compare import world_arms, world_flags
from saesteer.compare.statistics import Estimate, bootstrap, paired, wilson
from saesteer.compare.world_arms import SINGLE, VECTOR, Options
from saesteer.compare.world_pool import Pool, read_pool
from saesteer.compare.world_score import clean_stories, edited_kl
from saesteer.core.blocks import decoder_layers
from saesteer.core.model import HookPoint
from saesteer.core.progress import progress
from saesteer.core.sae import Sae
from saesteer.effects import planted_score
from saesteer.effects.damage import Reference
from saesteer.effects.planted_score import Prompts
from saesteer.errors import SteeringError
from saesteer.features.search import Index
from saesteer.world import lexicon

PAIRS = 128
"""Pairs that every arm is given; the vector also has the n-curve."""

VALIDATION, TEST = 6, 12
"""Prompts of each concept."""

MARGIN = 0.05
"""How much worse than the best single feature a vector may be, in scores, to be no worse."""

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Chosen:
    """What validation chose for an arm on one concept: the option, its place, the strength."""

    option: str
    place: int
    strength: float
    kl: float


@dataclass(frozen=True, eq=False)
class Scored:
    """An arm on one concept: kl [draws, prompts] in nats on test; validation's choice; its cost."""

    chosen: Chosen
    kl: _Array
    delta_ce: float
    evaluations: int


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: Sae,
    index: Index,
    *,
    arms: Sequence[str] | None = None,
    n: Sequence[int] = (1, 3, 8, 32, 128, 256),
    draws: int = 10,
    concepts: Sequence[str] | None = None,
    validation: int = VALIDATION,
    test: int = TEST,
    seed: int = 0,
) -> dict[str, Any]:
    """Score every arm on every causal concept of the planted language. JSON.

    Intervals are 95%, from a bootstrap over concepts, then prompts, then draws, with the two fixed
    points held fixed. `anti_steerable` is the share of test prompts that the edits, over draws,
    put further from the exact answer (its Wilson interval beside it); `delta_ce` is on clean
    stories, in nats a token, the mean over concepts. `n_star` is the least n from which the
    vector, with 95% confidence, is no worse than the best single feature (the arm that
    validation liked best) by more than `MARGIN`; None: none of those tried.

    Args:
        model, tokenizer, sae, index: the embedded model, an SAE of it and its index.
        arms: names of `world_arms.ARMS`, or "none"; None: all.
        n: numbers of pairs of the n-curve.
        draws: of pairs, for each arm and each n.
        concepts: None: all causal ones.
        validation, test: prompts a concept.

    Returns:
        "arms": {name: {"score", "low", "high", "anti_steerable", "delta_ce", …}}, "n_curve":
        [{"n", "score", "low", "high", …}], "n_star", "flags": {failure: bool}, "seconds", and
        what stands behind them.

    Raises:
        SteeringError: no such arm, or no draw. TextError: no such concept.
    """
    began = time.monotonic()
    if draws < 1 or not n or min(n) < 1:
        raise SteeringError(f"draws={draws}, n={list(n)}: expected whole numbers from 1 up")
    wanted = world_arms.chosen_arms(arms)
    names = lexicon.causal() if concepts is None else list(concepts)
    n_pairs = max(2 * PAIRS, max(n) * 3 // 2)
    points = _points(model, sae)
    clean = clean_stories(model, tokenizer, seed)
    fixed: dict[str, list[_Array]] = {"none": [], "ceiling": []}
    scored: dict[str, list[Scored | None]] = {arm: [] for arm in wanted}
    curve: dict[int, list[Scored]] = {size: [] for size in dict.fromkeys(n)}
    for concept in progress("world", len(names), unit="concept", iterable=names):
        pool = read_pool(
            model, tokenizer, sae, index, concept,
            points=points, n_pairs=n_pairs, n_found=world_arms.OPTIONS, seed=seed,
        )  # fmt: skip
        looked_at = planted_score.prompts(concept, validation, seed=2 * seed)
        tested = planted_score.prompts(concept, test, seed=2 * seed + 1)
        fixed["none"].append(_kl(model, tested.ids, tested.mask, tested))
        fixed["ceiling"].append(_kl(model, tested.twin_ids, tested.twin_mask, tested))

        def one(arm: str, size: int, pool: Pool, on: tuple[Prompts, Prompts]) -> Scored | None:
            return score_arm(model, pool, arm, size, on, clean, draws=draws, seed=seed)

        for arm in wanted:
            scored[arm].append(one(arm, PAIRS, pool, (looked_at, tested)))
        for size, found in curve.items():
            again = scored[VECTOR][-1] if size == PAIRS else None
            vector = again or one(VECTOR, size, pool, (looked_at, tested))
            assert vector is not None  # it has an option at every layer
            found.append(vector)
    run = {arm: [s for s in of if s] for arm, of in scored.items() if all(of)}
    scale = _Scale(np.stack(fixed["none"]), np.stack(fixed["ceiling"]), seed)
    flags, controls = world_flags.measure(model, tokenizer, sae, index, seed=seed)
    best = min(
        (arm for arm in SINGLE if arm in run),
        key=lambda arm: float(np.mean([s.chosen.kl for s in run[arm]])),
        default=None,
    )
    rows = [_curve_row(scale, size, found, run.get(best or "")) for size, found in curve.items()]
    # From so many pairs on: one lucky n among worse ones is none.
    no_worse = list(itertools.takewhile(lambda row: row["no_worse"], reversed(rows)))
    return {
        "arms": {"none": _nothing(scale), **{arm: _arm_row(scale, run[arm]) for arm in run}},
        "n_curve": rows,
        "n_star": no_worse[-1]["n"] if no_worse else None,
        "flags": {flag.failure: flag.flagged for flag in flags},
        "flag_statistics": [asdict(flag) for flag in flags],
        "controls": [asdict(flag) for flag in controls],
        "best_feature": best,
        "margin": MARGIN,
        "kl": {name: float(np.mean(values)) for name, values in fixed.items()},
        "per_concept": {
            concept: {
                "none": float(fixed["none"][i].mean()),
                "ceiling": float(fixed["ceiling"][i].mean()),
                **{arm: _concept_row(run[arm][i]) for arm in run},
            }
            for i, concept in enumerate(names)
        },
        "pairs": PAIRS, "draws": draws, "seed": seed, "concepts": len(names),
        "prompts": {"validation": validation, "test": test},
        "not_run": [
            {"what": arm, "why": "no feature was found to choose from for some concept"}
            for arm in wanted if arm not in run
        ],
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def score_arm(
    model: PreTrainedModel,
    pool: Pool,
    arm: str,
    n: int,
    prompts: tuple[Prompts, Prompts],
    clean: Reference,
    *,
    draws: int,
    seed: int,
) -> Scored | None:
    """Choose on validation prompts with the first draw of n pairs, score every draw on test ones.

    Where a later draw has no option of the chosen name (its pairs bring up other features), it is
    the option in the same place, or the last. None: the arm has nothing to choose from.
    """
    drawn = []
    for number in range(world_arms.draws_of(arm, draws)):
        order = np.random.default_rng([seed, 12, number]).permutation(pool.n)
        drawn.append(world_arms.ARMS[arm](pool, order[:n], 1000 * seed + number))
    if not all(drawn):
        return None
    grid = [
        (place, name, strength)
        for place, name in enumerate(drawn[0])
        for strength in world_arms.strengths(arm)
    ]
    looks = edited_kl(model, prompts[0], [drawn[0][name](s) for _, name, s in grid]).mean(1)
    place, name, strength = grid[int(looks.argmin())]
    chosen = Chosen(name, place, strength, float(looks.min()))
    edits = [_option(options, chosen)(strength) for options in drawn]
    return Scored(
        chosen, edited_kl(model, prompts[1], edits), clean.cost(edits[0]).delta_ce, len(grid)
    )


@dataclass(frozen=True, eq=False)
class _Scale:
    """From KL to scores: none and ceiling, both [concepts, prompts]."""

    none: _Array
    ceiling: _Array
    seed: int

    @property
    def concept(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(self.none)), self.none.shape[1])

    def gains(self, kl: _Array) -> _Array:
        """Scores [..., concepts · prompts] of kl [..., concepts, prompts]: their mean is the
        share of the mean way, so that no prompt with a short way of its own weighs more."""
        way = float(self.none.mean() - self.ceiling.mean())
        shares = (self.none - kl) / way
        return shares.reshape(*shares.shape[:-2], -1)

    def estimate(self, kl: _Array) -> Estimate:
        return bootstrap(self.gains(kl), self.concept, seed=self.seed)


def _stacked(scored: Sequence[Scored]) -> _Array:
    return np.stack([one.kl for one in scored], axis=1)


def _arm_row(scale: _Scale, scored: Sequence[Scored]) -> dict[str, Any]:
    kl = _stacked(scored)
    found = scale.estimate(kl)
    worse = kl.mean(0) > scale.none
    anti = wilson(int(worse.sum()), worse.size)
    return {
        "score": found.value, "low": found.low, "high": found.high,
        "anti_steerable": anti.value, "anti_low": anti.low, "anti_high": anti.high,
        "delta_ce": float(np.mean([one.delta_ce for one in scored])),
        "kl": float(kl.mean()), "draws": kl.shape[0], "prompts": worse.size,
        "validation_evaluations": sum(one.evaluations for one in scored),
    }  # fmt: skip


def _nothing(scale: _Scale) -> dict[str, Any]:
    zero = dict.fromkeys(("score", "low", "high", "anti_steerable", "delta_ce"), 0.0)
    return {**zero, "kl": float(scale.none.mean()), "draws": 1, "prompts": scale.none.size}


def _curve_row(
    scale: _Scale, size: int, scored: Sequence[Scored], feature: Sequence[Scored] | None
) -> dict[str, Any]:
    row = {"n": size, **_arm_row(scale, scored)}
    if not feature:
        return {**row, "less_feature": None, "no_worse": False}
    vector, other = (scale.gains(_stacked(some)) for some in (scored, feature))
    difference = paired(vector, other, scale.concept, seed=scale.seed).difference
    no_worse = difference.low is not None and difference.low > -MARGIN
    return {**row, "less_feature": asdict(difference), "no_worse": no_worse}


def _concept_row(one: Scored) -> dict[str, Any]:
    return {
        "kl": float(one.kl.mean()), "delta_ce": one.delta_ce,
        "option": one.chosen.option, "strength": one.chosen.strength,
    }  # fmt: skip


def _option(options: Options, chosen: Chosen) -> Any:
    names = list(options)
    return options.get(chosen.option) or options[names[min(chosen.place, len(names) - 1)]]


def _points(model: PreTrainedModel, sae: Sae) -> list[HookPoint]:
    """The ends of up to four blocks spread over the model, the SAE's own place among them."""
    last = len(decoder_layers(model)) - 1
    spread = {round(i * last / 3) for i in range(world_arms.OPTIONS)}
    if sae.write_point.site == "resid_post" and sae.write_point.layer not in spread:
        spread.remove(min(spread, key=lambda layer: abs(layer - sae.write_point.layer)))
        spread.add(sae.write_point.layer)
    return [HookPoint(layer, "resid_post") for layer in sorted(spread)]


def _kl(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, of: Prompts) -> _Array:
    return planted_score.kl(model, ids, mask, of.target).numpy()
