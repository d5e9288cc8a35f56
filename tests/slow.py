"""What steering is, as plainly as it can be said: one row, no cache, token by token, in float64.

Shares no code with the engine but the values that describe an edit and the places in a model. The
model itself computes in its own dtype, and what an edit makes is rounded to it once.
"""

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from saesteer.core.blocks import head_columns, site_module
from saesteer.core.sae import Sae
from saesteer.steering.conditions import Feature, When
from saesteer.steering.edits import Add, Affine, Clamp, Edit, Project, Rotate, place
from saesteer.steering.positions import Positions
from saesteer.steering.schedules import Linear

# A gate nearer to its threshold than this may fall either way in float32: DESIGN.md, law 2.
NEAR = 1e-5


def logits(
    model: nn.Module,
    ids: list[int],
    edits: list[Edit],
    *,
    special: set[int],
    prompt_length: int | None = None,
    tokenizer: Any = None,
    margins: list[float] | None = None,
) -> Tensor:
    """Logits [len(ids), vocab] of one row under the edits.

    margins: one a token, lowered to the distance of the token's nearest gate from its threshold
    (see `gate` and `condition_gate`).
    """
    length = len(ids) if prompt_length is None else prompt_length
    margins = [math.inf] * len(ids) if margins is None else margins
    readings: dict[int, list[bool]] = {}

    def change(point: Any, x: Tensor) -> Tensor:
        rows = list(x[0].double())
        for edit in edits:
            when = edit.when
            if when is not None and when.point == point and id(when) not in readings:
                readings[id(when)] = lasting(when, [reads(when, row) for row in rows], ids, special)
                margins[:] = map(min, margins, [condition_gate(when, row) for row in rows])
        here = [edit for edit in edits if place(edit) == point]
        while here:
            group = neighbours(here)
            here = here[len(group) :]
            for t, row in enumerate(rows):
                acting = [
                    (edit, factor(edit, t, length))
                    for edit in group
                    if chosen(edit.where, t, ids, length, special, tokenizer)
                    and (edit.when is None or readings[id(edit.when)][t])
                ]
                gates = [gate(e.sae, e.feature, row) for e, _ in acting if isinstance(e, Clamp)]
                margins[t] = min([margins[t], *gates])
                rows[t] = applied(row, acting).to(x.dtype).double()
        return torch.stack(rows)[None].to(x.dtype)

    points = {place(edit) for edit in edits} | {e.when.point for e in edits if e.when is not None}
    with ExitStack() as stack, torch.no_grad():
        for point in points:
            hook(stack, model, point, change)
        return model(torch.tensor([ids])).logits[0]


