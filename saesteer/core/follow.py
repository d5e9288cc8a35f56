"""Following one model: every call of it ticks a clock, and what can't be followed is refused.

Nothing here is a hook: the model's own `forward` and `generate` are intercepted (`intercept.py`).
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from saesteer.core.clock import Generation, TokenClock
from saesteer.core.intercept import intercept
from saesteer.errors import SteeringError


@contextmanager
def token_clock(
    model: nn.Module, *, special_ids: Collection[int], prompt_length: int | None = None
) -> Iterator[TokenClock]:
    """A clock that ticks at each forward pass of `model` until the context ends.

    special_ids: the ids that count as special.
    prompt_length: columns from this one on count as generated in bare forward passes; `generate`
    knows its own prompt.

    A pass with an empty cache begins a new prompt, except inside one `generate`. Raises
    SteeringError for models that it cannot follow (encoder-decoders, gradient checkpointing).
    """
    _check_followed(model, prompt_length)
    clock = TokenClock(special_ids, prompt_length)
    with ExitStack() as stack:
        base = getattr(model, "base_model", model)
        if isinstance(base, nn.Module) and base is not model:
            _listen(stack, base, clock)
        _listen(stack, model, clock)
        if callable(getattr(model, "generate", None)):
            _listen_to_generate(stack, model, clock)
        yield clock


def _check_followed(model: nn.Module, prompt_length: int | None) -> None:
    for part in (model, getattr(model, "base_model", model)):
        check_uncompiled(part, f"the {type(part).__name__}")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise SteeringError(
            f"{type(model).__name__} is an encoder-decoder; only decoders can be steered"
        )
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise SteeringError(
            "gradient checkpointing runs blocks again out of turn: "
            "call model.gradient_checkpointing_disable() before steering"
        )
    if prompt_length is not None and (
        isinstance(prompt_length, bool) or not isinstance(prompt_length, int) or prompt_length < 0
    ):
        raise SteeringError(f"prompt_length {prompt_length!r} is not a whole number from 0 up")


def check_uncompiled(module: nn.Module, name: str) -> None:
    """SteeringError where the module, its call or its `forward` went through torch.compile."""
    forward: Any = getattr(module, "forward", None)
    if (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        # What is marked as not to be compiled carries the first of these too.
        or (
            hasattr(forward, "_torchdynamo_orig_callable")
            and not hasattr(forward, "_torchdynamo_disable")
        )
    ):
        raise SteeringError(
            f"{name} is compiled (torch.compile), and what is compiled doesn't ask hooks again: "
            "steer the model as it was loaded, and compile nothing of it while it is steered"
        )


def _listen(stack: ExitStack, module: nn.Module, clock: TokenClock) -> None:
    """Tick when `module` is called, unless the whole model's call around it has ticked."""

    def around(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call: Mapping[str, Any] = kwargs
        if args:
            names = inspect.signature(module.forward).parameters
            call = {**dict(zip(names, args, strict=False)), **kwargs}
        if not clock.begin(call):
            return run(*args, **kwargs)
        completed = False
        try:
            output = run(*args, **kwargs)
            completed = True
            return output
        finally:
            clock.end(completed=completed)

    intercept(stack, module, "forward", around)


def _listen_to_generate(stack: ExitStack, model: nn.Module, clock: TokenClock) -> None:
    """Tell the clock where the prompt of a `generate` ends."""

    def around(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if hasattr(getattr(model, "generation_config", None), "disable_compile"):
            # With a static cache on a GPU `generate` compiles the model; hooks are not for that.
            kwargs.setdefault("disable_compile", True)
        if clock.generation is not None:
            raise SteeringError(
                "the model's generate was called within its generate (an assistant that is the "
                "model itself, or assistant_early_exit) or in two threads at once, so whose tokens "
                "are whose isn't known: use another assistant_model or prompt_lookup_num_tokens, "
                "and one thread at a time"
            )
        with clock.generating(_read_generation(model, args, kwargs)):
            output = run(*args, **kwargs)
        texts = getattr(output, "sequences", output)
        if isinstance(texts, Tensor) and kwargs.get("inputs_embeds") is None:
            clock.generated(texts.shape[1])
        return output

    def around_step(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Every way of generating comes by here, also a `generate` bound before the context was
        # entered, or the class's own.
        if clock.generation is None:
            raise SteeringError(
                "the model generates otherwise than by its `generate` of now, so where its prompt "
                "ends isn't known: call model.generate(…) within the context"
            )
        return run(*args, **kwargs)

    intercept(stack, model, "generate", around)
    if callable(getattr(model, "prepare_inputs_for_generation", None)):
        intercept(stack, model, "prepare_inputs_for_generation", around_step)
    for name in ("generate_batch", "init_continuous_batching"):
        if callable(getattr(model, name, None)):
            intercept(stack, model, name, _refuse_packed)


def _refuse_packed(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise SteeringError(
        "continuous batching (generate_batch) packs texts into one row, which can't be steered: "
        "use generate"
    )


def _read_generation(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Generation:
    """The prompt's width and mask, from the arguments of `generate`."""
    embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    prompt = embeds if embeds is not None else ids
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)

    def setting(name: str) -> Any:
        return kwargs.get(name, getattr(config, name, None))

    if setting("guidance_scale") not in (None, 1):
        raise SteeringError(
            "guidance_scale runs a second text through the model between the steps of the first, "
            "so whose tokens are whose isn't known: generate without it"
        )
    beams = setting("num_beams") or 1
    if prompt is None:
        return Generation(1, None, 1, beams)  # generate starts from the BOS token alone
    rows, width = prompt.shape[:2]
    if isinstance(mask, Tensor) and mask.dim() == 2:
        # Without padding there is nothing to keep in step with each pass.
        return Generation(width, None if bool(mask.all()) else mask, rows, beams)
    pad, eos = setting("pad_token_id"), setting("eos_token_id")
    # As generate does it: without a mask, pad tokens are padding if they can't be EOS.
    if mask is None and embeds is None and isinstance(pad, int):
        ends = eos if isinstance(eos, list | tuple) else [eos]
        if pad not in ends and bool((prompt == pad).any()):
            return Generation(width, (prompt != pad).long(), rows, beams)
    return Generation(width, None, rows, beams)
