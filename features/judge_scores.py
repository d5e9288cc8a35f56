"""How good a label is: can a model tell, by the label alone, where the feature fires?

Detection shows whole contexts, half of them such in which the feature is silent, and asks of each
whether it fits the label. Fuzzing shows contexts in which it fires with words marked, in half of
them words on which it is silent, and asks whether the marked words fit. Each score is the mean of
the share of right answers on either half (balanced accuracy): ½ is chance. (Paulo et al. 2024,
arXiv 2410.13928, section 4; here one question is asked at a time.)
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from saesteer.core.progress import progress
from saesteer.core.writers import Write
from saesteer.errors import IndexingError
from saesteer.features.judge import answers, example_text, marked, strong
from saesteer.features.judge_silence import Silence, line
from saesteer.features.migrate import reading, writing
from saesteer.features.records import Feature

CONTEXTS = 10  # of each kind a label
_DETECT = """\
A feature of a language model is described as: {label}
Does this text hold words that the description fits?

{text}

Answer yes or no.
Answer:"""
_FUZZ = """\
A feature of a language model is described as: {label}
Does the description fit the words between « and » in this text?

{text}

Answer yes or no.
Answer:"""


@dataclass(frozen=True)
class Question:
    """A question about a label, and the right answer to it."""

    kind: Literal["detection", "fuzzing"]
    prompt: str
    right: bool


@dataclass(frozen=True)
class LabelScore:
    """How well a label did; None where too few contexts or answers were there to tell.

    n: answers that were yes or no.
    """

    feature: int
    detection: float | None
    fuzzing: float | None
    n: int

    @property
    def score(self) -> float | None:
        """The mean of both, or None."""
        if self.detection is None or self.fuzzing is None:
            return None
        return (self.detection + self.fuzzing) / 2


def questions(
    feature: Feature, label: str, silence: Silence, *, n: int = CONTEXTS, seed: int = 0
) -> list[Question]:
    """Up to `n` contexts of each kind for detection, and as many for fuzzing.

    Firing contexts are the examples that the label's writer was not shown; silent ones are cut as
    they are.
    """
    rng = np.random.default_rng([seed, feature.id])
    held_out = [e for e in feature.examples[1::2] if max(e.activations, default=0) > 0]
    chosen = [silence.bare(held_out[i]) for i in rng.permutation(len(held_out))[:n]]
    firing = [line(example.pieces) for example in chosen]
    silent = silence.like(feature.id, chosen, rng)
    found = [
        Question("detection", _DETECT.format(label=label, text=text), right)
        for right, texts in ((True, firing), (False, silent))
        for text in texts
    ]
    for i, example in enumerate(chosen):
        if i % 2 == 0:
            text, right = example_text(example), True
        else:
            off = [j for j, a in enumerate(example.activations) if a <= 0 and example.pieces[j]]
            if not off:
                continue
            where = rng.choice(off, min(len(off), len(strong(example))), replace=False)
            text, right = marked(example.pieces, where.tolist()), False
        found.append(Question("fuzzing", _FUZZ.format(label=label, text=text), right))
    return found


def graded(feature: int, asked: Sequence[Question], texts: Sequence[str]) -> LabelScore:
    """A label's score from the answers to its questions; what is neither yes nor no is left out."""
    given = [(question, answer(text)) for question, text in zip(asked, texts, strict=True)]

    def accuracy(kind: str) -> float | None:
        halves = [
            [said == right for q, said in given if (q.kind, q.right) == (kind, right) and
             said is not None]
            for right in (True, False)
        ]  # fmt: skip
        if not all(halves):
            return None
        return float(np.mean([np.mean(half) for half in halves]))

    n = sum(said is not None for _, said in given)
    return LabelScore(feature, accuracy("detection"), accuracy("fuzzing"), n)


def answer(text: str) -> bool | None:
    """Whether a text says yes, True, or no, False; None where it says neither first."""
    said = re.search(r"\b(yes|no)\b", text, re.IGNORECASE)
    return None if said is None else said[1].lower() == "yes"


def score_features(
    path: Path,
    features: Iterable[tuple[Feature, str]],
    silence: Silence,
    write: Write,
    *,
    n: int = CONTEXTS,
    seed: int = 0,
    batch_size: int = 4,
    n_features: int | None = None,
) -> Iterator[LabelScore]:
    """Score judged labels and keep each batch of scores in the index at `path`.

    Args:
        features: full records with the key of their label (`judge.Judged.key`). Those whose score
            is known need not be given.
        write: asked some 30 questions a feature, `batch_size` features at a time.

    Raises:
        IndexingError: the index has no such label; the writer gave another number of texts; the
            index can't be written.
    """
    waiting = iter(features)
    with progress("score", n_features, unit="feature") as bar:
        while some := list(islice(waiting, batch_size)):
            asked = [questions(one, one.label, silence, n=n, seed=seed) for one, _ in some]
            texts = iter(answers(write, [q.prompt for each in asked for q in each]))
            scores = [
                graded(one.id, each, list(islice(texts, len(each))))
                for (one, _), each in zip(some, asked, strict=True)
            ]
            with writing(path) as connection:
                for (one, key), score in zip(some, scores, strict=True):
                    done = connection.execute(
                        "UPDATE judged SET detection = ?, fuzzing = ?, n = ? "
                        "WHERE feature = ? AND key = ?",
                        (score.detection, score.fuzzing, score.n, one.id, key),
                    )
                    if done.rowcount == 0:
                        raise IndexingError(
                            f"{path} has no judged label of feature {one.id} under that key; have "
                            "it labelled first"
                        )
                    connection.execute(
                        "UPDATE features SET label_score = ? "
                        "WHERE id = ? AND label_source = 'judge'",
                        (score.score, one.id),
                    )
            bar.update(len(some))
            yield from scores


def is_scored(path: Path, feature: int, key: str) -> bool:
    """Whether a judged label was scored, also where too few answers were there to tell."""
    with reading(path) as connection:
        row = connection.execute(
            "SELECT n FROM judged WHERE feature = ? AND key = ?", (feature, key)
        ).fetchone()
    return row is not None and row[0] is not None
