"""The options of a method's or an arm's own, as `--set` writes them, made into values."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from saesteer import arming
from saesteer.cli.steer_options import Scoped, read_prompts
from saesteer.compare.arms.prompts import opened_with
from saesteer.compare.prepared import PromptTransform
from saesteer.directions.pairs import Pair, read_pairs
from saesteer.errors import ConfigError, did_you_mean
from saesteer.run import Run
from saesteer.steering.conditions import When


def values(method: str, given: Sequence[str], run: Run) -> dict[str, Any]:
    """OPTION=VALUE each, as the options of a method or an arm.

    Raises:
        ConfigError: another form, an option that there isn't, or a value that isn't its kind.
        TextError, PairsError: a file of texts or pairs that can't be read.
        SteeringError, IndexingError: a condition that can't be.
    """
    texts = dict(_split(text) for text in given)
    known = arming.options_of(method, texts.get("of"))
    found = {}
    for name, text in texts.items():
        if name not in known:
            has = f"its options are {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"{method} has no option {name!r}{did_you_mean(name, known)}; {has}")
        found[name] = _value(known[name], text, run)
    return found


def shown(option: inspect.Parameter) -> str:
    """An option with its default, or with what to give in its place, as `--set` takes it."""
    kind = _kind(option)
    if option.default is None or option.default is inspect.Parameter.empty or _is_texts(kind):
        return f"{option.name}={_PLACEHOLDERS.get(option.name) or _placeholder(kind)}"
    if isinstance(option.default, str) and option.default == option.default.strip() != "":
        return f"{option.name}={option.default}"
    return f"{option.name}={json.dumps(option.default, separators=(',', ':'))}"


# What a text or a number is of, where its kind alone doesn't say it.
_PLACEHOLDERS = {"of": "METHOD", "feature": "FEATURE"}


def _placeholder(kind: Any) -> str:
    if kind is When:
        return "'FEATURE>NUMBER'"
    if kind == PromptTransform:
        return "TEXT"
    if _is_texts(kind):
        return "FILE"
    if kind == Sequence[Pair]:
        return "PAIRS"
    return "NUMBER"


def _split(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ConfigError(f"--set {text!r}: expected OPTION=VALUE, such as alpha=15")
    return name, value


def _kind(option: inspect.Parameter) -> Any:
    """Its type, without the None."""
    if isinstance(option.annotation, UnionType):
        return next(one for one in get_args(option.annotation) if one is not NoneType)
    return option.annotation


def _is_texts(kind: Any) -> bool:
    return bool(kind == Sequence[str])


def _value(option: inspect.Parameter, text: str, run: Run) -> Any:
    kind = _kind(option)
    if kind is When:
        return Scoped().parsed_when(text, run)
    if kind == PromptTransform:
        return opened_with(text)
    if kind == Sequence[Pair]:
        return read_pairs(text, run.tokenizer)
    if _is_texts(kind) and not text.startswith("["):
        return read_prompts(Path(text))
    read = _json(text)
    if kind is str or get_origin(kind) is Literal:
        return read if isinstance(read, str) else text
    if kind is bool and isinstance(read, bool):
        return read
    if kind is float and _is_number(read):
        return read
    if kind is int and _is_number(read) and read == int(read):
        return int(read)
    if kind == Sequence[float]:
        several = read if isinstance(read, list) else [read]
        if several and all(_is_number(one) for one in several):
            return several
    if _is_texts(kind) and isinstance(read, list) and all(isinstance(x, str) for x in read):
        return read
    raise ConfigError(f"--set {option.name}={text}: expected {_expected(option, kind)}")


def _expected(option: inspect.Parameter, kind: Any) -> str:
    what = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind)
    if what is None:
        what = "a list of numbers" if kind == Sequence[float] else "a file, or a JSON list of texts"
    if option.default is None or option.default is inspect.Parameter.empty or _is_texts(kind):
        return what
    return f"{what}, as {json.dumps(option.default)}"


def _is_number(value: Any) -> bool:
    finite = isinstance(value, int | float) and abs(value) < float("inf")
    return finite and not isinstance(value, bool)


def _json(text: str) -> Any:
    """What the text is in JSON, or a number that JSON writes otherwise (.5), or None."""
    for read in (json.loads, float):
        try:
            return read(text)
        except ValueError:
            continue
    return None
