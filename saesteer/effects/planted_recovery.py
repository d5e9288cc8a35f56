"""Which planted concepts an SAE has found, and whether a child has absorbed its parent.

The planted language says which concept every word belongs to, so a feature can be held against the
truth: `auroc` of its activation as a detector of a concept's own words, for every pair of the two.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from saesteer.core.hooks import activations
from saesteer.core.progress import progress
from saesteer.core.sae import Codes, Sae
from saesteer.effects.planted_search import right_features
from saesteer.world import corpus, exact, lexicon
from saesteer.world.grammar import BOS, PAD

FRESH_STORIES = 400
_BATCH = 32
# A child whose absorption rate is this or more is flagged.
ABSORBED = 0.1


@dataclass(frozen=True)
class ConceptRecovery:
    """A concept, the feature that tells its words best, and the best feature of its own.

    Attributes:
        planted: the failure it is planted to show, "" for none.
        feature, auroc: the best of all; None where the concept's words didn't occur.
        own_feature, own_auroc: the best of those with AUROC ≥ .9 that tell no other concept
            better; None where there is none, and the concept is then not recovered.
    """

    concept: str
    planted: str
    feature: int | None
    auroc: float | None
    own_feature: int | None
    own_auroc: float | None
    recovered: bool


@dataclass(frozen=True)
class Absorption:
    """How far a child concept has absorbed its parent; see `absorption`.

    Attributes:
        read: share of the child's tokens on which the activation shows the parent; only these
            count, and there are `tokens` of them.
        absorbed: of those, the share on which the parent's feature is silent and the child's
            carries the parent.
        missed: share of the parent's own tokens (that show it) on which its feature is silent.
        rate: absorbed − missed, 0 at least; None where no token of the child shows the parent.
        flagged: rate ≥ .1.
    """

    parent: str
    child: str
    parent_feature: int
    child_feature: int
    tokens: int
    read: float
    absorbed: float | None
    missed: float
    rate: float | None
    flagged: bool


@dataclass(frozen=True)
class Recovery:
    """What an SAE has of the planted concepts.

    Attributes:
        recovered: share of the concepts that occurred which have a feature of their own.
        distinct: number of different best features, over the number of concepts that occurred.
        mean_auroc: of the best features.
    """

    tokens: int
    recovered: float
    distinct: float
    mean_auroc: float
    concepts: list[ConceptRecovery]
    absorption: list[Absorption]


def measure(
    model: PreTrainedModel, sae: Sae, *, stories: int = FRESH_STORIES, seed: int = 0
) -> Recovery:
    """Hold an SAE of the embedded model against fresh stories of the planted language."""
    x, words = _fresh(model, sae, stories, seed)
    codes = sae.encode(x)
    return score(sae, x, codes, words)


def score(sae: Sae, x: Tensor, codes: Codes, words: NDArray[np.int64]) -> Recovery:
    """The same from activations x [n, d_in], their codes, and the words' ids [n].

    Where a child is on its parent is on too, so the child's words count neither for nor against
    a feature of the parent.
    """
    concept = concept_of(words)
    table = auroc(codes, concept, sae.d_sae)
    for child, parent in lexicon.PARENT_OF.items():
        column, rest = lexicon.INDEX[parent], concept != lexicon.INDEX[child]
        table[:, column] = auroc(_kept(codes, rest), concept[rest], sae.d_sae)[:, column]
    concepts = [
        _recovery(table[:, column], right_features(table, about.name), about)
        for column, about in enumerate(lexicon.CONCEPTS)
    ]
    seen = [c for c in concepts if c.auroc is not None]
    return Recovery(
        tokens=len(words),
        recovered=sum(c.recovered for c in seen) / max(1, len(seen)),
        distinct=len({c.feature for c in seen}) / max(1, len(seen)),
        mean_auroc=float(np.mean([c.auroc for c in seen])) if seen else float("nan"),
        concepts=concepts,
        absorption=[
            absorption(
                sae,
                x,
                words,
                parent=parent,
                child=child,
                parent_feature=int(table[:, lexicon.INDEX[parent]].argmax()),
                child_feature=int(table[:, lexicon.INDEX[child]].argmax()),
            )
            for child, parent in lexicon.PARENT_OF.items()
            # A transcoder writes elsewhere than where the parent's direction was read.
            if sae.hook_point_out is None
            and not np.isnan(table[0, [lexicon.INDEX[child], lexicon.INDEX[parent]]]).any()
        ],
    )


def concept_of(words: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of the concept that each word id belongs to, −1 where to none."""
    of = np.full(len(exact.word_ids()), -1, dtype=np.int64)
    for number, concept in enumerate(lexicon.CONCEPTS):
        of[[exact.word_ids()[word] for word in concept.words]] = number
    return of[words]


