"""training/baselines.py against numpy, and its definitions."""

import numpy as np
import pytest
import torch
from torch import Tensor

from saesteer.core.points import HookPoint
from saesteer.errors import TrainingError
from saesteer.training.baselines import moments, principal_components, random_dictionary

POINT = HookPoint(1, "resid_post")
N, D = 600, 12


@pytest.fixture(scope="module")
def x() -> Tensor:
    """Far from zero, with one massive dimension, as residual streams have."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(N, D, generator=generator) @ torch.randn(D, D, generator=generator)
    mixed[:, 3] += 2000
    return mixed


@pytest.fixture(scope="module")
def y(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    flat = (x - x.mean(0)) @ torch.randn(D, 7, generator=generator)
    return flat + 0.1 * torch.randn(N, 7, generator=generator) + 5


def fvu(y: Tensor, given: Tensor) -> float:
    return float(((y - given) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())


def test_streaming_moments_are_those_of_the_whole(x: Tensor, y: Tensor) -> None:
    found = moments((a, b) for a, b in zip(x.split(17), y.split(17), strict=True))
    exact_x, exact_y = (t.numpy().astype(np.float64) for t in (x, y))
    from_x, from_y = (t - t.mean(0) for t in (exact_x, exact_y))
    assert found.n == N
    np.testing.assert_allclose(found.mean_x, exact_x.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.mean_y, exact_y.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.xx, from_x.T @ from_x, rtol=1e-4, atol=0.05)
    assert found.xy is not None
    np.testing.assert_allclose(found.xy, from_x.T @ from_y, rtol=1e-4, atol=0.05)
    assert moments((a, a) for a in x.split(50)).xy is None


def test_pca_is_the_best_of_its_rank(x: Tensor) -> None:
    fitted = moments((a, a) for a in x.split(64))
    singular = np.linalg.svd((x - x.mean(0)).numpy(), compute_uv=False)
    for rank in (1, 3, D):
        left = float((singular[rank:] ** 2).sum() / (singular**2).sum())
        assert fvu(x, principal_components(fitted, rank)(x)) == pytest.approx(left, abs=1e-5)


def test_a_transcoder_s_components_are_the_best_linear_map_of_their_rank(
    x: Tensor, y: Tensor
) -> None:
    """Reduced-rank regression: OLS, then the principal components of what it gives."""
    fitted = moments((a, b) for a, b in zip(x.split(64), y.split(64), strict=True))
    from_x, from_y = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    ols = from_x @ torch.linalg.lstsq(from_x, from_y).solution
    basis = torch.linalg.svd(ols, full_matrices=False).Vh
    for rank in (1, 4, 7):
        best = ols @ basis[:rank].T @ basis[:rank] + y.mean(0)
        given = principal_components(fitted, rank)(x)
        assert fvu(y, given) == pytest.approx(fvu(y, best), abs=1e-4)
    assert fvu(y, principal_components(fitted, 7)(x)) < 0.01
    assert fvu(y, principal_components(fitted, 1)(x)) > 0.1


def test_the_random_dictionary_is_its_definition(x: Tensor) -> None:
    fitted = moments((a, a) for a in x.split(64))
    made = random_dictionary(fitted, 40, 5, seed=3, at=POINT)
    rows = made.W_dec
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(40))
    pre = (x - x.mean(0)) @ rows.T
    values, chosen = pre.topk(5, dim=-1)
    dense = torch.zeros_like(pre).scatter(1, chosen, values.relu())
    expected = x.mean(0) + dense @ rows
    torch.testing.assert_close(made.decode(made.encode(x), x), expected, rtol=1e-4, atol=2e-3)
    again = random_dictionary(fitted, 40, 5, seed=3, at=POINT)
    other = random_dictionary(fitted, 40, 5, seed=4, at=POINT)
    assert torch.equal(again.W_dec, rows) and not torch.equal(other.W_dec, rows)
    assert random_dictionary(fitted, 4, 9, seed=0, at=POINT).k == 4


def test_a_random_transcoder_goes_through_the_linear_map(x: Tensor, y: Tensor) -> None:
    fitted = moments([(x, y)])
    made = random_dictionary(fitted, 40, 5, seed=3, at=POINT)
    plain = random_dictionary(moments([(x, x)]), 40, 5, seed=3, at=POINT)
    back = plain.decode(plain.encode(x), x) - x.mean(0)
    from_x, from_y = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    map_ = torch.linalg.lstsq(from_x, from_y).solution.float()
    torch.testing.assert_close(
        made.decode(made.encode(x), x), back @ map_ + y.mean(0), rtol=1e-3, atol=5e-2
    )


def test_no_token_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no token to fit"):
        moments([])
    with pytest.raises(TrainingError, match="no token to fit"):
        moments([(torch.zeros(0, 3), torch.zeros(0, 3))])
