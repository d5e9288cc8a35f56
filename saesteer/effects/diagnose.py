"""What can be said of a direction before anyone steers with it: see `Diagnosis`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.model import d_model, special_token_ids
from saesteer.core.sae import Codes, Sae
from saesteer.core.sae_codes import fire_above
from saesteer.core.shards import ContextBatch
from saesteer.directions.direction import Direction
from saesteer.effects.decompose import CAVEAT, Decomposition, decompose
from saesteer.effects.diagnose_pairs import Fit, PairFigures, pair_figures
from saesteer.errors import SaeError
from saesteer.features.build import lexicon
from saesteer.features.collect import collect
from saesteer.features.entries import entries
from saesteer.features.records import Example
from saesteer.features.weights import logit_lens
from saesteer.features.words import Pieces

__all__ = ["CAVEAT", "Contexts", "Diagnosis", "Fit", "Side", "Tokens", "diagnose"]


@dataclass(frozen=True)
class Tokens:
    """The tokens that a direction promotes and suppresses by the logit lens, with their logits."""

    promotes: tuple[tuple[str, float], ...]
    suppresses: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Side:
    """One side of a direction in text, as an index describes a feature.

    density: the share of tokens on it; words: those that it fires on most; examples: its
    strongest contexts, each from another document, with x·v/‖v‖ less the zero point.
    """

    density: float
    words: tuple[str, ...]
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Contexts:
    """Where a direction reads high and low in text.

    zero: the x·v/‖v‖ from which both sides are counted, midway between the means of the pairs'
    two sides; above, below: the tokens over and under it; n_tokens: how many were read.
    """

    zero: float
    above: Side
    below: Side
    n_tokens: int


@dataclass(frozen=True)
class Diagnosis:
    """What pairs, weights, text and an SAE say about a direction.

    Attributes:
        method, point, read: of the direction.
        pairs: agreement of the pairs, separability, and how much the direction depends on them.
        layer_norm: the mean ‖x‖ of the text's plain tokens at the point; None without text.
        tokens: None where the direction doesn't write into the stream (a single head).
        contexts: None without text. features: None without an SAE.
    """

    method: str
    point: str
    read: str
    pairs: PairFigures
    layer_norm: float | None
    tokens: Tokens | None
    contexts: Contexts | None
    features: Decomposition | None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, lists and dictionaries, ready for JSON."""
        caveat = {"encoded_caveat": CAVEAT} if self.features and self.features.encoded else {}
        return asdict(self) | caveat


def diagnose(
    direction: Direction,
    chosen: Tensor,
    rejected: Tensor,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    fit: Fit | None = None,
    groups: Sequence[int] | None = None,
    text: Iterable[ContextBatch] | None = None,
    sae: Sae | None = None,
    features: int = 16,
    top: int = 10,
    splits: int = 100,
    seed: int = 0,
) -> Diagnosis:
    """Diagnose a direction by the pairs that it was fitted on.

    Args:
        chosen, rejected: activations of the pairs at the direction's point, [n, d] each.
        fit: how the direction is made from activations, to fit it again on some of the pairs;
            None: it can't be, and split halves and growth are left out.
        groups: for each pair its group, so that halves share no prompt
            (`directions.groups.groups_of`); None: each pair is its own.
        text: contexts with activations at the direction's point, from which the mean norm and the
            top activating contexts are taken.
        sae: whose features the direction is compared with; it must write at the same point.
        features: decoder rows that a decomposition may take.
        top: tokens, contexts and nearest features listed on either side.
        splits: of the pairs into halves; seed: of all random draws.

    Raises:
        PairsError: activations that don't fit the direction, or a direction of norm 0.
        SaeError: the SAE writes elsewhere. IndexingError: text without a plain token.
    """
    if sae is not None and sae.write_point != direction.point:
        raise SaeError(
            f"a direction at {direction.point} can't be compared with features that write at "
            f"{sae.write_point}; fit it there, or leave the SAE out"
        )
    vector = direction.vector.detach().float().cpu()
    pairs = pair_figures(vector, chosen, rejected, fit, groups=groups, splits=splits, seed=seed)
    norms = _Norms(special_token_ids(model, tokenizer))
    contexts = None
    if text is not None:
        unit = vector.double() / vector.double().norm()
        both = torch.cat([chosen, rejected]).detach().double().cpu()
        zero = float((both @ unit).mean())
        contexts = top_contexts(vector, zero, norms.of(text), model, tokenizer, top=top)
    writes = direction.point.head is None and len(vector) == d_model(model)
    return Diagnosis(
        direction.method,
        str(direction.point),
        direction.read,
        pairs,
        norms.mean,
        lens_tokens(vector, model, tokenizer, top=top) if writes else None,
        contexts,
        decompose(vector, sae, features=features, nearest_features=top, seed=seed) if sae else None,
    )