def auroc(codes: Codes, concept: NDArray[np.int64], d_sae: int) -> NDArray[np.float64]:
    """AUROC of every feature as a detector of every concept's tokens, without a dense code.

    Mann–Whitney U by mid-ranks: all tokens on which a feature is silent tie at the lowest rank, so
    that only what fires has to be sorted.

    Args:
        codes: of n tokens; concept [n]: each token's concept, −1 where none.

    Returns:
        [d_sae, n_concepts]; NaN for a concept that never occurs, or always does.
    """
    n, n_concepts = codes.n_rows, len(lexicon.CONCEPTS)
    rows, latents, values = (
        t.detach().cpu().numpy() for t in (codes.rows, codes.latents, codes.values.double())
    )
    order = np.lexsort((values, latents))
    rows, latents, values = rows[order], latents[order], values[order]
    fires = np.bincount(latents, minlength=d_sae)
    silent = n - fires
    # Mid-ranks within runs of the same latent and value; ranks begin after the silent ones.
    new = np.ones(len(values), dtype=bool)
    new[1:] = (latents[1:] != latents[:-1]) | (values[1:] != values[:-1])
    run = np.cumsum(new) - 1
    starts = np.flatnonzero(new)
    lengths = np.diff(np.append(starts, len(values)))
    first_of_latent = np.concatenate([[0], np.cumsum(fires)[:-1]])
    place = starts - first_of_latent[latents[starts]] if len(starts) else starts
    rank = (place + (lengths + 1) / 2)[run] + silent[latents]

    at = latents * (n_concepts + 1) + concept[rows]  # −1 is counted into a column that is cut off
    at[concept[rows] < 0] = latents[concept[rows] < 0] * (n_concepts + 1) + n_concepts
    size = d_sae * (n_concepts + 1)
    rank_sum = np.bincount(at, rank, size).reshape(d_sae, -1)[:, :n_concepts]
    fired_on = np.bincount(at, minlength=size).reshape(d_sae, -1)[:, :n_concepts]
    positives = np.bincount(concept[concept >= 0], minlength=n_concepts).astype(np.float64)
    all_ranks = rank_sum + (positives - fired_on) * ((silent + 1) / 2)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (all_ranks - positives * (positives + 1) / 2) / (positives * (n - positives))


