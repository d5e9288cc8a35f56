"""Steering: edits applied to a model while a context lasts, in `forward` and in `generate`."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from saesteer.core.blocks import point_width
from saesteer.core.clock import SteeringWarning
from saesteer.core.hooks import edit as edit_activations
from saesteer.core.model import HookPoint, device_of, site_module, special_token_ids
from saesteer.core.tokens import Tokens
from saesteer.errors import NothingSteeredError, SteeringError
from saesteer.steering.conditions import Gate, When
from saesteer.steering.edits import Clamp, Edit, Scope, place, read_at, width
from saesteer.steering.positions import Positions
from saesteer.steering.program import compile_point
from saesteer.steering.receipt import Receipt
from saesteer.steering.steps import Placed, Records, Shared


@contextmanager
def steer(
    model: nn.Module,
    edits: Edit | Sequence[Edit] | Sequence[Sequence[Edit]],
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
    A list of lists gives each row of the batch its own edits, an empty list none; beams and return
    sequences go with the row they came from.
    tokenizer: its special tokens are left alone too, beside those the model's configuration names.
    prompt_length: columns from this one on count as generated in bare forward passes. Otherwise a
    bare forward pass is all prompt; `generate` tells the two apart by itself.

    Works in `forward` and `generate`, with a KV cache or without, for any batch and padding;
    gradients flow. Contexts nest, the outer one's edits first. When the context ends, the model
    is what it was.

    Each `generate`, and each bare forward pass that begins with an empty cache, is one prompt, and
    in every row of every prompt each edit must be for at least one token, but for edits whose
    positions are optional.

    Raises:
        SteeringError: no edits, or one that doesn't fit the model; within the context, a batch of
            other than as many rows as there are lists.
        HookPointError: a hook point that the model doesn't have.
        NothingSteeredError: at the end of a body that raised nothing, where no forward pass ran or
            some edit was for no token in some row.
    """
    placed, n_rows = _placed(edits)
    _check(model, [one.edit for one in placed])
    device = device_of(model)  # to begin with: steps follow the activations
    conditions = {id(when): when for one in placed if (when := one.edit.when) is not None}
    gates = {key: Gate(when, device) for key, when in conditions.items()}
    shared = Shared(_Masks(tokenizer, n_rows), gates, n_rows, device)
    for gate in gates.values():
        shared.readers.setdefault(gate.when.point, []).append(gate.read)
    points = [*(place(one.edit) for one in placed), *(read_at(one.edit) for one in placed)]
    changes = {
        point: compile_point(point, [one for one in placed if place(one.edit) == point], shared)
        for point in dict.fromkeys([*points, *shared.readers])
    }
    records = [shared.records[one] for one in placed]
    special = special_token_ids(model, tokenizer)
    with edit_activations(
        model, changes, special_ids=special, prompt_length=prompt_length
    ) as clock:
        yield Receipt(records, lambda: (clock.forwards, clock.prompts))
        clock.check_at_rest()
    _judge(shared.records, clock.forwards)


def _placed(
    edits: Edit | Sequence[Edit] | Sequence[Sequence[Edit]],
) -> tuple[list[Placed], int]:
    """Edits with their rows, and how many rows have lists of their own (0: none)."""
    if isinstance(edits, Scope):
        return [Placed(edits)], 0
    lists = [each for each in edits if isinstance(each, list | tuple)]
    if not lists:
        return [Placed(cast(Edit, each)) for each in edits], 0
    if len(lists) < len(edits):
        raise SteeringError("edits and lists of edits are mixed: give every row a list")
    return [Placed(one, row) for row, each in enumerate(lists) for one in each], len(lists)


