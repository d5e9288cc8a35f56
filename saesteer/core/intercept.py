"""Calls of one object's method seen on their way, for as long as a context lasts."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, wraps
from types import MethodType
from typing import Any

from torch import nn

Around = Callable[..., Any]


def intercept(stack: ExitStack, module: nn.Module, name: str, around: Around) -> None:
    """Until `stack` closes, module.name(…) is around(run, …), with run what it was before.

    Of this one module alone, not of its class. Contexts may end in any order; with the last the
    attribute is gone. Hooks would do for `forward`, but cost every pass some microseconds more.
    """
    arounds = getattr(module.__dict__.get(name), "arounds", None)
    if arounds is None:
        arounds = _placed(module, name)
    arounds.append(around)

    def leave() -> None:
        arounds.remove(around)
        if not arounds:
            restore()

    restore: Callable[[], None] = module.__dict__[name].restore
    stack.callback(leave)


def _placed(module: nn.Module, name: str) -> list[Around]:
    """Put a method on the module that calls what stands in the list returned, still empty."""
    attributes, before = module.__dict__, getattr(module, name)
    arounds: list[Around] = []
    own = name in attributes

    def restore() -> None:
        if own:
            attributes[name] = before
        else:
            del attributes[name]

    bound = inspect.ismethod(before)
    original: Callable[..., Any] = before.__func__ if bound else lambda _, *a, **k: before(*a, **k)

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = partial(original, self)
        for around in arounds:
            run = partial(around, run)
        return run(*args, **kwargs)

    if bound:
        # A copy of the module made meanwhile gets a method bound to the copy, and runs its weights.
        method = wraps(original)(method)
        placed: Any = MethodType(method, module)
    else:
        placed = method = wraps(before)(partial(method, module))
    method.__dict__.update(arounds=arounds, restore=restore)
    attributes[name] = placed
    return arounds
