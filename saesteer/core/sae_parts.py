"""What an SAE is made of, and which parts fit one another."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saesteer.errors import SaeError

ARCHITECTURES = ("standard", "topk", "jumprelu", "gated")
# Those that a transcoder can have: the SAELens format holds no other.
TRANSCODERS = ("standard", "jumprelu")
NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")

# [d_sae] tensors that only one architecture has.
EXTRA: Mapping[str, tuple[str, ...]] = {"jumprelu": ("threshold",), "gated": ("r_mag", "b_mag")}
# Every weight that an SAE can have.
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "r_mag", "b_mag", "W_skip")


@dataclass(frozen=True)
class Conventions:
    """What an SAE does to its input; each reproduces sae-lens's inference.

    Args:
        apply_b_dec_to_input: b_dec is taken from the input before the encoder.
        normalize_activations: "none"; "layer_norm" (minus the token's mean, over its standard
            deviation); "constant_norm_rescale" (each token to norm √d).
        rescale_acts_by_decoder_norm: activations are in units of the decoder row's norm (TopK).
        center_writing_weights: trained on the stream minus its mean over d.
    """

    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    rescale_acts_by_decoder_norm: bool = False
    center_writing_weights: bool = False


def check_parts(parts: Mapping[str, Any]) -> None:
    """Raise SaeError where the arguments of `Sae` don't fit one another or aren't reproduced."""
    architecture, conventions = parts["architecture"], parts["conventions"]
    if architecture not in ARCHITECTURES:
        raise SaeError(
            f"the SAE's architecture is {architecture!r}, which is not reproduced here; use one "
            f"of {', '.join(ARCHITECTURES)} (BatchTopK is saved as jumprelu)"
        )
    if conventions.normalize_activations not in NORMALIZATIONS:
        raise SaeError(
            f"the SAE declares normalize_activations={conventions.normalize_activations!r}, "
            f"which is not reproduced here; use one with {', '.join(NORMALIZATIONS)}"
        )
    if conventions.rescale_acts_by_decoder_norm and architecture != "topk":
        raise SaeError(
            f"the SAE declares rescale_acts_by_decoder_norm with architecture {architecture!r}: "
            "it is defined for topk only; fold the norms into its weights first"
        )
    _check_shapes(parts)
    if parts["hook_point_out"] is not None:
        _check_transcoder(architecture, conventions)
    elif parts["W_skip"] is not None:
        raise SaeError(
            "the SAE has a W_skip and no hook_point_out: only a transcoder skips; say where it "
            "writes, or leave W_skip out"
        )


def _check_shapes(parts: Mapping[str, Any]) -> None:
    architecture, W_enc, W_dec = parts["architecture"], parts["W_enc"], parts["W_dec"]
    if W_enc.ndim != 2 or W_dec.ndim != 2:
        raise SaeError("the SAE's W_enc and W_dec must be matrices; its weights are damaged")
    (d_in, d_sae), d_out = W_enc.shape, W_dec.shape[1]
    shapes: dict[str, tuple[int, ...]] = {
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_out),
        "b_dec": (d_out,),
        **dict.fromkeys(EXTRA.get(architecture, ()), (d_sae,)),
    }
    optional = {"W_skip": (d_out, d_in), "log10_density": (d_sae,)}
    shapes |= {name: s for name, s in optional.items() if parts[name] is not None}
    for name, shape in shapes.items():
        tensor = parts[name]
        if tensor is None or tuple(tensor.shape) != shape:
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise SaeError(
                f"the SAE's {name} is {found}, expected {shape} beside W_enc "
                f"{tuple(W_enc.shape)}; download or train it again"
            )
    for names in EXTRA.values():
        for name in names:
            if parts[name] is not None and name not in shapes:
                raise SaeError(f"a {architecture} SAE has no {name}; leave it out")
    if architecture == "topk" and not 1 <= (parts["k"] or 0) <= d_sae:
        raise SaeError(f"a topk SAE needs 1 ≤ k ≤ d_sae = {d_sae}, and k is {parts['k']}")
    plain = Conventions(apply_b_dec_to_input=False)
    if parts["hook_point_out"] is None and d_in != d_out and parts["conventions"] != plain:
        raise SaeError(
            f"the SAE reads {d_in} dimensions and writes {d_out}, so what it takes from its input "
            "it can't give back; only a transcoder does that: say at which hook_point_out it writes"
        )


def _check_transcoder(architecture: str, conventions: Conventions) -> None:
    """A transcoder's input and output are different streams: nothing of one is in the other."""
    if architecture not in TRANSCODERS:
        raise SaeError(
            f"the SAE is a {architecture} transcoder, which the SAELens format can't hold; train "
            f"one that is saved as {' or '.join(TRANSCODERS)} (batchtopk, in place of topk)"
        )
    if conventions.apply_b_dec_to_input:
        raise SaeError(
            "the SAE is a transcoder with apply_b_dec_to_input: its b_dec belongs to the output "
            "only; set apply_b_dec_to_input to false"
        )
    if conventions.center_writing_weights:
        raise SaeError(
            "the SAE is a transcoder with center_writing_weights: its output's mean can't be made "
            "from its input, so it is not reproduced here; choose one trained without it"
        )
