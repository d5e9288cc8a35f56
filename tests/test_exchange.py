"""What other programs are given does there what it does here, and theirs does here what it did.

The other programs' own ways of adding are written out below, after their sources: llama.cpp's
common_control_vector_load_one and llama_adapter_cvec, repeng 0.4.0's ControlModule,
steering-vectors 0.12.2's patch_activations and lm-eval 0.4.13's hf_steered.
"""

import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saesteer.core.model import decoder_layers
from saesteer.errors import RunError, SteeringError
from saesteer.steering import gguf
from saesteer.steering.conditions import Projection, When
from saesteer.steering.edits import Add, Affine, Clamp, Edit, Project, Rotate
from saesteer.steering.engine import steer
from saesteer.steering.exchange import (
    from_gguf,
    from_lm_eval,
    from_repeng,
    from_steering_vectors,
    to_gguf,
    to_lm_eval,
    to_repeng,
    to_steering_vectors,
)
from saesteer.steering.positions import Positions
from saesteer.steering.schedules import Decay
from tests.tiny import BOS, LAYERS, WIDTH, random_ids, tiny_model, tiny_sae

EVERY = Positions(special=True)


@dataclass
class SteeringVector:
    """steering-vectors' object."""

    layer_activations: dict[int, Tensor]
    layer_type: str = "decoder_block"


@dataclass
class ControlVector:
    """repeng's object."""

    model_type: str
    directions: dict[int, Any]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, thing in (("steering_vectors", SteeringVector), ("repeng", ControlVector)):
        module = ModuleType(name)
        setattr(module, thing.__name__, thing)
        monkeypatch.setitem(sys.modules, name, module)


def vector(seed: int = 0) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def edits() -> list[Edit]:
    """Two at one place, one of them written as the next block's resid_pre, and one later."""
    return [
        Add(vector(0), 1.5, "layers.1.resid_post", where=EVERY),
        Add(vector(1).double(), -0.5, "layers.2.resid_pre", where=EVERY),
        Add(vector(2).bfloat16(), 0.25, "layers.2.resid_post", where=EVERY),
    ]


def ids() -> Tensor:
    return torch.cat([torch.full((2, 1), BOS), random_ids(2, 9)], 1)


def logits(model: PreTrainedModel, some: list[Edit] | None = None) -> Tensor:
    with torch.no_grad():
        if some is None:
            return model(ids()).logits
        with steer(model, some):
            return model(ids()).logits


