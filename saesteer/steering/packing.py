"""Edits taken apart into JSON and tensors for `artifact`, and put together again.

Fields are taken as the dataclasses declare them, so that a new one is kept too, and what can't be
kept is refused by its type, never dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, get_args

from torch import Tensor

from saesteer import __version__
from saesteer.core import sae_formats
from saesteer.core.model import HookPoint
from saesteer.core.sae import Sae
from saesteer.errors import SteeringError
from saesteer.steering.conditions import Feature, Projection, When
from saesteer.steering.edits import Edit
from saesteer.steering.positions import Positions
from saesteer.steering.schedules import Schedule

KINDS: Mapping[str, Any] = {kind.__name__: kind for kind in get_args(Edit)}

_READINGS: Mapping[str, Any] = {kind.__name__: kind for kind in (Feature, Projection)}
_SCHEDULES: Mapping[str, Any] = {kind.__name__: kind for kind in get_args(Schedule)}
# In the notes of an SAE that came out of a file: which SAE and features it is.
_ORIGIN = "narrowed_from"


class Pack:
    """Takes edits apart into JSON and tensors; what several of them share is kept once."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.saes: list[dict[str, Any]] = []
        self.conditions: list[dict[str, Any]] = []
        self._names: dict[int, str] = {}  # of tensors, by id; the edits keep them alive
        self._whens: dict[int, int] = {}
        self._features: dict[str, list[int]] = {}  # of each SAE, in its own numbers
        readings = [edit.when.reads for edit in edits if edit.when is not None]
        self._numbers: dict[str, int] = {}  # of SAEs, by hash
        found: dict[str, Sae] = {}
        for one in (*edits, *readings):
            own: Sae | None = getattr(one, "sae", None)
            if own is not None:
                found.setdefault(own.hash, own)
                features = self._features.setdefault(own.hash, [])
                if (feature := int(getattr(one, "feature"))) not in features:  # noqa: B009
                    features.append(feature)
        for own in found.values():
            self._add_sae(own)

    def described(self, value: Any) -> dict[str, Any]:
        """An edit, a reading or a schedule: its kind, and its fields."""
        one = {f.name: self._field(getattr(value, f.name)) for f in fields(value)}
        if isinstance(getattr(value, "sae", None), Sae):
            one["feature"] = value.sae.trained_number(int(value.feature))
        return {"kind": type(value).__name__, **one}

    def _field(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value)}
        if isinstance(value, Sae):
            return {"sae": self._numbers[value.hash]}
        if isinstance(value, HookPoint):
            return str(value)
        if isinstance(value, Positions):
            return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
        if isinstance(value, When):
            return {"condition": self._condition(value)}
        if type(value).__name__ in _SCHEDULES:
            return self.described(value)
        return _plain(value)

    def _condition(self, when: When) -> int:
        if id(when) not in self._whens:
            self._whens[id(when)] = len(self.conditions)
            others = {
                f.name: _plain(getattr(when, f.name)) for f in fields(when) if f.name != "reads"
            }
            self.conditions.append({"reads": self.described(when.reads), **others})
        return self._whens[id(when)]

    def _tensor(self, tensor: Tensor) -> str:
        if id(tensor) not in self._names:
            name = self._names[id(tensor)] = f"tensors.{len(self._names)}"
            # safetensors refuses tensors that share memory.
            self.tensors[name] = tensor.detach().cpu().contiguous().clone()
        return self._names[id(tensor)]

    def _add_sae(self, sae: Sae) -> None:
        number = self._numbers[sae.hash] = len(self.saes)
        features = self._features[sae.hash]
        origin = _origin(sae)
        entry: dict[str, Any] = {
            "hash": sae.hash if origin is None else origin["hash"],
            "model_id": sae.model_id,
            "hook_point": str(sae.hook_point),
            "architecture": sae.architecture,
            "notes": {key: value for key, value in sae.notes.items() if key != _ORIGIN},
            "features": [sae.trained_number(feature) for feature in features],
        }
        if sae.architecture != "topk":
            parts = {f.name: getattr(sae.narrowed(features), f.name) for f in fields(sae)}
            if sae.hook_point.head is not None:
                # A single head has no name in the SAELens format; the entry's own is taken back.
                parts["hook_point"] = HookPoint(sae.hook_point.layer, "attn_out")
            parts["notes"] = entry["notes"]
            entry["config"], tensors = sae_formats.to_saelens(parts)
            self.tensors |= {f"saes.{number}.{name}": t.clone() for name, t in tensors.items()}
        self.saes.append(entry)


