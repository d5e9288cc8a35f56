"""Which features of an SAE differ between the sides of pairs.

Features are ranked by how much more they are active on the chosen answers than on the rejected
ones; those that fire on more than 1% of all tokens, and those most active on BOS, are left out
(Soo et al. 2025, FGAA, arXiv 2501.09929).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.compare.prepared import Material
from saesteer.core.hooks import reading
from saesteer.core.model import special_token_ids
from saesteer.core.sae import Sae
from saesteer.directions.answers import side_tokens
from saesteer.directions.pairs import Pair
from saesteer.effects.damage import padded
from saesteer.errors import FeatureError, PairsError

DENSEST = 0.01
"""Features that fire on a larger share of all tokens are about nothing in particular."""
_RANKED = 256  # candidates that are ranked by AUROC


def activation_differences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: Sae,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 32,
) -> Tensor:
    """Mean over pairs of a_f(chosen) − a_f(rejected), each the mean over the answer: [d_sae].

    Features are read token by token, and means taken of activations: an encoder is not linear.
    Special tokens in an answer are left out. float64 on the CPU.

    Raises:
        PairsError: an answer without tokens.
    """
    total = torch.zeros(sae.d_sae, dtype=torch.float64)
    for x, owner, share in _answers(model, tokenizer, sae, pairs, batch_size):
        codes = sae.encode(x)
        weight = share * (1 - 2 * (owner % 2)) / len(pairs)
        rows = codes.rows.cpu()
        total.index_add_(0, codes.latents.cpu(), codes.values.double().cpu() * weight[rows])
    return total


def answer_means(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: Sae,
    pairs: Sequence[Pair],
    features: Sequence[int],
    *,
    batch_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Mean activation of each feature over each answer: chosen and rejected, [n, features] each.

    Read as by `activation_differences`. float64 on the CPU.

    Raises:
        PairsError: an answer without tokens.
    """
    found = torch.zeros(2 * len(pairs), len(features), dtype=torch.float64)
    for x, owner, share in _answers(model, tokenizer, sae, pairs, batch_size):
        values = sae.activation(x.to(sae.W_enc.dtype), list(features)).double().cpu()
        found.index_add_(0, owner, values * share[:, None])
    return found[0::2], found[1::2]


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: Sae,
    pairs: Sequence[Pair],
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of answers' plain tokens: x [m, d]; whose they are, [m], 2i for the chosen answer of
    pair i and 2i + 1 for its rejected one; 1 / that answer's tokens, [m] float64."""
    special = special_token_ids(model, tokenizer)
    sides, shares = [], []
    for number, pair in enumerate(pairs, 1):
        for answer in (pair.chosen, pair.rejected):
            side = side_tokens(tokenizer, pair.prompt, answer)
            plain = [i for i in range(side.start, len(side.ids)) if side.ids[i] not in special]
            if not plain:
                raise PairsError(f"pair {number}: {answer!r} has no tokens to read; give it text")
            row = torch.zeros(len(side.ids), dtype=torch.float64)
            row[plain] = 1.0 / len(plain)
            sides.append(side.ids)
            shares.append(row)
    order = sorted(range(len(sides)), key=lambda i: len(sides[i]))
    with reading(model, [sae.hook_point]) as read, torch.no_grad():
        for first in range(0, len(order), batch_size):
            some = order[first : first + batch_size]
            ids, mask = padded([sides[i] for i in some])
            x = read(ids, mask)[sae.hook_point]
            share = torch.nn.utils.rnn.pad_sequence([shares[i] for i in some], batch_first=True)
            wanted = share != 0  # padding may hold anything, NaN too
            owner = torch.tensor(some)[wanted.nonzero()[:, 0]]
            yield x[wanted.to(x.device)], owner, share[wanted]


def candidates(material: Material, *, densest: float = DENSEST) -> tuple[list[int], Tensor]:
    """Features that are more active on the chosen answers, the most so first; and differences.

    Left out are those that the index never saw fire, those denser than `densest`, and those that
    are more active on BOS than on any text. The differences are of all features, [d_sae].

    Raises:
        FeatureError: none is left. SaeError, IndexingError: see `Material.features`.
    """
    sae, index = material.features()
    differences = activation_differences(material.model, material.tokenizer, sae, material.pairs)
    density, max_act = (
        torch.from_numpy(index.column(name).copy()) for name in ("density", "max_act")
    )
    kept = (differences > 0) & (max_act > 0) & (density <= densest)
    kept &= _on_bos(material.model, material.tokenizer, sae) <= max_act
    order = differences.argsort(descending=True, stable=True)
    found = [int(feature) for feature in order if kept[feature]]
    if not found:
        raise FeatureError(
            f"no feature is more active on the chosen answers and fires on at most {densest:g} of "
            "all tokens; give more pairs, a larger `densest`, or an SAE of another layer"
        )
    return found, differences


def by_auroc(material: Material, *, densest: float = DENSEST) -> list[int]:
    """The first candidates, those first whose mean activation best tells the answers apart.

    AUROC over all answers of the pairs; of equals the one that differs more is first. Of the
    candidates the 256 that differ most are looked at.

    Raises:
        FeatureError, SaeError, IndexingError: as `candidates`.
    """
    from scipy.stats import rankdata

    sae, _ = material.features()
    found = candidates(material, densest=densest)[0][:_RANKED]
    sides = answer_means(material.model, material.tokenizer, sae, material.pairs, found)
    n = len(material.pairs)
    ranks = rankdata(torch.cat(sides).numpy(), axis=0)
    auroc = (ranks[:n].sum(0) - n * (n + 1) / 2) / n**2
    return [found[i] for i in (-auroc).argsort(kind="stable")]


def _on_bos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sae: Sae) -> Tensor:
    """Each feature's activation on BOS, [d_sae]; zeros where the tokenizer has none."""
    found = torch.zeros(sae.d_sae)
    if tokenizer.bos_token_id is None:
        return found
    with reading(model, [sae.hook_point]) as read, torch.no_grad():
        codes = sae.encode(read(torch.tensor([[tokenizer.bos_token_id]]))[sae.hook_point])
    found[codes.latents.cpu()] = codes.values.float().cpu()
    return found
