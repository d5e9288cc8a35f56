"""The token clock: what is known of the tokens in each forward pass.

Each call of the whole model has it worked out once, and every edit asks it; no edit counts tokens
by itself. That is what makes an edit land on the same tokens with a KV cache or without,
padded on the left, on the right or not at all, in `forward` and in `generate`.
"""

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saesteer.core.intercept import intercept
from saesteer.core.tokens import Tokens
from saesteer.errors import SteeringError


class SteeringWarning(UserWarning):
    """Something about an edit that is allowed, and probably not what was meant."""


@dataclass(frozen=True)
class _Generation:
    """What `generate` was called with: its prompt's width and rows, its mask, how many beams."""

    prompt_length: int
    mask: Tensor | None
    rows: int
    beams: int


class _Ids:
    """The ids of a prompt's columns so far, a piece for each pass; None where they aren't known."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] | None = []
        self._width = 0

    def add(self, ids: Tensor | None, past: int) -> None:
        """A pass over these ids [batch, seq] (None: embeddings) after `past` columns."""
        if past == 0:
            self.pieces, self._width = [], 0
        if ids is None or self.pieces is None or self._width < past:
            self.pieces = None
            return
        if self._width > past:  # guesses of an assistant that were not taken
            self.pieces, self._width = [torch.cat(self.pieces, 1)[:, :past]], past
        self.pieces.append(ids)
        self._width += ids.shape[1]


class TokenClock:
    """Ticks at every forward pass of one model; `tokens` is what it read at the last tick."""

    def __init__(
        self, model: nn.Module, special_ids: Collection[int], prompt_length: int | None
    ) -> None:
        self._special = frozenset(special_ids)
        self._prompt_length = prompt_length
        self._generation: _Generation | None = None
        self._prompt_mask: Tensor | None = None  # the generation's, for all rows of its passes
        self._tokens: Tokens | None = None
        self._inside = False  # within a forward pass of the whole model
        self._seen = 0  # columns of the present prompt that some pass has covered
        self._rows = 0
        self._ids = _Ids()
        self._warned = False
        self.forwards = 0
        self.prompts = 0

    @property
    def tokens(self) -> Tokens:
        """The tokens of the forward pass that is running. SteeringError outside of one."""
        if self._tokens is None:
            raise SteeringError(
                "a part of the model was called by itself, so what its tokens are is unknown: "
                "call the whole model or its base model"
            )
        return self._tokens

    def tick(self, call: Mapping[str, Any]) -> None:
        """Read one forward pass off the arguments it is called with."""
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        source = ids if ids is not None else embeds
        if source is None:
            raise SteeringError("the model was called with neither input_ids nor inputs_embeds")
        if ids is None and not self._warned and len(self._special):
            self._warned = True
            warnings.warn(
                "the model was called with inputs_embeds: which tokens are special (BOS, EOS, …) "
                "cannot be known, so they are edited like any other",
                SteeringWarning,
                stacklevel=2,
            )
        batch, seq = source.shape[:2]
        past = _past_length(call.get("past_key_values"))
        again = self._generation is not None and self._seen > 0
        if batch != self._rows or (past == 0 and not again):
            self.prompts += 1
            self._seen, self._rows = 0, batch
            self._ids = _Ids()
        self._ids.add(ids, past)
        self._tokens = Tokens(
            shape=source.shape[:2],
            device=source.device,
            input_ids=ids,
            past_length=past,
            prompt_length=(
                self._generation.prompt_length if self._generation else self._prompt_length
            ),
            forward_index=self.forwards,
            prompt_index=self.prompts - 1,
            first_new=min(max(self._seen - past, 0), seq),
            mask=self._mask(call.get("attention_mask"), batch, past + seq),
            special_ids=self._special,
            generating=self._generation is not None,
            rows=self._generation.rows if self._generation else batch,
            reordered=self._generation is not None and self._generation.beams > 1 and past > 0,
            ids_so_far=self._ids.pieces,
        )
        self._seen = max(self._seen, past + seq)
        self.forwards += 1

    def _mask(self, mask: Any, batch: int, width: int) -> Tensor | None:
        """The mask over the whole sequence so far [batch, width], or None for no padding."""
        given = None if self._generation is None else self._generation.mask
        # What `generate` adds to its prompt is never padding.
        if given is None and (mask is None or self._generation is not None):
            return None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            if mask.shape[1] < width:
                raise SteeringError(
                    f"the attention mask is {mask.shape[1]} wide and the sequence {width}: "
                    "it must cover the cached tokens too"
                )
            return mask[:, :width]
        if self._generation is None:
            raise SteeringError(
                "the attention mask is not [batch, sequence], so which tokens are padding is "
                "unknown: give the model a two-dimensional mask"
            )
        # With a static cache, `generate` makes its masks itself; only its own prompt has padding.
        assert given is not None
        if self._prompt_mask is None or len(self._prompt_mask) != batch:
            self._prompt_mask = given.repeat_interleave(batch // len(given), 0)
        prompt = self._prompt_mask[:, :width]
        return nn.functional.pad(prompt, (0, width - prompt.shape[1]), value=1)

    @contextmanager
    def _generating(self, generation: _Generation) -> Iterator[None]:
        before, self._prompt_mask = self._generation, None
        self._generation, self._seen, self._rows, self._ids = generation, 0, 0, _Ids()
        try:
            yield
        finally:
            self._generation, self._prompt_mask = before, None
            self._seen, self._rows, self._ids = 0, 0, _Ids()


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
    clock = TokenClock(model, special_ids, prompt_length)
    with ExitStack() as stack:
        base = getattr(model, "base_model", model)
        if isinstance(base, nn.Module) and base is not model:
            _listen(stack, base, clock)
        _listen(stack, model, clock)
        if callable(getattr(model, "generate", None)):
            _listen_to_generate(stack, model, clock)
        yield clock


def _check_followed(model: nn.Module, prompt_length: int | None) -> None:
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise SteeringError(
            "the model is compiled (torch.compile), and what is compiled doesn't ask hooks again: "
            "steer the model as it was loaded, and compile nothing of it while it is steered"
        )
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


def _listen(stack: ExitStack, module: nn.Module, clock: TokenClock) -> None:
    """Tick when `module` is called, unless the whole model's call around it has ticked."""

    def around(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if clock._inside:
            return run(*args, **kwargs)
        call: Mapping[str, Any] = kwargs
        if args:
            names = inspect.signature(module.forward).parameters
            call = {**dict(zip(names, args, strict=False)), **kwargs}
        clock.tick(call)
        clock._inside = True
        try:
            return run(*args, **kwargs)
        finally:
            clock._inside, clock._tokens = False, None

    intercept(stack, module, "forward", around)


def _listen_to_generate(stack: ExitStack, model: nn.Module, clock: TokenClock) -> None:
    """Tell the clock where the prompt of a `generate` ends."""

    def around(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if hasattr(getattr(model, "generation_config", None), "disable_compile"):
            # With a static cache on a GPU `generate` compiles the model; hooks are not for that.
            kwargs.setdefault("disable_compile", True)
        with clock._generating(_read_generation(model, args, kwargs)):
            return run(*args, **kwargs)

    intercept(stack, model, "generate", around)


def _read_generation(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> _Generation:
    """The prompt's width and mask, from the arguments of `generate`."""
    embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    prompt = embeds if embeds is not None else ids
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)

    def setting(name: str) -> Any:
        return kwargs.get(name, getattr(config, name, None))

    beams = setting("num_beams") or 1
    if prompt is None:
        return _Generation(1, None, 1, beams)  # generate starts from the BOS token alone
    rows, width = prompt.shape[:2]
    if isinstance(mask, Tensor) and mask.dim() == 2:
        # Without padding there is nothing to keep in step with each pass.
        return _Generation(width, None if bool(mask.all()) else mask, rows, beams)
    pad, eos = setting("pad_token_id"), setting("eos_token_id")
    # As generate does it: without a mask, pad tokens are padding if they can't be EOS.
    if mask is None and embeds is None and isinstance(pad, int):
        ends = eos if isinstance(eos, list | tuple) else [eos]
        if pad not in ends and bool((prompt == pad).any()):
            return _Generation(width, (prompt != pad).long(), rows, beams)
    return _Generation(width, None, rows, beams)


def _past_length(cache: Any) -> int:
    """Tokens in a KV cache of any kind."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())  # a static cache counts in a tensor
    if isinstance(cache, tuple | list):  # before transformers 5: (keys, values) a block
        return cache[0][0].shape[-2] if cache else 0
    raise SteeringError(
        f"a cache of type {type(cache).__name__} does not tell how many tokens it holds: "
        "pass use_cache=False"
    )