def lens_tokens(
    vector: Tensor, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, top: int = 10
) -> Tokens:
    """The logit lens of a vector [d_model] of the stream; its length doesn't matter."""
    n_ids = model.get_input_embeddings().weight.shape[0]
    # Ids past the tokenizer's are padding of the embedding matrix: they are no tokens.
    hidden = {*special_token_ids(model, tokenizer), *range(len(tokenizer), n_ids)}
    lens = logit_lens(model, vector[None], top=top, exclude=hidden)
    pieces = Pieces(tokenizer)

    def spelled(ids: Any, logits: Any) -> tuple[tuple[str, float], ...]:
        return tuple(zip(pieces.texts(ids[0].tolist()), logits[0].tolist(), strict=True))

    return Tokens(
        spelled(lens.promoted, lens.promoted_logits),
        spelled(lens.suppressed, lens.suppressed_logits),
    )


def top_contexts(
    vector: Tensor,
    zero: float,
    text: Iterable[ContextBatch],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    top: int = 10,
) -> Contexts:
    """The contexts in which x·v/‖v‖ is farthest above and below `zero`.

    The two sides go through the pass that describes features, as if they were two of them.

    Raises:
        IndexingError: text without a plain token, or activations that are not finite.
    """
    found = collect(
        text,
        _TwoSides(vector, zero),
        special_ids=special_token_ids(model, tokenizer),
        lexicon=lexicon(model, tokenizer),
        top_contexts=top,
    )
    above, below = (
        Side(
            one.feature.density,
            tuple(word.text for word in one.feature.words[:top]),
            tuple(x for x in one.feature.examples if x.group == "top")[:top],
        )
        for one in entries(found, None, tokenizer)
    )
    return Contexts(zero, above, below, found.n_tokens)


class _TwoSides:
    """A direction as a dictionary of two features: how far x·v/‖v‖ is above, and below, zero."""

    d_sae = 2

    def __init__(self, vector: Tensor, zero: float) -> None:
        self._unit, self._zero = vector.float() / vector.float().norm(), zero

    def encode(self, x: Tensor) -> Codes:
        flat = x.reshape(-1, x.shape[-1]).float()
        read = flat @ self._unit.to(x.device) - self._zero
        return Codes(*fire_above(torch.stack([read, -read], 1), None), len(flat))


class _Norms:
    """The mean norm of the plain tokens of activations that pass by."""

    def __init__(self, special_ids: frozenset[int]) -> None:
        self._special = sorted(special_ids)
        self._sum, self._n = 0.0, 0

    def of(self, text: Iterable[ContextBatch]) -> Iterator[ContextBatch]:
        for batch in text:
            plain = torch.from_numpy(~np.isin(np.asarray(batch.tokens), self._special))
            norms = batch.activations.float().norm(dim=-1).cpu()[plain]
            self._sum += float(norms.double().sum())
            self._n += len(norms)
            yield batch

    @property
    def mean(self) -> float | None:
        return self._sum / self._n if self._n else None
