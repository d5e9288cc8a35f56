"""Calls seen on their way: every one of them, in any order of ends, and of one object alone."""

import copy
import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from saesteer.core.intercept import intercept


class Doubles(nn.Module):
    """Twice x times its weight, and what else it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: float, *, more: float = 0.0) -> Any:
        return self.weight.item() * 2 * x + more


def adding(n: float) -> Any:
    return lambda run, *args, **kwargs: run(*args, **kwargs) + n


def test_the_last_to_come_is_the_outermost_and_any_may_end_first() -> None:
    module, first, second = Doubles(), ExitStack(), ExitStack()
    seen: list[str] = []

    def told(name: str) -> Any:
        def around(run: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return run(*args, **kwargs)

        return around

    intercept(first, module, "forward", told("first"))
    intercept(second, module, "forward", told("second"))
    assert module(3.0, more=1.0) == 7.0
    assert seen == ["second", "first"]
    first.close()
    assert module(3.0) == 6.0
    assert seen == ["second", "first", "second"]
    second.close()
    assert "forward" not in vars(module)


def test_an_attribute_that_was_there_is_put_back() -> None:
    module, own = Doubles(), lambda x: -x
    vars(module)["forward"] = own
    with ExitStack() as stack:
        intercept(stack, module, "forward", adding(1.0))
        assert module(3.0) == -2.0
        assert list(inspect.signature(module.forward).parameters) == ["x"]
    assert vars(module)["forward"] is own


def test_the_signature_stays_and_other_modules_see_nothing() -> None:
    module = Doubles()
    with ExitStack() as stack:
        intercept(stack, module, "forward", adding(1.0))
        assert inspect.signature(module.forward) == inspect.signature(Doubles().forward)
        assert Doubles()(3.0) == 6.0


def test_a_copy_made_meanwhile_runs_its_own_weights() -> None:
    module = Doubles()
    with ExitStack() as stack:
        intercept(stack, module, "forward", adding(1.0))
        other = copy.deepcopy(module)
        nn.init.constant_(other.weight, 10.0)
        assert (module(3.0), other(3.0)) == (7.0, 61.0)
    assert (module(3.0), other(3.0)) == (6.0, 60.0)
