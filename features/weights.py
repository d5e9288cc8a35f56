"""What each feature writes towards: the logit lens of its decoder direction."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saesteer.core.model import final_norm, unembedding
from saesteer.errors import ModelError

# Elements of one chunk of logits: 64 MB in float32.
_CHUNK = 2**24
# Large enough that the norm's epsilon doesn't count, small enough to be squared in float16.
_SCALE = 16.0


@dataclass(frozen=True)
class LogitLens:
    """The tokens that each feature raises and lowers most, [n, top] each, strongest first."""

    promoted: NDArray[np.int64]
    promoted_logits: NDArray[np.float32]
    suppressed: NDArray[np.int64]
    suppressed_logits: NDArray[np.float32]


@torch.no_grad()
def logit_lens(
    model: nn.Module,
    directions: Tensor,
    *,
    top: int = 10,
    exclude: Collection[int] = (),
) -> LogitLens:
    """Top and bottom tokens of W_U · (gain ⊙ centred(d_f)), d_f of unit length.

    The final norm's division by the token's own size is left out, since it depends on the token:
    logits are comparable within a feature and between features, not with the model's own.

    Args:
        directions: [n, d_model], one a feature, in the stream's space. Length doesn't matter.
        top: how many tokens on either side.
        exclude: token ids that are never shown (special tokens).

    Raises:
        ModelError: the unembedding or the directions don't fit the final norm's width.
    """
    matrix = unembedding(model)
    gain, centred = linear_part(final_norm(model), matrix.shape[1], matrix.device, matrix.dtype)
    if directions.shape[-1] != len(gain):
        raise ModelError(
            f"directions of width {directions.shape[-1]} don't fit this model's final norm and "
            f"unembedding, {len(gain)} wide; take the SAE's own model"
        )
    columns = (matrix.float() * gain).T  # [d_model, vocab]
    if centred:
        columns = columns - columns.mean(dim=0)
    hidden = [i for i in exclude if 0 <= i < matrix.shape[0]]
    top = min(top, matrix.shape[0] - len(set(hidden)))
    best, worst = [], []
    for chunk in directions.to(matrix.device).split(max(1, _CHUNK // matrix.shape[0])):
        logits = nn.functional.normalize(chunk.float(), dim=-1) @ columns
        logits[:, hidden] = -torch.inf
        best.append(logits.topk(top, dim=-1))
        logits[:, hidden] = torch.inf
        worst.append(logits.topk(top, dim=-1, largest=False))
    empty = torch.zeros(0, top, device=matrix.device)

    def joined(parts: list[Tensor], dtype: torch.dtype) -> NDArray:
        return torch.cat(parts or [empty]).to("cpu", dtype).numpy()

    return LogitLens(
        joined([b.indices for b in best], torch.int64),
        joined([b.values for b in best], torch.float32),
        joined([w.indices for w in worst], torch.int64),
        joined([w.values for w in worst], torch.float32),
    )


@torch.no_grad()
def linear_part(
    norm: nn.Module, width: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, bool]:
    """The gain [width] of a norm, float32, and whether it takes the mean away first.

    Found by asking the norm, so that it holds for LayerNorm, RMSNorm, Gemma's (1 + w) and norms
    without weights alike: on a vector x of ±1 without mean, (norm(sx) − norm(−sx))/2 = gain ⊙ x,
    the bias being gone; on a constant vector a norm that centres gives its bias alone.

    Raises:
        ModelError: the module is of another width.
    """

    def odd(x: Tensor) -> Tensor:
        x = x.to(device=device, dtype=dtype)[None, None]
        return ((norm(x).float() - norm(-x).float()) / 2)[0, 0]

    signs = torch.ones(width)
    signs[1::2] = -1
    # An odd width has no sign vector without mean: one entry is 0, and found in a second look.
    looks = [signs]
    if width % 2:
        looks = [torch.cat([signs[1:], torch.zeros(1)]), torch.cat([torch.zeros(1), signs[1:]])]
    try:
        gain = torch.zeros(width, device=device)
        for x in looks:
            x = x.to(device)
            size = x.square().mean().sqrt()
            gain = torch.where(x != 0, odd(x * _SCALE) * size * x, gain)
        constant = odd(torch.ones(width) * _SCALE)
    except RuntimeError as error:
        raise ModelError(
            f"the final norm ({type(norm).__name__}) doesn't take vectors of width {width}, the "
            "unembedding's; this model projects between them, which isn't supported here"
        ) from error
    return gain, bool(constant.abs().max() < 0.01 * gain.abs().max())
