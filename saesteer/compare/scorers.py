"""Scores from 0 to 2 of texts that a steered model wrote, without a judge.

lexicon      concept: are the behaviour's words there, and how many of the words are they
classifier   concept: how like a chosen answer is it, told by its words
relevance    how much likelier does the prompt make the text
fluency      how likely is the text, and how little does it repeat itself

All are read off the text and the unsteered model, after the prompt as the problem gives it,
whatever the arm made of that prompt. Each scale but the lexicon's lies between two fixed points
that are measured before anything is steered, and is cut off beyond them; since single texts lie to
either side of a mean, texts like those that fix the 2 score somewhat below it on average. A text
without a token scores 0 in all.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel

from saesteer.compare.problem import Behaviour
from saesteer.compare.texts import Flags, Floats, Text, cross_entropies, information
from saesteer.directions.pairs import Pair
from saesteer.effects.damage import repetition
from saesteer.errors import PairsError, SaesteerError, SteeringError, did_you_mean

Axis = Literal["concept", "relevance", "fluency"]

FULL = 0.1
"""Share of a text's words at which the lexicon scores 2: every tenth is one of the behaviour's."""
FOLDS = 5
"""Of the pairs, in which the classifier is fitted on the others: at least so many pairs."""
_ERRORS_APART = 2.0  # fixed points are further apart than so many standard errors
_WORD = re.compile(r"\w+(?:['’]\w+)*")


@dataclass(frozen=True, eq=False)
class Basis:
    """What scorers are made from.

    Attributes:
        model, tokenizer: the unsteered ones.
        base: what the unsteered model writes to the prompts.
        pairs: for the classifier; of the fit split only.
    """

    model: PreTrainedModel
    tokenizer: Any
    behaviour: Behaviour
    base: Sequence[Text]
    pairs: Sequence[Pair] = ()


@dataclass(frozen=True, eq=False)
class Scorer:
    """Texts → a score from 0 to 2 each.

    Attributes:
        axis: which of the three scores of AxBench it is.
        fixed: what scores 0 and what scores 2, in the unit that the scorer measures in; for the
            report.
    """

    axis: Axis
    score: Callable[[Sequence[Text]], list[float]]
    fixed: Mapping[str, float]


def lexicon(basis: Basis) -> Scorer:
    """0 without any of the behaviour's words; else 1 + min(1, s / .1), s their share of all words.

    Words count whole and in any case. Of an entry of several words each counts.

    Raises:
        SteeringError: the behaviour has no words.
    """
    entries = sorted({entry.strip() for entry in basis.behaviour.lexicon} - {""}, key=len)
    if not entries:
        raise SteeringError(
            f"the behaviour {basis.behaviour.name!r} has no words to look for; give it some "
            '(words = ["happy", "glad"]), or take the scorer "classifier", which learns them'
        )
    # The longest first: of two that begin alike it is the one that counts.
    known = "|".join(re.escape(entry) for entry in reversed(entries))
    pattern = re.compile(rf"(?<!\w)(?:{known})(?!\w)", re.IGNORECASE)

    def score(texts: Sequence[Text]) -> list[float]:
        found = []
        for one in texts:
            words = len(_WORD.findall(one.text))
            of_concept = sum(len(_WORD.findall(hit)) for hit in pattern.findall(one.text))
            found.append(1 + min(1.0, of_concept / words / FULL) if of_concept else 0.0)
        return found

    return Scorer("concept", score, {"0": 0.0, "2": FULL})


def classifier(basis: Basis) -> Scorer:
    """Log-odds of a text being a chosen answer, by a logistic regression on which words it holds.

    0: the mean of the unsteered texts. 2: the mean of the chosen answers, each by a classifier that
    was fitted on the pairs of the other four fifths. Unknown words say nothing.

    Raises:
        PairsError: fewer than five pairs. SteeringError: words don't tell the answers apart, or
            don't tell chosen ones from what the model writes anyway.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    n = len(basis.pairs)
    if n < FOLDS:
        raise PairsError(
            f"{n} pairs to learn the behaviour's words from: give {FOLDS} at least, or take the "
            'scorer "lexicon" and give words'
        )
    answers = [pair.chosen for pair in basis.pairs] + [pair.rejected for pair in basis.pairs]
    if not all(any(_WORD.findall(text) for text in side) for side in (answers[:n], answers[n:])):
        raise SteeringError("the answers of the pairs hold no words that a classifier could learn")
    labels, groups = np.repeat([1, 0], n), np.tile(np.arange(n), 2)
    words = CountVectorizer(binary=True, token_pattern=_WORD.pattern)
    model = make_pipeline(words, LogisticRegression(max_iter=1000))
    held_out = cross_val_predict(
        model, answers, labels, groups=groups, cv=GroupKFold(FOLDS), method="decision_function"
    )
    _apart(held_out[:n] - held_out[n:], "a classifier of words can't tell chosen from rejected")
    model.fit(answers, labels)
    zero = float(model.decision_function([one.text for one in basis.base]).mean())
    two = float(held_out[:n].mean())
    if not two > zero:
        raise SteeringError(
            "the unsteered texts are as much like chosen answers as those are themselves, so there "
            'is no scale between them; take the scorer "lexicon" and give words'
        )

    def score(texts: Sequence[Text]) -> list[float]:
        odds = model.decision_function([one.text for one in texts])
        return _scaled(odds, zero, two, np.array([bool(one.tokens) for one in texts]))

    return Scorer("concept", score, {"0": zero, "2": two})


