"""What each feature writes towards, read from the weights alone: the logit lens and more."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saesteer.core.model import final_norm, unembedding
from saesteer.core.progress import progress
from saesteer.errors import ModelError
from saesteer.features import token_sets
from saesteer.features.neighbours import nearest

# Elements of one chunk of logits: 64 MB in float32.
_CHUNK = 2**24
# Features of a chunk at most.
_ROWS = 1024
# Large enough that the norm's epsilon doesn't count, small enough to be squared in float16.
_SCALE = 16.0
# Bins of a histogram of logits.
_BINS = 32
# A set of tokens stands out from here on: the highest of some 70 sets seldom gets there by chance.
_STANDS_OUT = 4.0


@dataclass(frozen=True)
class LogitLens:
    """The tokens that each feature raises and lowers most, [n, top] each, strongest first."""

    promoted: NDArray[np.int64]
    promoted_logits: NDArray[np.float32]
    suppressed: NDArray[np.int64]
    suppressed_logits: NDArray[np.float32]


@dataclass(frozen=True)
class Logits:
    """What n features write into the logits.

    lens: the tokens that each raises and lowers most; low, high [n], histogram [n, bins]: how many
    tokens have a logit in each of the equal parts of [low, high]; token_sets [n]: the set of tokens
    that each raises most, None where none stands out; token_set_scores [n]: how far, see
    `token_sets.scores`.
    """

    lens: LogitLens
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    histogram: NDArray[np.int64]
    token_sets: tuple[str | None, ...]
    token_set_scores: NDArray[np.float32]


@dataclass(frozen=True)
class WeightChunk:
    """What the weights say of n consecutive features.

    norms [n]: of the decoder rows; neighbours, cosines [n, k]: the features whose decoder rows are
    most like each; logits: None where the decoder doesn't write into the stream (a single head's).
    """

    norms: NDArray[np.float32]
    neighbours: NDArray[np.int64]
    cosines: NDArray[np.float32]
    logits: Logits | None

    def __len__(self) -> int:
        return len(self.norms)


class Projection:
    """W_U · (gain ⊙ centred(d)) of the final norm's own gain, over the tokens that are shown.

    The norm's division by the token's own size is left out, since it depends on the token: logits
    are comparable within a feature and between features, not with the model's own.

    Args:
        exclude: token ids that are left out (special tokens).

    Raises:
        ModelError: the final norm and the unembedding differ in width.
    """

    def __init__(self, model: nn.Module, exclude: Collection[int] = ()):
        matrix = unembedding(model)
        device = matrix.device
        gain, centred = linear_part(final_norm(model), matrix.shape[1], device, matrix.dtype)
        shown = torch.ones(len(matrix), dtype=torch.bool)
        shown[[i for i in exclude if 0 <= i < len(matrix)]] = False
        self.ids = shown.nonzero()[:, 0].to(device)
        columns = (matrix[self.ids].float() * gain).T  # [d_model, tokens shown]
        self.columns = columns - columns.mean(dim=0) if centred else columns

    def logits(self, directions: Tensor) -> Tensor:
        """[n, tokens shown] of directions [n, d_model], whose length doesn't matter.

        Raises:
            ModelError: the directions don't fit the norm's width.
        """
        if directions.shape[-1] != len(self.columns):
            raise ModelError(
                f"directions of width {directions.shape[-1]} don't fit this model's final norm and "
                f"unembedding, {len(self.columns)} wide; take the SAE's own model"
            )
        unit = nn.functional.normalize(directions.to(self.columns.device).float(), dim=-1)
        return unit @ self.columns

    def lens(self, logits: Tensor, top: int) -> LogitLens:
        """The top and bottom tokens of `logits`."""
        top = min(top, len(self.ids))
        best, worst = logits.topk(top, dim=-1), logits.topk(top, dim=-1, largest=False)
        return LogitLens(
            self.ids[best.indices].cpu().numpy(),
            best.values.cpu().numpy(),
            self.ids[worst.indices].cpu().numpy(),
            worst.values.cpu().numpy(),
        )


@torch.no_grad()
def logit_lens(
    model: nn.Module,
    directions: Tensor,
    *,
    top: int = 10,
    exclude: Collection[int] = (),
) -> LogitLens:
    """Top and bottom tokens of W_U · (gain ⊙ centred(d_f)), d_f of unit length; see `Projection`.

    Args:
        directions: [n, d_model], one a feature, in the stream's space. Length doesn't matter.
        top: how many tokens on either side.
        exclude: token ids that are never shown (special tokens).

    Raises:
        ModelError: the unembedding or the directions don't fit the final norm's width.
    """
    projection = Projection(model, exclude)
    size = max(1, _CHUNK // max(1, len(projection.ids)))
    # An empty part beside them, since there may be no direction at all.
    parts = [directions[:0], *directions.split(size)]
    found = [projection.lens(projection.logits(part), top) for part in parts]
    return LogitLens(
        *(np.concatenate([getattr(lens, x.name) for lens in found]) for x in fields(LogitLens))
    )


@torch.no_grad()
def describe(
    model: nn.Module,
    directions: Tensor,
    texts: Sequence[str],
    *,
    top: int = 10,
    neighbours: int = 10,
    exclude: Collection[int] = (),
) -> Iterator[WeightChunk]:
    """What the weights say of each feature, in order, a bounded chunk of features at a time.

    Args:
        directions: [n, width], the decoder's rows.
        texts: of every token by id, with its leading space. Rows of the unembedding past them are
            padding: they are no tokens.
        top: tokens on either side of the logit lens.
        neighbours: how many; 0 saves their n² width multiply-adds.
        exclude: token ids that are never shown (special tokens).
    """
    matrix = unembedding(model)
    directions = directions.detach().to(matrix.device)
    unit = nn.functional.normalize(directions.float(), dim=-1)
    read = None
    if matrix.shape[1] == directions.shape[1]:
        projection = Projection(model, {*exclude, *range(len(texts), len(matrix))})
        names, members = token_sets.membership([texts[i] for i in projection.ids.tolist()])
        members = members.to(matrix.device)
        read = _Reader(projection, names, members, token_sets.spread(projection.columns, members))
    size = min(_ROWS, max(1, _CHUNK // len(matrix)))
    with progress("weights", len(unit), unit="feature") as bar:
        for start in range(0, len(unit), size):
            rows = range(start, min(start + size, len(unit)))
            near, cosines = nearest(unit, rows, neighbours)
            yield WeightChunk(
                directions[rows.start : rows.stop].float().norm(dim=-1).cpu().numpy(),
                near.cpu().numpy(),
                cosines.cpu().numpy(),
                read.of(unit[rows.start : rows.stop], top) if read else None,
            )
            bar.update(len(rows))


@dataclass(frozen=True)
class _Reader:
    """The projection into logits, and the sets [s] of tokens among those shown."""

    projection: Projection
    names: tuple[str, ...]
    members: Tensor
    spread: Tensor

    def of(self, unit: Tensor, top: int) -> Logits:
        logits = self.projection.logits(unit)
        low, high = logits.amin(dim=1), logits.amax(dim=1)
        sets: tuple[str | None, ...] = (None,) * len(unit)
        scores = np.zeros(len(unit), np.float32)
        if self.names:
            best = token_sets.scores(logits, self.members, self.spread).max(dim=1)
            scores = best.values.cpu().numpy()
            sets = tuple(
                self.names[i] if score >= _STANDS_OUT else None
                for i, score in zip(best.indices.tolist(), scores.tolist(), strict=True)
            )
        return Logits(
            self.projection.lens(logits, top),
            low.cpu().numpy(),
            high.cpu().numpy(),
            _histogram(logits, low, high).cpu().numpy(),
            sets,
            scores,
        )


def _histogram(logits: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How many of `logits` [m, n] lie in each of the equal parts of [low, high], [m, bins]."""
    width = (high - low).clamp(min=1e-30)[:, None] / _BINS
    bins = ((logits - low[:, None]) / width).long().clamp(0, _BINS - 1)
    bins += torch.arange(len(logits), device=logits.device)[:, None] * _BINS
    return torch.bincount(bins.flatten(), minlength=len(logits) * _BINS).view(len(logits), _BINS)


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