@contextmanager
def adding(modules: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """The vectors added to what the modules put out, as a tensor or first in a tuple."""

    def hook(change: Tensor) -> Callable[..., Any]:
        def add(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (output[0] + change, *output[1:])
            return output + change

        return add

    handles = [m.register_forward_hook(hook(change)) for m, change in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def at_blocks(model: PreTrainedModel, changes: Mapping[int, Tensor]) -> Tensor:
    blocks = decoder_layers(model)
    with adding({blocks[layer]: change for layer, change in changes.items()}):
        return logits(model)


def agree(first: Tensor, second: Tensor, plain: Tensor) -> None:
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    assert (first - plain).abs().max() > 0.01


# --- llama.cpp --------------------------------------------------------------------------------


def llama_cpp(path: Path, n_layers: int) -> dict[int, Tensor]:
    """By block: what llama.cpp adds after it."""
    _, tensors = gguf.read(path)
    numbers = {int(name.removeprefix("direction.")): t for name, t in tensors.items()}
    assert 0 not in numbers  # "direction tensor invalid"
    rows = torch.zeros(max(numbers), WIDTH)
    for il, tensor in numbers.items():
        rows[il - 1] = tensor
    return {il: rows[il - 1] for il in range(1, n_layers) if il - 1 < len(rows)}


def test_llama_cpp_adds_where_we_do(tmp_path: Path, model: PreTrainedModel) -> None:
    path = tmp_path / "control.gguf"
    to_gguf(path, edits(), LAYERS, model_hint="llama")
    agree(at_blocks(model, llama_cpp(path, LAYERS)), logits(model, edits()), logits(model))


def test_a_control_vector_comes_back(tmp_path: Path, model: PreTrainedModel) -> None:
    path = tmp_path / "control.gguf"
    to_gguf(path, edits()[:2], 40)
    back = from_gguf(path)
    assert [str(each.point) for each in back] == ["layers.1.resid_post"]  # zeros are left out
    agree(logits(model, back), logits(model, edits()[:2]), logits(model))


def by_the_specification() -> bytes:
    """Two blocks' vectors, byte by byte."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 3)
    head += text("general.architecture") + struct.pack("<I", 8) + text("controlvector")
    head += text("controlvector.model_hint") + struct.pack("<I", 8) + text("llama")
    head += text("controlvector.layer_count") + struct.pack("<II", 4, 2)
    head += text("direction.1") + struct.pack("<IQIQ", 1, 3, 0, 0)
    head += text("direction.2") + struct.pack("<IQIQ", 1, 3, 0, 32)
    head += bytes(-len(head) % 32)
    return (
        head + struct.pack("<3f", 0, 0, 0) + bytes(20) + struct.pack("<3f", 1, -2, 0.5) + bytes(20)
    )


def test_the_bytes_are_those_of_the_specification(tmp_path: Path) -> None:
    path = tmp_path / "control.gguf"
    add = Add(torch.tensor([2.0, -4.0, 1.0]), 0.5, "layers.2.resid_post", where=EVERY)
    to_gguf(path, [add], 3, model_hint="llama")
    assert path.read_bytes() == by_the_specification()


def test_files_of_other_writers_are_read(tmp_path: Path) -> None:
    """Keys of every type, another alignment, block 0 (which repeng can write), no gap filled."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 2, 2, 6)
    head += text("general.architecture") + struct.pack("<I", 8) + text("controlvector")
    head += text("general.alignment") + struct.pack("<II", 4, 64)
    head += text("a") + struct.pack("<IIQ", 9, 8, 2) + text("ä") + text("")
    head += text("b") + struct.pack("<I?", 7, True)
    head += text("c") + struct.pack("<Id", 12, 0.5)
    head += text("d") + struct.pack("<Ii", 5, -3)
    head += text("direction.5") + struct.pack("<IQIQ", 1, 2, 0, 64)
    head += text("direction.0") + struct.pack("<IQIQ", 1, 2, 0, 0)
    head += bytes(-len(head) % 64)
    path = tmp_path / "other.gguf"
    path.write_bytes(head + struct.pack("<2f", 1, 2) + bytes(56) + struct.pack("<2f", 3, 4))
    assert gguf.read(path)[0]["a"] == ["ä", ""]
    first, second = from_gguf(path)
    assert isinstance(first, Add) and isinstance(second, Add)
    assert (str(first.point), first.vector.tolist()) == ("layers.0.resid_post", [1, 2])
    assert (str(second.point), second.vector.tolist()) == ("layers.5.resid_post", [3, 4])
    assert first.where == EVERY and first.strength == 1


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    path, whole = tmp_path / "cut.gguf", by_the_specification()
    for length in range(len(whole) - 20):  # the last padding may be missing
        path.write_bytes(whole[:length])
        with pytest.raises(SteeringError, match=r"cut\.gguf"):
            from_gguf(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GGUF", b"GGML", "no GGUF file"),
        (struct.pack("<I", 3), struct.pack(">I", 3), "big-endian"),
        (struct.pack("<I", 3), struct.pack("<I", 1), "version 1"),
        (b"controlvector", b"llama-x-vecto", "no controlvector"),
        (b"direction.2", b"direction.x", "direction.x"),
        (b"direction.2", b"direction.1", "damaged"),
        (b"direction.2", b"undirecti.2", "direction"),
        (struct.pack("<IQIQ", 1, 3, 0, 32), struct.pack("<IQIQ", 1, 3, 1, 32), "type 1"),
        (struct.pack("<IQIQ", 1, 3, 0, 32), struct.pack("<IQIQ", 1, 3, 0, 2**40), "damaged"),
        (struct.pack("<IQIQ", 1, 3, 0, 32), struct.pack("<IQIQ", 1, 3, 0, 2**64 - 32), "damaged"),
        (struct.pack("<IQIQ", 1, 3, 0, 32), struct.pack("<IQIQ", 1, 2**62, 0, 32), "damaged"),
        (struct.pack("<3f", 1, -2, 0.5), bytes(12), "nothing"),
        (struct.pack("<3f", 1, -2, 0.5), struct.pack("<3f", 1, float("nan"), 0), "NaN"),
    ],
)
def test_foreign_and_damaged_files_are_refused(
    old: bytes, new: bytes, message: str, tmp_path: Path
) -> None:
    path, whole = tmp_path / "control.gguf", by_the_specification()
    assert old in whole
    path.write_bytes(whole.replace(old, new, 1))
    with pytest.raises(SteeringError, match=message):
        from_gguf(path)


def test_arrays_in_arrays_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.gguf"
    nest = struct.pack("<IQ", 9, 1) * 20000
    path.write_bytes(
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 9) + nest
    )
    with pytest.raises(SteeringError, match="damaged"):
        from_gguf(path)


def test_a_missing_file_is_refused(tmp_path: Path, model: PreTrainedModel) -> None:
    with pytest.raises(SteeringError, match="No such file"):
        from_gguf(tmp_path / "none.gguf")
    with pytest.raises(SteeringError, match="No such file"):
        from_lm_eval(tmp_path / "none.pt", model)


def test_blocks_that_llama_cpp_does_not_steer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "control.gguf"
    first = Add(vector(), 1.0, "layers.0.resid_post", where=EVERY)
    with pytest.raises(SteeringError, match="after block 0"):
        to_gguf(path, [first], LAYERS)
    with pytest.raises(SteeringError, match="n_layers=2"):
        to_gguf(path, edits(), 2)
    assert not path.exists()


# --- repeng and steering-vectors --------------------------------------------------------------


@pytest.mark.usefixtures("packages")
def test_repeng_adds_what_we_do(model: PreTrainedModel) -> None:
    control = to_repeng(edits(), "llama")
    assert isinstance(control, ControlVector) and control.model_type == "llama"
    theirs = {layer: torch.tensor(1.0 * each) for layer, each in control.directions.items()}
    agree(at_blocks(model, theirs), logits(model, edits()), logits(model))
    agree(logits(model, from_repeng(control)), logits(model, edits()), logits(model))


@pytest.mark.usefixtures("packages")
def test_steering_vectors_adds_what_we_do(model: PreTrainedModel) -> None:
    steering = to_steering_vectors(edits())
    assert isinstance(steering, SteeringVector) and steering.layer_type == "decoder_block"
    agree(at_blocks(model, steering.layer_activations), logits(model, edits()), logits(model))
    agree(logits(model, from_steering_vectors(steering)), logits(model, edits()), logits(model))


def test_what_comes_in_is_a_copy(model: PreTrainedModel) -> None:
    array = np.ones(WIDTH, dtype=np.float32)
    (edit,) = from_repeng(ControlVector("llama", {1: array, 2: 0 * array}))
    before = logits(model, [edit])
    array *= -1
    assert torch.equal(logits(model, [edit]), before)


@pytest.mark.parametrize("name", ["steering_vectors", "repeng"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SteeringError, match=f"pip install {name.replace('_', '-')}"):
        to_repeng(edits(), "llama") if name == "repeng" else to_steering_vectors(edits())


def test_objects_of_another_shape_are_refused() -> None:
    for take in (from_repeng, from_steering_vectors):
        with pytest.raises(SteeringError, match="a int has no"):
            take(3)
        with pytest.raises(SteeringError, match="nothing"):
            take(SteeringVector({})) if take is from_steering_vectors else take(
                ControlVector("llama", {1: vector() * 0})
            )
    with pytest.raises(SteeringError, match="'mlp' layers"):
        from_steering_vectors(SteeringVector({1: vector()}, "mlp"))
    with pytest.raises(SteeringError, match="layer -1"):
        from_steering_vectors(SteeringVector({-1: vector()}))
    with pytest.raises(SteeringError, match="no vector"):
        from_repeng(ControlVector("llama", {1: "ocean"}))


# --- lm-evaluation-harness --------------------------------------------------------------------


def lm_eval(path: Path, model: PreTrainedModel) -> Tensor:
    """Logits of lm-eval's SteeredModel."""
    config = torch.load(path, weights_only=True)
    modules = dict(model.base_model.named_modules())
    changes = {}
    for name, info in config.items():
        assert info["action"] == "add" and info["bias"] is None and info["head_index"] is None
        changes[modules[name]] = info["steering_vector"] * float(info["steering_coefficient"])
    with adding(changes):
        return logits(model)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "gemma2", "opt"])
