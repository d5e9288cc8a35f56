"""The logit lens on architectures whose final norms differ."""

import numpy as np
import pytest
import torch
from torch import nn

from saesteer.core.model import final_norm, unembedding
from saesteer.errors import ModelError
from saesteer.features import weights
from saesteer.features.weights import linear_part, logit_lens
from tests.tiny import VOCAB, WIDTH, tiny_model

CPU = torch.device("cpu")


def stated_gain(arch: str, norm: nn.Module) -> torch.Tensor:
    """The gain as the architecture's own source states it."""
    weight = norm.weight.detach()
    return 1 + weight if arch.startswith("gemma") else weight


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma", "gemma2", "opt", "olmo2"])
def test_gain_and_centring_are_found_by_asking_the_norm(arch: str) -> None:
    norm = final_norm(tiny_model(arch))
    gain, centred = linear_part(norm, WIDTH, CPU, torch.float32)
    torch.testing.assert_close(gain, stated_gain(arch, norm), rtol=1e-4, atol=1e-5)
    assert centred == isinstance(norm, nn.LayerNorm)


@pytest.mark.parametrize("norm", [nn.LayerNorm(7), nn.RMSNorm(7), nn.LayerNorm(1 + 8)])
def test_odd_widths(norm: nn.Module) -> None:
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, len(norm.weight)))
    gain, centred = linear_part(norm, len(norm.weight), CPU, torch.float32)
    torch.testing.assert_close(gain, norm.weight.detach(), rtol=1e-4, atol=1e-5)
    assert centred == isinstance(norm, nn.LayerNorm)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma"])
def test_lens_is_the_derivative_of_the_logits(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along a direction that leaves the norm's own statistics alone, logits move as the lens says.

    x is chosen orthogonal to d (and without mean, where the norm centres), so that a small step
    along d changes the size of x in second order only.
    """
    monkeypatch.setattr(weights, "_CHUNK", 3 * VOCAB)  # several chunks
    model = tiny_model(arch)
    norm, matrix = final_norm(model), unembedding(model)
    rng = torch.Generator().manual_seed(0)
    directions = torch.randn(8, WIDTH, generator=rng)
    lens = logit_lens(model, directions, top=VOCAB)
    for i, direction in enumerate(directions):
        d = direction / direction.norm()
        x = torch.randn(WIDTH, generator=rng)
        x = x - x.mean()
        flat = d - d.mean()
        x = x - (x @ flat) / (flat @ flat) * flat
        if arch != "gpt2":
            x = x - (x @ d) * d
        size = x.square().mean().sqrt()
        step = 0.02
        with torch.no_grad():
            moved = (norm(x + step * d) - norm(x - step * d)) @ matrix.T / (2 * step) * size
        expected = np.empty(VOCAB, np.float32)
        expected[lens.promoted[i]] = lens.promoted_logits[i]
        np.testing.assert_allclose(moved.numpy(), expected, atol=1e-3)


def test_top_and_bottom_tokens() -> None:
    model = tiny_model("llama")
    directions = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    lens = logit_lens(model, directions, top=4, exclude=[2, 7])
    gain, _ = linear_part(final_norm(model), WIDTH, CPU, torch.float32)
    logits = (directions / directions.norm(dim=1, keepdim=True) * gain) @ unembedding(model).T
    logits[:, [2, 7]] = torch.nan
    order = np.argsort(logits.numpy(), axis=1)[:, : VOCAB - 2]  # NaN sorts last
    np.testing.assert_array_equal(lens.suppressed, order[:, :4])
    np.testing.assert_array_equal(lens.promoted, order[:, ::-1][:, :4])
    assert (np.diff(lens.promoted_logits) <= 0).all()
    assert (np.diff(lens.suppressed_logits) >= 0).all()
    # The length of a direction says nothing.
    again = logit_lens(model, directions * 100, top=4, exclude=[2, 7])
    np.testing.assert_array_equal(again.promoted, lens.promoted)
    np.testing.assert_allclose(again.promoted_logits, lens.promoted_logits, rtol=1e-4)


def test_no_directions_and_few_tokens() -> None:
    model = tiny_model("llama")
    assert logit_lens(model, torch.zeros(0, WIDTH)).promoted.shape == (0, 10)
    assert logit_lens(model, torch.zeros(1, WIDTH), top=500).promoted.shape == (1, VOCAB)


def test_directions_of_another_width_are_refused() -> None:
    with pytest.raises(ModelError, match="width 5"):
        logit_lens(tiny_model("llama"), torch.zeros(3, 5))