def hook(stack: ExitStack, model: nn.Module, point: Any, change: Any) -> None:
    module, side = site_module(model, point)
    columns = slice(None) if point.head is None else head_columns(model, point)

    def edited(x: Tensor) -> Tensor:
        x = x.clone()
        flat = x.dim() == 2
        x[..., columns] = (
            change(point, x[None, :, columns])[0] if flat else change(point, x[..., columns])
        )
        return x

    if side == "input":

        def before(_: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (edited(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edited(kwargs["hidden_states"])}

        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        return

    def after(_: Any, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return edited(output)
        return (edited(output[0]), *output[1:])

    stack.callback(module.register_forward_hook(after).remove)


def neighbours(edits: list[Edit]) -> list[Edit]:
    """The first edit, with the clamps of the same SAE that follow it."""
    first = edits[0]
    n = 1
    while (
        isinstance(first, Clamp)
        and n < len(edits)
        and isinstance(other := edits[n], Clamp)
        and other.sae.hash == first.sae.hash
        and other.keep_norm == first.keep_norm
    ):
        n += 1
    return edits[:n]


def applied(x: Tensor, acting: list[tuple[Edit, float]]) -> Tensor:
    if not acting:
        return x
    if isinstance(acting[0][0], Clamp):
        new = x + clamped(x, acting)
    else:
        ((edit, f),) = acting
        new = x + f * (mapped(edit, x) - x)
    if acting[0][0].keep_norm:
        new = new * (x.norm() / new.norm())
    return new


def clamped(x: Tensor, acting: list[tuple[Any, float]]) -> Tensor:
    """Encode all, put the targets in place, decode, add back the untouched error: the change."""
    sae = acting[0][0].sae.to("cpu", torch.float64)
    code = sae.encode(x[None]).dense(sae.d_sae)[0]
    new = code.clone()
    for edit, f in acting:
        a = float(new[edit.feature])
        t = {
            "set": edit.value,
            "min": max(a, edit.value),
            "max": min(a, edit.value),
            "scale": a * edit.value,
        }[edit.how]
        new[edit.feature] = a + f * (t - a)
    error = x - decoded(sae, code, x)
    return decoded(sae, new, x) + error - x


def decoded(sae: Sae, code: Tensor, x: Tensor) -> Tensor:
    """The reconstruction of x [d] from a dense code [d_sae]."""
    if sae.conventions.rescale_acts_by_decoder_norm:
        code = code / sae.W_dec.norm(dim=1)
    out = code @ sae.W_dec + sae.b_dec
    _, scale, shift = sae.prepare(x)
    out = out if scale is None else out * scale
    return out if shift is None else out + shift


def preactivations(sae: Sae, x: Tensor) -> tuple[Tensor, Tensor]:
    """What decides which latents fire, and their sizes if they do: [d_sae], in float64."""
    sae = sae.to("cpu", torch.float64)
    z = sae.prepare(x).z
    u = (z - sae.b_dec if sae.conventions.apply_b_dec_to_input else z) @ sae.W_enc
    pre = u + sae.b_enc
    if sae.r_mag is not None and sae.b_mag is not None:
        return pre, u * sae.r_mag.exp() + sae.b_mag
    if sae.conventions.rescale_acts_by_decoder_norm:
        pre = pre * sae.W_dec.norm(dim=1)
    return pre, pre


def gate(sae: Sae, feature: int, x: Tensor) -> float:
    """How far a feature is from jumping on or off, in units of its pre-activation.

    A plain ReLU never jumps, and what is no larger than 0 on both sides doesn't either.
    """
    pre, size = preactivations(sae, x)
    own = float(pre[feature])
    if sae.architecture == "jumprelu" and sae.threshold is not None:
        above = float(sae.threshold[feature])
        return abs(own - above) if above > 0 else math.inf
    if sae.architecture == "gated":
        return abs(own) if size[feature] > 0 else math.inf
    if sae.architecture == "topk" and sae.k is not None and own > 0 and sae.k < sae.d_sae:
        others = torch.cat([pre[:feature], pre[feature + 1 :]])
        return abs(own - float(others.sort(descending=True).values[sae.k - 1]))
    return math.inf


def condition_gate(when: When, x: Tensor) -> float:
    """How far a condition is from holding where it doesn't, or the other way round."""
    if not isinstance(when.reads, Feature):
        return abs(float(x @ when.reads.vector.double() + when.reads.offset) - when.above)
    if when.above < 0:  # no activation is below 0
        return math.inf
    sae, feature = when.reads.sae, when.reads.feature
    size = float(preactivations(sae, x)[1][feature])
    return min(gate(sae, feature, x), abs(size - when.above))


def mapped(edit: Edit, x: Tensor) -> Tensor:
    if isinstance(edit, Add):
        return x + edit.strength * edit.vector.double()
    if isinstance(edit, Project):
        unit = edit.vector.double() / edit.vector.double().norm()
        return x - (x @ unit) * unit + edit.to * unit
    if isinstance(edit, Affine):
        return edit.matrix.double() @ x + edit.shift.double()
    assert isinstance(edit, Rotate)
    basis, _ = torch.linalg.qr(torch.stack([edit.first, edit.second], 1).double())
    basis = basis * torch.sign((basis * torch.stack([edit.first, edit.second], 1)).sum(0))
    part = basis.T @ x
    if edit.how == "by":
        c, s = math.cos(edit.angle), math.sin(edit.angle)
        turned = torch.stack([c * part[0] - s * part[1], s * part[0] + c * part[1]])
    else:
        turned = part.norm() * torch.tensor([math.cos(edit.angle), math.sin(edit.angle)]).double()
    return x + basis @ (turned - part)


def reads(when: When, x: Tensor) -> bool:
    if isinstance(when.reads, Feature):
        sae = when.reads.sae.to("cpu", torch.float64)
        value = sae.encode(x[None]).dense(sae.d_sae)[0, when.reads.feature]
    else:
        value = x @ when.reads.vector.double() + when.reads.offset
    return bool(value > when.above)


def lasting(when: When, holds: list[bool], ids: list[int], special: set[int]) -> list[bool]:
    if when.lasting == "while":
        return holds
    begun, out = False, []
    for held, token in zip(holds, ids, strict=True):
        begun = begun or (held and token not in special)
        out.append(begun if when.lasting == "from" else not begun)
    return out


def factor(edit: Edit, t: int, prompt_length: int) -> float:
    schedule, n = edit.schedule, max(0, t - prompt_length)
    if schedule is None:
        return 1.0
    if isinstance(schedule, Linear):
        return schedule.begin + (schedule.end - schedule.begin) * min(1.0, n / schedule.over)
    return float(0.5 ** (n / schedule.half_life))


def chosen(
    where: Positions, t: int, ids: list[int], length: int, special: set[int], tokenizer: Any
) -> bool:
    def narrowed(t: int) -> bool:
        if ids[t] in special and not where.special:
            return False
        if not (where.prompt if t < length else where.generated):
            return False
        if where.spans is not None and not any(
            a <= t and (b is None or t < b) for a, b in where.spans
        ):
            return False
        if where.after is not None and where.after not in tokenizer.decode(ids[:t]):
            return False
        return t % where.every == 0

    if not narrowed(t):
        return False
    if t >= length or not (where.first or where.last):
        return True
    left = [i for i in range(length) if narrowed(i)]
    ends = left[: where.first or 0] + left[len(left) - min(where.last or 0, len(left)) :]
    return t in ends
