"""SAE-targeted steering: a vector that raises one feature of the text and little else.

A linear map from edits to what they do to the SAE's features is fitted, ŷ = x M + b, with x [d] an
added vector and y [d_sae] the change of the features' mean activations on the text that the model
writes under it. The vector for feature j is then the column of M that raises it, less what raises
the features that any edit raises (Chalnev et al. 2024, arXiv 2411.02193):

    s = M_j / ‖M_j‖ − λ M_b / ‖M_b‖,  M_b = M b
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.compare.arms.candidates import DENSEST, candidates
from saesteer.compare.prepared import Material, Prepared
from saesteer.core.generate import prompt_ids
from saesteer.core.hooks import activations
from saesteer.core.progress import progress
from saesteer.core.sae import Sae
from saesteer.directions.places import text_of
from saesteer.effects.continuations import Continuation, continuations
from saesteer.effects.damage import padded
from saesteer.errors import SteeringError
from saesteer.steering.edits import Add, Edit

# Rows of one `generate`.
_ROWS = 64


class Effects(NamedTuple):
    """ŷ = x M + b. M: [d, d_sae]; b: [d_sae]; float64 on the CPU."""

    M: Tensor
    b: Tensor


def fit_effects(vectors: Tensor, effects: Tensor, *, ridge: float = 1e-3) -> Effects:
    """Least squares of effects [n, d_sae] on vectors [n, d], b not penalised.

    ridge: added to the diagonal of XᵀX, as a share of its mean; it decides what n < d leaves open.

    Raises:
        SteeringError: shapes don't agree, or numbers aren't finite.
    """
    x, y = vectors.double().cpu(), effects.double().cpu()
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or len(x) < 2:
        raise SteeringError(
            f"vectors of shape {list(x.shape)} and effects of shape {list(y.shape)}: expected "
            "[n, d] and [n, d_sae], n from 2 up"
        )
    if not bool(x.isfinite().all() and y.isfinite().all()):
        raise SteeringError("the vectors or their effects hold NaN or infinite numbers")
    centre_x, centre_y = x.mean(0), y.mean(0)
    x, y = x - centre_x, y - centre_y
    gram = x.T @ x
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    M = torch.linalg.solve(gram, x.T @ y)
    return Effects(M, centre_y - centre_x @ M)


def targeted(effects: Effects, feature: int, *, aside: float = 1.0) -> Tensor:
    """s = M_j/‖M_j‖ − λ M_b/‖M_b‖ of a feature, float32 [d], with λ = `aside`.

    Raises:
        SteeringError: no vector was seen to have an effect on the feature.
    """
    column = effects.M[:, feature]
    if not bool(column.any()):
        raise SteeringError(
            f"no edit changed feature {feature} in the text that was written, so that no vector "
            "for it can be told; fit on more or longer texts, or choose another feature"
        )
    common = effects.M @ effects.b
    common = common / common.norm().clamp_min(1e-30)
    return (column / column.norm() - aside * common).float()


def measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: Sae,
    vectors: Tensor,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 24,
    seed: int = 0,
) -> Tensor:
    """What adding each vector [n, d] does to the features of the text written: [n, d_sae] float32.

    Mean activation over the tokens written under the vector, less that of what is written from
    the same prompt and the same noise without it; both are read by the model as it is. Vector i
    gets prompt i modulo their number.

    Raises:
        TextError, SteeringError: see `effects.continuations`.
    """
    rows, _ = prompt_ids(tokenizer, prompts, prepend_bos=sae.prepend_bos)
    chosen = [rows[i % len(rows)] for i in range(len(vectors))]
    bar = progress("sae-ts", len(vectors), unit="edit")
    found = []
    with bar:
        for first in range(0, len(vectors), _ROWS):
            some = range(first, min(first + _ROWS, len(vectors)))
            steered: list[list[Edit]] = [[Add(vectors[i], 1.0, sae.write_point)] for i in some]
            plain: list[list[Edit]] = [[] for _ in some]
            under, without = (
                mean_activations(
                    model,
                    sae,
                    continuations(
                        model,
                        tokenizer,
                        [chosen[i] for i in some],
                        edits,
                        max_new_tokens=max_new_tokens,
                        seeds=[seed + i for i in some],
                    ),
                )
                for edits in (steered, plain)
            )
            found.append(under - without)
            bar.update(len(some))
    return torch.cat(found)


def mean_activations(model: PreTrainedModel, sae: Sae, texts: Sequence[Continuation]) -> Tensor:
    """Each feature's mean over the tokens written, [n, d_sae] float32; 0 for a text without one."""
    ids, mask = padded([(*one.prompt, *one.new) for one in texts])
    columns = torch.arange(ids.shape[1])
    begins = torch.tensor([[len(one.prompt)] for one in texts])
    written = (columns >= begins) & (mask == 1)
    x = activations(model, [sae.hook_point], ids, mask)[sae.hook_point]
    codes = sae.encode(x[written.to(x.device)])
    owner = written.nonzero()[:, 0][codes.rows.cpu()]
    found = torch.zeros(len(texts), sae.d_sae)
    found.index_put_((owner, codes.latents.cpu()), codes.values.float().cpu(), accumulate=True)
    return found / written.sum(1, keepdim=True).clamp_min(1)


