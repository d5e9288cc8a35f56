"""What an SAE has to beat: a random dictionary and the principal components, at its own L0.

Both are fitted on moments of activations: x read by the SAE, y written by it. For an autoencoder y
is x; for a transcoder the linear map B of least squares takes x to y, a random dictionary is
followed by B, and principal components become the reduced-rank regression of the same rank
(Izenman 1975), which for y = x they are.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saesteer.core.points import HookPoint
from saesteer.core.sae import Conventions, Sae
from saesteer.errors import TrainingError

# Against directions without any variance, as a share of the mean variance.
_RIDGE = 1e-6


@dataclass(frozen=True)
class Moments:
    """Means and centred second moments (sums over n tokens), float64, on the CPU.

    n; mean_x [d_in]; mean_y [d_out]; xx [d_in, d_in]; xy [d_in, d_out], None where y is x.
    """

    n: int
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor | None


def moments(pairs: Iterable[tuple[Tensor, Tensor]]) -> Moments:
    """Moments of a stream of (x [n, d_in], y [n, d_out]), read once; y may be x itself.

    Raises:
        TrainingError: no token came.
    """
    n = 0
    start_x = start_y = sum_x = sum_y = xx = xy = torch.empty(0)
    same = True
    for x, y in pairs:
        if len(x) == 0:
            continue
        if n == 0:
            # Near the mean the products lose nothing in float32, however far that is from zero.
            same = y is x
            start_x, start_y = x.float().mean(0), y.float().mean(0)
            sum_x = torch.zeros_like(start_x, dtype=torch.float64)
            sum_y = torch.zeros_like(start_y, dtype=torch.float64)
            xx = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
            xy = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
        from_x = x.float() - start_x
        xx += from_x.T @ from_x
        sum_x += from_x.double().sum(0)
        if not same:
            from_y = y.float() - start_y
            xy += from_x.T @ from_y
            sum_y += from_y.double().sum(0)
        n += len(x)
    if n == 0:
        raise TrainingError("there is no token to fit the baselines on; give more text")
    off_x, off_y = sum_x / n, sum_y / n
    mean_x = (start_x.double() + off_x).cpu()
    xx = (xx - n * off_x[:, None] * off_x).cpu()
    if same:
        return Moments(n, mean_x, mean_x, xx, None)
    xy = (xy - n * off_x[:, None] * off_y).cpu()
    return Moments(n, mean_x, (start_y.double() + off_y).cpu(), xx, xy)


def random_dictionary(fitted: Moments, d_sae: int, k: int, *, seed: int, at: HookPoint) -> Sae:
    """A TopK SAE of random unit rows (normalised Gaussians), the encoder their transpose.

    x̂ = mean + Σ over the k largest a_i of a_i · row_i, with a = relu((x − mean) · rowsᵀ).
    """
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(d_sae, len(fitted.mean_x), generator=generator), dim=-1)
    map_ = _linear_map(fitted)
    return Sae(
        W_enc=rows.T.contiguous(),
        b_enc=-(rows @ fitted.mean_x.float()),
        W_dec=rows if map_ is None else rows @ map_.float(),
        b_dec=fitted.mean_y.float(),
        architecture="topk",
        k=min(k, d_sae),
        hook_point=at,
        model_id=None,
        conventions=Conventions(apply_b_dec_to_input=False),
    )


def principal_components(fitted: Moments, rank: int) -> Callable[[Tensor], Tensor]:
    """x [n, d_in] → ŷ [n, d_out] through the best `rank` linear directions (all, where fewer)."""
    map_ = _linear_map(fitted)
    spread = fitted.xx if map_ is None else map_.T @ fitted.xx @ map_
    # eigh gives them in ascending order.
    basis = torch.linalg.eigh((spread + spread.T) / 2).eigenvectors[:, -rank:]
    down = (basis if map_ is None else map_ @ basis).float()
    up, mean_x, mean_y = basis.T.float(), fitted.mean_x.float(), fitted.mean_y.float()

    def reconstruct(x: Tensor) -> Tensor:
        down_, up_, mean_x_, mean_y_ = (t.to(x.device) for t in (down, up, mean_x, mean_y))
        return (x.float() - mean_x_) @ down_ @ up_ + mean_y_

    return reconstruct


def _linear_map(fitted: Moments) -> Tensor | None:
    """B [d_in, d_out] of least squares, (x − mean) B ≈ y − mean; None where y is x."""
    if fitted.xy is None:
        return None
    ridge = _RIDGE * fitted.xx.diagonal().mean().clamp_min(1e-12)
    return torch.linalg.solve(
        fitted.xx + ridge * torch.eye(len(fitted.xx), dtype=fitted.xx.dtype), fitted.xy
    )
