"""The planted failures, each a statistic with a threshold that says whether it is there.

    read-only        a feature reads a concept, and adding it changes nothing
    sign flip        a context in which a direction does the opposite of what it does elsewhere
    spurious token   a direction follows a token that went with the labels
    rare             a concept that came so seldom that no feature is its own
    absorbed child   a child's feature fires in its parent's place
    circle           values on a circle, which no one direction can stand for

and two controls, which say whether there is anything to find at all:

    untrained model      a context in which the concept is on brings the model no nearer
    random dictionary    random directions tell the concepts as well as the features do
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.compare.circle import circularity
from saesteer.compare.metrics import slopes
from saesteer.compare.statistics import bootstrap, paired, wilson
from saesteer.compare.world_score import edited_kl, edited_log_p, prompts_in
from saesteer.core.model import HookPoint
from saesteer.directions.answers import answer_activations
from saesteer.directions.pairs import Pair
from saesteer.effects import planted_score
from saesteer.effects.calibrate import EditsAt
from saesteer.effects.planted_recovery import ABSORBED, Absorption, Recovery
from saesteer.effects.planted_search import RIGHT_AUROC
from saesteer.world import corpus, lexicon

NO_EFFECT = 0.05
"""Nats of KL: an edit that gains less steers nothing. Causal concepts gain some .5."""

FOLLOWS = 0.1
"""Share of pairs whose order turns with the letters, from which on a direction follows them."""

ROUND = 0.5
"""Circularity from which on values lie on a circle; 1 is a perfect one, 0 a line."""

NO_BETTER = 0.1
"""Share of concepts by which an SAE must recover more than random directions do."""

_TURNS = np.linspace(-1.5, 1.5, 7)  # Tan et al. 2024 (arXiv 2407.12404)


@dataclass(frozen=True)
class Flag:
    """Whether a failure is there: a statistic, its 95% interval where it has one, its threshold.

    n: what the statistic was measured on, prompts, pairs, tokens or concepts. why: in words.
    """

    failure: str
    statistic: str
    value: float
    low: float | None
    high: float | None
    threshold: float
    flagged: bool
    n: int
    why: str


def read_only(
    model: PreTrainedModel,
    concept: str,
    edits_at: EditsAt,
    strengths: Sequence[float],
    *,
    auroc: float,
    n_prompts: int = 12,
    seed: int = 0,
) -> Flag:
    """What reads the concept (AUROC ≥ .9) gains less than .05 nats at its best strength.

    The gain is KL(p*_do ‖ model) without the edits less that with them, mean over test prompts,
    at the strength that validation prompts chose; flagged where its interval lies below.

    auroc: of what the edits add, as a detector of the concept's words.
    """
    looked_at = prompts_in(concept, n_prompts, 2 * seed)
    tested = prompts_in(concept, n_prompts, 2 * seed + 1)
    looks = edited_kl(model, looked_at, [edits_at(s) for s in strengths]).mean(1)
    best = strengths[int(looks.argmin())]
    none = planted_score.kl(model, tested.ids, tested.mask, tested.target).numpy()
    gain = bootstrap(none - edited_kl(model, tested, [edits_at(best)])[0], seed=seed)
    small = gain.high is not None and gain.high < NO_EFFECT
    return Flag(
        "read-only",
        "mean gain of KL(p*_do ‖ model) in nats, where AUROC ≥ .9",
        gain.value, gain.low, gain.high, NO_EFFECT, auroc >= RIGHT_AUROC and small, gain.n,
        f"{concept!r} is read with AUROC {auroc:.3f}; adding what reads it, at strength {best:g}, "
        f"gains {gain.value:.3f} nats",
    )  # fmt: skip


def sign_flip(
    model: PreTrainedModel,
    edits_at: Mapping[str, EditsAt],
    strength: Mapping[str, float],
    rival: Mapping[str, str],
    *,
    n_prompts: int = 24,
    seed: int = 0,
) -> Flag:
    """In dreams most prompts are anti-steerable, and outside them few: both intervals beyond .5.

    A prompt's margin is log P(right words) − log P(wrong words) of the next word: right are the
    words that the concept speaks with there (in a dream it may be another's: `lexicon.FLIPS`),
    wrong those of its rival, or its own where it speaks with its rival's. The prompt is
    anti-steerable where the margin's least-squares slope over seven strengths, −1.5 to 1.5 times
    the one given, is below 0 (Tan et al. 2024, arXiv 2407.12404). Shares are over all concepts
    together, with Wilson intervals; the value is that in dreams.

    edits_at, strength: by concept, what turns it on outside dreams. rival: the other concept of
    each margin.
    """
    shares = []
    for dream in (True, False):
        found = []
        for concept, edits in edits_at.items():
            prompts = prompts_in(concept, n_prompts, 2 * seed + 1, dream=dream)
            turned = [edits(t * strength[concept]) for t in _TURNS]
            own, other = (
                edited_log_p(model, prompts, turned, _words(name))
                for name in (concept, rival[concept])
            )
            flips = dream and lexicon.FLIPS.get(concept) == rival[concept]
            found.append(slopes(_TURNS, other - own if flips else own - other))
        slope = np.concatenate(found)
        shares.append(wilson(int((slope < 0).sum()), len(slope)))
    inside, outside = shares
    flagged = (inside.low or 0.0) > 0.5 and outside.high is not None and outside.high < 0.5
    return Flag(
        "sign flip",
        "share of prompts in dreams that are anti-steerable, where outside they are not",
        inside.value, inside.low, inside.high, 0.5, flagged, inside.n,
        f"{' and '.join(edits_at)}: anti-steerable on {inside.value:.0%} of prompts in a dream and "
        f"on {outside.value:.0%} outside",
    )  # fmt: skip


def spurious_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    concept: str,
    vector: Tensor,
    point: HookPoint,
    *,
    read: str = "answer-mean",
    n_pairs: int = 128,
    seed: int = 0,
) -> Flag:
    """A tenth of held-out pairs or more change their order when "A" and "B" change places.

    Of each pair both whole stories are read along the direction, the chosen one beginning "Story
    A" and the other "Story B", and then with the letters swapped. A pair follows the letter where
    the chosen story reads higher with A, and lower with B. Flagged where the Wilson interval of
    their share lies above .1: a direction of the concept alone would turn none.

    vector: [d_model], which the pairs' activations at `point` are read along.
    """
    right = [Pair(**p) for p in corpus.pairs(concept, n_pairs, seed, spurious=True)]
    swapped = [replace(p, chosen=_as(p.chosen, "B"), rejected=_as(p.rejected, "A")) for p in right]
    ahead = []
    for pairs in (right, swapped):
        chosen, rejected = answer_activations(model, tokenizer, pairs, point, read=read)
        ahead.append(((chosen - rejected).double() @ vector.double()) > 0)
    share = wilson(int((ahead[0] & ~ahead[1]).sum()), n_pairs)
    return Flag(
        "spurious token",
        "share of held-out pairs that the direction orders by the letter, not by the concept",
        share.value, share.low, share.high, FOLLOWS, (share.low or 0.0) > FOLLOWS, n_pairs,
        f"{concept!r}: {float(ahead[0].double().mean()):.0%} of pairs in order with the letters as "
        f"they were fitted, {float(ahead[1].double().mean()):.0%} with the letters swapped",
    )  # fmt: skip


def rare(recovery: Recovery, concept: str, *, occurrences: int) -> Flag:
    """No feature of its own reads the concept with AUROC ≥ .9; a feature's best concept is one.

    occurrences: of the concept's words among the recovery's tokens.
    """
    found = next(c for c in recovery.concepts if c.concept == concept)
    own = 0.5 if found.own_auroc is None else found.own_auroc
    best = "nothing reads it" if found.auroc is None else f"the best of any reads {found.auroc:.3f}"
    return Flag(
        "rare",
        "AUROC of the best feature that is the concept's own (.5: none is)",
        own, None, None, RIGHT_AUROC, own < RIGHT_AUROC, recovery.tokens,
        f"{concept!r} is {occurrences} of {recovery.tokens} words; {best}",
    )  # fmt: skip


def absorbed_child(found: Absorption) -> Flag:
    """The absorption rate is .1 or more; see `effects.planted_recovery.absorption`."""
    absorbed = "none" if found.absorbed is None else f"{found.absorbed:.0%}"
    return Flag(
        "absorbed child",
        "absorption rate",
        found.rate or 0.0, None, None, ABSORBED, found.flagged, found.tokens,
        f"{found.child!r} in {found.parent!r}'s place on {absorbed} of the child's tokens that "
        f"show the parent; the parent's feature misses {found.missed:.0%} of its own",
    )  # fmt: skip


def circle(means: NDArray[np.float64]) -> Flag:
    """Means of values in their cyclic order, [k, d], lie on a circle: circularity ≥ .5, p ≤ .05.

    p is the share of all orders of the k values with as high a circularity; see
    `circle.circularity`.
    """
    k = len(means)
    orders = [(0, *rest) for rest in itertools.permutations(range(1, k)) if rest[0] < rest[-1]]
    values = np.array([circularity(means[list(order)]) for order in orders])
    value = float(values[orders.index(tuple(range(k)))])
    p = float((values >= value - 1e-12).mean())
    return Flag(
        "circle", "circularity of the means", value, None, None, ROUND,
        value >= ROUND and p <= 0.05, k,
        f"circularity {value:.3f}; {p:.0%} of all {len(orders)} orders of the {k} values have as "
        "much",
    )  # fmt: skip


def untrained(
    model: PreTrainedModel, concepts: Sequence[str], *, n_prompts: int = 6, seed: int = 0
) -> Flag:
    """A real context in which the concept is on gains less than .05 nats: nothing to steer to."""
    gains = []
    for concept in concepts:
        of = planted_score.prompts(concept, n_prompts, seed=2 * seed + 1)
        none = planted_score.kl(model, of.ids, of.mask, of.target)
        gains.append((none - planted_score.kl(model, of.twin_ids, of.twin_mask, of.target)).numpy())
    clusters = np.repeat(np.arange(len(concepts)), n_prompts)
    gain = bootstrap(np.concatenate(gains), clusters, seed=seed)
    return Flag(
        "untrained model",
        "KL without the concept less that in a context in which it is on, in nats",
        gain.value, gain.low, gain.high, NO_EFFECT, (gain.low or 0.0) < NO_EFFECT, gain.n,
        f"over {len(concepts)} concepts a context gains {gain.value:.3f} nats",
    )  # fmt: skip


def random_dictionary(sae: Recovery, random: Recovery) -> Flag:
    """The SAE gives no more concepts a feature of their own than random directions do, or just.

    The difference of the shares of concepts recovered, with its interval over concepts; flagged
    where that reaches below .1.
    """
    own, other = ([float(c.recovered) for c in found.concepts] for found in (sae, random))
    apart = paired(own, other).difference
    return Flag(
        "random dictionary",
        "share of concepts with a feature of their own, less that of random directions",
        apart.value, apart.low, apart.high, NO_BETTER,
        (apart.value if apart.low is None else apart.low) < NO_BETTER, len(own),
        f"the SAE recovers {np.mean(own):.0%} of the concepts, random directions "
        f"{np.mean(other):.0%}",
    )  # fmt: skip


def _words(concept: str) -> tuple[str, ...]:
    return lexicon.CONCEPTS[lexicon.INDEX[concept]].words


def _as(story: str, letter: str) -> str:
    """The story under another letter."""
    return f"Story {letter}" + story.removeprefix("Story A").removeprefix("Story B")
