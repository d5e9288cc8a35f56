"""The SAELens format, read and written straight.

Every input convention that a format can declare is either among `Conventions` or refused here by
name: an SAE fed with something else than it was trained on looks healthy and is wrong.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saesteer.core.points import HookPoint
from saesteer.core.sae_files import CONFIG, SCALER
from saesteer.core.sae_parts import ARCHITECTURES, EXTRA, Conventions
from saesteer.core.sae_parts import WEIGHTS as TENSORS
from saesteer.errors import HookPointError, SaeError

# SAELens's names for transcoders: the architecture here, and whether it has a W_skip.
TRANSCODERS = {
    "transcoder": ("standard", False),
    "skip_transcoder": ("standard", True),
    "jumprelu_transcoder": ("jumprelu", False),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}

# The version of the SAELens format that is written and tested against.
SAELENS_VERSION = "6.54.12"

# TransformerLens loading options that leave the residual stream, and what is added to it, as they
# are (but for rounding). `center_writing_weights` is a convention; anything else is refused.
_HARMLESS_KWARGS = frozenset(
    {
        "center_unembed",
        "default_padding_side",
        "default_prepend_bos",
        "device",
        "device_map",
        "dtype",
        "fold_ln",
        "fold_value_biases",
        "low_cpu_mem_usage",
        "move_to_device",
        "n_devices",
        "refactor_factored_attn_matrices",
        "torch_dtype",
        "trust_remote_code",
    }
)


def from_saelens(config: dict[str, Any], tensors: dict[str, Tensor], where: str) -> dict[str, Any]:
    """The arguments of `Sae` from a SAELens configuration (any version) and its weights.

    Raises:
        SaeError: a missing key, or a convention that isn't reproduced, by name.
    """
    metadata = config.get("metadata") or {}
    version = str(metadata.get("sae_lens_version") or config.get("sae_lens_version") or "0")
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < 6:
        config, metadata = _modernised(config)
    architecture = config.get("architecture")
    if architecture is None:
        raise SaeError(f"{where}: {CONFIG} names no architecture; it is no SAELens configuration")

    def refuse(what: str, instead: str = "choose another SAE") -> SaeError:
        return SaeError(f"{where} declares {what}, which is not reproduced here; {instead}")

    transcoder = architecture in TRANSCODERS
    if not transcoder and architecture not in ARCHITECTURES:
        known = ", ".join([*ARCHITECTURES, *TRANSCODERS])
        raise refuse(f"architecture {architecture!r}", f"use one of {known}")
    architecture, skips = TRANSCODERS.get(architecture, (architecture, False))
    if config.get("reshape_activations", "none") != "none":
        raise refuse(f"reshape_activations={config['reshape_activations']!r}")
    if config.get("activation_fn", "relu") not in ("relu", "topk"):
        raise refuse(f"activation_fn={config['activation_fn']!r}")
    if metadata.get("hook_head_index") is not None:
        raise refuse(f"hook_head_index={metadata['hook_head_index']} (one attention head)")
    out = metadata.get("hook_name_out")
    if not transcoder and out not in (None, metadata.get("hook_name")):
        raise refuse(f"hook_name_out={out!r} of an SAE that is no transcoder")
    if transcoder and out is None:
        raise SaeError(
            f"{where} is a transcoder and does not say where it writes: put hook_name_out into the "
            f"metadata of its {CONFIG}"
        )
    kwargs = dict(metadata.get("model_from_pretrained_kwargs") or {})
    centred = bool(kwargs.pop("center_writing_weights", False))
    for key, value in kwargs.items():
        if key not in _HARMLESS_KWARGS and value is not None:
            raise refuse(f"model_from_pretrained_kwargs {key}={value!r}")

    tensors = dict(tensors)
    ones = tensors.pop("scaling_factor", None)
    if ones is not None and not torch.allclose(ones.float(), torch.ones_like(ones.float())):
        raise refuse("a finetuning scaling_factor")
    own = metadata.get("saesteer") or {}
    parts: dict[str, Any] = {
        "architecture": architecture,
        "hook_point": hook_point(metadata.get("hook_name"), where),
        "hook_point_out": hook_point(out, where) if transcoder else None,
        "model_id": metadata.get("model_name"),
        "k": int(config["k"]) if architecture == "topk" and "k" in config else None,
        "model_fingerprint": own.get("model_fingerprint"),
        "prepend_bos": metadata.get("prepend_bos") is not False,
        "context_size": metadata.get("context_size"),
        "conventions": Conventions(
            apply_b_dec_to_input=bool(config.get("apply_b_dec_to_input", True)),
            normalize_activations=config.get("normalize_activations") or "none",
            rescale_acts_by_decoder_norm=bool(config.get("rescale_acts_by_decoder_norm", False)),
            center_writing_weights=centred,
        ),
        "notes": own.get("notes", {}),
    }
    if architecture == "gated" and "b_gate" in tensors:
        tensors["b_enc"] = tensors.pop("b_gate")
    parts |= weights(tensors, architecture, where, skips=skips)
    if parts["conventions"].normalize_activations == "expected_average_only_in":
        if transcoder:
            # What is taken from its input says nothing of its output's size.
            raise refuse("normalize_activations='expected_average_only_in' for a transcoder")
        parts = _folded(parts, config.get("scaling_factor"), where)
    check_size(parts, config, where)
    return parts


def _modernised(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A configuration of SAELens before 6 (flat, other names) as today's, and its metadata."""
    names = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
    flat = {names.get(key, key): value for key, value in config.items()}
    flat["activation_fn"] = flat.get("activation_fn", flat.pop("activation_fn_str", "relu"))
    flat.setdefault("architecture", "standard")
    if flat["activation_fn"] == "topk":
        flat["architecture"] = "topk"
        flat["k"] = (flat.get("activation_fn_kwargs") or {}).get("k")
    if isinstance(flat.get("normalize_activations"), bool):
        flat["normalize_activations"] = (
            "expected_average_only_in" if flat["normalize_activations"] else "none"
        )
    if "hook_z" in str(flat.get("hook_name")):
        flat.setdefault("reshape_activations", "hook_z")
    return flat, flat


