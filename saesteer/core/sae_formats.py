"""The SAELens format, read and written straight.

Every input convention that a format can declare is either among `Conventions` or refused here by
name: an SAE fed with something else than it was trained on looks healthy and is wrong.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saesteer.core.points import HookPoint
from saesteer.errors import HookPointError, SaeError

ARCHITECTURES = ("standard", "topk", "jumprelu")
NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")
CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"

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
    W_enc, W_dec = parts["W_enc"], parts["W_dec"]
    if W_enc.ndim != 2 or W_dec.ndim != 2:
        raise SaeError("the SAE's W_enc and W_dec must be matrices; its weights are damaged")
    d_sae, d_out = W_enc.shape[1], W_dec.shape[1]
    shapes = {"b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    if architecture == "jumprelu":
        shapes["threshold"] = (d_sae,)
    for name, shape in shapes.items():
        tensor = parts[name]
        if tensor is None or tuple(tensor.shape) != shape:
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise SaeError(
                f"the SAE's {name} is {found}, expected {shape} beside W_enc "
                f"{tuple(W_enc.shape)}; download or train it again"
            )
    if architecture == "topk" and not 1 <= (parts["k"] or 0) <= d_sae:
        raise SaeError(f"a topk SAE needs 1 ≤ k ≤ d_sae = {d_sae}, and k is {parts['k']}")


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

    if architecture not in ARCHITECTURES:
        raise refuse(f"architecture {architecture!r}", f"use one of {', '.join(ARCHITECTURES)}")
    if config.get("reshape_activations", "none") != "none":
        raise refuse(f"reshape_activations={config['reshape_activations']!r}")
    if config.get("activation_fn", "relu") not in ("relu", "topk"):
        raise refuse(f"activation_fn={config['activation_fn']!r}")
    if metadata.get("hook_head_index") is not None:
        raise refuse(f"hook_head_index={metadata['hook_head_index']} (one attention head)")
    if metadata.get("hook_name_out") not in (None, metadata.get("hook_name")):
        raise refuse(f"hook_name_out={metadata['hook_name_out']!r} (a transcoder)")
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
    parts |= weights(tensors, architecture, where)
    if parts["conventions"].normalize_activations == "expected_average_only_in":
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


def weights(tensors: dict[str, Tensor], architecture: str, where: str) -> dict[str, Tensor]:
    """The named tensors in float32; SaeError where one is missing, unknown or not finite."""
    names = ["W_enc", "b_enc", "W_dec", "b_dec"]
    if architecture == "jumprelu":
        names.append("threshold")
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
    """Raise SaeError where the configuration's d_in or d_sae is not the weights'."""
    found = dict(zip(("d_in", "d_sae"), parts["W_enc"].shape, strict=True))
    for key, size in found.items():
        if config.get(key, size) != size:
            raise SaeError(
                f"{where}: {CONFIG} says {key}={config[key]} and W_enc has {size}; the two files "
                "don't belong together: download or train it again"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; SaeError in one line where it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SaeError(
            f"{path} is missing; the SAE folder is incomplete: download it again"
        ) from None
    except (OSError, ValueError) as error:
        raise SaeError(f"{path} can't be read ({one_line(error)}); download it again") from error
    if not isinstance(value, dict):
        raise SaeError(f"{path} is no JSON object; download or train the SAE again")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; SaeError in one line where it is missing or damaged."""
    if not path.exists():
        raise SaeError(f"{path} is missing; the SAE folder is incomplete: download it again")
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise SaeError(
            f"{path} is truncated or damaged ({one_line(error)}); download or train it again"
        ) from error


def one_line(error: BaseException) -> str:
    """An exception's message on one line, cut to 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def write_folder(parts: dict[str, Any], folder: Path) -> None:
    """Write an SAE (the arguments of `Sae`) in SAELens format: beside the folder, then renamed.

    Raises:
        SaeError: the folder cannot be written, or the disk is full.
    """
    conventions: Conventions = parts["conventions"]
    tensors = {
        name: parts[name].detach().cpu().float().contiguous()
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        if parts[name] is not None
    }
    centred = {"center_writing_weights": True} if conventions.center_writing_weights else {}
    config: dict[str, Any] = {
        "architecture": parts["architecture"],
        "d_in": parts["W_enc"].shape[0],
        "d_sae": parts["W_enc"].shape[1],
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
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        aside.mkdir(parents=True)
        save_file(tensors, aside / WEIGHTS)
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for written in aside.iterdir():
            with written.open("rb+") as file:
                os.fsync(file.fileno())
        # Both files change together: a folder with one old and one new would load and be wrong.
        if folder.exists():
            folder.rename(old)
        try:
            aside.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    except (OSError, SafetensorError) as error:
        raise SaeError(
            f"cannot write {folder}: {one_line(error)}; free some space or choose a folder that "
            "you can write to"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