def sae_ts(
    material: Material,
    *,
    feature: int | None = None,
    n: int | None = None,
    size: float = 0.5,
    max_new_tokens: int = 24,
    aside: float = 1.0,
    densest: float = DENSEST,
) -> Prepared:
    """Add the vector that raises one feature of the text and little else.

    Its length is that of max_act times the feature's decoder row, so that a strength is as long
    here as with `sae_add`. The map is fitted on random decoder rows and random vectors, as many of
    either, on the prompts of the material's pairs.

    Args:
        feature: None takes the first candidate, as `sae_add` does.
        n: how many edits the map is fitted on; None: twice as many as the stream has dimensions.
        size: their length, in units of the mean norm of what stands where the SAE writes, over all
            tokens but the first of the first 32 pairs' prompts with their chosen answers.
        aside: λ, how much of what any edit does is taken out.

    Raises:
        SteeringError: no edit changed the feature; n below 2 or a size that isn't positive.
    """
    sae, index = material.features()
    n = 2 * sae.d_out if n is None else n
    if n < 2 or not 0 < size < float("inf"):
        raise SteeringError(f"{n} edits of size {size}: expected 2 or more, of a size above 0")
    chosen = candidates(material, densest=densest)[0][0] if feature is None else feature
    generator = torch.Generator().manual_seed(material.seed)
    alive = torch.from_numpy(index.column("max_act").copy()) > 0
    alive[chosen] = False  # it comes first, and once
    others = alive.nonzero()[:, 0]
    drawn = others[torch.randperm(len(others), generator=generator)][: (n - 1) // 2].tolist()
    own = torch.stack([sae.direction(one) for one in (chosen, *drawn)]).float().cpu()
    noise = torch.randn(n - len(own), sae.d_out, generator=generator)
    vectors = torch.nn.functional.normalize(torch.cat([own, noise]), dim=-1)
    vectors *= size * _mean_norm(material, sae)
    effects = measured(
        material.model,
        material.tokenizer,
        sae,
        vectors,
        [pair.prompt for pair in material.pairs],
        max_new_tokens=max_new_tokens,
        seed=material.seed,
    )
    vector = targeted(fit_effects(vectors, effects), chosen, aside=aside)
    length = index.max_act(chosen) * float(sae.direction(chosen).norm())
    vector = vector * (length / vector.norm().clamp_min(1e-30))
    return Prepared(
        "sae-ts",
        material.model,
        edits=lambda strength: [Add(vector, strength, sae.write_point, name="sae-ts")],
        notes={
            "features": [chosen],
            "sae": sae.hash,
            "edits": n,
            "size": size,
            "aside": aside,
            # A text under each edit, and one without it.
            "tokens_written": 2 * n * max_new_tokens,
            "validation_looks": 0,
        },
    )


def _mean_norm(material: Material, sae: Sae) -> float:
    """Mean ‖x‖ where the SAE writes, over the chosen texts of 32 pairs at the most."""
    texts = [text_of(pair.prompt, pair.chosen) for pair in material.pairs[:32]]
    rows, _ = prompt_ids(material.tokenizer, texts, prepend_bos=True)
    ids, mask = padded(rows)
    point = sae.write_point
    x = activations(material.model, [point], ids, mask)[point]
    # The first token's norm is often many times that of any other.
    return float(x[:, 1:][(mask[:, 1:] == 1).to(x.device)].float().norm(dim=-1).mean())
