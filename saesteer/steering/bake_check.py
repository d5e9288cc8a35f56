"""What `bake` measures on a model: which layers write to its stream, and whether a copy agrees."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from saesteer.core.hooks import capture, edit
from saesteer.core.model import HookPoint, d_model, decoder_layers, special_token_ids
from saesteer.errors import SteeringError

# The largest difference of logits that is let through, in standard deviations of the logits.
TOLERANCE = {
    torch.float64: 1e-5,  # edits are made in float32 in any model
    torch.float32: 1e-3,
    torch.float16: 5e-2,
    torch.bfloat16: 2.5e-1,
}
# Batches and lengths of the random texts on which two models are compared.
_SHAPES = ((4, 1), (4, 7), (2, 32))


@dataclass(frozen=True)
class Agreement:
    """How far two models' logits are apart.

    error: the largest absolute difference. spread: the logits' standard deviation over the
    vocabulary, averaged over tokens. effect: the largest difference that the edits themselves make
    to the logits of the model as it was. tolerance: the error allowed, in spreads.
    """

    error: float
    spread: float
    effect: float
    tolerance: float

    @property
    def relative(self) -> float:
        """The error in spreads."""
        return self.error / self.spread if self.spread else self.error

    @property
    def holds(self) -> bool:
        """Within the tolerance, and well below what the edits do; NaN never is."""
        return self.relative <= self.tolerance and self.error <= self.effect / 2


def agreement(
    plain: Sequence[Tensor], wanted: Sequence[Tensor], got: Sequence[Tensor]
) -> Agreement:
    """`got` beside `wanted`; `plain` are the unedited model's. Each [batch, seq, vocab]."""
    spreads = torch.cat([each.float().std(-1).flatten() for each in wanted])
    return Agreement(
        _largest_difference(wanted, got),
        float(spreads.mean()),
        _largest_difference(wanted, plain),
        TOLERANCE.get(wanted[0].dtype, 1e-3),
    )


def probe_texts(model: PreTrainedModel) -> list[Tensor]:
    """Random token ids [batch, seq] of several lengths, special tokens at odd places among them."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = embedding(model).num_embeddings
    special = sorted(i for i in special_token_ids(model) if i < vocabulary)
    texts = []
    for batch, length in _SHAPES:
        ids = torch.randint(vocabulary, (batch, length), generator=generator)
        for n, token in enumerate(special):
            ids[n % batch, (n * length // 2) % length] = token
        texts.append(ids)
    return texts


@torch.no_grad()
def logits_of(model: PreTrainedModel, texts: Sequence[Tensor]) -> list[Tensor]:
    """Logits of each text, [batch, seq, vocab], on the CPU; nothing is padding."""
    device = embedding(model).weight.device
    found = []
    for ids in texts:
        ids = ids.to(device)
        mask = torch.ones_like(ids)
        found.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits.cpu())
    return found


def reloaded(folder: Path, like: PreTrainedModel) -> PreTrainedModel:
    """The model in `folder`, by the stock code alone, on the device of `like`.

    Raises:
        SteeringError: it can't be loaded, or lacks weights or has some that nothing reads.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            attn_implementation=like.config._attn_implementation,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise SteeringError(f"the baked model can't be loaded again: {error}") from error
    wrong = [key for kind in report.values() for key in map(str, kind)]
    if wrong:
        raise SteeringError(
            f"the baked model is not what stock {type(like).__name__} reads: {len(wrong)} weights "
            f"are missing, left over or of another shape, the first is {wrong[0]}"
        )
    return model.to(embedding(like).weight.device).eval()


