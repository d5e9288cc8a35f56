"""TOML files as dataclasses, and back: unknown keys and wrong types are errors by name."""

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saesteer.errors import ConfigError, did_you_mean


def read(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: the file is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}; configs/ holds examples") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error


def build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass of TOML values: a table for a dataclass, a list for a tuple.

    where: what error messages begin with.

    Raises:
        ConfigError: an unknown key, or a value of another type than the field's.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(
                f"{where}: unknown key {key!r}{did_you_mean(key, fields)}; "
                f"expected one of {', '.join(fields)}"
            )
        expected: Any = fields[key].type
        if dataclasses.is_dataclass(expected):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{where}: {key!r} is a table: write [{key}] on a line of its own"
                )
            arguments[key] = build(expected, value, f"{where} [{key}]")  # type: ignore[arg-type]
            continue
        if typing.get_origin(expected) is tuple:
            arguments[key] = _items(value, typing.get_args(expected)[0], f"{where}: {key}")
            continue
        if expected in (float, float | None) and type(value) is int:
            value = float(value)
        # bool is an int to isinstance, but `tokens = true` is a mistake
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            name = getattr(expected, "__name__", str(expected).replace(" | None", ""))
            raise ConfigError(f"{where}: {key} = {value!r} is not a {name}")
        arguments[key] = value
    return kind(**arguments)


def written(values: Mapping[str, Any]) -> str:
    """Values as TOML: plain ones first, then a table for each mapping, and for each mapping of a
    list of them. None is left out."""
    plain: list[str] = []
    tables: list[str] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            tables += ["", f"[{key}]", *_lines(value)]
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            for one in value:
                tables += ["", f"[[{key}]]", *_lines(one)]
        elif value is not None:
            plain.append(f"{key} = {_toml(value)}")
    return "\n".join([*plain, *tables]).lstrip("\n") + "\n"


def _lines(table: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in table.items() if value is not None]


def _items(values: Any, kind: type, where: str) -> tuple[Any, ...]:
    if not isinstance(values, list):
        raise ConfigError(f"{where} = {values!r} is not a list; write [{_toml_or_repr(values)}]")
    if kind is float:
        values = [float(value) if type(value) is int else value for value in values]
    for value in values:
        if type(value) is not kind:
            raise ConfigError(f"{where}: {value!r} is not a {kind.__name__}")
    return tuple(values)


def _toml_or_repr(value: Any) -> str:
    return _toml(value) if isinstance(value, str | bool | int | float) else "…"


def _toml(value: str | bool | int | float | list[Any] | tuple[Any, ...]) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        escaped = "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped)
        return f'"{escaped}"'
    return repr(value)
