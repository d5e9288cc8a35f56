"""Where things are in a decoder: its blocks, the sites in a block, the final norm, the unembedding.

Nothing here is a table of models: blocks are found by their number, and a block's halves by the
names that transformers gives them. What is found by name is checked by number on the first
forward pass (`hooks.py`): a half whose output is not exactly what the block adds is refused.
"""

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn

from saesteer.core.points import HookPoint
from saesteer.errors import HookPointError, ModelError

_BLOCK_LISTS = ("layers", "h", "blocks", "block")
_NOT_TEXT = ("vision", "visual", "audio", "image", "speech", "encoder", "expert")
_FINAL_NORMS = (
    "norm",
    "ln_f",
    "final_layer_norm",
    "final_layernorm",
    "norm_f",
    "final_norm",
    "layer_norm",
)
# A half of a block, as a path inside it: the first that exists is what is added to the stream,
# unless the block norms it once more. Bloom's and MPT's halves add the residual themselves, so
# the last linear layer inside is the one; OPT's second half is no module but ends in fc2.
_HALVES = {
    "attn_out": (
        "self_attention.dense",
        "self_attn",
        "attn",
        "attention",
        "self_attention",
        "linear_attn",
    ),
    "mlp_out": (
        "mlp.dense_4h_to_h",
        "ffn.down_proj",
        "mlp",
        "feed_forward",
        "block_sparse_moe",
        "ffn",
        "fc2",
    ),
}