def linear_writers(model: PreTrainedModel, points: Sequence[HookPoint]) -> dict[HookPoint, str]:
    """The linear layer whose output is, unchanged, what a half of a block adds to the stream.

    points: attn_out and mlp_out of any blocks. Found by running the model, by number: a norm after
    the layer, or a sum of several layers' outputs, leaves the point out. Names as in
    `named_modules`.

    Raises:
        HookPointError: a block whose two halves aren't all that it adds.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen[name] = output.detach().clone()

        return after

    blocks = {point.layer: decoder_layers(model)[point.layer] for point in points}
    inside = {id(m): layer for layer, block in blocks.items() for m in block.modules()}
    layers = {}
    with ExitStack() as stack:
        read = stack.enter_context(capture(model, points))
        for name, module in model.named_modules():
            if id(module) in inside and _is_linear(module, d_model(model)):
                layers[name] = inside[id(module)]
                stack.callback(module.register_forward_hook(keep(name)).remove)
        logits_of(model, probe_texts(model)[1:2])
    found = {}
    for point in points:
        for name, output in seen.items():
            half = read[point]
            here = layers[name] == point.layer and output.numel() == half.numel()
            if here and torch.equal(output.view_as(half), half):
                found[point] = name
    return found


def reads_attention(model: PreTrainedModel, layer: int) -> bool:
    """Whether a block's second half reads what its first half adds; in parallel blocks it doesn't.

    Found by running the model with something else added there.
    """
    first, second = HookPoint(layer, "attn_out"), HookPoint(layer, "mlp_out")
    with capture(model, [second]) as read:
        logits_of(model, probe_texts(model)[1:2])
        before = read[second]
        with edit(model, {first: lambda x, _: 1 - x}):
            logits_of(model, probe_texts(model)[1:2])
        return not torch.equal(before, read[second])


def embedding_writers(model: PreTrainedModel) -> list[str]:
    """The embeddings whose sum, each times a number, is what enters the first block.

    Found by running the model. Names as in `named_modules`.

    Raises:
        SteeringError: what enters the first block is something else; it names what comes between.
    """
    start = HookPoint(0, "resid_pre")
    seen: dict[str, Tensor] = {}
    between: list[str] = []
    begun: list[bool] = []

    def note(name: str) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if begun:
                return
            if isinstance(module, nn.Embedding) and output.shape[-1] == d_model(model):
                seen[name] = output.detach().clone()
            elif not isinstance(module, nn.Embedding) and any(True for _ in module.parameters()):
                between.append(name)

        return after

    blocks = decoder_layers(model)
    inner = {id(m) for m in blocks.modules()}
    with ExitStack() as stack:
        read = stack.enter_context(capture(model, [start]))
        begin = blocks[0].register_forward_pre_hook(lambda *_: begun.append(True))
        stack.callback(begin.remove)
        for name, module in model.named_modules():
            if id(module) not in inner and not any(module.children()):
                stack.callback(module.register_forward_hook(note(name)).remove)
        logits_of(model, probe_texts(model)[1:2])
    entered = read[start]
    whole = entered.cpu().double().flatten()
    columns = [each.cpu().double().expand(entered.shape).flatten() for each in seen.values()]
    if columns and not between:
        parts = torch.stack(columns, 1)
        rest = parts @ torch.linalg.lstsq(parts, whole[:, None]).solution[:, 0] - whole
        if float(rest.norm()) <= 8 * torch.finfo(entered.dtype).eps * float(whole.norm()):
            return list(seen)
    raise SteeringError(
        f"{type(model).__name__} can't be baked: what enters its first block is not a sum of "
        f"embeddings ({', '.join(seen) or 'none found'})"
        + (f": {', '.join(between)} comes between" if between else "")
        + ", so taking a direction out of their rows doesn't take it out of the stream; steer at "
        "run time instead"
    )


def embedding(model: PreTrainedModel) -> nn.Embedding:
    """The token embedding. SteeringError where there is none."""
    found = model.get_input_embeddings()
    if not isinstance(found, nn.Embedding):
        raise SteeringError(f"{type(model).__name__} can't be baked: it has no token embedding")
    return found


def _is_linear(module: nn.Module, width: int) -> bool:
    if isinstance(module, Conv1D):
        return bool(module.weight.shape[1] == width)
    return isinstance(module, nn.Linear) and bool(module.weight.shape[0] == width)


def _largest_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    pairs = zip(first, second, strict=True)
    return float(torch.stack([(a.double() - b.double()).abs().max() for a, b in pairs]).max())
