"""Language models: loading one, its special tokens, its fingerprint; and where things are in it.

`HookPoint` and the functions that find blocks are defined in `points.py` and `blocks.py` and are
part of this module's interface.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedModel as PreTrainedModel
from transformers import PreTrainedTokenizerBase as PreTrainedTokenizerBase

from saesteer.core.blocks import d_model, decoder_layers, final_norm, site_module, unembedding
from saesteer.core.points import SITES, HookPoint
from saesteer.errors import ModelError, did_you_mean

__all__ = [
    "EMBEDDED",
    "SITES",
    "HookPoint",
    "d_model",
    "decoder_layers",
    "final_norm",
    "fingerprint",
    "load_model",
    "site_module",
    "special_token_ids",
    "unembedding",
]

EMBEDDED = "planted"
"""The model id of the small language model that comes with the package."""

_EMBEDDED_FOLDER = Path(__file__).parent.parent / "world" / "lm"
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    RuntimeError,
    TypeError,
    AttributeError,
    SafetensorError,
)
# Of each parameter, at most this many values take part in the fingerprint.
_SAMPLE = 1024


def load_model(
    model_id: str,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready to be read and steered.

    model_id: a Hub id, a local folder, or "planted" for the embedded model.
    dtype: "float32", "bfloat16", "float16" or "float64"; None takes the stored one (float16 becomes
    float32 on a CPU, which computes badly in it).

    The model is in eval mode and its parameters are frozen (gradients still reach activations).
    Raises ModelError where it is missing, incomplete, or not a causal language model.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ModelError(
            f"unknown dtype {dtype!r}{did_you_mean(dtype, _DTYPES)}: use {', '.join(_DTYPES)}"
        )
    target = _device(device)
    source = _source(model_id)
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=_DTYPES[dtype] if dtype else "auto",
            output_loading_info=True,
            **common,
        )
    except _LOAD_ERRORS as error:
        raise ModelError(_cannot_load("model", model_id, error)) from error
    # transformers fills what a checkpoint lacks with random numbers and only logs it.
    if missing := sorted([*report["missing_keys"], *map(str, report.get("mismatched_keys", ()))]):
        raise ModelError(
            f"the weights of {model_id!r} are incomplete: {len(missing)} missing or of another "
            f"shape, the first is {missing[0]}; fetch or copy the model again"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
    except _LOAD_ERRORS as error:
        raise ModelError(_cannot_load("tokenizer of", model_id, error)) from error
    if dtype is None and target.type == "cpu" and model.dtype == torch.float16:
        model = model.float()
    return model.to(target).eval().requires_grad_(False), tokenizer


def special_token_ids(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None
) -> frozenset[int]:
    """The ids that are not text: BOS, EOS and PAD of the model's configuration and generation
    configuration, and every special token of the tokenizer where one is given."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    found: set[int] = set(tokenizer.all_special_ids) if tokenizer is not None else set()
    for source in (config, text, getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value: Any = getattr(source, name, None)
            values = value if isinstance(value, list | tuple) else [value]
            found.update(i for i in values if isinstance(i, int) and i >= 0)
    return frozenset(found)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are, or the first of them where they are spread over several."""
    # Weights that accelerate keeps on disk are "meta" between calls, which run on the CPU.
    devices = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return next(devices, torch.device("cpu"))


def fingerprint(model: nn.Module) -> str:
    """A short hash that tells this model's weights from another's: 16 hexadecimal digits.

    Made from every parameter's name and shape and the signs of up to 1024 of its values, evenly
    spread. A sign survives every rounding, so a model has one fingerprint in float32, bfloat16
    and float16 and on any device; a fine-tuned copy flips enough of them to have another.
    A copy whose weights are only multiplied by positive numbers has the same.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        _check_in_memory(name, parameter)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.is_floating_point():
            digest.update(_signs(parameter.detach()).numpy().tobytes())
        else:  # packed by a quantisation
            digest.update(_evenly(parameter.detach()).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def weight_sizes(model: nn.Module) -> list[float]:
    """The root mean square of up to 1024 values of each parameter, in the order of their names.

    Rounding to bfloat16 moves it by .4 % at most, so what `fingerprint` can't tell, weights that
    were only multiplied, shows here. ModelError: see `fingerprint`.
    """
    sizes = []
    for name, parameter in sorted(model.named_parameters()):
        _check_in_memory(name, parameter)
        sizes.append(float(_evenly(parameter.detach()).double().square().mean().sqrt()))
    return sizes


def _check_in_memory(name: str, parameter: Tensor) -> None:
    if parameter.is_meta:
        raise ModelError(
            f"{name} is kept outside of memory (offloaded by accelerate's device_map), so the "
            "weights can't be told from others: load the whole model into memory"
        )


def _signs(values: Tensor) -> Tensor:
    """The sign bits of up to `_SAMPLE` values of a tensor, evenly spread: uint8 on the CPU."""
    return torch.signbit(_evenly(values)).to("cpu", torch.uint8)


def _evenly(values: Tensor) -> Tensor:
    """Up to `_SAMPLE` values of a tensor, evenly spread."""
    flat = values.reshape(-1)
    count = min(_SAMPLE, flat.numel())
    at = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
    return flat[at]


def _device(device: str) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device {device!r}: use cpu, cuda, cuda:1 or mps") from error
    missing = {
        "cuda": not torch.cuda.is_available(),
        "mps": not torch.backends.mps.is_available(),
    }
    if missing.get(target.type):
        raise ModelError(f"device {device!r} is not available here: use --device cpu")
    return target


def _source(model_id: str) -> str:
    """What transformers is to load: a Hub id as it is, or an existing folder's path."""
    if not model_id.strip():
        raise ModelError("no model given: name a Hub id, a local folder, or 'planted'")
    folder = _EMBEDDED_FOLDER if model_id == EMBEDDED else Path(model_id).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"folder {str(folder)!r} holds no model: there is no config.json in it"
            )
        return str(folder)
    if model_id == EMBEDDED:
        raise ModelError(
            "the embedded model's weights are missing from this installation: install saesteer "
            "again, or train them with `python -m saesteer.world.train`"
        )
    if folder.is_file():
        raise ModelError(f"{model_id!r} is a file: name the folder that holds config.json")
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
        near = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise ModelError(f"no model folder {model_id!r}{did_you_mean(folder.name, near)}")
    return model_id


def _cannot_load(what: str, model_id: str, error: BaseException) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    reason = reason or type(error).__name__
    return (
        f"cannot load the {what} {model_id!r}: {reason.rstrip('.')}. "
        "Give a local folder that holds it, or a Hub id (which needs a network or a filled cache)"
    )
