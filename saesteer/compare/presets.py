"""Published protocols by name: their figures by their own formulas, and what each was run with.

A preset changes nothing in how arms are chosen: it tells, beside ours, the figure that its paper
would have told, so that results can be held against theirs. Where its choices were made on the
texts that were scored, `caveat` says so.

caa      A/B: the probability of the matching letter, of the two letters
tan      steerability: the slope of the margin over seven strengths
pres     likelihoods where there was room to move
axbench  0–2: harmonic mean of concept, relevance and fluency at the factor chosen on other prompts
sae_ts   Behaviour × Coherence, the peak over strengths
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saesteer.compare import metrics
from saesteer.compare.statistics import Estimate, bootstrap
from saesteer.errors import ConfigError, SteeringError, did_you_mean


@dataclass(frozen=True)
class Preset:
    """A published protocol.

    Attributes:
        deployment, positions: in the words of problem.toml; positions "generated" from the prompt's
            last token on, which predicts the first answer token.
        strengths: those of the paper; empty where it fixed none. unit: what they multiply.
        suffix: what the prompt ends with, before the answer.
        metric: the formula. caveat: how the paper's use of it differs from our protocol.
        figure: the function in this module that works it out.
    """

    name: str
    paper: str
    deployment: Literal["completion", "ab", "chat"]
    strengths: tuple[float, ...]
    unit: str
    positions: Literal["all", "prompt", "generated"]
    suffix: str
    metric: str
    caveat: str
    figure: Callable[..., Any]


@dataclass(frozen=True)
class AxBench:
    """score: on the second half of the prompts, at `factor`, which won on the first half."""

    score: Estimate
    factor: float
    chosen_on: int


@dataclass(frozen=True)
class SaeTs:
    """The peak over strengths of mean behaviour × mean coherence, both on 0 … 1, and where."""

    product: float
    behaviour: float
    coherence: float
    strength: float


def caa(matching: ArrayLike, other: ArrayLike) -> NDArray[np.float64]:
    """p(matching letter) / (p(A) + p(B)) of each question, from log-probabilities: [n] each → [n].

    Panickssery et al. 2024 report its mean over questions at each strength.

    Raises:
        SteeringError: unlike lengths.
    """
    from scipy.special import expit

    first, second = (np.asarray(one, dtype=np.float64) for one in (matching, other))
    if first.shape != second.shape:
        raise SteeringError(
            f"{first.shape} matching and {second.shape} other log-probabilities; "
            "give both letters' for each question"
        )
    return np.asarray(expit(first - second))


def tan(margins: ArrayLike) -> metrics.SlopeSummary:
    """Tan et al. 2024: steerability, from margins [7, n] at strengths −1.5, −1, … 1.5.

    Their margin is the log-probability (= logit) of the letter that shows the behaviour less that
    of the other.

    Raises:
        SteeringError: not seven rows of margins.
    """
    return metrics.slope_summary(metrics.slopes(metrics.STRENGTHS, margins))


def pres(
    control_positive: ArrayLike,
    control_negative: ArrayLike,
    steered_positive: ArrayLike,
    steered_negative: ArrayLike,
) -> dict[str, tuple[metrics.Room, ...]]:
    """Pres et al. 2024, raw and by both normalisations: see `metrics.pres`.

    Raises:
        SteeringError: see `metrics.pres`.
    """
    given = (control_positive, control_negative, steered_positive, steered_negative)
    return {how: metrics.pres(*given, normalise=how) for how in ("raw", "own", "control")}


def axbench(
    factors: ArrayLike,
    concept: ArrayLike,
    relevance: ArrayLike,
    fluency: ArrayLike,
    *,
    seed: int = 0,
) -> AxBench:
    """Wu et al. 2025: the mean harmonic mean of three 0–2 scores, on prompts that chose nothing.

    factors [k]; concept, relevance, fluency [k, n]: of the text of each factor and prompt. The
    factor with the highest mean on the first ⌊n / 2⌋ prompts (the first of equals) is scored on the
    rest. seed: of the interval.

    Raises:
        SteeringError: fewer than two prompts, a factor without its row, or a score outside 0 … 2.
    """
    scores, given = metrics.harmonic(concept, relevance, fluency), np.asarray(factors)
    if scores.ndim != 2 or len(scores) != len(given) or len(given) == 0 or scores.shape[1] < 2:
        raise SteeringError(
            f"scores of shape {scores.shape} for {len(given)} factors: expected [factors, prompts] "
            "with two prompts or more, one half to choose on and one to score"
        )
    half = scores.shape[1] // 2
    best = int(scores[:, :half].mean(1).argmax())
    return AxBench(bootstrap(scores[best, half:], seed=seed), float(given[best]), half)


def sae_ts(
    strengths: ArrayLike,
    behaviour: ArrayLike,
    coherence: ArrayLike,
    *,
    lowest: float = 1.0,
    highest: float = 10.0,
) -> SaeTs:
    """Chalnev et al. 2024: Behaviour × Coherence, from ratings [k, n] of texts at strengths [k].

    Each rating becomes (rating − lowest) / (highest − lowest), 1 to 10 in the paper; at each
    strength the mean behaviour is multiplied by the mean coherence, and the largest product (the
    first of equals) is told.

    Raises:
        SteeringError: a strength without its row, no texts, or a rating outside the range.
    """
    given = np.asarray(strengths, dtype=np.float64)
    ratings = [np.asarray(one, dtype=np.float64) for one in (behaviour, coherence)]
    if any(one.ndim != 2 or len(one) != len(given) or one.size == 0 for one in ratings):
        raise SteeringError(
            f"ratings of shapes {ratings[0].shape} and {ratings[1].shape} for {len(given)} "
            "strengths: expected [strengths, texts] of each"
        )
    if not all(np.all((one >= lowest) & (one <= highest)) for one in ratings):
        raise SteeringError(
            f"a rating lies outside {lowest:g} … {highest:g}; give the judge's own range"
        )
    shown, sound = ((one.mean(1) - lowest) / (highest - lowest) for one in ratings)
    best = int((shown * sound).argmax())
    return SaeTs(
        float(shown[best] * sound[best]), float(shown[best]), float(sound[best]), float(given[best])
    )


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "caa",
            "Panickssery et al. 2024, Steering Llama 2 via Contrastive Activation Addition",
            "ab",
            (-1.0, 0.0, 1.0),
            "the mean difference at one layer, all behaviours' vectors brought to one norm",
            "generated",
            "(",
            "mean of p(matching letter) / (p(A) + p(B))",
            "the layer was swept on the questions that are reported",
            caa,
        ),
        Preset(
            "tan",
            "Tan et al. 2024, Analyzing the Generalization and Reliability of Steering Vectors",
            "ab",
            metrics.STRENGTHS,
            "the mean difference at one layer",
            "generated",
            "",
            "least-squares slope of log p(matching) − log p(other) over the strengths, a prompt",
            "strengths are fixed: what they cost is not part of it",
            tan,
        ),
        Preset(
            "pres",
            "Pres et al. 2024, Towards Reliable Evaluation of Behavior Steering Interventions",
            "chat",
            (),
            "the method's own",
            "all",
            "",
            "mean change of log-likelihood of the 25/50/75% least likely positives and most likely "
            "negatives",
            "the authors' code averages a continuation's log-likelihoods over its padded length; "
            "ours are means over its own tokens",
            pres,
        ),
        Preset(
            "axbench",
            "Wu et al. 2025, AxBench",
            "chat",
            (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0),
            "the feature's maximal activation times the unit direction",
            "all",
            "",
            "harmonic mean of concept, relevance and fluency, 0 to 2 each; the mean over prompts "
            "at the factor that the other half of them chose",
            "an LLM judge gives the three scores, for 10 instructions a concept; texts of 128 "
            "tokens at temperature 1",
            axbench,
        ),
        Preset(
            "sae-ts",
            "Chalnev et al. 2024, Improving Steering Vectors by Targeting SAE Features",
            "completion",
            tuple(float(scale) for scale in range(0, 320, 20)),
            "the unit direction",
            "all",
            "",
            "largest over strengths of mean((behaviour − 1) / 9) × mean((coherence − 1) / 9)",
            "an LLM judge rates 1 to 10; the strength is chosen on the texts that are scored, "
            "which flatters every arm",
            sae_ts,
        ),
    )
}
"""Published protocols by the name that problem.toml gives them."""


def preset(name: str) -> Preset:
    """The protocol of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"no preset {name!r}{did_you_mean(name, PRESETS)}; there are {', '.join(PRESETS)}"
        )
    return PRESETS[name]
