"""Directions written as text: `a - 0.5*b`, `orthogonal(a, b)`, of directions known by name."""

import ast
import dataclasses
import operator
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from saesteer.directions.direction import Direction
from saesteer.errors import SteeringError, did_you_mean

ORTHOGONAL = "orthogonal"
"""The one function: orthogonal(a, b) is a without its part along b."""

_SIGNS: dict[type, Callable[[Any, Any], Any]] = {ast.Add: operator.add, ast.Sub: operator.sub}
_NUMBER = re.compile(r"\d+(e\d+)?", re.IGNORECASE)
_ALLOWED = f"use names, numbers, +, -, *, /, parentheses and {ORTHOGONAL}(a, b)"


def names_in(text: str, known: Collection[str]) -> tuple[str, ...]:
    """The known names that an expression uses, in the order in which they first stand in it.

    Where several names could be meant the longest is: "a-b" is the direction a-b where there is
    one, and a less b where there is not. A name that is a number stands for the number.

    Raises:
        SteeringError: a word that is no known name.
    """
    return tuple(_with_places(text, known)[1])


def combined(text: str, directions: Mapping[str, Direction]) -> Direction:
    """The direction that an expression comes to; its provenance has the text as "expression".

    Args:
        text: names, numbers, +, -, * and / by numbers, parentheses, orthogonal(a, b).
        directions: by name, those that `names_in` finds or more.

    Raises:
        SteeringError: no such expression, an unknown name, a sum that has no meaning (a number and
            a direction, directions of two places or models), or nothing left in the end.
    """
    source, used = _with_places(text, directions)
    at = {f"_{i}": directions[name] for i, name in enumerate(used)}
    try:
        value = _value(ast.parse(source, mode="eval").body, at, text)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise SteeringError(f"{_shown(text)} can't be read as an expression; {_ALLOWED}") from error
    if not isinstance(value, Direction):
        raise SteeringError(f"{_shown(text)} is a number; name a direction at least")
    if not bool(value.vector.isfinite().all()):
        raise SteeringError(f"{_shown(text)} is too long for float32; use smaller numbers")
    if not bool(value.vector.any()):
        raise SteeringError(f"{_shown(text)} comes to zero, which is no direction; change it")
    facts = {**value.provenance, "expression": text.strip()}
    return dataclasses.replace(value, provenance=facts)


def _with_places(text: str, known: Collection[str]) -> tuple[str, list[str]]:
    """The text with each known name as _0, _1, …, which Python can parse, and the names."""
    names = sorted((n for n in known if not _NUMBER.fullmatch(n)), key=len, reverse=True)
    either = "|".join([*map(re.escape, names), r"[^\W\d]\w*"])
    pattern = re.compile(rf"(?<!\w)(?:(?P<word>{ORTHOGONAL})(?=\s*\()|(?:{either}))(?!\w)")
    used: list[str] = []

    def placed(match: re.Match[str]) -> str:
        if match["word"]:
            return ORTHOGONAL
        name = match[0]
        if name not in known:
            raise SteeringError(
                f"{_shown(text)}: no direction {name!r}{did_you_mean(name, known)}; there "
                f"{'are ' + ', '.join(sorted(known)) if known else 'is none'}"
            )
        if name not in used:
            used.append(name)
        return f"_{used.index(name)}"

    return pattern.sub(placed, text.strip()), used


def _value(node: ast.AST, at: Mapping[str, Direction], text: str) -> Direction | float:
    match node:
        case ast.Name(id=name):
            return at[name]
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return float(number)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner, at, text)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _value(inner, at, text)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as sign, right=right):
            a, b = _value(left, at, text), _value(right, at, text)
            if isinstance(a, Direction) != isinstance(b, Direction):
                raise SteeringError(
                    f"{_shown(text)}: a direction and a number can't be added; multiply by numbers"
                )
            return _SIGNS[type(sign)](a, b)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            a, b = _value(left, at, text), _value(right, at, text)
            if isinstance(a, float):
                return a * b
            if isinstance(b, float):
                return a * b
            raise SteeringError(f"{_shown(text)}: two directions can't be multiplied")
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            a, b = _value(left, at, text), _value(right, at, text)
            if isinstance(b, Direction) or b == 0:
                raise SteeringError(f"{_shown(text)}: divide by a number other than 0")
            return a / b if isinstance(a, float) else a * (1 / b)
        case ast.Call(func=ast.Name(id="orthogonal"), args=[first, second], keywords=[]):
            a, b = _value(first, at, text), _value(second, at, text)
            if not isinstance(a, Direction) or not isinstance(b, Direction):
                raise SteeringError(f"{_shown(text)}: {ORTHOGONAL} is of two directions")
            return a.orthogonal_to(b)
    raise SteeringError(f"{_shown(text)} can't be read as an expression; {_ALLOWED}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:79]}…")
