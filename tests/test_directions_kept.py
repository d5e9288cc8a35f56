"""Directions and maps: how they are meant to be used, added up and kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from saesteer.core.model import HookPoint
from saesteer.directions.direction import Direction, Map, Part, Use
from saesteer.directions.kept import load_parts, save_parts
from saesteer.errors import SteeringError

POINT = HookPoint(1, "resid_post")


def direction(*numbers: float, **changed) -> Direction:  # type: ignore[no-untyped-def]
    one = Direction(
        torch.tensor(numbers), POINT, "lat", 64, "answer-mean", "f00d", {"file": "p.jsonl"}
    )
    return replace(one, **changed)


def some_map() -> Map:
    return Map(
        torch.arange(4.0).view(2, 2), torch.tensor([5.0, 6.0]), POINT, "leace", 64, "answer-last",
        "f00d", {"seed": 3},
    )  # fmt: skip


def same(one: Part, other: Part) -> bool:
    tensors = {"vector", "matrix", "shift"}
    return type(one) is type(other) and all(
        torch.equal(value, getattr(other, name)) if name in tensors else value == vars(other)[name]
        for name, value in vars(one).items()
    )


def test_directions_add_up() -> None:
    a, b = direction(1.0, 2.0), direction(3.0, -1.0, method="random", n_pairs=32)
    assert torch.equal((a + b).vector, torch.tensor([4.0, 1.0]))
    assert torch.equal((a - b).vector, torch.tensor([-2.0, 3.0]))
    assert torch.equal((-a).vector, torch.tensor([-1.0, -2.0]))
    assert torch.equal((2.0 * a).vector, torch.tensor([2.0, 4.0]))
    assert torch.equal((a * 2).vector, (2 * a).vector)
    assert torch.equal((a - b).vector, (a + -b).vector)
    made = 0.5 * (a + b)
    assert made.method == "0.5 * (lat + random)"
    assert (made.point, made.n_pairs, made.model_fingerprint) == (POINT, 32, "f00d")
    (summed,) = made.provenance["made_of"]
    assert [part["method"] for part in summed["provenance"]["made_of"]] == ["lat", "random"]
    assert json.loads(json.dumps(made.provenance)) == made.provenance


def test_orthogonal_to_another() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = (direction(*torch.randn(64, generator=rng).tolist()) for _ in range(2))
    rest = a.orthogonal_to(b)
    assert rest.method == "lat orthogonal to lat"
    assert abs(float(rest.vector @ b.vector)) < 1e-5
    # Only a multiple of b has gone.
    torch.testing.assert_close(
        a.vector - rest.vector, b.vector * (a.vector @ b.vector) / (b.vector @ b.vector)
    )
    with pytest.raises(SteeringError, match="parallel"):
        a.orthogonal_to(-3.0 * a)
    with pytest.raises(SteeringError, match="orthogonal to zero"):
        a.orthogonal_to(0.0 * a)


def test_what_cannot_be_combined_is_refused() -> None:
    a = direction(1.0, 2.0)
    with pytest.raises(SteeringError, match=r"layers\.1\.resid_post and one at layers\.2"):
        a + replace(a, point=HookPoint(2, "resid_post"))
    with pytest.raises(SteeringError, match="another model"):
        a - replace(a, model_fingerprint="beef")
    with pytest.raises(SteeringError, match="2 dimensions and one of 3"):
        a.orthogonal_to(direction(1.0, 2.0, 3.0))
    with pytest.raises(SteeringError, match="direction to project"):
        -replace(a, use=Use("project", to=1.0))
    with pytest.raises(SteeringError, match="different tokens"):
        a + replace(a, use=Use(where="prompt"))
    with pytest.raises(SteeringError, match="times inf"):
        a * float("inf")
    for wrong in (lambda: a + 1, lambda: a - some_map(), lambda: a * "2", lambda: a * True):
        with pytest.raises(TypeError):
            wrong()


def test_a_use_is_checked() -> None:
    assert Use() == Use("add", None, "all", None)
    with pytest.raises(SteeringError, match="did you mean 'ablate'"):
        Use("ablat")  # type: ignore[arg-type]
    with pytest.raises(SteeringError, match="unknown place 'promt'"):
        Use(where="promt")  # type: ignore[arg-type]
    with pytest.raises(SteeringError, match="to=None"):
        Use("project")
    with pytest.raises(SteeringError, match=r"'add' with to=1\.0"):
        Use("add", to=1.0)
    with pytest.raises(SteeringError, match="set to nan"):
        Use("project", to=float("nan"))
    with pytest.raises(SteeringError, match="position -1"):
        Use(position=-1)


def test_a_maps_shapes_are_checked() -> None:
    with pytest.raises(SteeringError, match=r"\[2, 2\] and a shift of shape \[3\]"):
        replace(some_map(), shift=torch.zeros(3))


def test_parts_come_back_as_they_were(tmp_path: Path) -> None:
    parts = [
        direction(1.0, 2.0),
        some_map(),
        direction(3.0, use=Use("project", to=-2.5), point=HookPoint(2, "head.3")),
        *(direction(float(i), use=Use("add", None, "prompt", i)) for i in range(10)),
        0.5 * direction(1.0, 4.0),
    ]
    save_parts(tmp_path / "deep" / "many", parts)
    found = load_parts(tmp_path / "deep" / "many", model_fingerprint="f00d")
    assert len(found) == len(parts)
    assert all(same(one, other) for one, other in zip(parts, found, strict=True))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["many"]


def test_a_file_of_the_first_version_is_read(tmp_path: Path) -> None:
    facts = {
        "point": "layers.1.resid_post",
        "method": "lat",
        "n_pairs": 64,
        "read": "answer-mean",
        "model_fingerprint": "f00d",
        "provenance": {"file": "p.jsonl"},
    }
    metadata = {"format": "saesteer direction 1", "direction": json.dumps(facts)}
    save_file({"vector": torch.tensor([1.0, 2.0])}, tmp_path / "old", metadata)
    assert same(Direction.load(tmp_path / "old"), direction(1.0, 2.0))
    assert same(load_parts(tmp_path / "old")[0], direction(1.0, 2.0))


def test_another_models_parts_are_refused_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "sea"
    save_parts(path, [direction(1.0), replace(some_map(), model_fingerprint="beef")])
    with pytest.raises(SteeringError, match="was fitted on another model"):
        load_parts(path, model_fingerprint="f00d")
    assert len(load_parts(path, model_fingerprint="f00d", force=True)) == 2
    assert len(load_parts(path)) == 2
    with pytest.raises(SteeringError, match="holds 2 directions or maps, not one"):
        Direction.load(path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sea"
    with pytest.raises(SteeringError, match="there is no direction"):
        load_parts(path)
    with pytest.raises(SteeringError, match="there are no directions"):
        save_parts(path, [])
    save_parts(path, [direction(1.0), some_map()])
    whole = path.read_bytes()
    for cut in (3, 20, len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:-cut])
        with pytest.raises(SteeringError, match="damaged"):
            load_parts(path)
    good = {"point": "layers.1.resid_post", "method": "lat", "n_pairs": 1, "read": "answer-mean"}
    good |= {"model_fingerprint": "f00d", "provenance": {}}
    wrong = [
        "[]", "{", "[1]", json.dumps([good | {"use": {"how": "fly"}}]), json.dumps([good, good]),
        json.dumps([good | {"point": "layer 1"}]), json.dumps([good | {"colour": "red"}]),
    ]  # fmt: skip
    for parts in wrong:
        metadata = {"format": "saesteer direction 2", "parts": parts}
        save_file({"0.vector": torch.ones(2)}, path, metadata)
        with pytest.raises(SteeringError, match="damaged"):
            load_parts(path)
