"""Fitting any method on contrast pairs, at any number of hook points in one pass over them."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.model import HookPoint, fingerprint
from saesteer.directions.answers import answer_activations
from saesteer.directions.direction import Direction, Map, Part
from saesteer.directions.groups import folds, groups_of
from saesteer.directions.methods import Method, method
from saesteer.directions.pairs import Pair, warn_if_few
from saesteer.directions.places import check_sides_read
from saesteer.errors import ConfigError, did_you_mean

FOLDS = 5
"""In how many parts, at the most, the pairs are held out in turn, to tell how well a direction
reads."""

# What `fit_method` itself hands to a method that runs the model, where the method takes it.
_HANDED = ("read", "batch_size", "cache")


class Reader(Protocol):
    """Tells how much an activation is like the chosen side's."""

    def score(self, x: Tensor) -> Tensor:
        """[m] for x [m, d], higher the more like the chosen side."""
        ...


def fit_method(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    points: Sequence[HookPoint],
    *,
    read: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    noise: float = 0.0,
    cache: Path | None = None,
    **options: Any,
) -> dict[HookPoint, list[Part]]:
    """What the method `name` of `methods.METHODS` makes of the pairs, at each point.

    A method that runs the model may choose its own points (heads, say). The provenance of a part
    has the seed, the noise and the options; of a direction fitted on activations also
    "chosen_mean" and "rejected_mean", each side's mean of x·v/‖v‖, and of a method that gives one
    direction "held_out_auroc", the mean over five parts of the pairs of how well x·v, fitted on the
    other four, tells that part's sides apart (by the labels as they are after the noise). Pairs
    that ask the same are in one part (`groups.groups_of`); there are fewer parts where one of five
    wouldn't have two prompts, and no such figure under ten pairs or four prompts.

    Args:
        read, batch_size, cache: as in `answers.answer_activations`; None is "answer-mean", 32 and
            no cache, or what a method that runs the model does by itself. Such a method is handed
            what it takes of them, and its parts say what it read.
        seed: of whatever the method draws, and of the noise.
        noise: this share of the pairs, drawn by `seed`, has its sides swapped first (labels that
            are wrong so often).
        options: the method's own.

    Raises:
        ConfigError: no such method, an option that it doesn't have, a noise outside 0 to 1, or a
            method that only reads (see `fit_reader`).
        PairsError: pairs that can't be read or that the method can make nothing of; the end of the
            prompt as the place to read, by a method that contrasts the sides.
        HookPointError: the model has no such place.
    """
    chosen = _method(name, options)
    if chosen.kind == "reader":
        raise ConfigError(
            f"{name} only reads and makes nothing to steer with; use fitting.fit_reader, or a "
            "method that gives a direction, such as mean-difference"
        )
    facts = {"seed": seed, "noise": noise, "options": options}
    said = _said(read=read, batch_size=batch_size, cache=cache)
    if chosen.kind == "model":
        swaps = swapped(len(pairs), noise, seed).tolist()
        given = [
            replace(p, chosen=p.rejected, rejected=p.chosen) if swap else p
            for p, swap in zip(pairs, swaps, strict=True)
        ]
        takes = inspect.signature(chosen.fit).parameters
        handed = {k: value for k, value in said.items() if k in takes}
        check_sides_read(handed.get("read"))
        prompts = list(dict.fromkeys(pair.prompt for pair in given if pair.prompt))
        what = prompts if "prompts" in takes else given
        found: list[Direction] = chosen.fit(
            model, tokenizer, what, points, seed=seed, **handed, **options
        )
        grouped: dict[HookPoint, list[Part]] = {}
        for part in found:
            part = replace(part, provenance={**facts, **part.provenance})
            grouped.setdefault(part.point, []).append(part)
        return grouped

    if chosen.kind != "pairs-many":  # which takes both sides together
        check_sides_read(read)
    sides = _sides(model, tokenizer, pairs, points, noise, seed, said)
    groups = groups_of(pairs)
    read, of = said.get("read", "answer-mean"), fingerprint(model)
    parts: dict[HookPoint, list[Part]] = {}
    for point, (a, b) in sides.items():
        made = chosen.fit(a, b, seed=seed, **options)
        common = (point, chosen.name, len(pairs), read, of)
        if chosen.kind == "map":
            matrix, shift = made
            parts[point] = [Map(matrix, shift, *common, facts)]
            continue
        vectors = made if chosen.kind == "pairs-many" else [made]
        told: dict[str, Any] = dict(facts)
        if chosen.kind == "pairs":
            told |= _auroc(chosen, a, b, groups, seed, options)
        parts[point] = [
            Direction(vector, *common, {**told, **_means(vector, a, b)}) for vector in vectors
        ]
    return parts


