"""Texts with and without edits, beside one another, and what each strength does to them.

The baseline and the steered texts of a comparison draw the same noise, so that they differ only
where their distributions do. Each text is then read once by the unsteered model: its CE, and what
the feature fires on in what was written, however that was brought about.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from saesteer.core.generate import Prompt, Written, write
from saesteer.core.hooks import capture
from saesteer.core.model import special_token_ids
from saesteer.effects.damage import cross_entropy, distinct_n
from saesteer.effects.readings import Reading
from saesteer.errors import SteeringError
from saesteer.steering.edits import Add, Clamp, Edit, Project, Rotate
from saesteer.steering.engine import steer
from saesteer.steering.receipt import Receipt
from saesteer.steering.record import TokenTrace


@dataclass(frozen=True)
class Measures:
    """Of one text: its plain generated tokens, as the unsteered model reads them.

    Attributes:
        n_tokens: how many there are.
        ce: nats a token, each after all that stands before it; None where there is no token.
        distinct_2: distinct 2-grams / 2-grams; None where there is none.
        activation: mean of the reading; None without a reading or a token.
    """

    n_tokens: int
    ce: float | None
    distinct_2: float | None
    activation: float | None


@dataclass(frozen=True)
class Side:
    """One of the texts of a comparison.

    Attributes:
        strength: what its edits were multiplied by; None: the baseline.
        trace: every token, BOS included: whether it was edited, what the unsteered model reads on
            it, and what a clamp put in its place.
    """

    strength: float | None
    written: Written
    measures: Measures
    trace: tuple[TokenTrace, ...]


@dataclass(frozen=True)
class Comparison:
    """A baseline and what was steered, of one prompt and seed. sides: the baseline first."""

    seed: int
    reading: str | None
    sides: tuple[Side, ...]

    @property
    def top(self) -> float:
        """The highest reading in any of the texts; 0 where nothing was read."""
        values = [t.before for side in self.sides for t in side.trace if t.before is not None]
        return max(values, default=0.0)


@dataclass(frozen=True)
class Sampling:
    """How texts are written; see `core.generate.write`."""

    max_new_tokens: int = 40
    temperature: float = 1.0
    prepend_bos: bool = True


def scaled(edit: Edit, times: float) -> Edit:
    """The edit with its strength multiplied: a clamp's value, an addition's factor, the number
    that a projection is set to, the angle of a rotation.

    Raises:
        SteeringError: an edit without one: a projection to 0, an affine map.
    """
    if isinstance(edit, Clamp):
        return replace(edit, value=edit.value * times)
    if isinstance(edit, Add):
        return replace(edit, strength=edit.strength * times)
    if isinstance(edit, Project) and edit.to:
        return replace(edit, to=edit.to * times)
    if isinstance(edit, Rotate):
        return replace(edit, angle=edit.angle * times)
    raise SteeringError(
        f"{edit} has no strength to multiply: sweep clamps, additions, angles or projections to "
        "another number than 0, or leave the sweep out"
    )


def pairs(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    edits: Sequence[Edit] | Sequence[Sequence[Edit]],
    *,
    seeds: Sequence[int],
    sampling: Sampling = Sampling(),
    reading: Reading | None = None,
    stream: Callable[[str], BaseStreamer] | None = None,
) -> tuple[list[Comparison], Receipt]:
    """Each prompt continued without the edits and with them.

    edits: for all prompts, or a list for each. seeds: one a prompt. reading: what is read in the
    texts. stream: of one prompt, makes the streamer of its "baseline" and of its "steered" text.

    Raises:
        TextError, SteeringError, NothingSteeredError: see `write` and `steer`.
    """

    def texts(side: str) -> list[Written]:
        return write(
            model,
            tokenizer,
            prompts,
            **vars(sampling),
            seed=seeds,
            streamer=stream(side) if stream else None,
        )

    baseline = texts("baseline")
    with steer(model, edits, tokenizer=tokenizer) as receipt:
        steered = texts("steered")
    read = _read_all(model, tokenizer, [*baseline, *steered], reading)
    marks, found = _marks(receipt, len(prompts)), []
    for row, (before, after, seed) in enumerate(zip(baseline, steered, seeds, strict=True)):
        sides = (
            _side(None, before, *read[row], []),
            _side(1.0, after, *read[len(prompts) + row], marks[row]),
        )
        found.append(Comparison(seed, reading.name if reading else None, sides))
    return found, receipt


def sweep(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Prompt,
    edits: Sequence[Edit],
    multiples: Sequence[float],
    *,
    seed: int = 0,
    sampling: Sampling = Sampling(),
    reading: Reading | None = None,
) -> tuple[Comparison, Receipt]:
    """A prompt continued at each multiple of the edits' strengths, in one `generate`.

    The baseline is a row of its own without edits: 0 times a clamp is ablation, not the baseline.

    Raises:
        SteeringError: no multiples, or an edit without a strength; and those of `pairs`.
    """
    if not multiples:
        raise SteeringError("no strengths to sweep; give at least one multiple")
    rows = [[], *([scaled(edit, times) for edit in edits] for times in multiples)]
    with steer(model, rows, tokenizer=tokenizer) as receipt:
        written = write(
            model, tokenizer, [prompt] * len(rows), **vars(sampling), seed=[seed] * len(rows)
        )
    read, marks = _read_all(model, tokenizer, written, reading), _marks(receipt, len(rows))
    sides = tuple(
        _side(times, one, *found, mark)
        for times, one, found, mark in zip([None, *multiples], written, read, marks, strict=True)
    )
    return Comparison(seed, reading.name if reading else None, sides), receipt


def measures(logits: Tensor, ids: Tensor, counted: Tensor, values: Tensor | None) -> Measures:
    """Of one text: logits [seq, vocabulary], ids [seq], its counted tokens bool [seq], readings
    [seq] or None."""
    read = values is not None and bool(counted.any())
    predicted = counted[1:]  # the first is not: there is nothing before it
    losses = cross_entropy(logits[:-1][predicted], ids[1:][predicted])
    return Measures(
        n_tokens=int(counted.sum()),
        ce=float(losses.mean()) if len(losses) else None,
        distinct_2=distinct_n([ids[counted].tolist()], 2),
        activation=float(values[counted].mean()) if read and values is not None else None,
    )


@torch.no_grad()
def _read_all(
    model: PreTrainedModel, tokenizer: Any, texts: Sequence[Written], reading: Reading | None
) -> list[tuple[Measures, list[float] | None]]:
    """Measures of each text, and the reading of each of its tokens; the model is unsteered.

    One text a pass: logits of long texts over a large vocabulary take much memory.
    """
    special = torch.tensor(sorted(special_token_ids(model, tokenizer)), device=model.device)
    found = []
    for text in texts:
        ids = torch.tensor([*text.prompt, *text.new], device=model.device)
        counted = torch.arange(len(ids), device=model.device) >= len(text.prompt)
        counted &= ~torch.isin(ids, special)
        with capture(model, [reading.point] if reading else []) as x:
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        values = reading.read(x[reading.point])[0].float().to(model.device) if reading else None
        read = None if values is None else values.tolist()
        found.append((measures(logits, ids, counted, values), read))
    return found


def _marks(receipt: Receipt, n_rows: int) -> list[list[tuple[bool, float | None]]]:
    """Of each row's tokens that passed through: whether any edit changed it, and what the first
    clamp that did put in its place."""
    rows: list[list[list[TokenTrace]]] = [[] for _ in range(n_rows)]
    for number, edit in enumerate(receipt.edits):
        (traced,) = receipt.traces(number)  # of the one `generate`
        for row in range(n_rows) if edit.row is None else [edit.row]:
            rows[row].append(traced[row])
    return [[_mark(token) for token in zip(*row, strict=True)] for row in rows]


def _mark(token: Sequence[TokenTrace]) -> tuple[bool, float | None]:
    edited = [one for one in token if one.edited]
    return bool(edited), next((one.after for one in edited if one.after is not None), None)


def _side(
    strength: float | None,
    written: Written,
    found: Measures,
    values: list[float] | None,
    marks: Sequence[tuple[bool, float | None]],
) -> Side:
    """The last token of a text never passed through the model, and so has no mark."""
    trace = []
    for n, token in enumerate((*written.prompt, *written.new)):
        edited, after = marks[n] if n < len(marks) else (False, None)
        trace.append(TokenTrace(token, edited, values[n] if values else None, after))
    return Side(strength, written, found, tuple(trace))