def relevance(basis: Basis) -> Scorer:
    """r = (log p(text | prompt) − log p(text)) / tokens under the unsteered model, nats a token.

    The pointwise mutual information of prompt and text. 2: the mean r of the unsteered texts after
    their own prompts. 0: that of the same texts after the prompts of others.

    Raises:
        SteeringError: fewer than two different prompts, or the unsteered texts don't depend on
            theirs, such as where prompts are empty.
    """
    n = len(basis.base)
    others = []
    for i, one in enumerate(basis.base):
        after = (basis.base[(i + step) % n].prompt for step in range(1, n))
        other = next((prompt for prompt in after if prompt != one.prompt), None)
        if other is None:
            raise SteeringError(
                "relevance is told from texts of other prompts, and all prompts are the same; give "
                "more prompts"
            )
        others.append(Text(other, one.text, one.tokens))
    own, whole = information(basis.model, basis.tokenizer, basis.base)
    other_way, _ = information(basis.model, basis.tokenizer, others)
    _apart((own - other_way)[whole], "what the model writes doesn't depend on its prompts")
    zero, two = float(other_way[whole].mean()), float(own[whole].mean())

    def score(texts: Sequence[Text]) -> list[float]:
        found, written = information(basis.model, basis.tokenizer, texts)
        return _scaled(found, zero, two, written)

    return Scorer("relevance", score, {"0": zero, "2": two})


def fluency(basis: Basis) -> Scorer:
    """2 × (c_0 − c) / (c_0 − c_2), cut off at 0 and 2, times 1 − repetition.

    c: cross-entropy of the text after its prompt under the unsteered model, nats a token. c_2: the
    mean of the unsteered texts. c_0: that of the same texts with their tokens in a random order,
    but no more than ln(vocabulary), which a model has that knows nothing. repetition: the share of
    4-grams that stood before in the text; see `damage.repetition`.

    Raises:
        SteeringError: the order of the words is nothing to the model.
    """
    rng = np.random.default_rng(0)
    mixed = [
        Text(one.prompt, "", tuple(one.tokens[i] for i in rng.permutation(len(one.tokens))))
        for one in basis.base
    ]
    own, whole = cross_entropies(basis.model, basis.tokenizer, basis.base)
    shuffled, _ = cross_entropies(basis.model, basis.tokenizer, mixed)
    knows_nothing = math.log(basis.model.get_input_embeddings().num_embeddings)
    _apart(
        (np.minimum(shuffled, knows_nothing) - own)[whole],
        "the model finds its own texts no likelier than a heap of their words",
    )
    zero = min(float(shuffled[whole].mean()), knows_nothing)
    two = float(own[whole].mean())

    def score(texts: Sequence[Text]) -> list[float]:
        ce, written = cross_entropies(basis.model, basis.tokenizer, texts)
        scaled = _scaled(ce, zero, two, written)
        return [
            value * (1 - (repetition([one.tokens]) or 0.0))
            for value, one in zip(scaled, texts, strict=True)
        ]

    return Scorer("fluency", score, {"0": zero, "2": two})


SCORERS: dict[str, Callable[[Basis], Scorer]] = {
    "lexicon": lexicon,
    "classifier": classifier,
    "relevance": relevance,
    "fluency": fluency,
}
"""Scorers by the name that problem.toml gives them; one of your own is one entry more."""


def make(names: Sequence[str], basis: Basis) -> tuple[dict[str, Scorer], list[dict[str, str]]]:
    """The scorers of these names, and those that can't score this behaviour, with why.

    The second are entries of a report's "not_run". "judge" is none of them: see `judge.judged`.

    Raises:
        SteeringError: there is no scorer of a name.
    """
    made: dict[str, Scorer] = {}
    not_run = []
    for name in dict.fromkeys(names):
        if name == "judge":
            continue
        if name not in SCORERS:
            raise SteeringError(
                f"no scorer {name!r}{did_you_mean(name, SCORERS)}; there are {', '.join(SCORERS)}"
            )
        try:
            made[name] = SCORERS[name](basis)
        except SaesteerError as error:
            not_run.append({"what": f"scorer {name}", "why": str(error)})
    return made, not_run


def _scaled(values: Floats, zero: float, two: float, written: Flags) -> list[float]:
    """Values between the fixed points on 0 … 2, cut off beyond; 0 where nothing is written."""
    scaled = np.where(written, np.clip(2 * (values - zero) / (two - zero), 0, 2), 0.0)
    return [float(one) for one in scaled]


def _apart(differences: Floats, what: str) -> None:
    """Refuse fixed points that are the same within what chance does."""
    n = len(differences)
    mean = differences.mean() if n else 0.0
    error = differences.std(ddof=1) / n**0.5 if n > 1 else np.inf
    if not mean > _ERRORS_APART * error:
        raise SteeringError(
            f"{what} ({mean:.2g} nats apart over {n} texts), so this score has no scale here; give "
            "more prompts or pairs, or leave the scorer out"
        )