def absorption(
    sae: Sae, x: Tensor, words: NDArray[np.int64], *,
    parent: str, child: str, parent_feature: int, child_feature: int,
) -> Absorption:  # fmt: skip
    """How far the child's feature has taken the parent's place on the child's tokens.

    Chanin et al. 2024 (arXiv 2409.14507): a token is absorbed where a probe shows the parent, the
    parent's feature doesn't fire, and another that does carries the parent's direction. Here:

    - the parent's direction w is the unit difference of the mean activation on the parent's own
      words and on the words of neither; a token shows the parent where its projection on w is
      nearer to the former's mean than to the latter's;
    - the features are the best of each by AUROC, as in `score`;
    - the child's feature carries the parent where what it writes has a projection on w of half
      the distance between the two means or more.

    Since the parent is on wherever the child is, its feature should miss no more of the child's
    tokens than of its own: the rate is the share absorbed less the share missed.
    """
    concept = concept_of(words)
    is_parent, is_child = (concept == lexicon.INDEX[name] for name in (parent, child))
    rest = ~(is_parent | is_child)
    x = x.double()
    on, off = (x[torch.from_numpy(mask).to(x.device)].mean(0) for mask in (is_parent, rest))
    gap = float((on - off).norm())
    w = (on - off) / max(gap, 1e-12)
    shows = (((x - off) @ w) > gap / 2).cpu().numpy()

    values = sae.activation(x.to(sae.W_enc.dtype), [parent_feature, child_feature])
    writes = sae.write(values[:, 1:], [child_feature], x.to(sae.W_enc.dtype))
    carries = ((writes.double() @ w) >= gap / 2).cpu().numpy()
    silent = (values[:, 0] <= 0).cpu().numpy()
    theirs, own = is_child & shows, is_parent & shows
    missed = float(silent[own].mean()) if own.any() else 0.0
    absorbed = float((silent & carries)[theirs].mean()) if theirs.any() else None
    rate = None if absorbed is None else max(0.0, absorbed - missed)
    return Absorption(
        parent=parent,
        child=child,
        parent_feature=parent_feature,
        child_feature=child_feature,
        tokens=int(theirs.sum()),
        read=float(shows[is_child].mean()),
        absorbed=absorbed,
        missed=missed,
        rate=rate,
        flagged=rate is not None and rate >= ABSORBED,
    )


def _recovery(
    by_feature: NDArray[np.float64], right: set[int], about: lexicon.Concept
) -> ConceptRecovery:
    if np.isnan(by_feature[0]):
        return ConceptRecovery(about.name, about.planted, None, None, None, None, False)
    best = int(by_feature.argmax())
    own = max(right, key=lambda feature: by_feature[feature], default=None)
    return ConceptRecovery(
        concept=about.name,
        planted=about.planted,
        feature=best,
        auroc=float(by_feature[best]),
        own_feature=own,
        own_auroc=None if own is None else float(by_feature[own]),
        recovered=own is not None,
    )


def _kept(codes: Codes, keep: NDArray[np.bool_]) -> Codes:
    """The codes of the rows that are kept, which are numbered anew."""
    mask = torch.from_numpy(keep).to(codes.rows.device)
    number = mask.long().cumsum(0) - 1
    stays = mask[codes.rows]
    return Codes(
        number[codes.rows[stays]], codes.latents[stays], codes.values[stays], int(keep.sum())
    )


def _fresh(
    model: PreTrainedModel, sae: Sae, stories: int, seed: int
) -> tuple[Tensor, NDArray[np.int64]]:
    """Activations [n, d_in] and ids [n] of every word of stories that nothing was trained on."""
    ids = exact.word_ids()
    room = model.config.max_position_embeddings
    told = [
        [ids[BOS], *(ids[word] for word in story.words)][:room]
        for story in corpus.stories(stories, seed=seed + 10_000)
    ]
    found, words = [], []
    for first in progress("recovery", None, unit="batch", iterable=range(0, len(told), _BATCH)):
        some = told[first : first + _BATCH]
        width = max(map(len, some))
        tokens = torch.tensor([story + [ids[PAD]] * (width - len(story)) for story in some])
        mask = torch.tensor([[1] * len(story) + [0] * (width - len(story)) for story in some])
        x = activations(model, [sae.hook_point], tokens, mask)[sae.hook_point]
        real = mask.bool()
        real[:, 0] = False  # BOS is no word
        found.append(x[real.to(x.device)].float().to(sae.W_enc.device))
        words.append(tokens[real].numpy())
    return torch.cat(found), np.concatenate(words)
