"""Does an SAE belong to this model and this place? A wrong pair must never load silently."""

from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from saesteer.core.model import (
    HookPoint,
    d_model,
    decoder_layers,
    final_norm,
    fingerprint,
    site_module,
)
from saesteer.errors import SaeError

if TYPE_CHECKING:
    from saesteer.core.sae import Sae


def check_fits(
    sae: "Sae",
    model: PreTrainedModel,
    point: HookPoint,
    *,
    model_id: str | None = None,
    force: bool = False,
) -> None:
    """Refuse an SAE at the wrong place or on the wrong model.

    Where the SAE carries a fingerprint, the weights are compared; else the names are (case and
    owner aside), and an SAE that names no model is refused.

    Args:
        model_id: the model's name; its own `name_or_path` where not given.
        point: where it is to read. Where a transcoder writes, it says itself.
        force: skip the comparison of names (not of fingerprints, widths or places).

    Raises:
        SaeError: what differs, and what to try.
        HookPointError: a transcoder writes where the model has no such place.
    """
    width = d_model(model)
    for does, size, place in (
        ("reads", sae.d_in, sae.hook_point),
        ("writes", sae.d_out, sae.write_point),
    ):
        if size != width:
            raise SaeError(
                f"the SAE {does} {size} dimensions at {place}, but the model's stream has {width}: "
                f"it was trained on another model; load {sae.model_id or 'that one'}"
            )
    if sae.hook_point_out is not None:
        site_module(model, sae.hook_point_out)
    if _place(point) != _place(sae.hook_point):
        raise SaeError(
            f"the SAE was trained at {sae.hook_point}, not at {point}; use it at {sae.hook_point}"
        )
    hooked = sae.notes.get("hooked_module")
    module, _ = site_module(model, point)
    if hooked and point.site in ("mlp_out", "attn_out"):
        path = next(path for path, each in model.named_modules() if each is module)
        if path.rsplit(".", 1)[-1] != str(hooked).rsplit(".", 1)[-1]:
            # A norm after the half (Gemma 2): the module's output is not what is added.
            raise SaeError(
                f"the SAE reads the output of module {hooked}, and what this model adds to its "
                f"stream at {point} is the output of {path}; choose an SAE of the residual stream"
            )
    name = model_id or model.name_or_path
    if sae.model_fingerprint is not None:
        if sae.model_fingerprint != fingerprint(model):
            raise SaeError(
                f"the SAE was trained on other weights ({sae.model_id}, fingerprint "
                f"{sae.model_fingerprint}) than this model's ({name or 'unnamed'}, fingerprint "
                f"{fingerprint(model)}); load the model and revision that it was trained on"
            )
    elif not force and not _same_name(sae.model_id, name):
        raise SaeError(
            f"the SAE was trained on {sae.model_id or 'a model it does not name'}, and this model "
            f"is {name or 'unnamed'}; load the model it was trained on, or force it where "
            "you know that they are the same"
        )
    if sae.conventions.center_writing_weights:
        _check_centring_is_harmless(model)


def _place(point: HookPoint) -> tuple[int, str]:
    """A block's output is the next one's input: one name for both."""
    return (
        (point.layer + 1, "resid_pre") if point.site == "resid_post" else (point.layer, point.site)
    )


# TransformerLens's short names for models whose Hub name ends otherwise.
_ALIASES = {
    "gpt2-small": "gpt2",
    "distillgpt2": "distilgpt2",
    "distilgpt2-small": "distilgpt2",
    "gpt-neo-small": "gpt-neo-125m",
    "gpt-j": "gpt-j-6b",
    "gpt-neox": "gpt-neox-20b",
}


def _same_name(first: str | None, second: str | None) -> bool:
    """Compare model names without owner, folder and case: gpt2 = openai-community/gpt2."""
    if not first or not second:
        return False
    names = [name.rstrip("/").rsplit("/", 1)[-1].lower() for name in (first, second)]
    return _ALIASES.get(names[0], names[0]) == _ALIASES.get(names[1], names[1])


def _check_centring_is_harmless(model: PreTrainedModel) -> None:
    """`center_writing_weights` moves only the mean over d, which LayerNorm alone doesn't see."""
    in_blocks = {
        module
        for module in decoder_layers(model).modules()
        if type(module).__name__.lower().endswith("norm")
    }
    last = final_norm(model)
    everywhere = {
        module for module in model.modules() if type(module).__name__.lower().endswith("norm")
    }
    kinds = {
        type(norm).__name__ for norm in in_blocks | {last} if not isinstance(norm, nn.LayerNorm)
    }
    advice = "its activations can't be reproduced here; choose an SAE trained without it"
    if kinds:
        raise SaeError(
            f"the SAE declares center_writing_weights, which holds for LayerNorm models only, and "
            f"this model has {', '.join(sorted(kinds))}: {advice}"
        )
    if everywhere - in_blocks - {last} or not getattr(model.config, "do_layer_norm_before", True):
        raise SaeError(
            "the SAE declares center_writing_weights, and this model normalises its stream itself "
            f"(after the embedding or after each block): {advice}"
        )
