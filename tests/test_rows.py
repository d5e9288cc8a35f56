"""training/rows.py: which rows, and in which order."""

import numpy as np
import pytest

from saesteer.errors import TrainingError
from saesteer.training.rows import (
    batches,
    first_evaluated,
    first_held_out,
    split_rows,
    without_outliers,
)
from tests.trained import InMemory, train


def test_rows_leave_out_special_tokens_and_hold_out_the_last_contexts() -> None:
    tokens = np.arange(200).reshape(20, 10) % 50 + 4
    tokens[:, 0] = 1
    tokens[3, 5] = 2
    train_rows, held_out = split_rows(tokens, {1, 2}, held_out=0.1)
    assert first_held_out(20, 0.1) == 18
    assert train_rows.max() < 180 <= held_out.min()
    assert len(train_rows) == 18 * 9 - 1
    # Of the two contexts held out the second is evaluation's.
    assert first_evaluated(20, 0.1) == 19
    assert held_out.tolist() == list(range(181, 190))
    everything = tokens.reshape(-1)
    assert not np.isin(everything[train_rows], [1, 2]).any()
    assert not np.isin(everything[held_out], [1, 2]).any()
    # No special tokens known: nothing is left out.
    assert len(split_rows(tokens, set(), held_out=0.5)[0]) == 100


def test_rows_that_cannot_be_split_are_named() -> None:
    with pytest.raises(TrainingError, match="only 1 context"):
        split_rows(np.ones((1, 8), dtype=np.int32), set())
    with pytest.raises(TrainingError, match="every cached token is a special token"):
        split_rows(np.ones((4, 8), dtype=np.int32), {1})


def test_each_epoch_is_a_true_permutation_by_seed() -> None:
    rows = np.arange(100, 1100)
    epochs = []
    for epoch in range(2):
        seen = [b for _, b in batches(rows, 100, 5, epoch * 10, epoch * 10 + 10)]
        assert sorted(np.concatenate(seen)) == rows.tolist()
        epochs.append(seen)
    first = epochs[0][0]
    assert first.tolist() != epochs[1][0].tolist()
    # Tokens of one batch come from everywhere: neighbours in the text don't travel together.
    assert (np.diff(first) == 1).sum() < 30
    again = next(batches(rows, 100, 5, 17, 18))[1]
    assert again.tolist() == epochs[1][7].tolist()
    assert next(batches(rows, 100, 6, 0, 1))[1].tolist() != first.tolist()


def test_held_out_rows_are_never_trained_on() -> None:
    data = InMemory()
    train(data)
    assert max(int(rows.max()) for rows in data.asked) < 2600


def test_outliers_are_left_out_by_their_norm() -> None:
    norms = np.ones((4, 5), dtype=np.float32)
    norms[1, 2], norms[3, 0] = 50, 9
    rows = np.array([0, 1, 7, 8, 15])
    assert without_outliers(rows, norms, 10).tolist() == [0, 1, 8, 15]
    assert without_outliers(rows, norms, 2).tolist() == [0, 1, 8]
    with pytest.raises(TrainingError, match=r"max_norm is 0\.5"):
        without_outliers(rows, norms, 0.5)
