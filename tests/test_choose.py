"""training/choose.py: what fires is exactly the k largest, and thresholds give k on average."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saesteer.core.sae_codes import largest
from saesteer.training import choose
from saesteer.training.choose import (
    Chosen,
    Encoder,
    batch_topk,
    calibrated_threshold,
    topk,
)
from saesteer.training.ranks import Ranks

ALONE = Ranks()


def encoder(pre: Tensor) -> Encoder:
    """Whose pre-activations are `pre`, to the bit: x is the identity's rows."""
    zeros = torch.zeros(pre.shape[1], dtype=pre.dtype)
    return Encoder(torch.eye(len(pre), dtype=pre.dtype), pre.T.contiguous(), zeros, pre.dtype)


def dense(chosen: Chosen, shape: torch.Size) -> Tensor:
    return torch.zeros(shape, dtype=chosen.values.dtype).index_put(
        (chosen.rows, chosen.latents), chosen.values
    )


def check_order(chosen: Chosen, n_rows: int) -> None:
    """Rows ascend, and `starts` says where each begins, empty ones too."""
    assert (chosen.rows.diff() >= 0).all()
    counts = torch.bincount(chosen.rows, minlength=n_rows)
    assert torch.equal(chosen.starts, counts.cumsum(0) - counts)
    assert (chosen.values > 0).all()


@given(st.integers(1, 70), st.integers(1, 40), st.data(), st.sampled_from([-2.0, -0.5, 0.0, 1.0]))
@settings(max_examples=100, deadline=None)
def test_choices_are_exact(n_rows: int, d_sae: int, data: st.DataObject, shift: float) -> None:
    k = data.draw(st.integers(1, d_sae))
    generator = torch.Generator().manual_seed(n_rows * 100 + d_sae)
    pre = torch.randn(n_rows, d_sae, generator=generator, dtype=torch.float64) + shift

    chosen = topk(encoder(pre), k, ALONE)
    check_order(chosen, n_rows)
    values, latents = pre.topk(k, dim=-1)
    assert torch.equal(
        dense(chosen, pre.shape), torch.zeros_like(pre).scatter(1, latents, values.relu())
    )

    chosen = batch_topk(encoder(pre), k * n_rows, ALONE)
    check_order(chosen, n_rows)
    values, places = pre.relu().flatten().topk(k * n_rows)
    expected = torch.zeros(pre.numel(), dtype=pre.dtype).scatter(0, places, values)
    assert torch.equal(dense(chosen, pre.shape), expected.reshape(pre.shape))


def test_pieces_are_joined_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of many pieces, the last of them short, gives what one piece gives."""
    pre = torch.randn(75, 30, generator=torch.Generator().manual_seed(3))
    whole = topk(encoder(pre), 4, ALONE), batch_topk(encoder(pre), 300, ALONE)
    monkeypatch.setattr(choose, "ROWS_A_PIECE", 8)
    pieces = topk(encoder(pre), 4, ALONE), batch_topk(encoder(pre), 300, ALONE)
    for one, other in zip(whole, pieces, strict=True):
        assert torch.equal(dense(one, pre.shape), dense(other, pre.shape))


@pytest.mark.parametrize("d", [7, 64, 100, 1024, 4099])
@pytest.mark.parametrize("k", [1, 5, 7])
def test_the_largest_are_found_group_by_group(d: int, k: int) -> None:
    x = torch.randn(33, d, generator=torch.Generator().manual_seed(d))
    x[:5] = x[:5].round()  # ties
    values, places = largest(x, k)
    assert torch.equal(x.gather(1, places), values)
    assert torch.equal(values.sort(descending=True).values, x.topk(k).values)
    assert all(len(set(row)) == k for row in places.tolist())


def test_none_of_none_is_found() -> None:
    values, places = largest(torch.empty(4, 0), 0)
    assert values.shape == places.shape == (4, 0)


def test_batch_topk_is_exact_where_few_rows_mislead_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that the bound is guessed from hold all the large values, or none of them."""
    monkeypatch.setattr(choose, "ROWS_A_PIECE", 64)
    generator = torch.Generator().manual_seed(0)
    for first in (100.0, -100.0):
        pre = torch.randn(256, 32, generator=generator)
        pre[:64] += first
        values = pre.relu().flatten().sort(descending=True).values[: 3 * 256]
        chosen = batch_topk(encoder(pre), 3 * 256, ALONE)
        torch.testing.assert_close(chosen.values.sort(descending=True).values, values)


def test_batch_topk_takes_no_more_than_its_share_of_equal_values() -> None:
    assert len(batch_topk(encoder(torch.ones(8, 10)), 16, ALONE).values) == 16


@pytest.mark.parametrize("per_row", [True, False])
def test_a_product_in_bfloat16_changes_next_to_nothing(per_row: bool) -> None:
    """The values are those of float32 to the bit's rounding, and so is nearly every choice."""
    generator = torch.Generator().manual_seed(1)
    x, W = torch.randn(512, 64, generator=generator), torch.randn(400, 64, generator=generator)
    bias = torch.randn(400, generator=generator)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        about = Encoder(x, W, bias, dtype)
        chosen = topk(about, 8, ALONE) if per_row else batch_topk(about, 8 * 512, ALONE)
        found.append(dense(chosen, torch.Size((512, 400))))
    exact, approximate = found
    assert int((approximate > 0).sum()) == 8 * 512
    both = (exact > 0) & (approximate > 0)
    torch.testing.assert_close(exact[both], approximate[both], rtol=1e-5, atol=1e-5)
    assert int(both.sum()) >= 0.999 * 8 * 512


@pytest.mark.parametrize("k", [1, 3, 9])
def test_calibrated_threshold_gives_k_on_average(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    # The second batch fires far more than the first, so equal shares of each would be wrong.
    chunks = [
        torch.randn(40, 32, generator=generator),
        torch.randn(24, 32, generator=generator) + 5,
    ]
    threshold = calibrated_threshold(lambda: map(encoder, chunks), k, ALONE)
    assert sum(int((chunk > threshold).sum()) for chunk in chunks) == k * 64


def test_calibrated_threshold_is_zero_where_too_little_is_positive() -> None:
    assert calibrated_threshold(lambda: map(encoder, [-torch.ones(5, 8)]), 2, ALONE) == 0.0