def test_lm_eval_adds_what_we_do(arch: str, tmp_path: Path) -> None:
    model, path = tiny_model(arch), tmp_path / "steer.pt"
    to_lm_eval(path, edits(), model)
    agree(lm_eval(path, model), logits(model, edits()), logits(model))
    agree(logits(model, from_lm_eval(path, model)), logits(model, edits()), logits(model))


def test_lm_eval_files_of_halves_are_read(tmp_path: Path) -> None:
    model, path = tiny_model("gpt2"), tmp_path / "steer.pt"
    entry = {"action": "add", "steering_vector": vector(), "steering_coefficient": 2.0}
    torch.save({"h.1.mlp": entry | {"bias": None}, "h.2.attn": entry | {"head_index": None}}, path)
    back = from_lm_eval(path, model)
    assert [str(each.point) for each in back] == ["layers.1.mlp_out", "layers.2.attn_out"]
    modules = dict(model.base_model.named_modules())
    with adding({modules["h.1.mlp"]: 2 * vector(), modules["h.2.attn"]: 2 * vector()}):
        theirs = logits(model)
    agree(theirs, logits(model, back), logits(model))


ENTRY = {"action": "add", "steering_vector": torch.ones(WIDTH), "steering_coefficient": 1.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layers.1": ENTRY | {"action": "clamp"}}, "'clamp'.*only 'add'"),
        ({"layers.1": ENTRY | {"bias": torch.ones(WIDTH)}}, "has a bias"),
        ({"layers.1": ENTRY | {"head_index": 2}}, "head_index"),
        ({"layers.9": ENTRY}, r"'layers\.9' is no block.*layers\.1"),
        ({"layers.1.self_attn.q_proj": ENTRY}, "is no block"),
        ({"layers.1": ENTRY | {"steering_vector": None}}, "no vector"),
        ([ENTRY], "no dictionary"),
        ({"layers.1": print}, "can't be read as tensors"),
    ],
)
def test_lm_eval_files_that_say_more_are_refused(
    content: Any, message: str, tmp_path: Path, model: PreTrainedModel
) -> None:
    path = tmp_path / "steer.pt"
    torch.save(content, path)
    with pytest.raises(SteeringError, match=message):
        from_lm_eval(path, model)


