"""Directions to and from other programs: llama.cpp, repeng, steering-vectors, lm-eval-harness.

All four add one vector at the output of a block, on every token, special ones included. So only
`Add` edits at `resid_post` (or `resid_pre` of the next block, which is the same place) can be
given to them, without condition, schedule, keep_norm or choice of tokens; several at one place are
summed. What comes from them has `Positions(special=True)`. Numbers of blocks:

    llama.cpp         tensor direction.N is added after block N, counted from 0; direction.0 is
                      refused. (`common_control_vector_load` puts direction.N at row N − 1 and
                      `llama_adapter_cvec` takes row il − 1 for block il.)
    repeng            directions[N] is added to the output of block N, counted from 0; its GGUF
                      files carry the same numbers.
    steering-vectors  layer_activations[N], decoder_block: the output of block N, counted from 0.
    lm-eval           names a module below `model.base_model` and adds to its output.
"""

import pickle
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saesteer.core.files import written_aside
from saesteer.core.model import SITES, HookPoint, decoder_layers, site_module
from saesteer.errors import HookPointError, SteeringError
from saesteer.steering import gguf
from saesteer.steering.additions import added, as_edits, block_outputs
from saesteer.steering.edits import Edit

ARCHITECTURE = "controlvector"


def to_gguf(
    path: str | Path,
    edits: Sequence[Edit],
    n_layers: int,
    *,
    model_hint: str = "",
    with_special: bool = False,
) -> None:
    """Write a llama.cpp control vector: `llama-cli --control-vector FILE` adds what `steer` adds.

    n_layers: blocks in the model. model_hint: its architecture, such as "llama" (repeng shows it,
    llama.cpp doesn't read it). with_special: accept that special tokens are steered too.
    Blocks without an edit get a zero vector, so that repeng can use the file for all of them.

    Raises:
        SteeringError: an edit that the format can't hold, by name; one after block 0, which
            llama.cpp doesn't steer; a block that the model doesn't have.
        RunError: the file can't be written.
    """
    sums = block_outputs(edits, "llama.cpp", with_special)
    for layer in sums:
        if layer == 0:
            raise SteeringError(
                "llama.cpp adds nothing after block 0 (layers.0.resid_post): choose a later block"
            )
        if layer >= n_layers:
            raise SteeringError(
                f"an edit at layers.{layer}.resid_post, and n_layers={n_layers}: give the model's "
                "number of blocks"
            )
    none = torch.zeros_like(next(iter(sums.values())))
    vectors = {f"direction.{n}": sums.get(n, none) for n in range(1, n_layers)}
    keys: dict[str, str | int] = {
        "general.architecture": ARCHITECTURE,
        f"{ARCHITECTURE}.model_hint": model_hint,
        f"{ARCHITECTURE}.layer_count": len(vectors),
    }
    gguf.write(Path(path), keys, vectors)


def from_gguf(path: str | Path) -> list[Edit]:
    """The additions of a control vector that llama.cpp or repeng wrote; zero vectors are left out.

    Raises:
        SteeringError: no control vector, damage, or nothing but zeros.
    """
    keys, tensors = gguf.read(Path(path))
    if keys.get("general.architecture") != ARCHITECTURE:
        raise SteeringError(
            f"{path} holds a {keys.get('general.architecture')!r}, and no {ARCHITECTURE}: name a "
            "file that llama-cvector-generator or repeng wrote"
        )
    found = {}
    for name, vector in tensors.items():
        head, _, number = name.partition(".")
        if head != "direction" or not number.isdecimal():
            raise SteeringError(f"{path}: a tensor {name!r}, expected direction.<block>")
        found[int(number)] = vector
    return as_edits(found, str(path))


def to_lm_eval(
    path: str | Path, edits: Sequence[Edit], model: nn.Module, *, with_special: bool = False
) -> None:
    """Write the file that lm-evaluation-harness reads with --model steered, steer_path=FILE.pt.

    It holds a dictionary from the name of a module to the vector that is added to its output. The
    harness reads nothing but a file of torch.save, whose name must end in .pt (and 0.4.13 unpickles
    whatever is in it, so give it only files of your own). Versions 0.4.9 and 0.4.9.1 add the last
    vector at every place; 0.4.9.2 and later do as written.

    model: the one that will be evaluated; with_special: accept that special tokens are steered too.

    Raises:
        SteeringError: another ending, or an edit that the format can't hold, by name.
        RunError: the file can't be written.
    """
    if Path(path).suffix not in (".pt", ".pth"):
        raise SteeringError(f"{path}: lm-eval knows the format by the ending; name it .pt")
    sums = block_outputs(edits, "lm-eval", with_special)
    blocks = decoder_layers(model)
    names = {id(module): name for name, module in _base(model).named_modules()}
    content = {}
    for layer, vector in sums.items():
        if layer >= len(blocks):
            raise SteeringError(
                f"an edit at layers.{layer}.resid_post, and the model has {len(blocks)} blocks"
            )
        content[names[id(blocks[layer])]] = {
            "action": "add",
            "steering_vector": vector,
            "steering_coefficient": 1.0,
            "bias": None,
            "head_index": None,
        }
    with written_aside(Path(path)) as aside:
        torch.save(content, aside)


