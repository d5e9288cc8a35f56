"""Sparse autoencoders at inference: encode, decode, a few features only, and what a clamp writes.

An `Sae` computes what sae-lens's inference classes compute (they are the oracle in the tests) for
ReLU ("standard"), TopK, JumpReLU (BatchTopK is saved as JumpReLU) and Gated SAEs, and for
transcoders with ReLU and JumpReLU, without a dense code and without importing sae-lens. Folders
and releases are read in `sae_formats` and `sae_sources`.

    z      = (x - shift) / scale                what the SAE's input convention makes of x
    a      = f((z - [b_dec]) W_enc + b_enc)     [b_dec] where `apply_b_dec_to_input`
    x_hat  = scale · (a W_dec + b_dec) + shift  of an autoencoder
    y_hat  = a W_dec + b_dec + [W_skip x]       of a transcoder, at another place than x
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saesteer.core import sae_codes, sae_files, sae_formats, sae_parts, sae_sources
from saesteer.core.points import HookPoint
from saesteer.core.sae_codes import Codes, Prepared
from saesteer.core.sae_fits import check_fits
from saesteer.core.sae_parts import Conventions
from saesteer.errors import FeatureError

__all__ = ["Codes", "Conventions", "Prepared", "Sae", "check_fits", "load_sae"]

Features = Sequence[int] | Tensor | slice

# Elements of one chunk of pre-activations: 64 MB in float32.
_CHUNK = 2**24


@dataclass(frozen=True, eq=False)
class Sae:
    """A sparse autoencoder, where it sits, and the conventions of its input.

    Args:
        W_enc: [d_in, d_sae]; b_enc: [d_sae]; W_dec: [d_sae, d_out]; b_dec: [d_out].
        architecture: "standard" (ReLU), "topk" (needs `k`), "jumprelu" (needs `threshold`) or
            "gated" (needs `r_mag` and `b_mag`; `b_enc` is the gate's bias).
        hook_point: where in the model it reads; an autoencoder writes there too.
        model_id: the model it was trained on, None where unknown.
        k: number of latents kept a token (TopK).
        threshold: [d_sae], a latent fires above it (JumpReLU).
        r_mag, b_mag: [d_sae], of the size of what passes the gate (Gated): with u the
            pre-activation less b_enc, relu(exp(r_mag) u + b_mag) where u + b_enc > 0.
        hook_point_out: where a transcoder writes; None: it is an autoencoder.
        W_skip: [d_out, d_in], what a transcoder makes of its input beside the code.
        model_fingerprint: of the weights it was trained on, None where unknown.
        prepend_bos: whether its training contexts began with BOS.
        context_size: tokens in a training context, None where unknown.
        conventions: what it does to its input.
        notes: anything else worth keeping with it; saved as metadata, must be JSON.
        log10_density: [d_sae], log10 of the fraction of tokens on which each latent fires, -10 for
            never, where it was measured; saved beside the weights.

    Raises:
        SaeError: shapes that don't fit one another, an unknown architecture, a bad k, a combination
            that the SAELens format can't hold.
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
    r_mag: Tensor | None = None
    b_mag: Tensor | None = None
    hook_point_out: HookPoint | None = None
    W_skip: Tensor | None = None
    model_fingerprint: str | None = None
    prepend_bos: bool = True
    context_size: int | None = None
    conventions: Conventions = field(default_factory=Conventions)
    notes: Mapping[str, Any] = field(default_factory=dict)
    log10_density: Tensor | None = None

    def __post_init__(self) -> None:
        sae_parts.check_parts(self._parts())

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def write_point(self) -> HookPoint:
        """Where its decoder's rows belong: `hook_point_out` of a transcoder, else `hook_point`."""
        return self.hook_point_out or self.hook_point

    @cached_property
    def hash(self) -> str:
        """16 hex digits of a SHA-256 over the weights and everything that changes a code."""
        digest = hashlib.sha256(repr((self.architecture, self.k, self.conventions)).encode())
        if self.hook_point_out is not None:
            digest.update(b"transcoder")
        for name in sae_parts.WEIGHTS:
            tensor = getattr(self, name)
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
            for name in (*sae_parts.WEIGHTS, "log10_density")
            if getattr(self, name) is not None
        }
        return replace(self, **moved)

    def narrowed(self, features: Sequence[int]) -> "Sae":
        """The same SAE with these features alone, in this order; what they compute is the same.

        Raises:
            FeatureError: a feature that this SAE doesn't have; a TopK SAE, where whether a feature
                fires depends on the others.
        """
        if self.architecture == "topk":
            raise FeatureError("features of a topk SAE depend on one another; use the whole SAE")
        index = self._features(features)
        kept: dict[str, Any] = {"W_enc": self.W_enc[:, index]}
        for name in ("b_enc", "W_dec", "threshold", "r_mag", "b_mag", "log10_density"):
            tensor = getattr(self, name)
            if tensor is not None:
                kept[name] = tensor[index]
        return replace(self, **kept)

    def trained_number(self, feature: int) -> int:
        """A feature's number in the SAE that was trained, also where this one is what a file of
        edits kept of it: its notes then name the features "narrowed_from" it."""
        origin = self.notes.get("narrowed_from")
        # Narrowed once more, it is another SAE, and the note isn't about it.
        if not origin or origin["narrow"] != self.hash:
            return feature
        return int(origin["features"][feature])

    def prepare(self, x: Tensor) -> Prepared:
        """What the SAE makes of activations x [..., d_in] before its encoder, with its inverse.

        Statistics are each token's own. `layer_norm` divides by the sample standard deviation
        plus 1e-5 and multiplies back by it without (as sae-lens does, so z → x is exact to 1e-5
        only); a centred SAE sees x minus its mean over d.
        """
        return sae_codes.prepare(x.to(self.W_enc.dtype), self.conventions)

    def encode(self, x: Tensor) -> Codes:
        """Sparse code of activations x [..., d_in]; rows are the flattened leading dimensions.

        Pre-activations are made in bounded chunks; there is no dense code after them.
        """
        z = self._centred(self.prepare(x.reshape(-1, self.d_in)).z)
        step = max(1, _CHUNK // self.d_sae)
        parts = []
        for i, chunk in enumerate(z.split(step)):
            rows, latents, values = self._fire(chunk)
            parts.append((rows + i * step, latents, values))
        if not parts:
            none = torch.zeros(0, dtype=torch.long, device=z.device)
            return Codes(none, none, z.new_zeros(0), 0)
        rows, latents, values = (torch.cat(column) for column in zip(*parts, strict=True))
        return Codes(rows, latents, values, z.shape[0])

    def activation(self, x: Tensor, features: Features) -> Tensor:
        """Activations [..., n] of the chosen features on x [..., d_in].

        Only the chosen encoder columns are computed; but TopK needs one x W_enc to know whether a
        feature is among the k. features: numbers, or an int64 tensor [n] of them that exist, or
        slice(None) for all (not of a TopK SAE).

        Raises:
            FeatureError: a feature that this SAE doesn't have.
        """
        index = self._features(features)
        z = self._centred(self.prepare(x).z)
        if self.architecture == "topk":
            step = max(1, _CHUNK // self.d_sae)
            chunks = [
                sae_codes.among_k(self._pre(c), self._k, index)
                for c in z.reshape(-1, self.d_in).split(step)
            ]
            flat = torch.cat(chunks) if chunks else z.new_zeros(0, len(index))
            return flat.reshape(*x.shape[:-1], len(index))
        some = self if isinstance(index, slice) else self.narrowed(index)
        u = z @ some.W_enc
        pre = u + some.b_enc
        if some.r_mag is not None and some.b_mag is not None:
            return (u * some.r_mag.exp() + some.b_mag).relu() * (pre > 0)
        return pre.relu() if some.threshold is None else pre.relu() * (pre > some.threshold)

    def decode(self, codes: Codes, x: Tensor) -> Tensor:
        """Reconstruction [n_rows, d_out] in the space of the stream that it writes to.

        Args:
            codes: of n_rows tokens.
            x: the activations they came from [..., d_in]; an autoencoder's input normalisation is
                undone with their own statistics, a transcoder's skip is made from them.
        """
        values = codes.values
        if self._decoder_norms is not None:
            values = values / self._decoder_norms[codes.latents]
        out = self.b_dec + sae_codes.weighted_rows(codes, values, self.W_dec)
        x = x.reshape(-1, self.d_in)
        if self.hook_point_out is not None:
            return out if self.W_skip is None else out + x.to(out.dtype) @ self.W_skip.T
        prepared = self.prepare(x)
        if prepared.scale is not None:
            out = out * prepared.scale
        return out if prepared.shift is None else out + prepared.shift

    def write(self, delta: Tensor, features: Features, x: Tensor) -> Tensor:
        """What changing features by delta [..., n] adds to the stream, where the SAE read x.

        x + write(t - a) equals: put t in the place of a in the code, decode, add back the
        untouched reconstruction error. Statistics come from x, unedited. A transcoder's is to be
        added at `hook_point_out`. Returns x's dtype.
        """
        index = self._features(features)
        out = delta.to(self.W_dec.dtype) @ self._rows(index)
        scale = self.prepare(x).scale if self.hook_point_out is None else None
        return (out if scale is None else out * scale).to(x.dtype)

    def direction(self, feature: int) -> Tensor:
        """What one unit of the feature adds to the stream, [d_out].

        Where the SAE normalises its input a unit differs from token to token, and this is the
        direction only: use `write`.
        """
        return self._rows(self._features([feature]))[0]

    def save(self, folder: str | Path) -> None:
        """Write cfg.json and sae_weights.safetensors, which `sae_lens.SAE.load_from_disk` reads.

        With `log10_density`, also sparsity.safetensors, as sae-lens writes it. cfg.json holds the
        SHA-256 of the weights' file, which loading compares.

        Raises:
            SaeError: the folder cannot be written, or the disk is full; the format holds no such
                SAE.
        """
        config, tensors = sae_formats.to_saelens(self._parts())
        density = self.log10_density
        if density is not None:
            density = density.detach().cpu().float().contiguous()
        sae_files.write_folder(Path(folder), config, tensors, density)

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

    def _fire(self, z: Tensor) -> sae_codes.Fired:
        if self.r_mag is not None and self.b_mag is not None:
            return sae_codes.fire_gated(z @ self.W_enc, self.b_enc, self.r_mag, self.b_mag)
        if self.architecture == "topk":
            return sae_codes.fire_topk(self._pre(z), self._k)
        return sae_codes.fire_above(self._pre(z), self.threshold)

    def _rows(self, index: Tensor) -> Tensor:
        rows = self.W_dec[index]
        if self._decoder_norms is not None:
            rows = rows / self._decoder_norms[index, None]
        return rows

    def _features(self, features: Features) -> Any:
        if isinstance(features, Tensor | slice):  # known to exist, in a step run for each token
            return features
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
