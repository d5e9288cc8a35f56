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

from saesteer.core.attach import attach
from saesteer.core.blocks import decoder_layers
from saesteer.core.clock import TokenClock
from saesteer.core.follow import token_clock
from saesteer.core.model import HookPoint, device_of, special_token_ids
from saesteer.core.tokens import Tokens
from saesteer.errors import SteeringError


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
            attach(stack, model, point, _keeper(point, lambda: found))
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

    device = device_of(model)

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
            attach(stack, model, point, _keeper(point, found))
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
    configuration. prompt_length: as in `follow.token_clock`.

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
            tokens = clock.tokens.on(x.device)
            came[point] += 1
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

    came = dict.fromkeys(edits, 0)
    with ExitStack() as stack:
        clock = stack.enter_context(
            token_clock(model, special_ids=special_ids, prompt_length=prompt_length)
        )
        for point, change in edits.items():
            attach(stack, model, point, writer(point, change))
        yield clock
        for point, times in came.items():
            if times < clock.completed:
                raise SteeringError(
                    f"{clock.completed - times} of {clock.completed} forward passes ran past "
                    f"{point} without its edits: a part of the model was replaced, or compiled "
                    "with what is around it (torch.compile doesn't ask hooks again); steer the "
                    "model as it was loaded"
                )


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
