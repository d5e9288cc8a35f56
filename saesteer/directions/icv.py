"""In-context vectors (Liu et al. 2023, arXiv 2311.06668)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.model import HookPoint, fingerprint
from saesteer.directions.answers import answer_activations
from saesteer.directions.direction import Direction, Use
from saesteer.directions.pairs import Pair
from saesteer.directions.rows import layers_of
from saesteer.errors import PairsError


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    points: Sequence[HookPoint],
    *,
    seed: int = 0,
    batch_size: int = 32,
    cache: Path | None = None,
) -> list[Direction]:
    """PC1 + mean of the differences chosen − rejected, all layers as one long vector.

    Of each side the last token's stream is read, as it leaves each layer. The differences
    [n, layers · d_model] are centred, and their first principal component, of length 1, is added
    to their mean; what falls to a layer is its vector [d_model]. It is written where the authors'
    code writes it, at the layer's `mlp_out`, and so that norms are kept:
    x ← ‖x‖ · norm(x̂ + λ(1 + max(0, cos(x, −v))) v̂), λ = .1 times the strength.

    Args:
        pairs: the paper uses 5; of one pair there is no component, and its difference is taken.
        points: their layers are used; the method is meant for all of them.
        seed: not used: nothing is drawn.
        batch_size, cache: see `answers.answer_activations`.

    Raises:
        PairsError: no pairs or one that can't be read.
        HookPointError: the model has no such layer.
    """
    layers = layers_of(points)
    read = [HookPoint(layer, "resid_post") for layer in layers]
    found = answer_activations(
        model, tokenizer, pairs, read, read="answer-last", batch_size=batch_size, cache=cache
    )
    differences = torch.stack([found[p][0].double() - found[p][1].double() for p in read], 1)
    vectors = in_context_vectors(differences)
    name = fingerprint(model)
    return [
        Direction(
            vector,
            HookPoint(layer, "mlp_out"),
            "icv",
            len(pairs),
            "answer-last",
            name,
            {"read_at": f"layers.{layer}.resid_post", "layers": layers},
            Use("icv"),
        )
        for layer, vector in zip(layers, vectors, strict=True)
    ]


def in_context_vectors(differences: Tensor) -> Tensor:
    """PC1 + mean of differences [n, layers, d] taken as [n, layers · d]: [layers, d] float32.

    The component's sign is the one in which the pair that it says most of has a positive part, so
    that it turns round with the pairs. Raises PairsError for no pairs.
    """
    if not len(differences):
        raise PairsError("no contrast pairs; expected at least one, the paper uses 5")
    flat = differences.double().flatten(1)
    mean = flat.mean(0)
    left, sizes, components = torch.linalg.svd(flat - mean, full_matrices=False)
    vector = mean
    # Differences that are all the same leave rounding alone to be a component of.
    if float(sizes[0]) > 1e-9 * float(flat.norm()):
        vector = mean + components[0] * left[left[:, 0].abs().argmax(), 0].sign()
    return vector.view(differences.shape[1:]).float()
