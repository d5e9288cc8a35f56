"""Dose and breakage: what each strength of an edit does, what it costs, and where the model breaks.

dose      effect and cost at each strength, beside the baseline; α_break; a suggested strength
iso_kl    the strength at which an edit costs a given KL, so that edits can be compared
mean_norm the mean ‖x‖ at a place, in which strengths of vectors are told
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel

from saesteer.core.progress import progress
from saesteer.effects.calibrate import EditsAt, check_budget, iso_kl, mean_norm
from saesteer.effects.continuations import (
    Continuation,
    Effect,
    continuations,
    text_ce,
    word_share,
)
from saesteer.effects.damage import (
    Cost,
    Reference,
    Text,
    distinct_n,
    repetition,
    token_rows,
)
from saesteer.errors import SteeringError

__all__ = [
    "BREAK",
    "KL_BUDGET",
    "Dose",
    "DoseRow",
    "EditsAt",
    "Interval",
    "breaking_points",
    "dose",
    "interval",
    "iso_kl",
    "mean_norm",
    "suggested",
]

BREAK = 0.5
"""Nats of ΔCE above which the model counts as broken (α_break)."""
KL_BUDGET = 0.5
"""Nats of KL(p_0 ‖ p_α) a token that a suggested strength may cost."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean over n prompts with its 95% bootstrap interval; None of one prompt alone."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class DoseRow:
    """One strength, or the baseline.

    Attributes:
        strength: None for the baseline.
        effect: over prompts. gain: effect less the baseline's on the same prompt; None for the
            baseline.
        words: share of texts that hold one of the words, where words were given.
        cost: on the neutral texts.
        repetition, distinct: of the generated texts, `damage.repetition` and `distinct_n` for n =
            1, 2, 3; None where they are too short.
        text_ce: CE of the generated texts under the unsteered model, nats a token.
        n_empty: texts that ended before their first token.
        texts: what was written, a text a prompt.
    """

    strength: float | None
    effect: Interval
    gain: Interval | None
    words: Interval | None
    cost: Cost
    repetition: float | None
    distinct: tuple[float | None, float | None, float | None]
    text_ce: float | None
    n_empty: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Dose:
    """A dose curve.

    Attributes:
        rows: by strength, ascending; the baseline stands apart.
        break_negative, break_positive: α_break of each sign, the smallest |strength| measured with
            ΔCE > .5 (not interpolated); None where none had.
        suggested: of the strengths within the KL budget the one with the best effect; None where
            none had a better one than the baseline.
    """

    baseline: DoseRow
    rows: tuple[DoseRow, ...]
    break_negative: float | None
    break_positive: float | None
    suggested: float | None
    kl_budget: float
    want: Literal["more", "less"]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, lists and dictionaries, ready for JSON."""
        return asdict(self)


def dose(
    model: PreTrainedModel,
    tokenizer: Any,
    edits_at: EditsAt,
    strengths: Sequence[float],
    *,
    prompts: Sequence[Text],
    neutral_texts: Sequence[Text],
    effect: Effect,
    words: Sequence[str] = (),
    kl_budget: float = KL_BUDGET,
    want: Literal["more", "less"] = "more",
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    seed: int = 0,
    prepend_bos: bool = True,
    prompt_length: int | None = None,
    rows_at_once: int = 64,
) -> Dose:
    """Sweep the strength of an edit: what it does to generated text, and what it costs.

    All strengths of a prompt, and the baseline, are rows of one `generate` and draw the same
    noise. Strength 0 is a point like any other: of a clamp it is ablation.

    Args:
        edits_at: the edits of a strength.
        prompts, neutral_texts: strings or rows of token ids. Effects are measured on what is
            written after the prompts, costs on the neutral texts as they are.
        effect: one number a generated text, such as `continuations.feature_activation`.
        words: also count the texts that hold one of these.
        want: whether the best effect is the highest or the lowest.
        temperature: 0 is greedy.
        seed: of the sampling (prompt number i draws with seed + i) and of the bootstrap.
        prompt_length: of the neutral texts, for edits of generated tokens: see `Reference`.
        rows_at_once: rows of one `generate`, rounded to whole prompts.

    Raises:
        SteeringError: no strengths, a strength that is no finite number or given twice, or that
            makes the logits NaN. TextError: no prompts or neutral texts. NothingSteeredError.
    """
    given = _checked(strengths, kl_budget)
    rows = token_rows(tokenizer, prompts, prepend_bos=prepend_bos)
    reference = Reference(
        model, tokenizer, neutral_texts, prepend_bos=prepend_bos, prompt_length=prompt_length
    )
    by_strength = [list(edits_at(strength)) for strength in given]
    per_call = max(1, rows_at_once // (len(given) + 1))
    with progress("dose", len(given) + len(rows), unit="part") as bar:
        costs = [reference.cost()]
        for edits in by_strength:
            costs.append(reference.cost(edits))
            bar.update(1)
        written: list[list[Continuation]] = [[] for _ in costs]
        for start in range(0, len(rows), per_call):
            some = rows[start : start + per_call]
            texts = continuations(
                model,
                tokenizer,
                [row for row in some for _ in costs],
                [edits for _ in some for edits in ([], *by_strength)],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seeds=[seed + start + i for i in range(len(some)) for _ in costs],
            )
            for i, text in enumerate(texts):
                written[i % len(costs)].append(text)
            bar.update(len(some))
    holds = word_share(words) if words else None
    values = [np.asarray(effect(texts), dtype=np.float64) for texts in written]
    made = [
        DoseRow(
            strength=strength,
            effect=interval(own, seed),
            gain=None if strength is None else interval(own - values[0], seed),
            words=interval(np.asarray(holds(texts)), seed) if holds else None,
            cost=cost,
            **_wear(model, texts),
        )
        for strength, own, cost, texts in zip((None, *given), values, costs, written, strict=True)
    ]
    baseline, steered = made[0], tuple(made[1:])
    negative, positive = breaking_points(given, [row.cost.delta_ce for row in steered])
    return Dose(
        baseline, steered, negative, positive, suggested(steered, kl_budget, want), kl_budget, want
    )


def _wear(model: PreTrainedModel, texts: Sequence[Continuation]) -> dict[str, Any]:
    ids = [one.new for one in texts]
    return {
        "repetition": repetition(ids),
        "distinct": tuple(distinct_n(ids, n) for n in (1, 2, 3)),
        "text_ce": text_ce(model, texts),
        "n_empty": sum(not new for new in ids),
        "texts": tuple(one.text for one in texts),
    }


def _checked(strengths: Sequence[float], kl_budget: float) -> list[float]:
    given = sorted(float(strength) for strength in strengths)
    if not given or not all(map(math.isfinite, given)) or len(set(given)) < len(given):
        raise SteeringError(
            f"strengths {list(strengths)}: give one or more finite numbers, each once"
        )
    check_budget(kl_budget)
    return given


def interval(values: np.ndarray, seed: int) -> Interval:
    """The mean of values [n] with its percentile bootstrap interval of 95%, seeded."""
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n < 2:
        return Interval(float(values.mean()), None, None, n)
    rng = np.random.default_rng([seed % 2**32, 11])
    # In pieces, so that thousands of prompts don't take gigabytes.
    means = [values[rng.integers(0, n, (100, n))].mean(1) for _ in range(RESAMPLES // 100)]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high), n)


def breaking_points(
    strengths: Sequence[float], delta_ce: Sequence[float], threshold: float = BREAK
) -> tuple[float | None, float | None]:
    """α_break below and above zero: the strengths closest to 0 with ΔCE > threshold, or None.

    No strength between those measured is guessed at. Strength 0 counts as a positive one.
    """
    broken = [s for s, ce in zip(strengths, delta_ce, strict=True) if ce > threshold]
    return (
        max((s for s in broken if s < 0), default=None),
        min((s for s in broken if s >= 0), default=None),
    )


def suggested(
    rows: Sequence[DoseRow], kl_budget: float, want: Literal["more", "less"] = "more"
) -> float | None:
    """The strength with the largest mean gain (want="less": the lowest) at KL ≤ kl_budget.

    None where no strength within the budget gains anything. It is chosen on the prompts that
    measured it, so that its effect is flattered: measure it again on other prompts.
    """
    sign = 1.0 if want == "more" else -1.0
    gains = {
        row.strength: sign * row.gain.mean
        for row in rows
        if row.strength is not None and row.gain is not None and row.cost.kl <= kl_budget
    }
    best = max(gains, key=lambda strength: gains[strength], default=None)
    return best if best is not None and gains[best] > 0 else None
