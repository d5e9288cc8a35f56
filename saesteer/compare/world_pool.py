"""What the arms of one planted concept are made from: pairs, read once for all arms and draws."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.hooks import reading
from saesteer.core.model import HookPoint, fingerprint
from saesteer.core.sae import Sae
from saesteer.directions.answers import answer_activations
from saesteer.directions.pairs import Pair
from saesteer.directions.rows import both_sides, padded
from saesteer.features.search import Index
from saesteer.world import corpus

# The language has 24 concepts, so that a concept's words are some 2% of all tokens: the usual 1%
# would leave out the features that are wanted.
DENSEST = 0.05
_BATCH = 64


@dataclass(frozen=True, eq=False)
class Dictionary:
    """An SAE and, of each feature, the unit of strength and whether it may be a candidate.

    max_act: [d_sae] float64; allowed: [d_sae] bool.
    """

    sae: Sae
    max_act: NDArray[np.float64]
    allowed: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Pool:
    """Contrast pairs of one concept, as every arm may see them.

    Attributes:
        sides: at each point, the activations of the chosen and of the rejected answers (mean over
            the answer), each [pairs, d] float32.
        dictionary, random: the SAE, and random directions in place of its features.
        features: by the name of a dictionary, a_f(chosen) − a_f(rejected), each the mean over the
            answer: [pairs, d_sae] float64.
        found: features that the index finds by the concept's name, best first.
        fingerprint: of the model.
    """

    concept: str
    sides: dict[HookPoint, tuple[Tensor, Tensor]]
    dictionary: Dictionary
    random: Dictionary
    features: dict[str, NDArray[np.float64]]
    found: list[int]
    fingerprint: str

    @property
    def n(self) -> int:
        """How many pairs there are."""
        return len(self.features["sae"])


def read_pool(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: Sae,
    index: Index,
    concept: str,
    *,
    points: Sequence[HookPoint],
    n_pairs: int,
    n_found: int,
    seed: int,
) -> Pool:
    """Read `n_pairs` pairs of a concept at all points, and through the SAE and the random one."""
    pairs = [Pair(**pair) for pair in corpus.pairs(concept, n_pairs, seed)]
    density = index.column("density")
    max_act = index.column("max_act").astype(np.float64)
    own = Dictionary(sae, max_act, (max_act > 0) & (density <= DENSEST))
    drawn = random_dictionary(sae, k=max(1, round(float(density.sum()))), seed=seed)
    (features, _), (random, highest) = pair_features(model, tokenizer, [sae, drawn], pairs)
    return Pool(
        concept,
        answer_activations(model, tokenizer, pairs, list(points), batch_size=_BATCH),
        own,
        Dictionary(drawn, highest, highest > 0),
        {"sae": features, "random": random},
        [hit.id for hit in index.search(concept, limit=n_found) if max_act[hit.id] > 0],
        fingerprint(model),
    )


def random_dictionary(sae: Sae, *, k: int, seed: int) -> Sae:
    """A TopK SAE of as many features, each reading and writing one random direction.

    Random dictionaries have matched trained ones on published metrics, so they are the control
    for what any dictionary of this size and sparsity gives. k: features a token.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sae.d_sae, sae.d_out, generator=generator)
    rows = rows / rows.norm(dim=1, keepdim=True)
    return Sae(
        W_enc=rows.T.contiguous() if sae.d_in == sae.d_out else sae.W_enc,
        b_enc=torch.zeros(sae.d_sae),
        W_dec=rows,
        b_dec=sae.b_dec.detach().float().cpu().clone(),
        architecture="topk",
        k=min(k, sae.d_sae),
        hook_point=sae.hook_point,
        model_id=sae.model_id,
    ).to(sae.W_dec.device)


def pair_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    saes: Sequence[Sae],
    pairs: Sequence[Pair],
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """For each SAE, a_f(chosen) − a_f(rejected) of each pair [pairs, d_sae], and max a_f [d_sae].

    Activations are read token by token and averaged over the answer. The mean over the pairs is
    what `arms.candidates.activation_differences` gives; here draws of pairs share one pass.
    The SAEs read at one hook point.

    Raises:
        PairsError: an answer without tokens, or a pair longer than the model's contexts.
    """
    sides = [
        (number, sign, side)
        for number, pair in enumerate(both_sides(model, tokenizer, pairs))
        for sign, side in zip((1.0, -1.0), pair, strict=True)
    ]
    sides.sort(key=lambda one: len(one[2].ids))
    point = saes[0].hook_point
    found = [torch.zeros(len(pairs), sae.d_sae, dtype=torch.float64) for sae in saes]
    highest = [torch.zeros(sae.d_sae, dtype=torch.float64) for sae in saes]
    with reading(model, [point]) as read, torch.no_grad():
        for first in range(0, len(sides), _BATCH):
            some = sides[first : first + _BATCH]
            ids, mask = padded([side.ids for _, _, side in some])
            weight = torch.zeros(mask.shape, dtype=torch.float64)
            for row, (_, sign, side) in enumerate(some):
                weight[row, side.start : len(side.ids)] = sign / (len(side.ids) - side.start)
            wanted = weight != 0
            pair_of = torch.tensor([number for number, _, _ in some])[:, None].expand_as(ids)
            x = read(ids, mask)[point][wanted]
            for sae, into, top in zip(saes, found, highest, strict=True):
                codes = sae.encode(x)
                rows, latents = codes.rows.cpu(), codes.latents.cpu()
                values = codes.values.double().cpu()
                at = (pair_of[wanted][rows], latents)
                into.index_put_(at, values * weight[wanted][rows], accumulate=True)
                top.scatter_reduce_(0, latents, values, "amax")
    return [(f.numpy(), h.numpy()) for f, h in zip(found, highest, strict=True)]
