"""The token clock: what is known of the tokens in each forward pass.

Each call of the whole model has it worked out once, and every edit asks it; no edit counts tokens
by itself. That is what makes an edit land on the same tokens with a KV cache or without,
padded on the left, on the right or not at all, in `forward` and in `generate`.
"""

import threading
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saesteer.core.tokens import Tokens
from saesteer.errors import SteeringError


class SteeringWarning(UserWarning):
    """Something about an edit that is allowed, and probably not what was meant."""


@dataclass(frozen=True)
class Generation:
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

    def __init__(self, special_ids: Collection[int], prompt_length: int | None) -> None:
        self._special = frozenset(special_ids)
        self._prompt_length = prompt_length
        self.generation: Generation | None = None  # the `generate` that is running
        self._prompt_mask: Tensor | None = None  # the generation's, for all rows of its passes
        self._tokens: Tokens | None = None
        self._latest: Tokens | None = None  # the same, also after the pass
        self._inside = False  # within a forward pass of the whole model
        self._thread = 0  # the one in which it runs
        self._seen = 0  # columns of the present prompt that some pass has covered
        self._rows = 0
        self._ids = _Ids()
        self._warned = False
        self.forwards = 0
        self.completed = 0  # those of them that came to their end
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

    def check_at_rest(self) -> None:
        """SteeringError where a pass or a `generate` is still under way, in another thread."""
        if self._inside or self.generation is not None:
            raise SteeringError(
                "the context ends while the model still generates in another thread, and the rest "
                "of its text would not be steered: join the thread within the context"
            )

    def begin(self, call: Mapping[str, Any]) -> bool:
        """A forward pass is called with these arguments: read it off them, and True; False within
        the pass that has begun already, where a part of the model is called.

        Raises SteeringError where the tokens cannot be known.
        """
        if self._inside:
            if self._thread != threading.get_ident():
                raise SteeringError(
                    "two threads run the model at once within one context, so whose tokens are "
                    "whose isn't known: let one wait for the other, or put both texts in one batch"
                )
            return False
        if torch._C._get_tracing_state() is not None:
            raise SteeringError(
                "the model is traced (torch.jit.trace) while it is steered, and the trace would "
                "keep the edits for good: trace it outside of the context"
            )
        self._tick(call)
        self._inside, self._thread = True, threading.get_ident()
        return True

    def end(self, *, completed: bool) -> None:
        """The pass that `begin` has begun is over."""
        self.completed += completed
        self._inside, self._tokens = False, None

    def _tick(self, call: Mapping[str, Any]) -> None:
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
        for name in ("cache_params", "state"):
            if call.get(name) is not None:
                raise SteeringError(
                    f"the model keeps its past in {name}, which doesn't tell how many tokens it "
                    "holds: pass use_cache=False"
                )
        batch, seq = source.shape[:2]
        past = _past_length(call.get("past_key_values"))
        again = self.generation is not None and self._seen > 0
        if batch != self._rows or (past == 0 and not again):
            self.prompts += 1
            self._seen, self._rows = 0, batch
            self._ids = _Ids()
        elif 0 < past < self._seen and self._latest is not None:
            # The last pass held guesses that were not taken; others come in their place.
            self._latest.keep(max(past - self._latest.past_length, 0))
            self._seen = past
        self._ids.add(ids, past)
        self._latest = self._tokens = Tokens(
            shape=source.shape[:2],
            device=source.device,
            input_ids=ids,
            past_length=past,
            prompt_length=(
                self.generation.prompt_length if self.generation else self._prompt_length
            ),
            forward_index=self.forwards,
            prompt_index=self.prompts - 1,
            first_new=min(max(self._seen - past, 0), seq),
            kept=seq,
            mask=self._mask(call.get("attention_mask"), batch, past + seq),
            special_ids=self._special,
            generating=self.generation is not None,
            rows=self.generation.rows if self.generation else batch,
            reordered=self.generation is not None and self.generation.beams > 1 and past > 0,
            ids_so_far=self._ids.pieces,
        )
        self._seen = max(self._seen, past + seq)
        self.forwards += 1

    def _mask(self, mask: Any, batch: int, width: int) -> Tensor | None:
        """The mask over the whole sequence so far [batch, width], or None for no padding."""
        given = None if self.generation is None else self.generation.mask
        # What `generate` adds to its prompt is never padding.
        if given is None and (mask is None or self.generation is not None):
            return None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            if mask.shape[1] < width:
                raise SteeringError(
                    f"the attention mask is {mask.shape[1]} wide and the sequence {width}: "
                    "it must cover the cached tokens too"
                )
            return mask[:, :width]
        if self.generation is None:
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

    def generated(self, width: int) -> None:
        """`generate` is over, and its texts are so wide: the last pass's guesses end there."""
        last = self._latest
        if last is not None and last.past_length > 0 and last.shape[1] > 1:
            # The last token of a text never passes through the model.
            last.keep(min(last.kept, max(width - 1 - last.past_length, 0)))

    @contextmanager
    def generating(self, generation: Generation) -> Iterator[None]:
        """While `generate` runs."""
        before, self._prompt_mask = self.generation, None
        self.generation, self._seen, self._rows, self._ids = generation, 0, 0, _Ids()
        try:
            yield
        finally:
            self.generation, self._prompt_mask = before, None
            self._seen, self._rows, self._ids = 0, 0, _Ids()


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
