"""From an SAE's input to its sparse code: functions of weights and activations alone."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saesteer.core.sae_parts import Conventions

# Columns whose maximum is looked at before they are.
_GROUP = 8


@dataclass(frozen=True)
class Codes:
    """A sparse code: what fired, ordered by row, then by latent. Zeros are not in it.

    rows [nnz] int64, latents [nnz] int64, values [nnz] (all > 0), n_rows: rows encoded.
    """

    rows: Tensor
    latents: Tensor
    values: Tensor
    n_rows: int

    def dense(self, d_sae: int) -> Tensor:
        """The same code as a dense [n_rows, d_sae] tensor: for tests and small looks only."""
        out = self.values.new_zeros(self.n_rows, d_sae)
        return out.index_put((self.rows, self.latents), self.values)


class Prepared(NamedTuple):
    """The SAE's input z [..., d_in], and x = scale · z + shift (None where 1 or 0); [..., 1]."""

    z: Tensor
    scale: Tensor | None
    shift: Tensor | None


def prepare(x: Tensor, conventions: Conventions) -> Prepared:
    """What an SAE of these conventions makes of x [..., d_in] before its encoder; see `Sae`."""
    scale: Tensor | None = None
    shift: Tensor | None = None
    if conventions.center_writing_weights:
        shift = x.mean(dim=-1, keepdim=True)
        x = x - shift
    if conventions.normalize_activations == "layer_norm":
        mean = x.mean(dim=-1, keepdim=True)
        x = x - mean
        scale = x.std(dim=-1, keepdim=True)
        x = x / (scale + 1e-5)
        shift = mean if shift is None else shift + mean
    elif conventions.normalize_activations == "constant_norm_rescale":
        # A zero vector has no norm to rescale: it stays zero rather than becoming NaN.
        scale = x.norm(dim=-1, keepdim=True).clamp_min(1e-12) / x.shape[-1] ** 0.5
        x = x / scale
    return Prepared(x, scale, shift)


# What fired among some rows: rows [nnz], latents [nnz], values [nnz].
Fired = tuple[Tensor, Tensor, Tensor]


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of x [n, d] and their places, both [n, k], in no order.

    Of equal values at the edge any are taken. A CPU partly sorts whole rows, which costs far more
    than to look at them. So columns are put into groups of eight: the k largest values lie in
    the k groups with the largest maxima, and only those groups are looked into.
    """
    width = x.shape[1] // _GROUP
    if x.device.type != "cpu" or width < max(1, 2 * k):
        values, places = x.topk(k, dim=-1, sorted=False)
        return values, places
    columns = torch.arange(x.shape[1])
    groups = columns[: width * _GROUP].view(_GROUP, width).T  # [width, 8]
    _, best = largest(x[:, : width * _GROUP].unflatten(1, (_GROUP, width)).amax(1), k)
    rest = columns[width * _GROUP :].expand(len(x), -1)
    places = torch.cat([groups[best].flatten(1), rest], 1)
    values, at = x.gather(1, places).topk(k, dim=-1, sorted=False)
    return values, places.gather(1, at)


def fire_topk(pre: Tensor, k: int) -> Fired:
    """The k largest pre-activations of each row [n, d_sae], where they are positive."""
    chosen = largest(pre, k)[1].sort(dim=-1).values
    values = pre.gather(-1, chosen)
    rows, column = (values > 0).nonzero(as_tuple=True)
    return rows, chosen[rows, column], values[rows, column]


def fire_above(pre: Tensor, threshold: Tensor | None) -> Fired:
    """Positive pre-activations [n, d_sae], and above the threshold [d_sae] where there is one."""
    fires = pre > 0
    if threshold is not None:
        fires &= pre > threshold
    rows, latents = fires.nonzero(as_tuple=True)
    return rows, latents, pre[rows, latents]


def fire_gated(u: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> Fired:
    """Where u + b_gate > 0, relu(exp(r_mag) u + b_mag); u: [n, d_sae], the others [d_sae].

    Rajamanoharan et al. 2024, arXiv 2404.16014, equations 3 to 5.
    """
    rows, latents = (u + b_gate > 0).nonzero(as_tuple=True)
    values = u[rows, latents] * r_mag.exp()[latents] + b_mag[latents]
    positive = values > 0
    return rows[positive], latents[positive], values[positive]


def among_k(pre: Tensor, k: int, index: Tensor) -> Tensor:
    """Activations [n, len(index)] of chosen latents: 0 where they aren't among a row's top k."""
    values, chosen = largest(pre, k)
    # Each latent's column in the answer; the spare last column takes what wasn't asked for.
    wanted, back = index.unique(return_inverse=True)
    column = torch.full((pre.shape[1],), len(wanted), device=pre.device)
    column[wanted] = torch.arange(len(wanted), device=pre.device)
    out = pre.new_zeros(pre.shape[0], len(wanted) + 1)
    return out.scatter_add(1, column[chosen], values.relu())[:, back]


def weighted_rows(codes: Codes, values: Tensor, rows: Tensor) -> Tensor:
    """Σ values · rows[latent] over what fired, [n_rows, d]; rows: [d_sae, d]."""
    starts = torch.searchsorted(codes.rows, torch.arange(codes.n_rows, device=codes.rows.device))
    return F.embedding_bag(codes.latents, rows, starts, mode="sum", per_sample_weights=values)
