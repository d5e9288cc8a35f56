"""Nearest decoder rows: exact, whatever the tiles."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from saesteer.features import neighbours
from saesteer.features.neighbours import nearest


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    n=st.integers(1, 40),
    k=st.integers(0, 12),
    columns=st.integers(1, 50),
    start=st.integers(0, 39),
    length=st.integers(0, 40),
    seed=st.integers(0, 1000),
)
def test_as_from_all_cosines(
    n: int, k: int, columns: int, start: int, length: int, seed: int
) -> None:
    unit = normalize(torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)
    rows = range(min(start, n), min(start + length, n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_COLUMNS", columns)
        indices, cosines = nearest(unit, rows, k)
    k = min(k, n - 1)
    assert indices.shape == cosines.shape == (len(rows), k)
    every = (unit @ unit.T).fill_diagonal_(-2)[rows.start : rows.stop]
    expected = every.sort(dim=1, descending=True)
    torch.testing.assert_close(cosines, expected.values[:, :k])
    torch.testing.assert_close(every.gather(1, indices), cosines)
    for i, row in zip(rows, indices.tolist(), strict=True):
        assert i not in row
        assert len(set(row)) == k


def test_copies_find_one_another_and_a_zero_row_nothing() -> None:
    unit = normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    unit[7], unit[3], unit[11] = unit[2], -unit[2], 0
    indices, cosines = nearest(unit, range(20), 19)
    assert indices[2, 0] == 7
    assert indices[7, 0] == 2
    assert indices[2, -1] == indices[7, -1] == 3
    assert cosines[2, 0] == pytest.approx(1)
    assert cosines[2, -1] == pytest.approx(-1)
    assert (cosines.abs() <= 1).all()
    np.testing.assert_array_equal(cosines[11], 0)