def test_lm_eval_files_are_checked_before_they_are_written(
    tmp_path: Path, model: PreTrainedModel
) -> None:
    with pytest.raises(SteeringError, match=r"\.pt"):
        to_lm_eval(tmp_path / "steer.safetensors", edits(), model)
    with pytest.raises(SteeringError, match=f"{LAYERS} blocks"):
        to_lm_eval(
            tmp_path / "a.pt", [Add(vector(), 1.0, "layers.7.resid_post", where=EVERY)], model
        )
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError):
        to_lm_eval(tmp_path / "file" / "a.pt", edits(), model)
    (tmp_path / "broken.pt").write_bytes(b"no zip")
    with pytest.raises(SteeringError, match="can't be read"):
        from_lm_eval(tmp_path / "broken.pt", model)


# --- what none of them can be given -----------------------------------------------------------

POINT = "layers.1.resid_post"
WHEN = When(Projection(torch.ones(WIDTH), POINT))
REFUSED: list[tuple[Edit, str]] = [
    (Clamp(tiny_sae(), 3, 1.0), "Clamp"),
    (Project(vector(), POINT), "Project"),
    (Affine(torch.eye(WIDTH), vector(), POINT), "Affine"),
    (Rotate(vector(), vector(1), 1.0, POINT), "Rotate"),
    (Add(vector(), 1.0, POINT, where=EVERY, when=WHEN), "has a when"),
    (Add(vector(), 1.0, POINT, where=EVERY, schedule=Decay()), "has a schedule"),
    (Add(vector(), 1.0, POINT, where=EVERY, keep_norm=True), "has a keep_norm"),
    (Add(vector(), 1.0, POINT, where=Positions(special=True, last=1)), "every token"),
    (Add(vector(), 1.0, POINT, where=Positions(prompt=False)), "every token"),
    (Add(vector(), 1.0, "layers.1.mlp_out", where=EVERY), "output of a block"),
    (Add(vector(), 1.0, "layers.1.head.2", where=EVERY), "output of a block"),
    (Add(vector(), 1.0, "layers.0.resid_pre", where=EVERY), "output of a block"),
    (Add(vector()[:5], 1.0, POINT, where=EVERY), "dimensions|length"),
]


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(("edit", "message"), REFUSED, ids=str)
def test_what_cannot_be_said_there_is_refused_by_name(
    edit: Edit, message: str, tmp_path: Path, model: PreTrainedModel
) -> None:
    gives: list[Callable[[list[Edit]], Any]] = [
        lambda some: to_gguf(tmp_path / "a.gguf", some, LAYERS, with_special=True),
        lambda some: to_lm_eval(tmp_path / "a.pt", some, model, with_special=True),
        lambda some: to_repeng(some, "llama", with_special=True),
        lambda some: to_steering_vectors(some, with_special=True),
    ]
    for give in gives:
        for some in ([*edits(), edit], [edit, edits()[2]]):
            with pytest.raises(SteeringError, match=message):
                give(some)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("packages")
def test_special_tokens_are_steered_elsewhere_only_where_that_is_accepted(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    usual = [Add(vector(), 1.0, POINT)]
    with pytest.raises(SteeringError, match=r"BOS included.*with_special=True"):
        to_gguf(tmp_path / "a.gguf", usual, LAYERS)
    to_gguf(tmp_path / "a.gguf", usual, LAYERS, with_special=True)
    (back,) = from_gguf(tmp_path / "a.gguf")
    assert back.where.special
    theirs = at_blocks(model, llama_cpp(tmp_path / "a.gguf", LAYERS))
    agree(theirs, logits(model, [back]), logits(model, usual))  # on BOS the two differ
    with pytest.raises(SteeringError, match="no edits"):
        to_repeng([], "llama")