def fit_direction(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    point: HookPoint,
    **how: Any,
) -> Direction:
    """The one direction that a method gives at one point; `how` as in `fit_method`.

    Raises:
        ConfigError: the method gives several directions, or something else. As `fit_method`.
    """
    parts = [
        part
        for found in fit_method(name, model, tokenizer, pairs, [point], **how).values()
        for part in found
    ]
    if len(parts) != 1 or not isinstance(parts[0], Direction):
        raise ConfigError(
            f"{name} gives {len(parts)} parts that aren't one direction; use fitting.fit_method"
        )
    return parts[0]


def fit_reader(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    points: Sequence[HookPoint],
    *,
    read: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    noise: float = 0.0,
    cache: Path | None = None,
    **options: Any,
) -> dict[HookPoint, tuple[Reader, float | None]]:
    """At each point, a reader and its held-out AUROC, or None; see `fit_method`.

    Raises:
        ConfigError: no such method, or not one that only reads. The rest as `fit_method`.
    """
    chosen = _method(name, options)
    if chosen.kind != "reader":
        raise ConfigError(f"{name} is no reader; use fitting.fit_method")
    check_sides_read(read)
    said = _said(read=read, batch_size=batch_size, cache=cache)
    sides = _sides(model, tokenizer, pairs, points, noise, seed, said)
    groups = groups_of(pairs)
    return {
        point: (
            chosen.fit(a, b, seed=seed, **options),
            _auroc(chosen, a, b, groups, seed, options).get("held_out_auroc"),
        )
        for point, (a, b) in sides.items()
    }


def _method(name: str, options: dict[str, Any]) -> Method:
    """The method of that name, once its options are known to be its own."""
    chosen = method(name)
    first = 4 if chosen.kind == "model" else 2
    known = set(list(inspect.signature(chosen.fit).parameters)[first:]) - {"seed", *_HANDED}
    for option in options:
        if option not in known:
            has = f"its options are {', '.join(sorted(known))}" if known else "it has none"
            raise ConfigError(
                f"{name} has no option {option!r}{did_you_mean(option, known)}; {has}"
            )
    return chosen


def _said(**how: Any) -> dict[str, Any]:
    """What isn't None; for the rest, whoever reads the pairs has defaults."""
    return {name: value for name, value in how.items() if value is not None}


def _sides(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    points: Sequence[HookPoint],
    noise: float,
    seed: int,
    said: dict[str, Any],
) -> dict[HookPoint, tuple[Tensor, Tensor]]:
    """Chosen and rejected activations at each point, each [n, d], after the noise."""
    swap = swapped(len(pairs), noise, seed)[:, None]
    found = answer_activations(model, tokenizer, pairs, points, **said)
    warn_if_few(len(pairs))
    return {
        point: (torch.where(swap, b, a), torch.where(swap, a, b)) for point, (a, b) in found.items()
    }


def swapped(n: int, noise: float, seed: int) -> Tensor:
    """Which pairs' sides are swapped: [n] bool, a share of `noise` rounded to whole pairs."""
    if not 0 <= noise <= 1:
        raise ConfigError(f"noise={noise}: the share of pairs whose sides are swapped is 0 to 1")
    found = torch.zeros(n, dtype=torch.bool)
    # A stream of its own: methods draw from `seed` too.
    found[np.random.default_rng([seed, 1]).permutation(n)[: round(noise * n)]] = True
    return found


def _means(vector: Tensor, a: Tensor, b: Tensor) -> dict[str, float]:
    """x·v̂ of each side, on average: where a projection puts every token."""
    unit = vector.double() / vector.double().norm().clamp_min(1e-30)
    return {
        "chosen_mean": float((a.double() @ unit).mean()),
        "rejected_mean": float((b.double() @ unit).mean()),
    }


def _auroc(
    chosen: Method,
    a: Tensor,
    b: Tensor,
    groups: Sequence[int],
    seed: int,
    options: dict[str, Any],
) -> dict[str, float]:
    """How well the method tells apart the sides of groups of pairs that it wasn't fitted on."""
    count, own = folds(groups, FOLDS, np.random.default_rng([seed, 2]))
    if len(a) < 2 * FOLDS or count < 2:
        return {}
    fold = torch.from_numpy(own)
    found = []
    for held in range(count):
        out, rest = fold == held, fold != held
        made = chosen.fit(a[rest], b[rest], seed=seed, **options)
        x = torch.cat([a[out], b[out]])
        scores = made.score(x) if chosen.kind == "reader" else x @ made
        # The share of (chosen, rejected) that stand in order, ties counted half: so few pairs need
        # no sorting, and scikit-learn takes a second to import.
        higher = scores[: len(x) // 2, None] - scores[len(x) // 2 :]
        found.append(float(((higher > 0).double() + 0.5 * (higher == 0)).mean()))
    return {"held_out_auroc": float(np.mean(found))}