# The last linear layer of a block's attention, which mixes its heads.
_MIXES_HEADS = ("o_proj", "c_proj", "out_proj", "dense", "wo", "proj")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks of any causal language model, also inside a multimodal one.

    Raises ModelError, naming what was looked for and what was there, where none is found.
    """
    wanted = _text_setting(model, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    found = dict(_lists(model, wanted))
    fitting = {name: m for name, m in found.items() if wanted in (None, len(m))}
    # Outside the towers for other senses if possible, by the usual names, nearest to the root.
    ranked = sorted(
        fitting,
        key=lambda name: (
            any(word in name for word in _NOT_TEXT),
            name.rpartition(".")[2] not in _BLOCK_LISTS,
            name.count("."),
        ),
    )
    if not ranked:
        seen = ", ".join(f"{name} ({len(m)})" for name, m in found.items()) or "none"
        raise ModelError(
            f"no decoder blocks found in {type(model).__name__}: looked for a ModuleList of "
            f"{wanted} blocks (config.num_hidden_layers); the lists in it are: {seen}"
        )
    return fitting[ranked[0]]


def _lists(
    module: nn.Module, wanted: int | None, path: str = ""
) -> Iterator[tuple[str, nn.ModuleList]]:
    """Every list of modules with its path, but for those inside of what may well be the blocks,
    which rank behind it anyway: a large model has thousands of modules there."""
    for name, child in module.named_children():
        at = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList) and len(child):
            yield at, child
            if name in _BLOCK_LISTS and wanted in (None, len(child)):
                continue
        yield from _lists(child, wanted, at)


def block_at(model: nn.Module, point: HookPoint) -> nn.Module:
    """The block that a point is in. HookPointError for a layer that is not there."""
    layers = decoder_layers(model)
    if point.layer >= len(layers):
        raise HookPointError(
            f"{point}: this model has {len(layers)} blocks, layers.0 to layers.{len(layers) - 1}"
        )
    return layers[point.layer]


def site_module(model: nn.Module, point: HookPoint) -> tuple[nn.Module, Literal["input", "output"]]:
    """The module whose first input or output is the activation at `point`.

    Raises HookPointError for a layer that is not there, a block without such a half, and blocks
    that scale what their halves add (Granite's residual_multiplier and the like).
    """
    return site_in(block_at(model, point), model, point)


def site_in(
    block: nn.Module, model: nn.Module, point: HookPoint
) -> tuple[nn.Module, Literal["input", "output"]]:
    """`site_module`, where the block is at hand."""
    if point.site == "resid_pre":
        return block, "input"
    if point.site == "resid_post":
        return block, "output"
    if point.head is not None:
        head_columns(model, point)
        return _output_projection(block, point), "input"
    return _half(block, point), "output"


def head_columns(model: nn.Module, point: HookPoint) -> slice:
    """The columns of the output projection's input that are this head's.

    Raises HookPointError for a head that is not there, or an attention without such a projection.
    """
    heads = _text_setting(model, "num_attention_heads", "n_head", "n_heads")
    projection: Any = _output_projection(decoder_layers(model)[point.layer], point)
    # GPT-2's Conv1D names no width and keeps its weight [in, out]; quantised weights are packed.
    width = getattr(projection, "in_features", None) or projection.weight.shape[0]
    if not heads or width % heads:
        raise HookPointError(
            f"{point}: {width} columns can't be shared out among {heads} heads; use attn_out"
        )
    if point.head is None or point.head >= heads:
        raise HookPointError(f"{point}: this model has {heads} heads, head.0 to head.{heads - 1}")
    size = width // heads
    return slice(point.head * size, (point.head + 1) * size)


def point_width(model: nn.Module, point: HookPoint) -> int:
    """Dimensions of the activation at a point: d_model, or d_head at a single head."""
    if point.head is None:
        return d_model(model)
    site_module(model, point)
    columns = head_columns(model, point)
    return int(columns.stop - columns.start)


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the unembedding. ModelError where there is none."""
    layers = decoder_layers(model)
    parent = next(m for m in model.modules() if any(c is layers for c in m.children()))
    for name in _FINAL_NORMS:
        norm = getattr(parent, name, None)
        if isinstance(norm, nn.Module):
            return norm
    raise ModelError(
        f"no final norm found in {type(parent).__name__} beside its blocks: "
        f"looked for {', '.join(_FINAL_NORMS)}"
    )


def unembedding(model: nn.Module) -> Tensor:
    """The matrix [vocab, d_model] from the final norm's output to logits; shared, not a copy."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        raise ModelError(
            f"{type(model).__name__} has no unembedding: load it as a causal language model"
        )
    return weight


def d_model(model: nn.Module) -> int:
    """The width of the residual stream."""
    width = _text_setting(model, "hidden_size", "d_model", "n_embd")
    if width is None:
        raise ModelError(f"the configuration of {type(model).__name__} has no hidden_size")
    return width


def scaled_by(block: nn.Module) -> str | None:
    """The name of a factor other than 1 on what the block adds to the stream, or None."""
    for owner in (block, getattr(block, "config", None)):
        factor = getattr(owner, "residual_multiplier", None)
        if isinstance(factor, int | float) and factor != 1:
            return f"residual_multiplier={factor:g}"
    return None


def _half(block: nn.Module, point: HookPoint) -> nn.Module:
    kind = type(block).__name__
    if factor := scaled_by(block):
        raise HookPointError(
            f"{point}: {kind} multiplies what its halves add to the stream ({factor}), which is "
            "not supported; use resid_pre or resid_post"
        )
    for path in (*_post_norms(block, point.site), *_HALVES[point.site]):
        module = _descend(block, path)
        if module is not None:
            return module
    children = ", ".join(name for name, _ in block.named_children())
    raise HookPointError(
        f"{point}: {kind} has none of {', '.join(_HALVES[point.site])}; it has {children}"
    )


def _output_projection(block: nn.Module, point: HookPoint) -> nn.Module:
    for path in ("self_attn", "attn.attention", "attn", "attention", "self_attention"):
        attention = _descend(block, path)
        for name in _MIXES_HEADS:
            module = None if attention is None else _descend(attention, name)
            # torch.ao's quantised layers have a function in place of their weight.
            if module is not None and (
                hasattr(module, "in_features")
                or isinstance(getattr(module, "weight", None), Tensor)
            ):
                return module
    raise HookPointError(
        f"{point}: no output projection was found in the attention of {type(block).__name__}: "
        f"looked for {', '.join(_MIXES_HEADS)}; use attn_out"
    )


def _post_norms(block: nn.Module, site: str) -> Iterator[str]:
    """Norms on a half's output, in blocks that have them (Gemma 2 and 3, OLMo 2, GLM 4)."""
    yield {"attn_out": "post_self_attn_layernorm", "mlp_out": "post_mlp_layernorm"}[site]
    if site == "mlp_out":
        yield "post_feedforward_layernorm"
    # In most blocks post_attention_layernorm is the norm before the MLP; here it isn't.
    elif hasattr(block, "pre_feedforward_layernorm") or (
        hasattr(block, "post_feedforward_layernorm") and not hasattr(block, "input_layernorm")
    ):
        yield "post_attention_layernorm"


def _descend(module: nn.Module, path: str) -> nn.Module | None:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def _text_setting(model: nn.Module, *names: str) -> int | None:
    """The first of these settings in the text part of the model's configuration."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None
