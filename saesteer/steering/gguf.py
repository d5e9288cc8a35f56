"""GGUF files of float32 vectors, read and written by the format's specification, version 3.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    "GGUF" · version u32 · number of tensors u64 · number of keys u64
    each key:     name · type u32 · value
    each tensor:  name · number of dimensions u32 · dimensions u64… · type u32 · offset u64
    padding to the alignment · data, each tensor's padded to the alignment

Little-endian; a text is its length in bytes, u64, and its bytes. Offsets count from the data's
beginning. Version 2 has the same layout.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from saesteer.core.files import written_aside
from saesteer.errors import SteeringError

_MAGIC, _VERSION, _ALIGNMENT = b"GGUF", 3, 32
_U32, _STRING, _ARRAY, _FLOAT32 = 4, 8, 9, 0
# Types of a key's value, without text and arrays.
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


def write(path: Path, keys: Mapping[str, str | int], vectors: Mapping[str, Tensor]) -> None:
    """Write texts and whole numbers (as u32) under their keys, and vectors [n] in float32.

    Raises:
        RunError: the file can't be written, or the disk is full.
    """
    head, data = bytearray(), bytearray()
    head += _MAGIC + struct.pack("<IQQ", _VERSION, len(vectors), len(keys))
    for key, value in keys.items():
        head += _text(key)
        head += (
            struct.pack("<I", _STRING) + _text(value)
            if isinstance(value, str)
            else struct.pack("<II", _U32, value)
        )
    for name, vector in vectors.items():
        head += _text(name) + struct.pack("<IQIQ", 1, len(vector), _FLOAT32, len(data))
        data += vector.detach().to("cpu", torch.float32).numpy().astype("<f4").tobytes()
        data += bytes(-len(data) % _ALIGNMENT)
    head += bytes(-len(head) % _ALIGNMENT)
    with written_aside(path) as aside:
        aside.write_bytes(bytes(head + data))


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The keys of a GGUF file, and its vectors by name.

    Raises:
        SteeringError: no such file, no GGUF file, damage, or a tensor that is no float32 vector.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _read(_Source(file, size, path), path)
    except OSError as error:
        raise SteeringError(
            f"cannot read {path}: {error.strerror or error}; name a GGUF file"
        ) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise _damaged(path) from error


class _Source:
    """A file from which nothing is read beyond its end."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self._file, self._size, self._path = file, size, path

    def at(self) -> int:
        return self._file.tell()

    def seek(self, offset: int) -> None:
        if offset > self._size:
            raise _damaged(self._path)
        self._file.seek(offset)

    def take(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise _damaged(self._path)
        return self._file.read(count)

    def number(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return value

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        if kind not in _NUMBERS:
            raise _damaged(self._path)
        return self.number(_NUMBERS[kind])


def _read(source: _Source, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if source.take(4) != _MAGIC:
        raise SteeringError(f"{path} is no GGUF file; name a control vector in that format")
    version = source.number("I")
    if version not in (2, _VERSION):
        raise SteeringError(
            f"{path} is GGUF version {version} or big-endian, and versions 2 and 3, little-endian, "
            "are read here: write it again with today's llama.cpp or repeng"
        )
    n_tensors, n_keys = source.number("Q"), source.number("Q")
    keys = {}
    for _ in range(n_keys):
        key = source.text()
        keys[key] = source.value(source.number("I"))
    infos: dict[str, tuple[int, int]] = {}  # length, offset
    for _ in range(n_tensors):
        name, n_dims = source.text(), source.number("I")
        shape = [source.number("Q") for _ in range(min(n_dims, 5))]
        kind, offset = source.number("I"), source.number("Q")
        if n_dims != 1 or kind != _FLOAT32:
            raise SteeringError(
                f"{path}: its tensor {name} has {n_dims} dimensions and type {kind}, and a control "
                "vector's have one and are float32 (type 0); name a control vector"
            )
        if name in infos:
            raise _damaged(path)
        infos[name] = shape[0], offset
    alignment = keys.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _damaged(path)
    begin = -(-source.at() // alignment) * alignment
    vectors = {}
    for name, (length, offset) in infos.items():
        source.seek(begin + offset)
        vectors[name] = torch.frombuffer(bytearray(source.take(4 * length)), dtype=torch.float32)
    return keys, vectors


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _damaged(path: Path) -> SteeringError:
    return SteeringError(f"{path} is truncated or damaged: fetch it again, or write it again")
