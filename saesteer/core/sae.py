"""Sparse autoencoders at inference: encode, decode, a few features only, and what a clamp writes.

An `Sae` computes what sae-lens's inference classes compute (they are the oracle in the tests) for
ReLU ("standard"), TopK and JumpReLU (BatchTopK is saved as JumpReLU), without a dense code and
without importing sae-lens. Folders and releases are read in `sae_formats` and `sae_sources`.

    z      = (x - shift) / scale                what the SAE's input convention makes of x
    a      = f((z - [b_dec]) W_enc + b_enc)     [b_dec] where `apply_b_dec_to_input`
    x_hat  = scale · (a W_dec + b_dec) + shift
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saesteer.core import sae_formats, sae_sources
from saesteer.core.points import HookPoint
from saesteer.core.sae_fits import check_fits
from saesteer.core.sae_formats import Conventions
from saesteer.errors import FeatureError

__all__ = ["Codes", "Conventions", "Prepared", "Sae", "check_fits", "load_sae"]

# Elements of one chunk of pre-activations: 64 MB in float32.
_CHUNK = 2**24


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


@dataclass(frozen=True, eq=False)
class Sae:
    """A sparse autoencoder, where it sits, and the conventions of its input.

    Args:
        W_enc: [d_in, d_sae]; b_enc: [d_sae]; W_dec: [d_sae, d_out]; b_dec: [d_out].
        architecture: "standard" (ReLU), "topk" (needs `k`) or "jumprelu" (needs `threshold`).
        hook_point: where in the model it reads and writes.
        model_id: the model it was trained on, None where unknown.
        k: number of latents kept a token (TopK).
        threshold: [d_sae], a latent fires above it (JumpReLU).
        model_fingerprint: of the weights it was trained on, None where unknown.
        prepend_bos: whether its training contexts began with BOS.
        context_size: tokens in a training context, None where unknown.
        conventions: what it does to its input.
        notes: anything else worth keeping with it; saved as metadata, must be JSON.

    Raises:
        SaeError: shapes that don't fit one another, an unknown architecture, a bad k or threshold.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    architecture: str
    hook_point: HookPoint
    model_id: str | None
    k: int | None = None
    threshold: Tensor | None = None
    model_fingerprint: str | None = None
    prepend_bos: bool = True
    context_size: int | None = None
    conventions: Conventions = field(default_factory=Conventions)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sae_formats.check_parts(self._parts())

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @cached_property
    def hash(self) -> str:
        """16 hex digits of a SHA-256 over the weights and everything that changes a code."""
        digest = hashlib.sha256(repr((self.architecture, self.k, self.conventions)).encode())
        for tensor in (self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.threshold):
            if tensor is not None:
                digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def _decoder_norms(self) -> Tensor | None:
        """‖W_dec[i]‖ [d_sae] where activations are in units of it (TopK trained that way)."""
        if self.conventions.rescale_acts_by_decoder_norm:
            return self.W_dec.norm(dim=-1)
        return None

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> "Sae":
        """The same SAE on another device, or in another floating-point type."""
        moved = {
            name: getattr(self, name).to(device=device, dtype=dtype)
            for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
            if getattr(self, name) is not None
        }
        return replace(self, **moved)

    def prepare(self, x: Tensor) -> Prepared:
        """What the SAE makes of activations x [..., d_in] before its encoder, with its inverse.

        Statistics are each token's own. `layer_norm` divides by the sample standard deviation
        plus 1e-5 and multiplies back by it without (as sae-lens does, so z → x is exact to 1e-5
        only); a centred SAE sees x minus its mean over d.
        """
        x = x.to(self.W_enc.dtype)
        scale: Tensor | None = None
        shift: Tensor | None = None
        if self.conventions.center_writing_weights:
            shift = x.mean(dim=-1, keepdim=True)
            x = x - shift
        if self.conventions.normalize_activations == "layer_norm":
            mean = x.mean(dim=-1, keepdim=True)
            x = x - mean
            scale = x.std(dim=-1, keepdim=True)
            x = x / (scale + 1e-5)
            shift = mean if shift is None else shift + mean
        elif self.conventions.normalize_activations == "constant_norm_rescale":
            # A zero vector has no norm to rescale: it stays zero rather than becoming NaN.
            scale = x.norm(dim=-1, keepdim=True).clamp_min(1e-12) / self.d_in**0.5
            x = x / scale
        return Prepared(x, scale, shift)

    def encode(self, x: Tensor) -> Codes:
        """Sparse code of activations x [..., d_in]; rows are the flattened leading dimensions.

        Pre-activations are made in bounded chunks; there is no dense code after them.
        """
        z = self._centred(self.prepare(x.reshape(-1, self.d_in)).z)
        step = max(1, _CHUNK // self.d_sae)
        parts = [self._fire(chunk, i * step) for i, chunk in enumerate(z.split(step))]
        if not parts:
            none = torch.zeros(0, dtype=torch.long, device=z.device)
            return Codes(none, none, z.new_zeros(0), 0)
        rows, latents, values = (torch.cat(column) for column in zip(*parts, strict=True))
        return Codes(rows, latents, values, z.shape[0])

    def activation(self, x: Tensor, features: Sequence[int]) -> Tensor:
        """Activations [..., n] of the chosen features on x [..., d_in].

        ReLU and JumpReLU compute the chosen encoder columns only; TopK needs one x W_enc to know
        whether a feature is among the k.

        Raises:
            FeatureError: a feature that this SAE doesn't have.
        """
        index = self._features(features)
        z = self._centred(self.prepare(x).z)
        if self.architecture == "topk":
            step = max(1, _CHUNK // self.d_sae)
            chunks = [self._among_k(c, index) for c in z.reshape(-1, self.d_in).split(step)]
            flat = torch.cat(chunks) if chunks else z.new_zeros(0, len(index))
            return flat.reshape(*x.shape[:-1], len(index))
        pre = z @ self.W_enc[:, index] + self.b_enc[index]
        if self.threshold is None:
            return pre.relu()
        return pre.relu() * (pre > self.threshold[index])

    def decode(self, codes: Codes, x: Tensor) -> Tensor:
        """Reconstruction [n_rows, d_out] in the stream's own space.

        Args:
            codes: of n_rows tokens.
            x: the activations they came from [..., d_in]; input normalisation is undone with
                their own statistics.
        """
        prepared = self.prepare(x.reshape(-1, self.d_in))
        values = codes.values
        if self._decoder_norms is not None:
            values = values / self._decoder_norms[codes.latents]
        starts = torch.searchsorted(
            codes.rows, torch.arange(codes.n_rows, device=codes.rows.device)
        )
        out = self.b_dec + F.embedding_bag(
            codes.latents, self.W_dec, starts, mode="sum", per_sample_weights=values
        )
        if prepared.scale is not None:
            out = out * prepared.scale
        return out if prepared.shift is None else out + prepared.shift

    def write(self, delta: Tensor, features: Sequence[int], x: Tensor) -> Tensor:
        """What changing features by delta [..., n] adds to the stream at x [..., d_in].

        x + write(t - a) equals: put t in the place of a in the code, decode, add back the
        untouched reconstruction error. Statistics come from x, unedited. Returns x's dtype.
        """
        index = self._features(features)
        out = delta.to(self.W_dec.dtype) @ self._rows(index)
        scale = self.prepare(x).scale
        return (out if scale is None else out * scale).to(x.dtype)

    def direction(self, feature: int) -> Tensor:
        """What one unit of the feature adds to the stream, [d_out].

        Where the SAE normalises its input a unit differs from token to token, and this is the
        direction only: use `write`.
        """
        return self._rows(self._features([feature]))[0]

    def save(self, folder: str | Path) -> None:
        """Write cfg.json and sae_weights.safetensors, which `sae_lens.SAE.load_from_disk` reads.

        Raises:
            SaeError: the folder cannot be written, or the disk is full.
        """
        sae_formats.write_folder(self._parts(), Path(folder))

    def _parts(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def _k(self) -> int:
        return self.k or 0

    def _centred(self, z: Tensor) -> Tensor:
        return z - self.b_dec if self.conventions.apply_b_dec_to_input else z

    def _pre(self, z: Tensor) -> Tensor:
        pre = z @ self.W_enc + self.b_enc
        return pre if self._decoder_norms is None else pre * self._decoder_norms

    def _fire(self, z: Tensor, first_row: int) -> tuple[Tensor, Tensor, Tensor]:
        pre = self._pre(z)
        if self.architecture == "topk":
            chosen = pre.topk(self._k, dim=-1, sorted=False).indices.sort(dim=-1).values
            values = pre.gather(-1, chosen)
            rows, column = (values > 0).nonzero(as_tuple=True)
            return rows + first_row, chosen[rows, column], values[rows, column]
        fires = pre > 0
        if self.threshold is not None:
            fires &= pre > self.threshold
        rows, latents = fires.nonzero(as_tuple=True)
        return rows + first_row, latents, pre[rows, latents]

    def _among_k(self, z: Tensor, index: Tensor) -> Tensor:
        values, chosen = self._pre(z).topk(self._k, dim=-1, sorted=False)
        # Each latent's column in the answer; the spare last column takes what wasn't asked for.
        wanted, back = index.unique(return_inverse=True)
        column = torch.full((self.d_sae,), len(wanted), device=z.device)
        column[wanted] = torch.arange(len(wanted), device=z.device)
        out = z.new_zeros(z.shape[0], len(wanted) + 1)
        return out.scatter_add(1, column[chosen], values.relu())[:, back]

    def _rows(self, index: Tensor) -> Tensor:
        rows = self.W_dec[index]
        if self._decoder_norms is not None:
            rows = rows / self._decoder_norms[index, None]
        return rows

    def _features(self, features: Sequence[int]) -> Tensor:
        for feature in features:
            if not 0 <= feature < self.d_sae:
                raise FeatureError(
                    f"feature {feature} does not exist: this SAE has features 0 to "
                    f"{self.d_sae - 1}; look one up with a search"
                )
        return torch.tensor(list(features), dtype=torch.long, device=self.W_enc.device)


def load_sae(source: str | Path, *, device: str | torch.device = "cpu") -> Sae:
    """Load an SAE, in float32.

    Args:
        source: a folder in SAELens format (cfg.json, sae_weights.safetensors) or sparsify format
            (cfg.json, sae.safetensors), read without importing sae-lens; or a SAELens
            "release/id"; or a Hub repository, "owner/name" or "owner/name/folder".

    Raises:
        SaeError: nothing there, a damaged file, or a convention that isn't reproduced, by name.
    """
    return Sae(**sae_sources.read(source)).to(device)
