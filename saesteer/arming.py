"""Arms of a comparison on a run: made ready on pairs, measured on others, and kept by name.

What an arm makes decides what is kept: edits as RUN/steers/NAME.steer.safetensors, an adapter as
the folder RUN/steers/NAME, in peft's format. A prompt is text, and is kept nowhere. Directions by
the names of `directions.methods` are fitted by `saesteer.vectors`; here they are what an arm gates.
"""

import copy
import inspect
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from transformers import PreTrainedModel

from saesteer import named
from saesteer.compare.arms import ARMS, arm
from saesteer.compare.arms.training import finetuning
from saesteer.compare.held_out import check_apart, hold_out
from saesteer.compare.prepared import Material, Prepared, margins_of, noisy
from saesteer.core.clock import SteeringWarning
from saesteer.core.model import fingerprint
from saesteer.directions.direction import Part
from saesteer.directions.methods import METHODS
from saesteer.directions.pairs import Pair
from saesteer.effects import apply
from saesteer.errors import ConfigError, RunError, did_you_mean
from saesteer.run import Run
from saesteer.steering.artifact import save_edits
from saesteer.vectors import EVERY, OF_ALL_BLOCKS, check_noise, points_of

Group = Literal["directions", "readers", "features of the SAE", "prompts", "trained"]
# What a method's function takes that is no option of its own; an arm's takes the material.
_HANDED = ("seed", "read", "batch_size", "cache")


@dataclass(frozen=True)
class Margins:
    """Mean margins on n pairs, without an arm and under it at strength 1, in nats a token."""

    n: int
    without: float
    under: float


@dataclass(frozen=True)
class Armed:
    """An arm made ready.

    prepared: the arm itself. n_pairs: those that it was made of. margins: on those held out.
    path: what was kept; None for a prompt.
    """

    method: str
    prepared: Prepared
    n_pairs: int
    margins: Margins
    path: Path | None


def rows() -> dict[str, Group]:
    """Every method and arm by name, and the group that it is listed in; groups are together."""
    groups: dict[str, Group] = {
        name: "readers" if method.kind == "reader" else "directions"
        for name, method in METHODS.items()
    }
    told: dict[str, Group] = {
        "edits": "features of the SAE",
        "prompt": "prompts",
        "model": "trained",
    }
    groups |= {name: told[one.makes] for name, one in ARMS.items() if name not in METHODS}
    order = list(dict.fromkeys(groups.values()))
    return dict(sorted(groups.items(), key=lambda item: order.index(item[1])))


def options_of(method: str, of: str | None = None) -> dict[str, inspect.Parameter]:
    """The options of a method's or an arm's own; of "gated", those of the arm `of` as well.

    Raises:
        ConfigError: no such row, or nothing that can be gated.
    """
    if method not in rows():
        names = rows()
        raise ConfigError(
            f"no method {method!r}{did_you_mean(method, names)}; the methods are {', '.join(names)}"
        )
    if method in METHODS:
        first = 4 if METHODS[method].kind == "model" else 2
        found = list(inspect.signature(METHODS[method].fit).parameters.items())[first:]
        return {name: option for name, option in found if name not in _HANDED}
    found = list(inspect.signature(ARMS[method].function).parameters.items())[1:]
    own = {name: o for name, o in found if o.kind is not inspect.Parameter.VAR_KEYWORD}
    if method != "gated" or of is None:
        return own
    if of == method or of not in ARMS or ARMS[of].makes != "edits":
        can = [name for name, one in ARMS.items() if one.makes == "edits" and name != method]
        raise ConfigError(
            f"gated can't be of={of}{did_you_mean(of, can)}; it takes what makes edits: "
            f"{', '.join(can)}"
        )
    return own | options_of(of)


def check_asked(
    run: Run,
    method: str,
    name: str | None,
    options: Mapping[str, Any],
    *,
    layers: str | None = None,
    read: str | None = None,
) -> None:
    """Refuse what `make` could do nothing with, before any model is loaded; arguments as there.

    Raises:
        ConfigError: an option that isn't known or is missing, a layer of what has none, or no name
            for what is kept. RunError: no name of a file.
    """
    of = options.get("of", method)
    known = options_of(method, options.get("of"))
    for option in options:
        if option not in known:
            raise ConfigError(
                f"{method} has no option {option!r}{did_you_mean(option, known)}; its options are "
                f"{', '.join(known)}"
            )
    for option, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and option not in options:
            raise ConfigError(
                f"{method} needs the option {option!r}; give it with --set {option}=…, as "
                "`saesteer vector --list` says"
            )
    if of not in METHODS and (layers is not None or read is not None):
        raise ConfigError(
            f"a layer and what is read are of directions, and {of} has neither; leave them out"
        )
    if arm(method).makes == "prompt":
        return
    if name is None:
        raise ConfigError(f"what {method} makes is kept by name; give one with --name NAME")
    named.checked(name, f"what {method} makes")