def from_lm_eval(path: str | Path, model: nn.Module) -> list[Edit]:
    """The additions of a steering file of lm-evaluation-harness; only tensors are unpickled.

    Raises:
        SteeringError: no such file, anything in it but tensors and plain values, an action other
            than "add", a bias, a single head, a module that is no hook point.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's text advises to unpickle anything
            reason = "it holds more than that, or is no file of torch's"
        raise SteeringError(
            f"{path} can't be read as tensors and plain values ({reason}); name a .pt file of "
            "vectors that you trust"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise SteeringError(f"{path} holds no dictionary of hook points, as lm-eval reads it")
    modules = dict(_base(model).named_modules())
    points = _points(model)
    edits: list[Edit] = []
    for name, entry in content.items():
        if entry.get("action") != "add":
            raise SteeringError(
                f"{path}: the action at {name} is {entry.get('action')!r}, and only 'add' is read"
            )
        for key in ("bias", "head_index"):
            if entry.get(key) is not None:
                raise SteeringError(f"{path}: {name} has a {key}, which is not read here")
        point = points.get(id(modules.get(name)))
        if point is None:
            raise SteeringError(
                f"{path}: {name!r} is no block of this model and no half of one; such are "
                f"{', '.join(n for n, m in modules.items() if id(m) in points)}"
            )
        strength = entry.get("steering_coefficient", 1.0)
        edits.append(added(entry.get("steering_vector"), point, strength))
    return edits


def to_steering_vectors(edits: Sequence[Edit], *, with_special: bool = False) -> Any:
    """A `steering_vectors.SteeringVector` that adds what the edits add.

    Raises:
        SteeringError: the package isn't there, or an edit that the object can't hold, by name.
    """
    sums = block_outputs(edits, "steering-vectors", with_special)
    SteeringVector = _package("steering_vectors", "steering-vectors").SteeringVector
    return SteeringVector(layer_activations=sums, layer_type="decoder_block")


def from_steering_vectors(vector: Any) -> list[Edit]:
    """The additions of a `steering_vectors.SteeringVector`, or of anything with its fields.

    Its operator and multiplier belong to its `apply` and not to the object, so not to the edits.
    Raises SteeringError where it isn't of decoder blocks: what a half's module puts out is not
    what the block adds in every model.
    """
    layers = getattr(vector, "layer_activations", None)
    if not isinstance(layers, Mapping):
        raise SteeringError(
            f"a {type(vector).__name__} has no layer_activations: give a SteeringVector"
        )
    if getattr(vector, "layer_type", None) != "decoder_block":
        raise SteeringError(
            f"a SteeringVector of {getattr(vector, 'layer_type', None)!r} layers, and only those "
            "of decoder_block layers are read: add its vectors with Add(vector, 1.0, point)"
        )
    return as_edits(layers, "the SteeringVector")


def to_repeng(edits: Sequence[Edit], model_type: str, *, with_special: bool = False) -> Any:
    """A `repeng.ControlVector` that adds what the edits add, with strength 1.

    model_type: the model's `config.model_type`. Wrap the model for these blocks alone,
    `ControlModel(model, list(vector.directions))`: repeng asks for a direction for each block.

    Raises:
        SteeringError: the package isn't there, or an edit that the object can't hold, by name.
    """
    sums = block_outputs(edits, "repeng", with_special)
    ControlVector = _package("repeng", "repeng").ControlVector
    directions = {layer: vector.numpy() for layer, vector in sums.items()}
    return ControlVector(model_type=model_type, directions=directions)


def from_repeng(vector: Any) -> list[Edit]:
    """The additions of a `repeng.ControlVector`, with strength 1, or of anything with its fields.

    Raises SteeringError where there are none.
    """
    directions = getattr(vector, "directions", None)
    if not isinstance(directions, Mapping):
        raise SteeringError(f"a {type(vector).__name__} has no directions: give a ControlVector")
    return as_edits(directions, "the ControlVector")


def _base(model: nn.Module) -> nn.Module:
    """The module below which lm-eval names hook points."""
    base = getattr(model, "base_model", model)
    assert isinstance(base, nn.Module)
    return base


def _points(model: nn.Module) -> dict[int, HookPoint]:
    """The hook points that are a module's output, by the module's id."""
    found: dict[int, HookPoint] = {}
    for layer in range(len(decoder_layers(model))):
        for site in SITES:
            try:
                module, side = site_module(model, HookPoint(layer, site))
            except HookPointError:
                continue
            if side == "output":
                found[id(module)] = HookPoint(layer, site)
    return found


def _package(module: str, package: str) -> Any:
    """A package that is imported only here, if it is there."""
    try:
        return import_module(module)
    except ImportError as error:
        raise SteeringError(
            f"{package} can't be imported ({error}): pip install {package}, in an environment of "
            "its own where its requirements differ from saesteer's"
        ) from error
