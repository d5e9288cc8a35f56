"""Directions of a run: fitted on contrast pairs by any method, and kept by name in RUN/steers."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saesteer.core.blocks import decoder_layers
from saesteer.core.model import HookPoint
from saesteer.directions.answers import answer_activations
from saesteer.directions.direction import Direction, Part
from saesteer.directions.fitting import Reader, fit_method, fit_reader
from saesteer.directions.groups import groups_of
from saesteer.directions.kept import save_parts
from saesteer.directions.methods import ALTERNATIVES, METHODS
from saesteer.directions.methods import method as known_method
from saesteer.directions.pairs import Pair
from saesteer.effects import diagnose as diagnosing
from saesteer.effects.diagnose import Diagnosis
from saesteer.errors import ConfigError
from saesteer.run import Run
from saesteer.run_text import batches, has_cache

EVERY = "all"
"""What stands for every layer in place of a hook point."""

OF_ALL_BLOCKS = ("iti", "icv")
"""Methods that choose among all blocks, as they were published, where no layer is named."""
# Tokens of the run's text in which a direction's top contexts are looked for.
_TEXT = 100_000


@dataclass(frozen=True)
class Kept:
    """Parts that were fitted together, and the file they were kept in under a name."""

    name: str
    parts: tuple[Part, ...]
    path: Path


def points_of(run: Run, layers: str | None, site: str = "resid_post") -> list[HookPoint]:
    """Hook points by name: one, several with commas between, "all" blocks, or (None) the SAE's."""
    if layers is None:
        return [run.hook_point]
    if layers == EVERY:
        return [HookPoint(i, site) for i in range(len(decoder_layers(run.model)))]
    return [HookPoint.parse(text.strip()) for text in layers.split(",")]


def fit(
    run: Run,
    pairs: tuple[Pair, ...],
    *,
    name: str,
    method: str = "mean-difference",
    layers: str | None = None,
    read: str | None = None,
    seed: int = 0,
    noise: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> list[Kept]:
    """Fit a method on pairs and keep what it gives; activations are read once for all layers.

    A method of activations is kept for each layer by itself, as NAME, or NAME-3 where there are
    several layers; what a method that runs the model gives belongs together and is kept as NAME.
    Directions that are alternatives (both signs of a component, MELBO's) are numbered: NAME-1, ….

    Args:
        layers: see `points_of`.
        read, seed, noise, options: as of `directions.fitting.fit_method`.

    Raises:
        ConfigError: a method or option that there isn't, a method that only reads, or noise for
            one without sides.
        PairsError, HookPointError: as of `fit_method`. RunError: no name of a file.
    """
    chosen = known_method(method)
    run.vector_path(name)  # a wrong name is told before the work
    check_noise(method, noise)
    if method == "act-add" and layers is None:  # it is published for what enters a block
        layers = f"layers.{run.hook_point.layer + 1}.resid_pre"
    if method in OF_ALL_BLOCKS and layers is None:
        layers = EVERY
    points = points_of(run, layers, "resid_pre" if method == "act-add" else "resid_post")
    found = fit_method(
        method,
        run.model,
        run.tokenizer,
        pairs,
        points,
        read=read,
        seed=seed,
        noise=noise,
        cache=_cache(run),
        **(options or {}),
    )
    if chosen.kind == "model":
        groups = {name: tuple(part for parts in found.values() for part in parts)}
    elif len(found) == 1:
        groups = {name: tuple(*found.values())}
    else:
        # Two places of one layer are told apart by their whole names.
        alone = len({point.layer for point in found}) == len(found)
        groups = {
            f"{name}-{point.layer if alone else str(point).replace('.', '-')}": tuple(parts)
            for point, parts in found.items()
        }
    if method in ALTERNATIVES:
        groups = {
            f"{own}-{i}": (part,)
            for own, parts in groups.items()
            for i, part in enumerate(parts, 1)
        }
    kept = []
    for own, parts in groups.items():
        if not parts:
            raise ConfigError(f"{method} found nothing in these pairs; give others")
        path = run.vector_path(own)
        save_parts(path, parts)
        kept.append(Kept(own, parts, path))
    return kept


def check_noise(method: str, noise: float) -> None:
    """ConfigError where sides are to be swapped for a method that sees prompts alone."""
    if method == "melbo" and noise:
        raise ConfigError(
            f"noise={noise:g} swaps the sides of pairs, and melbo sees their prompts alone, which "
            "have none; leave the noise out"
        )


def read_with(
    run: Run,
    pairs: tuple[Pair, ...],
    *,
    method: str,
    layers: str | None = None,
    read: str | None = None,
    seed: int = 0,
    noise: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> dict[HookPoint, tuple[Reader, float | None]]:
    """At each layer a reader and its held-out AUROC; arguments as of `fit`."""
    return fit_reader(
        method,
        run.model,
        run.tokenizer,
        pairs,
        points_of(run, layers),
        read=read,
        seed=seed,
        noise=noise,
        cache=_cache(run),
        **(options or {}),
    )


def diagnose(run: Run, pairs: tuple[Pair, ...], direction: Direction) -> Diagnosis:
    """What the pairs, the run's text and its SAE say of a direction fitted by `fit`, before anyone
    steers with it; see `effects.diagnose`.

    Text and SAE are left out where they are of another hook point.

    Raises:
        PairsError: the pairs can't be read at its point.
    """
    chosen, rejected = answer_activations(
        run.model, run.tokenizer, pairs, direction.point, read=direction.read, cache=_cache(run)
    )
    method = METHODS.get(direction.method)
    again = None
    if method is not None and method.kind == "pairs":
        options = direction.provenance.get("options", {})
        again = functools.partial(method.fit, seed=direction.provenance.get("seed", 0), **options)
    here = direction.point == run.hook_point
    text = batches(run, None, _TEXT, held_out=False) if here and has_cache(run) else None
    return diagnosing.diagnose(
        direction,
        chosen,
        rejected,
        run.model,
        run.tokenizer,
        fit=again,
        groups=groups_of(pairs),
        text=text,
        sae=run.sae if here and run.sae.write_point == direction.point else None,
    )


def _cache(run: Run) -> Path:
    return run.path / "steers" / "pairs.cache"
