"""Reading and editing activations of any decoder, with hooks that never outlive their context.

`capture` reads, `edit` writes, `activations` reads and stops the model where nothing deeper is
wanted. Hooks on one place run in the order in which their contexts were entered, so a capture
sees the edits of the contexts around it.
"""

import inspect
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from saesteer.core.blocks import decoder_layers, head_columns, site_module
from saesteer.core.clock import TokenClock, token_clock
from saesteer.core.model import HookPoint, special_token_ids
from saesteer.core.tokens import Tokens
from saesteer.errors import HookPointError, SteeringError

HALVES = ("attn_out", "mlp_out")
_RUNS_LAST = "_saesteer_runs_last"


class _Deep(Exception):  # noqa: N818  (not an error: it stops the model)
    """Everything wanted has been read."""


@contextmanager
def capture(model: nn.Module, points: Iterable[HookPoint]) -> Iterator[dict[HookPoint, Tensor]]:
    """Read activations: the dictionary holds, after each forward pass, those of that pass.

    Each is [batch, seq, d_model] in the model's dtype, a copy that stays in the graph, so that
    gradients flow to and from it. Raises HookPointError for a place the model doesn't have.
    """
    found: dict[HookPoint, Tensor] = {}
    with ExitStack() as stack:
        for point in dict.fromkeys(points):
            _attach(stack, model, point, _keeper(point, lambda: found))
        yield found


def _keeper(point: HookPoint, store: Callable[[], dict[HookPoint, Tensor]]) -> Any:
    def keep(x: Tensor) -> None:
        # Some blocks add to this very tensor later (Falcon's `mlp_output += …`).
        store()[point] = x.clone()

    return keep


def activations(
    model: nn.Module,
    points: Iterable[HookPoint],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> dict[HookPoint, Tensor]:
    """Activations of one batch, without gradients; the model stops after the deepest of them.

    input_ids, attention_mask: [batch, seq], on any device. With a mask, position ids are counted
    from it, so that a row's activations don't depend on the padding beside it. Returns
    [batch, seq, d_model] for each point (meaningless where the mask is 0).
    """
    with reading(model, points) as read:
        return read(input_ids, attention_mask)


@contextmanager
def reading(
    model: nn.Module, points: Iterable[HookPoint]
) -> Iterator[Callable[..., dict[HookPoint, Tensor]]]:
    """`activations` of many batches: a function of (input_ids, attention_mask=None).

    Within the context every pass of the model stops early, so that it is good for nothing else.
    The function can be called from several threads at once.
    """
    points = list(dict.fromkeys(points))
    here = threading.local()

    def found() -> dict[HookPoint, Tensor]:
        return here.__dict__.setdefault("found", {})

    device = next(model.parameters()).device

    def read(input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[HookPoint, Tensor]:
        if not points:
            return {}
        call: dict[str, Any] = {"use_cache": False}
        if attention_mask is not None:
            call["attention_mask"] = attention_mask = attention_mask.to(device)
            if "position_ids" in inspect.signature(model.forward).parameters:
                call["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad(), suppress(_Deep):
            model(input_ids=input_ids.to(device), **call)
        return {point: found().pop(point) for point in points}

    with ExitStack() as stack:
        for point in points:
            _attach(stack, model, point, _keeper(point, found))
        if points:
            _stop_after(stack, model, points)
        yield read


@contextmanager
def edit(
    model: nn.Module,
    edits: Mapping[HookPoint, Callable[[Tensor, Tokens], Tensor]],
    *,
    special_ids: Collection[int] | None = None,
    prompt_length: int | None = None,
) -> Iterator[TokenClock]:
    """Replace activations: each edit maps x [batch, seq, d_model] and its tokens to the new x.

    special_ids: the ids that the clock calls special; by default those of the model's own
    configuration. prompt_length: as in `clock.token_clock`.

    An edit that returns the same object changes nothing, to the bit. Raises HookPointError for a
    place the model doesn't have and SteeringError where the tokens cannot be known. The model is
    as it was before when the context ends, whatever ended it.
    """
    if special_ids is None:
        special_ids = special_token_ids(model)

    def writer(
        point: HookPoint, change: Callable[[Tensor, Tokens], Tensor]
    ) -> Callable[[Tensor], Tensor | None]:
        def write(x: Tensor) -> Tensor | None:
            tokens = clock.tokens
            if x.shape[:-1] != tokens.shape:
                raise SteeringError(
                    f"{point}: activations of shape {tuple(x.shape[:2])} for tokens of shape "
                    f"{tuple(tokens.shape)}; call the whole model, not a part of it"
                )
            new = change(x, tokens)
            if new is x:
                return None
            if new.shape != x.shape:
                raise SteeringError(
                    f"{point}: an edit returned shape {tuple(new.shape)} "
                    f"in place of {tuple(x.shape)}"
                )
            return new if new.dtype == x.dtype else new.to(x.dtype)

        return write

    with ExitStack() as stack:
        clock = stack.enter_context(
            token_clock(model, special_ids=special_ids, prompt_length=prompt_length)
        )
        for point, change in edits.items():
            _attach(stack, model, point, writer(point, change))
        yield clock


def _attach(
    stack: ExitStack,
    model: nn.Module,
    point: HookPoint,
    use: Callable[[Tensor], Tensor | None],
) -> None:
    """Call `use` on the activation at `point`; what it returns, unless None, takes its place."""
    module, side = site_module(model, point)
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
        _remember_shape(stack, decoder_layers(model)[point.layer], shape)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = _first(output)
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
        after = _first(output).detach()
        wide = torch.promote_types(after.dtype, torch.float32)
        parts = [seen.pop(key).detach().to(wide).view(after.shape) for key in sorted(seen)]
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
                here.__dict__[site] = _first(output).clone()

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


def _first(output: Any) -> Tensor:
    """The tensor in what a module returned: transformers 4 has tuples where 5 has bare tensors."""
    return output if isinstance(output, Tensor) else output[0]


def _stop_after(stack: ExitStack, model: nn.Module, points: list[HookPoint]) -> None:
    """Stop the model by an exception once the deepest of `points` has been read."""
    deepest = max(points)
    block = decoder_layers(model)[deepest.layer]
    if all(p.site == "resid_pre" for p in points if p.layer == deepest.layer):

        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Deep

        stack.callback(block.register_forward_pre_hook(before).remove)
        return

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        raise _Deep

    stack.callback(block.register_forward_hook(after).remove)
