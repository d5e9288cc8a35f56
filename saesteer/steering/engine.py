"""Steering: edits applied to a model while a context lasts, in `forward` and in `generate`."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from saesteer.core.clock import SteeringWarning
from saesteer.core.hooks import edit as edit_activations
from saesteer.core.model import HookPoint, d_model, decoder_layers, site_module, special_token_ids
from saesteer.core.tokens import Tokens
from saesteer.errors import NothingSteeredError, SteeringError
from saesteer.steering.edits import Add, Clamp, Edit, place
from saesteer.steering.positions import Positions
from saesteer.steering.program import compile_point
from saesteer.steering.receipt import Receipt, Record


@contextmanager
def steer(
    model: nn.Module,
    edits: Edit | Sequence[Edit],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt_length: int | None = None,
) -> Iterator[Receipt]:
    """Steer any loaded Hugging Face causal language model while the context lasts.

        with steer(model, [Clamp(sae, 4217, 30.0)]) as receipt:
            model.generate(**inputs)
        print(receipt)

    edits: applied in the order written at each hook point; clamps of one SAE beside one another
    all read the same unedited activation, and two clamps of one feature act one after the other.
    tokenizer: its special tokens are left alone too, beside those the model's configuration names.
    prompt_length: columns from this one on count as generated in bare forward passes. Otherwise a
    bare forward pass is all prompt; `generate` tells the two apart by itself.

    Works in `forward` and `generate`, with a KV cache or without, for any batch and padding;
    gradients flow. Contexts nest, the outer one's edits first. When the context ends, the model
    is what it was.

    Each `generate`, and each bare forward pass that begins with an empty cache, is one prompt, and
    in every row of every prompt each edit must find at least one token.

    Raises:
        SteeringError: no edits, or one that doesn't fit the model.
        HookPointError: a hook point that the model doesn't have.
        NothingSteeredError: at the end of a body that raised nothing, where no forward pass ran or
            some edit found no token in some row.
    """
    chosen = [edits] if isinstance(edits, Clamp | Add) else list(edits)
    _check(model, chosen)
    records = [Record(str(edit)) for edit in chosen]
    masks = _Masks()
    by_point: dict[HookPoint, list[tuple[Edit, Record]]] = {}
    for edit, record in zip(chosen, records, strict=True):
        by_point.setdefault(place(edit), []).append((edit, record))
    changes = {}
    for point, here in by_point.items():
        device = next(decoder_layers(model)[point.layer].parameters()).device
        changes[point] = compile_point(here, masks, device)
    special = special_token_ids(model, tokenizer)
    with edit_activations(
        model, changes, special_ids=special, prompt_length=prompt_length
    ) as clock:
        yield Receipt(records, lambda: (clock.forwards, clock.prompts))
    _judge(chosen, records, clock.forwards)


class _Masks:
    """The chosen tokens of the present pass, worked out once for all edits that agree on where."""

    def __init__(self) -> None:
        self._tokens: Tokens | None = None
        self._known: dict[Positions, Tensor] = {}

    def __call__(self, tokens: Tokens, where: Positions) -> Tensor:
        if tokens is not self._tokens:
            self._tokens, self._known = tokens, {}
        if where not in self._known:
            self._known[where] = where.mask(tokens)
        return self._known[where]


def _check(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Refuse, before anything is hooked, edits that can't be made to this model."""
    if not edits:
        raise SteeringError("no edits given: name at least one Clamp or Add")
    width = d_model(model)
    for edit in edits:
        if not isinstance(edit, Clamp | Add):
            raise SteeringError(
                f"{type(edit).__name__} is not an edit: use saesteer.Clamp or saesteer.Add"
            )
        site_module(model, place(edit))
        if isinstance(edit, Add) and len(edit.vector) != width:
            raise SteeringError(
                f"{edit}: the vector has {len(edit.vector)} dimensions and the model {width}; "
                "was it made for another model?"
            )
        if isinstance(edit, Clamp) and (edit.sae.d_in, edit.sae.d_out) != (width, width):
            raise SteeringError(
                f"{edit}: the SAE reads {edit.sae.d_in} dimensions and writes {edit.sae.d_out}, "
                f"and the model has {width}; was it trained on another model?"
            )


def _judge(edits: Sequence[Edit], records: Sequence[Record], forwards: int) -> None:
    """After a clean end: an edit that found no token is an error, one that never bound a warning.

    Raises NothingSteeredError.
    """
    if forwards == 0:
        raise NothingSteeredError(
            "nothing was steered: no forward pass of the model ran inside the context; call the "
            "model, or its generate, within it"
        )
    for edit, record in zip(edits, records, strict=True):
        if not record.reached:
            raise NothingSteeredError(
                f"{edit} touched nothing: every forward pass stopped before it came there"
            )
        untouched = record.rows_untouched()
        if untouched:
            prompt, row = untouched[0]
            more = f" (and {len(untouched) - 1} more)" if len(untouched) > 1 else ""
            raise NothingSteeredError(
                f"{edit} touched no token in row {row} of prompt {prompt}{more}: it applies to "
                f"{edit.where}; give that row such a token, or choose other positions"
            )
    for edit, record in zip(edits, records, strict=True):
        bounded = isinstance(edit, Clamp) and edit.how in ("min", "max")
        if bounded and record.summary().n_changed == 0:
            warnings.warn(
                f"{edit} never bound: the activation stayed on its side of the value everywhere",
                SteeringWarning,
                stacklevel=4,
            )
