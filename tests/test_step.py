"""training/step.py: every architecture's loss and gradients equal dense autograd's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saesteer.training import step as step_module
from saesteer.training.architectures import ARCHITECTURES, Weights
from saesteer.training.pairs import stable_order
from saesteer.training.step import Plan, loss_and_gradients

D, D_SAE, K, BATCH = 16, 48, 4, 40
VARIANCE, SPARSITY, BANDWIDTH = 7.0, 0.3, 0.3
WIDTHS = (8, 20, D_SAE)


def weights_of(name: str, shift: float, *, transcoder: bool) -> Weights:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = {
        "encoder": normal(D_SAE, D),
        "b_enc": normal(D_SAE) + shift,
        "decoder": F.normalize(normal(D_SAE, D), dim=1),
        "b_dec": normal(D),
    }
    for extra, value in ARCHITECTURES[name].extra:
        weights[extra] = torch.rand(D_SAE, generator=generator, dtype=torch.float64) / 2 + value
    if transcoder:
        weights["skip"] = normal(D, D) * 0.1
    return weights


class Jump(torch.autograd.Function):
    """z · 1[z > θ] with the straight-through estimate of the derivative in θ."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(z, threshold)
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        z, threshold = ctx.saved_tensors
        window = ((z - threshold).abs() < BANDWIDTH / 2).double() / BANDWIDTH
        return grad * (z > threshold), -(threshold * window * grad).sum(0)


class Count(torch.autograd.Function):
    """1[z > θ], likewise."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(z, threshold)
        return (z > threshold).double()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        z, threshold = ctx.saved_tensors
        window = ((z - threshold).abs() < BANDWIDTH / 2).double() / BANDWIDTH
        return None, -(window * grad).sum(0)


def dense_loss(
    name: str, weights: Weights, x: Tensor, target: Tensor, dead: Tensor | None
) -> Tensor:
    """The loss as the papers write it, dense, for autograd."""
    decoder, b_dec = weights["decoder"], weights["b_dec"]
    skip = weights.get("skip")
    u = (x if skip is not None else x - b_dec) @ weights["encoder"].T
    pre = u + weights["b_enc"]
    n, penalty = len(x), torch.zeros((), dtype=x.dtype)
    if name == "topk":
        values, latents = pre.topk(K, dim=-1)
        code = torch.zeros_like(pre).scatter(1, latents, values.relu())
    elif name in ("batchtopk", "matryoshka"):
        values, places = pre.relu().flatten().topk(K * n)
        code = torch.zeros_like(pre).flatten().scatter(0, places, values).reshape(pre.shape)
    elif name == "standard":
        code = pre.relu()
        penalty = SPARSITY * (code * decoder.norm(dim=1).detach()).sum() / n / VARIANCE**0.5
    elif name == "jumprelu":
        code = Jump.apply(pre, weights["threshold"])
        penalty = SPARSITY * Count.apply(pre, weights["threshold"]).sum() / n
    else:
        opened = pre.relu()
        code = (pre > 0) * (weights["r_mag"].exp() * u + weights["b_mag"]).relu()
        by_gate = opened @ decoder.detach() + b_dec.detach() - target
        penalty = by_gate.square().sum() / n / VARIANCE
        penalty = penalty + SPARSITY * opened.sum() / n / VARIANCE**0.5
    loss = penalty
    widths = WIDTHS if name == "matryoshka" else (D_SAE,)
    for width in widths:
        error = code[:, :width] @ decoder[:width] + b_dec - target
        if skip is not None:
            error = error + x @ skip.T
        loss = loss + error.square().sum() / n / VARIANCE / len(widths)
    if dead is not None and len(dead) and ARCHITECTURES[name].revives:
        k_aux = D // 2
        values, places = pre[:, dead].topk(min(k_aux, len(dead)), dim=-1)
        code = torch.zeros_like(pre).scatter(1, dead[places], values.relu())
        aux = (error.detach() + code @ decoder).square().sum() / n / VARIANCE
        loss = loss + aux / 32 * min(1, len(dead) / k_aux)
    return loss


def both(
    name: str, shift: float, dead: list[int] | None, dtype: torch.dtype, *, transcoder: bool
) -> tuple[Any, Tensor, Weights]:
    """Our step, and the loss and gradients of autograd."""
    weights = weights_of(name, shift, transcoder=transcoder)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(BATCH, D, generator=generator, dtype=torch.float64)
    target = torch.randn(BATCH, D, generator=generator, dtype=torch.float64) if transcoder else x
    latents = None if dead is None else torch.tensor(dead, dtype=torch.long)
    architecture = ARCHITECTURES[name]
    plan = Plan(
        architecture, BATCH, VARIANCE, K, WIDTHS if architecture.nested else (D_SAE,),
        bandwidth=BANDWIDTH, subtract_b_dec=not transcoder, dtype=dtype,
    )  # fmt: skip
    cast = {key: tensor.to(dtype) for key, tensor in weights.items()}
    result = loss_and_gradients(
        plan, cast, x.to(dtype), target.to(dtype), sparsity=SPARSITY, dead=latents
    )
    for tensor in weights.values():
        tensor.requires_grad_()
    loss = dense_loss(name, weights, x, target, latents)
    loss.backward()
    return result, loss.detach(), {key: tensor.grad for key, tensor in weights.items()}


@pytest.mark.parametrize("dead", [None, [], [5], list(range(3, 40))], ids=["off", "0", "1", "37"])
@pytest.mark.parametrize("transcoder", [False, True], ids=["sae", "transcoder"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_gradients_equal_dense_autograd(
    name: str, transcoder: bool, dead: list[int] | None
) -> None:
    if name == "gated" and transcoder:
        pytest.skip("sae-lens's format can't hold a gated transcoder")
    # With the shifts few or hardly any latents fire, so that lists of pairs are used.
    for shift in (0.0, -6.0, -9.0):
        result, loss, gradients = both(name, shift, dead, torch.float64, transcoder=transcoder)
        torch.testing.assert_close(result.loss, loss, atol=1e-12, rtol=1e-10)
        assert set(result.gradients) == set(gradients)
        for key, expected in gradients.items():
            torch.testing.assert_close(
                result.gradients[key], expected, atol=1e-11, rtol=1e-9, msg=f"{key} at {shift}"
            )


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_gradients_in_float32_agree_to_1e_5(name: str) -> None:
    result, loss, gradients = both(name, 0.0, list(range(9)), torch.float32, transcoder=False)
    torch.testing.assert_close(result.loss.double(), loss, atol=1e-4, rtol=1e-5)
    for key, expected in gradients.items():
        torch.testing.assert_close(
            result.gradients[key].double(), expected, atol=2e-5, rtol=1e-4, msg=key
        )


@pytest.mark.parametrize("name", ["standard", "jumprelu", "gated"])
def test_lists_of_pairs_and_dense_products_agree(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for few in (0.0, 2.0):
        monkeypatch.setattr(step_module, "_FEW", few)
        found.append(both(name, -3.0, None, torch.float64, transcoder=False)[0])
    dense, sparse = found
    assert torch.equal(dense.fired, sparse.fired)
    assert float(dense.l0) == float(sparse.l0) > 0
    for key, expected in dense.gradients.items():
        torch.testing.assert_close(sparse.gradients[key], expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("most", [7, 2**16, 2**16 + 1, 2**20])
def test_order_by_latent_is_stable(most: int) -> None:
    keys = torch.randint(0, most, (5000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(stable_order(keys, most), keys.argsort(stable=True))