def make(
    run: Run,
    pairs: Sequence[Pair],
    *,
    method: str,
    name: str | None = None,
    validation: Sequence[Pair] | None = None,
    layers: str | None = None,
    read: str | None = None,
    seed: int = 0,
    noise: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> Armed:
    """Make an arm ready on pairs, keep what it makes, and measure it on pairs held out.

    Args:
        method: an arm that is no method of `directions.methods`, for which there is
            `vectors.fit`.
        name: what edits and adapters are kept as; a prompt needs none.
        validation: pairs held out; None holds out a quarter of `pairs`. An arm that has settings
            to choose chooses them by these (see its notes' "validation_looks").
        layers, read: of the direction that is gated; see `vectors.points_of`.
        seed: of what is drawn, the split as well.
        noise: this share of the pairs that it is made of has its sides swapped.
        options: the arm's own, as values.

    Raises:
        ConfigError: no such arm or option, an option missing, no name for what is kept, or noise
            for what has no sides.
        PairsError: too few pairs, or some of them in `validation` as well.
        SaeError, IndexingError: an arm of features, and no SAE or index of it in the run.
        SaesteerError: an arm that trains, without the extra that it needs. RunError: no name of a
            file. As the arm besides.
    """
    given = dict(options or {})
    chosen, of = arm(method), given.get("of", method)
    check_noise(of, noise)
    check_asked(run, method, name, given, layers=layers, read=read)
    if validation is None:
        fitted, held = hold_out(pairs, seed)
    else:
        fitted, held = tuple(pairs), tuple(validation)
        check_apart(fitted, held)
    # The index first: without it there is no need to load a model.
    index = run.index if _of_features(of) else None
    sae = run.sae if index is not None else None
    material = Material(run.model, run.tokenizer, fitted, held, sae, index, seed)
    if noise:
        material = noisy(material, noise)
    if of in METHODS:
        given["points"] = points_of(run, layers or (EVERY if of in OF_ALL_BLOCKS else None))
        given |= {"read": read, "cache": run.path / "steers" / "pairs.cache"}
    prepared = chosen(material, **given)
    margins = measured(run, prepared, held)
    kept = None
    if name is not None and chosen.makes == "edits":
        kept = named.edits_path(run, name)
        about = {"method": method, "n_pairs": len(fitted), "notes": dict(prepared.notes)}
        save_edits(kept, prepared.edits(1.0), run.model, provenance=about)
    elif name is not None and chosen.makes == "model":
        kept = named.adapter_path(run, name)
        save_adapter(kept, prepared.model)
    return Armed(method, prepared, len(fitted), margins, kept)


def measured(run: Run, prepared: Prepared, validation: Sequence[Pair]) -> Margins:
    """What an arm does at strength 1 to the margins of pairs.

    Pairs go in several passes; of the warnings that edits did nothing the first is given, with the
    number of those like it.
    """
    plain = Prepared("without", run.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        without, under = (
            float(margins_of(one, run.tokenizer, validation).mean()) for one in (plain, prepared)
        )
    idle = [one for one in caught if issubclass(one.category, SteeringWarning)]
    for one in caught:
        if one not in idle:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if idle:
        more = f" (on held-out pairs; {len(idle) - 1} more like it)" if len(idle) > 1 else ""
        warnings.warn(f"{idle[0].message}{more}", SteeringWarning, stacklevel=2)
    return Margins(len(validation), without, under)


def applied(run: Run, parts: Sequence[Part]) -> Prepared:
    """Directions that were fitted, as an arm."""
    return Prepared(parts[0].method, run.model, edits=lambda strength: apply.edits(parts, strength))


def fits(run: Run, parts: Sequence[Part]) -> bool:
    """Whether the run's model has the weights that all the parts were fitted on."""
    return all(part.model_fingerprint == fingerprint(run.model) for part in parts)


def save_adapter(folder: Path, model: PreTrainedModel) -> None:
    """Write the adapters in a model as a folder that `peft.PeftModel.from_pretrained` reads.

    An adapter that is there is replaced.

    Raises:
        RunError: the folder is something else, or can't be written.
    """
    if folder.exists() and not (folder / "adapter_config.json").is_file():
        raise RunError(f"{folder} is there, and is no adapter; choose another name")
    peft, _ = finetuning()
    adapted: Any = model
    config = copy.copy(adapted.peft_config["default"])
    config.inference_mode = True
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    # The names that they have within a PeftModel, which loading looks for.
    tensors = {f"base_model.model.{name}": value.contiguous() for name, value in state.items()}
    aside = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        config.save_pretrained(str(aside))
        save_file(tensors, aside / "adapter_model.safetensors", metadata={"format": "pt"})
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    except OSError as error:
        raise RunError(
            f"cannot write {folder}: {error}; free some space or choose another folder"
        ) from error


def _of_features(name: str) -> bool:
    return name not in METHODS and ARMS[name].makes == "edits"