class _Masks:
    """The chosen tokens of the present pass, worked out once for all edits that agree on where."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, n_rows: int) -> None:
        self._tokenizer, self._n_rows = tokenizer, n_rows
        self._tokens: Tokens | None = None
        self._known: dict[int, Tensor | None] = {}  # by the identity of the positions

    def __call__(self, tokens: Tokens, where: Positions) -> Tensor | None:
        if tokens is not self._tokens:
            if self._n_rows and tokens.rows != self._n_rows:
                raise SteeringError(
                    f"{self._n_rows} lists of edits for a batch of {tokens.rows} rows: give each "
                    "row one, an empty list for none"
                )
            self._tokens, self._known = tokens, {}
        if id(where) not in self._known:
            self._known[id(where)] = where.mask(tokens, self._tokenizer)
        return self._known[id(where)]


def _check(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Refuse, before anything is hooked, edits that can't be made to this model."""
    if not edits:
        raise SteeringError("no edits given: name at least one Clamp, Add, Project, …")

    @cache  # a thousand edits are mostly at one place
    def width_at(point: HookPoint) -> int:
        site_module(model, point)
        return point_width(model, point)

    for edit in edits:
        if not isinstance(edit, Scope):
            raise SteeringError(
                f"{type(edit).__name__} is not an edit: use saesteer.Clamp, saesteer.Add, …"
            )
        sizes = [width_at(read_at(edit)), width_at(place(edit))]
        size = sizes[1]
        if isinstance(edit, Clamp) and [edit.sae.d_in, edit.sae.d_out] != sizes:
            raise SteeringError(
                f"{edit}: the SAE reads {edit.sae.d_in} dimensions and writes {edit.sae.d_out}, "
                f"and the model has {sizes[0]} and {sizes[1]} there; was it trained on another "
                "model?"
            )
        if width(edit) != size:
            raise SteeringError(
                f"{edit}: it is made for {width(edit)} dimensions and the model has {size} there; "
                "was it made for another model?"
            )
        if edit.when is not None:
            _check_condition(model, edit, edit.when)


def _check_condition(model: nn.Module, edit: Edit, when: When) -> None:
    site_module(model, when.point)
    if when.point.depth > read_at(edit).depth:
        raise SteeringError(
            f"{edit}: its condition reads {when.point}, which comes later; read it at "
            f"{read_at(edit)} or before"
        )
    size = point_width(model, when.point)
    if when.reads.width != size:
        raise SteeringError(
            f"{edit}: its condition is made for {when.reads.width} dimensions and the model has "
            f"{size} at {when.point}"
        )


def _judge(records: Records, forwards: int) -> None:
    """After a clean end: an edit for no token is an error, one that did nothing a warning.

    Raises NothingSteeredError.
    """
    if forwards == 0:
        raise NothingSteeredError(
            "nothing was steered: no forward pass of the model ran inside the context; call the "
            "model, or its generate, within it"
        )
    for one, (record, at) in records.items():
        if not record.reached:
            raise NothingSteeredError(
                f"{one.edit} touched nothing: every forward pass stopped before it came there"
            )
        untouched = record.rows_untouched(at)
        if untouched and not one.edit.where.optional:
            prompt, row = untouched[0]
            more = f" (and {len(untouched) - 1} more)" if len(untouched) > 1 else ""
            raise NothingSteeredError(
                f"{one.edit} touched no token in row {row} of prompt {prompt}{more}: it applies to "
                f"{one.edit.where}; give that row such a token, or choose other positions"
            )
    optional = [(one, *known) for one, known in records.items() if one.edit.where.optional]
    if optional and not any(record.summary(at).n_eligible for _, record, at in optional):
        raise NothingSteeredError(
            f"{optional[0][0].edit} touched no token in any row, nor did any other edit whose "
            f"positions are optional: it applies to {optional[0][0].edit.where}; give a text that "
            "has such tokens, or choose other positions"
        )
    for one, (record, at) in records.items():
        bounded = isinstance(one.edit, Clamp) and one.edit.how in ("min", "max")
        if one.edit.when is None and not bounded:
            continue
        summary = record.summary(at)
        if one.edit.when is not None and summary.n_edited == 0:
            told = f"{one.edit} never applied: its condition ({one.edit.when}) held nowhere"
        elif bounded and summary.n_changed == 0:
            told = f"{one.edit} never bound: the activation stayed on its side of the value"
        else:
            continue
        warnings.warn(f"{told} on all {summary.n_eligible} tokens", SteeringWarning, stacklevel=4)