def hook_point(name: str | None, where: str) -> HookPoint:
    """The hook point that another format names; SaeError where it can't be hooked here."""
    if name is None:
        raise SaeError(f"{where} does not say at which hook point it was trained; use another SAE")
    try:
        return HookPoint.from_saelens(name)
    except HookPointError as error:
        raise SaeError(
            f"{where} was trained at {name}, which can't be hooked here: {error}"
        ) from error


def weights(
    tensors: dict[str, Tensor], architecture: str, where: str, *, skips: bool = False
) -> dict[str, Tensor]:
    """The named tensors in float32; SaeError where one is missing, unknown or not finite."""
    names = ["W_enc", "b_enc", "W_dec", "b_dec", *EXTRA.get(architecture, ())]
    if skips:
        names.append("W_skip")
    missing, unknown = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names))
    if missing:
        raise SaeError(f"{where} lacks {', '.join(missing)}; download or train it again")
    if unknown:
        raise SaeError(
            f"{where} has weights not reproduced here for {architecture}: {', '.join(unknown)}; "
            "choose another SAE"
        )
    # Copied out of the memory map: a file overwritten in place would take the weights with it.
    floats = {
        name: tensors[name].detach().to(torch.float32, copy=True).contiguous() for name in names
    }
    for name, tensor in floats.items():
        if not torch.isfinite(tensor).all():
            raise SaeError(f"{where}: {name} holds NaN or infinity; download or train it again")
    return floats


def _folded(parts: dict[str, Any], factor: float | None, where: str) -> dict[str, Any]:
    """Fold the factor by which the input was scaled, as sae-lens does at the end of training."""
    if factor is None:
        raise SaeError(
            f"{where} declares normalize_activations='expected_average_only_in' without the "
            f'factor: write {{"scaling_factor": √d / mean ‖x‖}} of its training activations to '
            f"{SCALER} beside it"
        )
    conventions = replace(parts["conventions"], normalize_activations="none")
    scaled = {
        "W_enc": parts["W_enc"] * factor,
        "W_dec": parts["W_dec"] / factor,
        "b_dec": parts["b_dec"] / factor,
    }
    return {**parts, **scaled, "conventions": conventions}


def check_size(parts: dict[str, Any], config: dict[str, Any], where: str) -> None:
    """Raise SaeError where the configuration's d_in, d_sae or d_out is not the weights'."""
    found = dict(zip(("d_in", "d_sae"), parts["W_enc"].shape, strict=True))
    if parts.get("hook_point_out") is not None:
        found["d_out"] = parts["W_dec"].shape[-1]
    for key, size in found.items():
        if config.get(key, size) != size:
            raise SaeError(
                f"{where}: {CONFIG} says {key}={config[key]} and the weights have {size}; the two "
                "files don't belong together: download or train it again"
            )


def to_saelens(parts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The SAELens configuration and weights (float32) of an SAE, from the arguments of `Sae`.

    Raises:
        SaeError: the format holds no such SAE.
    """
    conventions: Conventions = parts["conventions"]
    tensors = {
        name: parts[name].detach().cpu().float().contiguous()
        for name in TENSORS
        if parts[name] is not None
    }
    (d_in, d_sae), d_out = parts["W_enc"].shape, parts["W_dec"].shape[1]
    if parts["architecture"] == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    centred = {"center_writing_weights": True} if conventions.center_writing_weights else {}
    out: HookPoint | None = parts["hook_point_out"]
    config: dict[str, Any] = {
        "architecture": parts["architecture"],
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": conventions.apply_b_dec_to_input,
        "normalize_activations": conventions.normalize_activations,
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": parts["model_id"],
            "hook_name": parts["hook_point"].to_saelens(),
            "hook_head_index": None,
            "prepend_bos": parts["prepend_bos"],
            "context_size": parts["context_size"],
            "model_from_pretrained_kwargs": centred,
            "saesteer": {
                "hook_point": str(parts["hook_point"]),
                "model_fingerprint": parts["model_fingerprint"],
                "notes": dict(parts["notes"]),
            },
        },
    }
    if parts["architecture"] == "topk":
        config["k"] = parts["k"]
        config["rescale_acts_by_decoder_norm"] = conventions.rescale_acts_by_decoder_norm
    if out is not None:
        kind = (parts["architecture"], parts["W_skip"] is not None)
        config["architecture"] = next(name for name, each in TRANSCODERS.items() if each == kind)
        config["d_out"] = d_out
        config["metadata"]["hook_name_out"] = out.to_saelens()
        config["metadata"]["saesteer"]["hook_point_out"] = str(out)
    elif d_in != d_out:
        raise SaeError(
            f"the SAE reads {d_in} dimensions and writes {d_out} at one place: the SAELens format "
            "holds that as a transcoder only; say at which hook_point_out it writes"
        )
    return config, tensors
