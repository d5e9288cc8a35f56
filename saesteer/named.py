"""Edits by name: features by their numbers, directions by the names that a run keeps them under.

A direction is a feature's number (its decoder row), the name of a vector in RUN/steers, or the
.safetensors file of one. Kept edits are a name, or a file: .safetensors of `save_edits`, .gguf of
llama.cpp and repeng, .pt of lm-evaluation-harness.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from saesteer import units
from saesteer.errors import RunError, SteeringError

if TYPE_CHECKING:
    from torch import Tensor

    from saesteer.core.model import HookPoint
    from saesteer.directions import Direction
    from saesteer.directions.direction import Part
    from saesteer.run import Run
    from saesteer.steering.edits import Edit

Strength = str | float
Name = int | str

_SUFFIX = ".steer.safetensors"
_FOREIGN = (".gguf", ".pt", ".pth")
_NAME = re.compile(r"[\w-]+")
_ANGLE = re.compile(r"(to)?\s*([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)\s*(deg)?", re.IGNORECASE)


def edits(
    run: "Run",
    *,
    clamp: Mapping[int, Strength],
    add: Mapping[int, Strength],
    vector: Mapping[str, Strength],
    project: Mapping[Name, Strength],
    rotate: Mapping[tuple[Name, Name], Strength],
    force: bool,
) -> "list[Edit]":
    """See `Run.edits`."""
    from saesteer.steering.edits import Add, Clamp, Project, Rotate

    found: list[Edit] = [
        Clamp(run.sae, feature, units.of_feature(run, feature, value))
        for feature, value in clamp.items()
    ]
    for feature, value in add.items():
        row, point = direction(run, feature)
        strength = units.added(run, row, point, value, feature=feature)
        found.append(Add(row, strength, point, _told(feature)))
    for name, value in vector.items():
        found += _vector(run, name, value, force)
    for key, value in project.items():
        one, point = direction(run, key, force=force)
        found.append(Project(one, point, _projection(run, key, value, force), _told(key)))
    for plane, value in rotate.items():
        if not isinstance(plane, tuple) or len(plane) != 2:
            raise SteeringError(f"rotate={plane!r}: a plane is two directions, such as (12, 40)")
        first, second = plane
        one, point = direction(run, first, force=force)
        other, place = direction(run, second, force=force)
        if point != place:
            raise SteeringError(
                f"{_told(first)} is at {point} and {_told(second)} at {place}; a rotation needs "
                "two directions of one hook point"
            )
        angle, how = _angle(first, second, value)
        plane_name = f"{_told(first)}, {_told(second)}"
        found.append(Rotate(one, other, angle, point, how, plane_name))
    return found


def direction(run: "Run", name: Name, *, force: bool = False) -> "tuple[Tensor, HookPoint]":
    """A direction [d_model], and the hook point where it belongs.

    name: a feature, or what `load_vector` takes. force: see there.

    Raises:
        FeatureError: no such feature. RunError, SteeringError: see `load_vector`.
    """
    if isinstance(name, str):
        kept = load_vector(run, name, force=force)
        return kept.vector, kept.point
    return run.sae.direction(name), run.sae.write_point


def _vector(run: "Run", name: str, value: Strength, force: bool) -> "list[Edit]":
    """What a method fitted, used as it is meant, times a strength; in units of norm or KL only a
    single direction to add."""
    from saesteer.directions.direction import Use
    from saesteer.effects import apply
    from saesteer.steering.edits import Add

    parts = load_parts(run, name, force=force)
    if len(parts) == 1 and parts[0].use == Use():
        one, point = direction(run, name, force=force)
        return [Add(one, units.added(run, one, point, value), point, _told(name))]
    try:
        strength = float(str(value).strip().lower().removesuffix("x"))
    except ValueError:
        raise SteeringError(
            f"strength {value!r} of {_told(name)}: it is no single direction to add, so give a "
            "plain number, 1 for the method as it is"
        ) from None
    return apply.edits(parts, strength)


def load_vector(run: "Run", name: str, *, force: bool = False) -> "Direction":
    """See `Run.load_vector`."""
    from saesteer.directions import Direction

    parts = load_parts(run, name, force=force)
    if len(parts) != 1 or not isinstance(parts[0], Direction):
        raise SteeringError(
            f"{_told(name)} is {len(parts)} parts of {parts[0].method}, and no single direction; "
            "use it as --vector NAME=STRENGTH"
        )
    return parts[0]


def load_parts(run: "Run", name: str, *, force: bool = False) -> "list[Part]":
    """All that a method fitted and `vectors.fit` kept, by name or file; raises as `load_vector`."""
    from saesteer.core.model import fingerprint
    from saesteer.directions import kept

    path, here = Path(name), ""
    if path.suffix != ".safetensors":
        if path.name != name:
            raise RunError(f"no vector {name!r}; give a name, or the .safetensors file of a vector")
        path, here = _file(run, name), f"{run.path} has "
    if not path.is_file():
        _refuse_adapter(run, name)
        if here and _file(run, name, _SUFFIX).is_file():
            raise RunError(f"{name} is edits, and no vector: --load {name}")
        known = sorted(
            p.stem for p in (run.path / "steers").glob("*.safetensors") if "." not in p.stem
        )
        has = ("; it has " if here else f"; {run.path} has ") + ", ".join(known) if known else ""
        raise RunError(
            f"{here}no vector {name!r}{has}; fit one with `saesteer vector {run.path} --pairs FILE "
            f"--name {path.stem}`"
        )
    return kept.load_parts(path, model_fingerprint=fingerprint(run.model), force=force)


def vector_path(run: "Run", name: str) -> Path:
    """Where the direction of that name is to be kept. RunError where it is no name."""
    return _file(run, checked(name, "a vector"))


def edits_path(run: "Run", name: str) -> Path:
    """Where edits of that name are to be kept. RunError where it is no name."""
    return _file(run, checked(name, "edits"), _SUFFIX)


def adapter_path(run: "Run", name: str) -> Path:
    """The folder where the adapter of that name is to be kept. RunError where it is no name."""
    return _file(run, checked(name, "an adapter"), "")


def checked(name: str, what: str) -> str:
    """A name for what is kept in RUN/steers.

    Without dots, by which the files of vectors, edits and everything else there differ.

    Raises:
        RunError: it has other characters than letters, digits, dashes and underscores, or none.
    """
    if not _NAME.fullmatch(name):
        raise RunError(
            f"{name!r} is not a name for {what}; use letters, digits, dashes and underscores"
        )
    return name


def _file(run: "Run", name: str, suffix: str = ".safetensors") -> Path:
    """The file of a name, also of one with dots, which older versions took."""
    return run.path / "steers" / f"{name}{suffix}"


def in_python(run: Path, adapter: Path) -> str:
    """The lines of Python that generate with an adapter."""
    return (
        "import peft, saesteer; from saesteer.core.generate import write; "
        f'run = saesteer.Run.open("{run}"); '
        f'model = peft.PeftModel.from_pretrained(run.model, "{adapter}").eval(); '
        'print(write(model, run.tokenizer, ["…"])[0].text)'
    )


def _refuse_adapter(run: "Run", name: str) -> None:
    """RunError where the name, or folder, is that of an adapter: how that is used."""
    for folder in (_file(run, name, ""), Path(name)):
        if (folder / "adapter_config.json").is_file():
            raise RunError(
                f"{name} is an adapter, of which no edits are made; with peft (pip install "
                f"'saesteer[finetune]'), in Python: {in_python(run.path, folder)}"
            )


def load_edits(run: "Run", name: str | Path, *, force: bool = False) -> "list[Edit]":
    """See `Run.load_edits`."""
    from saesteer.steering import exchange
    from saesteer.steering.artifact import load_edits, read_document

    path = Path(name)
    if path.suffix not in (".safetensors", *_FOREIGN) and not path.is_file():
        _refuse_adapter(run, str(name))
        if path.name != str(name):
            raise RunError(f"no edits {name}; give a name, or a .safetensors, .gguf or .pt file")
        path = _file(run, str(name), _SUFFIX)
    if not path.is_file():
        keeps = ", ".join(
            sorted(p.name.removesuffix(_SUFFIX) for p in (run.path / "steers").glob(f"*{_SUFFIX}"))
        )
        vector = _file(run, str(name)).is_file()
        raise RunError(
            f"no edits at {path}; {run.path} keeps {keeps or 'none'}; "
            + (f"{name} is a vector: --vector {name}=1" if vector else "save some with --save NAME")
        )
    if path.suffix == ".gguf":
        return exchange.from_gguf(path)
    if path.suffix in _FOREIGN:
        return exchange.from_lm_eval(path, run.model)
    hashes = {sae["hash"] for sae in read_document(path)["saes"]}
    ours = bool(hashes) and run.sae.hash in hashes
    return load_edits(path, run.model, sae=run.sae if ours else None, force=force)


def _projection(run: "Run", name: Name, value: Strength, force: bool) -> float:
    """A number, or "chosen" or "rejected": where that side of a vector's pairs is on average."""
    if value in ("chosen", "rejected") and isinstance(name, str):
        mean = load_vector(run, name, force=force).provenance.get(f"{value}_mean")
        if mean is None:
            raise SteeringError(
                f"{_told(name)} doesn't say where its {value} side is: fit it again, or give a "
                "number"
            )
        return float(mean)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise SteeringError(
            f"{value!r} is no projection on {_told(name)}; give a plain number in the units of "
            "the activation, 0 to project the direction out, or of a vector fitted on pairs "
            "chosen or rejected, where that side is on average"
        ) from None


def _angle(first: Name, second: Name, value: Strength) -> tuple[float, Literal["by", "to"]]:
    """ "30deg", "to30deg" or a number of radians, and whether it turns by it or to it."""
    match = _ANGLE.fullmatch(str(value).strip())
    try:
        number = float(match[2]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not math.isfinite(number):
        raise SteeringError(
            f"{value!r} is no angle from {_told(first)} to {_told(second)}; write 30deg to turn by "
            "it, to30deg to turn to it, or a plain number of radians"
        )
    return math.radians(number) if match[3] else number, "to" if match[1] else "by"


def _told(name: Name) -> str:
    return f"feature {name}" if isinstance(name, int) else Path(name).stem
