"""Hooks on one place of a block, which see every activation there in the right order.

What is found by name is checked by number: halves that are not what the block adds are refused.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saesteer.core.blocks import block_at, decoder_layers, head_columns, site_in, site_module
from saesteer.core.follow import check_uncompiled
from saesteer.core.model import HookPoint
from saesteer.errors import HookPointError

HALVES = ("attn_out", "mlp_out")
_RUNS_LAST = "_saesteer_runs_last"


def attach(
    stack: ExitStack,
    model: nn.Module,
    point: HookPoint,
    use: Callable[[Tensor], Tensor | None],
) -> None:
    """Until `stack` closes, call `use` on the activation at `point`; what it returns, unless None,
    takes its place.

    Raises HookPointError for a place the model doesn't have, SteeringError where it is compiled.
    """
    block = block_at(model, point)
    module, side = site_in(block, model, point)
    for part in (block, module):
        check_uncompiled(part, f"the {type(part).__name__} at {point}")
    if point.head is not None:
        use = _of_columns(use, head_columns(model, point))
    if side == "input":

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                new = use(args[0])
                return None if new is None else ((new, *args[1:]), kwargs)
            new = use(kwargs["hidden_states"])
            return None if new is None else (args, {**kwargs, "hidden_states": new})

        with _in_order(stack, module._forward_pre_hooks):
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        return

    shape, half = threading.local(), point.site in HALVES
    if half:
        _remember_shape(stack, block, shape)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = first(output)
        # OPT's second half works on [batch * seq, d_model].
        flat = half and x.dim() == 2
        new = use(x.view(*shape.last, -1) if flat else x)
        if new is None:
            return None
        new = new.reshape(x.shape) if flat else new
        return new if isinstance(output, Tensor) else (new, *output[1:])

    with _in_order(stack, module._forward_hooks):
        stack.callback(module.register_forward_hook(after).remove)
    if half:
        _check_halves(stack, model, point.layer)


def _of_columns(
    use: Callable[[Tensor], Tensor | None], columns: slice
) -> Callable[[Tensor], Tensor | None]:
    """`use` on some columns of a tensor; the others stay as they are."""

    def use_part(x: Tensor) -> Tensor | None:
        new = use(x[..., columns])
        if new is None:
            return None
        return torch.cat([x[..., : columns.start], new, x[..., columns.stop :]], -1)

    return use_part


def _remember_shape(stack: ExitStack, block: nn.Module, shape: threading.local) -> None:
    """Keep [batch, seq] of what the block was last called with, in this thread, in `shape.last`."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shape.last = (args[0] if args else kwargs["hidden_states"]).shape[:2]

    with _in_order(stack, block._forward_pre_hooks):
        stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)


def _check_halves(stack: ExitStack, model: nn.Module, layer: int) -> None:
    """At the first forward pass, make sure that a block adds its two halves and nothing else.

    Halves are found by name, so in an architecture nobody tried here the name could mislead:
    resid_pre + attn_out + mlp_out == resid_post is measured, and HookPointError raised if not.
    """
    block = decoder_layers(model)[layer]
    here = threading.local()
    done: list[bool] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not done:
            here.__dict__["resid_pre"] = args[0] if args else kwargs["hidden_states"]

    def compare(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen: dict[str, Tensor] = here.__dict__
        if done or block.training or len(seen) < 3:  # while training, dropout comes between
            return
        done.append(True)
        after = first(output).detach()
        wide = torch.promote_types(after.dtype, torch.float32)
        parts = [
            seen.pop(key).detach().to(after.device, wide).view(after.shape) for key in sorted(seen)
        ]
        sizes = sum((part.abs() for part in parts), after.to(wide).abs())
        wrong = (sum(parts, -after.to(wide))).abs() > 8 * torch.finfo(after.dtype).eps * sizes
        if bool(wrong.any()):
            raise HookPointError(
                f"attn_out and mlp_out of layers.{layer} are not supported: what the halves of "
                f"{type(block).__name__} return is not what it adds to the stream; "
                "use resid_pre or resid_post"
            )

    def watch(site: str) -> None:
        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not done:
                here.__dict__[site] = first(output).clone()

        setattr(after, _RUNS_LAST, True)
        module = site_module(model, HookPoint(layer, site))[0]
        stack.callback(module.register_forward_hook(after).remove)

    # The sum is read first of all, before anyone edits resid_post; its parts last, after edits.
    stack.callback(block.register_forward_hook(compare, prepend=True).remove)
    setattr(before, _RUNS_LAST, True)
    stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
    for site in HALVES:
        watch(site)


@contextmanager
def _in_order(stack: ExitStack, hooks: Any) -> Iterator[None]:
    """Within it a hook is added; those that only look at the outcome are then moved behind it.

    They are the checks above and transformers' own (which fill `output_hidden_states` and would
    otherwise show the activation as it was before an edit). Their order is put back at the end.
    """
    before = list(hooks)
    yield
    watchers = [key for key in before if _only_watches(hooks[key])]
    for key in watchers:
        hooks.move_to_end(key)

    def restore() -> None:
        for key in before:
            if key in hooks:
                hooks.move_to_end(key)

    if watchers:
        stack.callback(restore)


def _only_watches(hook: Any) -> bool:
    name = getattr(hook, "__name__", "")
    return hasattr(hook, _RUNS_LAST) or name == "output_capturing_hook"


def first(output: Any) -> Tensor:
    """The tensor in what a module returned: transformers 4 has tuples where 5 has bare tensors."""
    return output if isinstance(output, Tensor) else output[0]
