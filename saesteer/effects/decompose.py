"""A direction in terms of an SAE's features: the nearest ones, and a few that add up to it.

A direction is a difference of activations, not an activation, so encoding it is out of
distribution: the encoder's biases were trained for whole activations, and a ReLU drops every
feature that the difference takes away. `encode` does so all the same, to show what it misses;
`decompose` looks for few decoder rows instead that add up to the vector.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saesteer.core.sae import Sae
from saesteer.errors import SaeError, SteeringError

CAVEAT = (
    "encoding a difference of activations is out of distribution: biases are for whole "
    "activations, and features that the difference takes away are lost"
)

# Correlations below this share of the vector's norm are rounding (float32).
_NOISE = 1e-6
# Random directions whose nearest feature tells what a cosine is by chance.
_RANDOM = 32
# Elements of one chunk of cosines: 64 MB in float32.
_CHUNK = 2**24


@dataclass(frozen=True)
class Pursuit:
    """Decoder rows that add up to a vector, in the order in which they were taken.

    Attributes:
        features: their numbers; activations: how much of each, in units of the feature's
            activation, all of them fitted together (0 where a later one made it needless).
        residuals: ‖what is left‖ / ‖vector‖ with the first 1, 2, 3, … of them.
    """

    features: tuple[int, ...]
    activations: tuple[float, ...]
    residuals: tuple[float, ...]


@dataclass(frozen=True)
class Encoded:
    """What the encoder makes of a vector, strongest first; see `CAVEAT`.

    Attributes:
        features, activations: the strongest; n_fired: how many fired in all.
        residual: ‖vector − Σ a_f d_f‖ / ‖vector‖ with all of them; above 1 it is farther off than
            nothing at all.
    """

    features: tuple[int, ...]
    activations: tuple[float, ...]
    n_fired: int
    residual: float


@dataclass(frozen=True)
class Nearest:
    """Features by cosine of their decoder row with a vector.

    Attributes:
        along, against: (feature, cosine), those of highest and of lowest cosine first.
        by_chance: the highest cosine that a random direction of the same width has with any row,
            mean of 32.
    """

    along: tuple[tuple[int, float], ...]
    against: tuple[tuple[int, float], ...]
    by_chance: float


@dataclass(frozen=True)
class Decomposition:
    """A vector in terms of features.

    encoded: None of a transcoder, whose encoder reads another place than its rows write to.
    """

    nearest: Nearest
    nonnegative: Pursuit
    signed: Pursuit
    encoded: Encoded | None


def decompose(
    vector: Tensor, sae: Sae, *, features: int = 16, nearest_features: int = 10, seed: int = 0
) -> Decomposition:
    """The vector [d_out] at the SAE's write point in terms of its features.

    Where the SAE normalises its input, what a unit of activation adds differs from token to token,
    and activations are in units of the decoder row.

    Args:
        features: decoder rows that each pursuit may take.
        nearest_features: listed on either side.
        seed: of the random directions that cosines are held against.

    Raises:
        SaeError: a vector of another width. SteeringError: a vector that is zero or not finite.
    """
    if vector.shape != (sae.d_out,):
        raise SaeError(
            f"a direction of shape {tuple(vector.shape)} for an SAE whose features write "
            f"{sae.d_out} numbers at {sae.write_point}; take the SAE of the direction's place"
        )
    vector = vector.detach().to(sae.W_dec.device)
    rows = sae.W_dec.detach()

    def in_activations(found: Pursuit) -> Pursuit:
        # A row of W_dec may be worth another length than a unit of the activation is.
        sizes = [float(rows[f].norm() / sae.direction(f).norm()) for f in found.features]
        scaled = tuple(a * s for a, s in zip(found.activations, sizes, strict=True))
        return Pursuit(found.features, scaled, found.residuals)

    return Decomposition(
        nearest(vector, rows, nearest_features, seed=seed),
        in_activations(pursuit(vector, rows, features, signed=False)),
        in_activations(pursuit(vector, rows, features, signed=True)),
        None if sae.hook_point_out is not None else encode(vector, sae, features),
    )


@torch.no_grad()
def pursuit(vector: Tensor, rows: Tensor, k: int, *, signed: bool) -> Pursuit:
    """Orthogonal matching pursuit (Pati et al. 1993) of a vector [d] in rows [m, d].

    Each step takes the row of highest cosine with what is left, and fits all taken rows again by
    least squares; not signed: by non-negative least squares (Bruckstein et al. 2008), and only
    rows that point along what is left are taken. It ends early where no row helps any more.

    Returns:
        A `Pursuit` whose activations are in units of the rows.

    Raises:
        SteeringError: the vector is zero or not finite.
    """
    from scipy.optimize import nnls

    target = vector.detach().double().cpu().numpy()
    size = _size(target)
    norms = rows.double().norm(dim=-1)
    usable = norms > 0
    taken: list[int] = []
    residuals: list[float] = []
    weights, left = np.zeros(0), target
    for _ in range(min(k, len(rows))):
        toward = torch.from_numpy(left / size).to(rows)
        cosines = torch.where(usable, (rows @ toward).double() / norms, 0.0)
        cosines[taken] = 0.0
        score = cosines.abs() if signed else cosines
        best = int(score.argmax())
        if float(score[best]) <= _NOISE:
            break
        taken.append(best)
        columns = rows[taken].double().cpu().numpy().T
        weights = np.linalg.lstsq(columns, target)[0] if signed else nnls(columns, target)[0]
        left = target - columns @ weights
        residuals.append(float(np.linalg.norm(left)) / size)
    return Pursuit(tuple(taken), tuple(float(w) for w in weights), tuple(residuals))


@torch.no_grad()
def encode(vector: Tensor, sae: Sae, most: int) -> Encoded:
    """The code of a difference vector [d_in], as if it were an activation; see `CAVEAT`.

    Raises:
        SteeringError: the vector is zero or not finite.
    """
    size = _size(vector.detach().double().cpu().numpy())
    x = vector[None].to(sae.W_enc)
    codes = sae.encode(x)
    written = sae.write(codes.values[None], codes.latents, x)
    order = codes.values.argsort(descending=True)[:most]
    return Encoded(
        tuple(codes.latents[order].tolist()),
        tuple(codes.values[order].tolist()),
        len(codes.values),
        float((x - written).double().norm()) / size,
    )


@torch.no_grad()
def nearest(vector: Tensor, rows: Tensor, k: int, *, seed: int = 0) -> Nearest:
    """The k rows [m, d] of highest and the k of lowest cosine with a vector [d].

    Raises:
        SteeringError: the vector is zero or not finite.
    """
    size = _size(vector.detach().double().cpu().numpy())
    generator = torch.Generator().manual_seed(seed)
    others = torch.randn(_RANDOM, rows.shape[1], generator=generator).to(rows)
    others = others / others.norm(dim=-1, keepdim=True)
    unit = torch.cat([(vector / size).to(rows)[None], others])
    norms = rows.norm(dim=-1)
    own, highest = [], torch.full((_RANDOM,), -torch.inf, device=rows.device, dtype=rows.dtype)
    step = max(1, _CHUNK // len(unit))
    for part, lengths in zip(rows.split(step), norms.split(step), strict=True):
        cosines = torch.where(lengths > 0, unit @ part.T / lengths, 0.0)
        own.append(cosines[0])
        highest = torch.maximum(highest, cosines[1:].amax(1))
    cosines = torch.cat(own).clamp(-1, 1)
    k = min(k, len(cosines))

    def listed(found: tuple[Tensor, Tensor]) -> tuple[tuple[int, float], ...]:
        return tuple(zip(found[1].tolist(), found[0].tolist(), strict=True))

    return Nearest(
        listed(cosines.topk(k)), listed(cosines.topk(k, largest=False)), float(highest.mean())
    )


def _size(vector: np.ndarray) -> float:
    size = float(np.linalg.norm(vector))
    if not 0 < size < np.inf:
        raise SteeringError(
            f"a direction of norm {size} has no parts; fit it on pairs whose sides differ"
        )
    return size
