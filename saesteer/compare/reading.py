"""How well each direction and feature reads: its AUROC as a classifier, beside what it steers.

Three sets of labels. "contains": the last tokens of a text up to this one hold a word of the
behaviour. "about to be said": the next tokens will hold one. "pairs": the chosen answers against
the rejected ones. What reads well need not steer well, which is why the two are told apart.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.compare.prepared import Prepared
from saesteer.compare.statistics import RESAMPLES, Estimate
from saesteer.core.hooks import reading
from saesteer.core.model import HookPoint, special_token_ids
from saesteer.core.sae import Sae
from saesteer.directions.answers import side_tokens
from saesteer.directions.fitting import Reader, fit_reader
from saesteer.directions.methods import METHODS
from saesteer.directions.pairs import Pair
from saesteer.effects.damage import padded
from saesteer.effects.readings import Reading, of_edit
from saesteer.errors import PairsError, SteeringError
from saesteer.features.words import Pieces

WINDOW = 8
"""Tokens that "contains" looks back, this one included, and "about to be said" looks ahead."""
CONTAINS, ABOUT, PAIRS = "contains", "about to be said", "pairs"

Floats = NDArray[np.float64]
_OF_A_VECTOR = ("sae-ts",)  # made for a feature, and steers by a vector that isn't its own


def reading_of(prepared: Prepared, sae: Sae | None = None) -> Reading | None:
    """What an arm's direction or features say of a token, or None where it has no one such.

    A direction says x · v / ‖v‖ where it is added or projected on. An arm of features says their
    activation, of several the sum by the shares it steers them with. A prompt, a trained model, a
    map, and what acts at several places have no direction of their own.

    Args:
        sae: the SAE of an arm of features.

    Raises:
        SteeringError: the arm's features are of another SAE. FeatureError: not one of the SAE's.
    """
    if prepared.notes.get("trained"):
        return None
    features = prepared.notes.get("features")
    if features and sae is not None and prepared.arm not in _OF_A_VECTOR:
        if prepared.notes.get("sae") not in (None, sae.hash):
            raise SteeringError(
                f"the features of the arm {prepared.arm!r} are of another SAE than the one given "
                f"({sae.hash}); give the SAE that it steers with"
            )
        shares = prepared.notes.get("shares") or [1.0] * len(features)
        return _of_features(prepared.arm, sae, features, shares)
    edits = prepared.edits(1.0)
    found = of_edit(edits[0]) if len(edits) == 1 else None
    return None if found is None else replace(found, name=prepared.arm)


def _of_features(arm: str, sae: Sae, features: Sequence[int], shares: Sequence[float]) -> Reading:
    weights = torch.tensor(shares, dtype=torch.float32)

    def read(x: Tensor) -> Tensor:
        found = sae.activation(x.to(sae.W_enc.device, torch.float32), list(features))
        return found @ weights.to(found.device)

    sae.direction(features[0])
    return Reading(arm, sae.hook_point, read)


def readers_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    point: HookPoint,
    *,
    seed: int = 0,
    cache: Path | None = None,
) -> list[Reading]:
    """The methods that only read, such as CCS, fitted on the pairs at a hook point.

    Raises:
        PairsError, HookPointError: see `directions.fitting.fit_reader`.
    """
    found = []
    for name in (method.name for method in METHODS.values() if method.kind == "reader"):
        reader, _ = fit_reader(name, model, tokenizer, pairs, [point], seed=seed, cache=cache)[
            point
        ]
        found.append(Reading(name, point, _scored_by(reader)))
    return found


def _scored_by(reader: Reader) -> Callable[[Tensor], Tensor]:
    return lambda x: reader.score(x.reshape(-1, x.shape[-1])).reshape(x.shape[:-1])


def read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    readings: Sequence[Reading],
    *,
    texts: Sequence[str],
    pairs: Sequence[Pair],
    words: Sequence[str],
    window: int = WINDOW,
    seed: int = 0,
    resamples: int = RESAMPLES,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """The "reading" of report.json: [{"arm", "labels", "auroc"}], by reading and set of labels.

    Texts and pairs go through the model once, whatever is read of them. Special tokens are left
    out. Of a pair, the mean over the answer's tokens is read. A set of labels that has one class
    only (no words, or none in the texts) is left out.

    Args:
        texts: in which the behaviour's words are looked for.
        pairs: of the test items.
        words: of the behaviour, or phrases; as they stand there, whatever the case.
        window: see `WINDOW`.

    Raises:
        SteeringError: a reading that isn't a number. PairsError: an answer without a token to read.
    """
    special = special_token_ids(model, tokenizer)
    room = getattr(model.config, "max_position_embeddings", None)
    rows, columns = [], []
    for text in texts:
        ids = side_tokens(tokenizer, "", text).ids[:room]
        plain = [i for i, token in enumerate(ids) if token not in special]
        if plain:
            rows.append(ids)
            columns.append(plain)
    n_texts = len(rows)
    for number, pair in enumerate(pairs, 1):
        for answer in (pair.chosen, pair.rejected):
            side = side_tokens(tokenizer, pair.prompt, answer)
            ids = side.ids[:room]
            plain = [i for i in range(side.start, len(ids)) if ids[i] not in special]
            if not plain:
                raise PairsError(
                    f"pair {number}: {answer!r} has no token to read within the model's contexts; "
                    "give it text, or a shorter prompt"
                )
            rows.append(ids)
            columns.append(plain)
    values = _values(model, readings, rows, columns, batch_size)
    pieces = Pieces(tokenizer)
    marks = [
        occurrences(pieces.window([rows[i][c] for c in columns[i]]), words) for i in range(n_texts)
    ]
    labels = [window_labels(len(columns[i]), marks[i], window) for i in range(n_texts)]
    found = []
    for one, of_rows in zip(readings, values, strict=True):
        for name, at in ((CONTAINS, 0), (ABOUT, 1)):
            sets = [(of_rows[i][both[at] >= 0], both[at]) for i, both in enumerate(labels)]
            scores = [score for score, _ in sets]
            truth = [label[label >= 0] == 1 for _, label in sets]
            found.append((one.name, name, scores, truth, f"texts, within {window} tokens"))
        means = [row.mean() for row in of_rows[n_texts:]]
        sides = [np.array(means[i : i + 2]) for i in range(0, len(means), 2)]
        truth = [np.array([True, False])] * len(sides)
        found.append((one.name, PAIRS, sides, truth, "pairs, mean over an answer's tokens"))
    told: list[dict[str, Any]] = []
    for arm, name, scores, truth, what in found:
        if len({bool(label) for row in truth for label in row}) == 2:
            made = auroc(scores, truth, what, seed=seed, resamples=resamples)
            told.append({"arm": arm, "labels": name, "auroc": asdict(made)})
    return told


def occurrences(pieces: Sequence[str], words: Sequence[str]) -> list[tuple[int, int]]:
    """The first and the last token of each place where one of the words stands whole.

    pieces: the text of each token, with its spaces. Of words that overlap the longest counts.
    """
    if not words:
        return []
    longest = sorted({word.strip() for word in words if word.strip()}, key=len, reverse=True)
    pattern = rf"(?<![^\W_])(?:{'|'.join(map(re.escape, longest))})(?![^\W_])"
    ends = np.cumsum([len(piece) for piece in pieces])
    spans = (match.span() for match in re.finditer(pattern, "".join(pieces), re.IGNORECASE))
    return [
        (int(np.searchsorted(ends, begin, "right")), int(np.searchsorted(ends, end - 1, "right")))
        for begin, end in spans
    ]


def window_labels(
    n: int, marks: Sequence[tuple[int, int]], window: int
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """("contains", "about to be said") of n tokens: 1, 0, or −1 where it can't be known, [n] each.

    A word is contained from its last token on, and about to be said before its first. Whether the
    next words hold one isn't known where the text ends before the window does.
    """
    contains, about = np.zeros(n, np.int8), np.zeros(n, np.int8)
    about[max(0, n - window) :] = -1
    for first, last in marks:
        contains[last : last + window] = 1
        about[max(0, first - window) : first] = 1
    return contains, about


def auroc(
    scores: Sequence[ArrayLike],
    labels: Sequence[ArrayLike],
    what: str = "texts",
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """The chance that a positive token scores higher than a negative one, ties counted half.

    Tokens of one text are alike, so that whole texts are resampled, for a percentile interval; a
    resample that has one class only is left out.

    Args:
        scores, labels: of each text's tokens; labels are true or false.
        what: what the texts are called in the estimate.

    Raises:
        SteeringError: only one class, or scores that aren't finite.
    """
    each = [np.asarray(score, dtype=np.float64) for score in scores]
    truth = [np.asarray(label, dtype=bool) for label in labels]
    if not all(np.isfinite(score).all() for score in each):
        raise SteeringError("a reading that isn't a finite number; load the model in float32")
    positives = np.array([label.sum() for label in truth], dtype=np.float64)
    negatives = np.array([(~label).sum() for label in truth], dtype=np.float64)
    if not positives.sum() or not negatives.sum():
        raise SteeringError(
            f"{int(positives.sum())} positive and {int(negatives.sum())} negative tokens: an AUROC "
            "needs both; give more text"
        )
    # wins[i, j]: of pairs of a positive of text i and a negative of text j, how many are in order.
    n = len(each)
    owners = np.repeat(np.arange(n), positives.astype(int))
    high = np.concatenate([score[label] for score, label in zip(each, truth, strict=True)])
    wins = np.empty((n, n))
    for j, (score, label) in enumerate(zip(each, truth, strict=True)):
        low = np.sort(score[~label])
        below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
        wins[:, j] = np.bincount(owners, below / 2, n)
    value = float(wins.sum() / (positives.sum() * negatives.sum()))
    if n < 2:
        return Estimate(value, None, None, n, f"one of {what}: no interval")
    rng = np.random.default_rng([seed, 31])
    found = []
    for first in range(0, resamples, 1000):
        size = min(1000, resamples - first)
        drawn = rng.multinomial(n, np.full(n, 1 / n), size).astype(np.float64)
        pairs = (drawn @ positives) * (drawn @ negatives)
        both = pairs > 0
        found.append((((drawn @ wins) * drawn).sum(1)[both]) / pairs[both])
    low_end, high_end = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    how = f"{level:.0%} percentile bootstrap of {n:,} {what}"
    return Estimate(value, float(low_end), float(high_end), n, how)


def _values(
    model: PreTrainedModel,
    readings: Sequence[Reading],
    rows: Sequence[Sequence[int]],
    columns: Sequence[Sequence[int]],
    batch_size: int,
) -> list[list[Floats]]:
    """For each reading, of each row the values on its columns."""
    found: list[dict[int, Floats]] = [{} for _ in readings]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    with reading(model, [one.point for one in readings]) as run, torch.no_grad():
        for first in range(0, len(order), batch_size):
            some = order[first : first + batch_size]
            x: Mapping[HookPoint, Tensor] = run(*padded([list(rows[i]) for i in some]))
            for one, of_rows in zip(readings, found, strict=True):
                values = one.read(x[one.point]).double().cpu()
                for i, row in zip(some, values, strict=True):
                    of_rows[i] = row[list(columns[i])].numpy()
    return [[of_rows[i] for i in range(len(rows))] for of_rows in found]