class Unpack:
    """Puts together again what `Pack` took apart."""

    def __init__(
        self, path: str, document: dict[str, Any], tensors: dict[str, Tensor], given: list[Sae]
    ) -> None:
        self._path, self._document, self._tensors = path, document, tensors
        known = {entry["hash"]: i for i, entry in enumerate(document["saes"])}
        for one in given:
            if one.hash not in known:
                there = ", ".join(known) or "none"
                raise SteeringError(
                    f"the SAE given has hash {one.hash}, and the edits in {path} were made with "
                    f"{there}: give that one"
                )
        whole = {one.hash: one for one in given}
        # Of each: the SAE, and the new numbers of its features (None: as they are).
        self._saes = [self._sae(i, entry, whole) for i, entry in enumerate(document["saes"])]
        self._conditions: list[When] = []
        self._conditions += [
            When(**{**each, "reads": self._made(each["reads"], _READINGS)})
            for each in document["conditions"]
        ]

    def edits(self) -> list[Edit]:
        return [self._made(each, KINDS) for each in self._document["edits"]]

    def _made(self, described: Mapping[str, Any], kinds: Mapping[str, Any]) -> Any:
        kind = kinds.get(described["kind"])
        if kind is None:
            raise SteeringError(
                f"{self._path} holds a {described['kind']}, which this saesteer ({__version__}) "
                f"doesn't know; it knows {', '.join(kinds)}: install saesteer "
                f"{self._document['saesteer']}, which wrote it"
            )
        values = {k: self._value(k, v) for k, v in described.items() if k != "kind"}
        if "sae" in values:
            values["sae"], numbers = values["sae"]
            values["feature"] = values["feature"] if numbers is None else numbers[values["feature"]]
        return kind(**values)

    def _value(self, name: str, value: Any) -> Any:
        if name == "where":
            spans = value["spans"]
            spans = None if spans is None else tuple((start, end) for start, end in spans)
            return Positions(**{**value, "spans": spans})
        if not isinstance(value, dict):
            return value
        if name == "schedule":
            return self._made(value, _SCHEDULES)
        ((to, key),) = value.items()
        kept: Mapping[str, Any] = {
            "tensor": self._tensors,
            "sae": self._saes,
            "condition": self._conditions,
        }
        return kept[to][key]

    def _sae(
        self, number: int, entry: dict[str, Any], whole: Mapping[str, Sae]
    ) -> tuple[Sae, dict[int, int] | None]:
        if entry["hash"] in whole:
            return whole[entry["hash"]], None
        if "config" not in entry:
            raise SteeringError(
                f"the edits in {self._path} use a {entry['architecture']} SAE, whose features "
                "depend on one another, so the file holds its hash alone: load the SAE with hash "
                f"{entry['hash']} (of {entry['model_id']}, at {entry['hook_point']}) and give it "
                "as sae="
            )
        prefix = f"saes.{number}."
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in self._tensors.items()
            if name.startswith(prefix)
        }
        parts = sae_formats.from_saelens(entry["config"], tensors, self._path)
        sae = Sae(**{**parts, "hook_point": HookPoint.parse(entry["hook_point"])})
        origin = {"hash": entry["hash"], "features": entry["features"], "narrow": sae.hash}
        sae = replace(sae, notes={**entry["notes"], _ORIGIN: origin})
        return sae, {feature: i for i, feature in enumerate(entry["features"])}


def _origin(sae: Sae) -> Mapping[str, Any] | None:
    """Which SAE and features this is, where it came out of a file and is still what it was."""
    origin = sae.notes.get(_ORIGIN)
    return origin if isinstance(origin, Mapping) and origin.get("narrow") == sae.hash else None


def _plain(value: Any) -> Any:
    """A number, a text, a truth value, nothing, or a sequence of such, as JSON has it."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if hasattr(value, "item"):  # of numpy or torch
        return _plain(value.item())
    if isinstance(value, int | float):
        return value
    raise SteeringError(
        f"an edit holds a {type(value).__name__}, which can't be saved: use plain numbers, "
        "vectors, hook points, conditions and schedules of saesteer"
    )
