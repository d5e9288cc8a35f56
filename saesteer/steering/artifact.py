"""Edits kept in a file: one safetensors file that stands alone, and never a pickle.

Its metadata hold one JSON document under "saesteer":

    format, version    "saesteer-edits", 1
    saesteer           the version that wrote it
    units              "raw": activation units, not multiples of a feature's maximum
    model              id, revision where known, fingerprint and sizes of the weights
    note, provenance   whatever the writer wanted kept
    edits              one object an edit: its kind, and its fields
    conditions         what edits refer to by number; edits that share one share it again
    saes               of each SAE: hash, model id, hook point, notes, and the features kept
    sha256             over all the rest of the document and the tensors

Tensors are the edits' vectors and matrices in their own dtype, and of each SAE the columns and rows
of the features that are used. A TopK SAE can't be cut down so; of it there is only the hash.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from saesteer import __version__
from saesteer.core.files import written_aside
from saesteer.core.model import fingerprint, weight_sizes
from saesteer.core.sae import Sae
from saesteer.errors import SaesteerError, SteeringError
from saesteer.steering.edits import Edit, Scope
from saesteer.steering.packing import KINDS, Pack, Unpack

FORMAT, VERSION = "saesteer-edits", 1

_KEY = "saesteer"
# Sizes of weights that differ by less are the same weights, rounded.
_SAME_SIZE = 0.01


def save_edits(
    path: str | Path,
    edits: Edit | Sequence[Edit],
    model: nn.Module,
    *,
    note: str = "",
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write edits to one safetensors file, whole or not at all.

    model: the one they were made for; its id and fingerprint are kept, and loading compares them.
    note: a line for people. provenance: where the edits come from; anything that JSON holds.

    Raises:
        SteeringError: no edits, lists for single rows, or something that can't be kept.
        RunError: the file can't be written, or the disk is full.
    """
    some = [edits] if isinstance(edits, Scope) else list(edits)
    if not some:
        raise SteeringError("no edits to save: name at least one Clamp, Add, Project, …")
    for edit in some:
        if type(edit).__name__ not in KINDS:
            raise SteeringError(
                f"{type(edit).__name__} can't be saved: give a flat list of {', '.join(KINDS)} "
                "(a file holds the edits of one row)"
            )
    pack = Pack(some)
    config: Any = getattr(model, "config", None)
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "saesteer": __version__,
        "units": "raw",
        "model": {
            "id": getattr(config, "_name_or_path", None) or None,
            "revision": getattr(config, "_commit_hash", None),
            "fingerprint": fingerprint(model),
            "sizes": [float(f"{size:.4g}") for size in weight_sizes(model)],
        },
        "note": note,
        "provenance": dict(provenance or {}),
        "edits": [pack.described(edit) for edit in some],
        "conditions": pack.conditions,
        "saes": pack.saes,
    }
    try:
        # Through JSON and back, so that what is hashed is what a reader sees.
        document = json.loads(json.dumps(document))
    except (TypeError, ValueError) as error:
        raise SteeringError(
            f"the note, the provenance or an SAE's notes can't be kept as JSON ({error}): use "
            "plain text, numbers, lists and dictionaries"
        ) from error
    document["sha256"] = _digest(document, pack.tensors)
    with written_aside(Path(path)) as aside:
        try:
            save_file(pack.tensors, aside, metadata={_KEY: json.dumps(document)})
        except SafetensorError as error:
            raise SteeringError(
                f"cannot write {path}: {error}; free some space or choose another folder"
            ) from error


def load_edits(
    path: str | Path,
    model: nn.Module,
    *,
    sae: Sae | Sequence[Sae] | None = None,
    force: bool = False,
) -> list[Edit]:
    """The edits that `save_edits` wrote, for this model, on the CPU.

    sae: the whole SAE that clamps or conditions read. Needed where it is a TopK SAE, of which the
    file holds the hash alone; several SAEs as a list. Without it, an edit's `sae` is the SAE of
    the features used, where these have other numbers: `sae.notes["narrowed_from"]["features"]`
    names the old ones, in order.
    force: load although the model's weights are others than those that the edits were made for: of
    some 1024 values of each parameter one has another sign, or their size differs by over 1 %.

    Raises:
        SteeringError: no such file, damage, an unknown version or kind; another model; a TopK SAE
            that wasn't given, or one given that isn't in the file.
    """
    document, tensors = _read(Path(path))
    given = [sae] if isinstance(sae, Sae) else list(sae or ())
    try:
        if not force:
            _check_model(path, document["model"], model)
        return Unpack(str(path), document, tensors, given).edits()
    except SteeringError:
        raise
    except (SaesteerError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise SteeringError(
            f"{path} holds edits that can't be made ({type(error).__name__}: {error}); save them "
            f"again, or install saesteer {document['saesteer']}, which wrote it"
        ) from error


def read_document(path: str | Path) -> dict[str, Any]:
    """What a file of edits says of itself: the JSON document above, checked; no model needed.

    Raises:
        SteeringError: no such file, damage, an unknown version.
    """
    return _read(Path(path))[0]


def _check_model(path: str | Path, made_for: Mapping[str, Any], model: nn.Module) -> None:
    here = fingerprint(model)
    if made_for["fingerprint"] != here:
        differs = f"has fingerprint {here}, not {made_for['fingerprint']}"
    else:
        pairs = zip(made_for.get("sizes", ()), weight_sizes(model), strict=False)
        other = sum(abs(now - then) > _SAME_SIZE * max(then, now) for then, now in pairs)
        if not other:
            return
        differs = f"has other weights: {other} of its parameters are of another size"
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or "this model"
    raise SteeringError(
        f"{path} was made for {made_for['id'] or 'a model'}, and {name} {differs}: load that "
        "model, or give force=True (--force) to use the edits all the same"
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and the tensors of a file, as they were written."""
    if not path.is_file():
        raise SteeringError(f"there is no file {path}; name one that save_edits wrote")
    again = "copy it again, or save the edits again"
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            # Copied out of the memory map, which would change with the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        document = None if text is None else json.loads(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise SteeringError(f"{path} is truncated or damaged ({error}); {again}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise SteeringError(
            f"{path} is no file of edits (its metadata hold no {FORMAT}); name one that "
            "save_edits wrote"
        )
    if document.get("version") != VERSION:
        raise SteeringError(
            f"{path} has version {document.get('version')!r} of the format, written by saesteer "
            f"{document.get('saesteer')}, and this is {__version__}, which reads version "
            f"{VERSION}: install that one, or save the edits again with this one"
        )
    if document.pop("sha256", None) != _digest(document, tensors):
        raise SteeringError(
            f"{path} is damaged: its SHA-256 is not the one it was saved with; {again}"
        )
    return document, tensors


def _digest(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a document without its own digest, and over tensors with their names."""
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
