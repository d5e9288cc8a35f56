"""training/stream.py: rows straight from the model, shuffled, and the same after a kill."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from saesteer.errors import TextError, TrainingError
from saesteer.training.packing import Context
from saesteer.training.ranks import Ranks
from saesteer.training.stream import LiveStream, prefetched

SIZE, CONTEXTS = 10, 40


def contexts() -> Iterator[Context]:
    for number in range(CONTEXTS):
        tokens = np.arange(number * SIZE, (number + 1) * SIZE, dtype=np.int32)
        yield Context(tokens, np.zeros(SIZE, dtype=np.int32))


class Model:
    """Activations that say which token they belong to; counts the contexts it reads."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __call__(self, batch: list[Context]) -> tuple[Tensor, ...]:
        self.read += [int(context.tokens[0]) // SIZE for context in batch]
        tokens = torch.from_numpy(np.concatenate([context.tokens for context in batch])).float()
        return tokens[:, None].expand(-1, 3), -tokens[:, None].expand(-1, 2)


def live(model: Model | None = None, **changes: object) -> LiveStream:
    arguments: dict[str, object] = {
        "keep": lambda tokens: tokens % SIZE != 0, "block": 8, "n_held_out": 4, "batch_size": 12,
        "seed": 3,
    }  # fmt: skip
    return LiveStream(contexts, model or Model(), **(arguments | changes))  # type: ignore[arg-type]


def served(stream: LiveStream, start: int, stop: int) -> dict[int, list[int]]:
    return {step: batch.x[:, 0].int().tolist() for step, batch in stream.batches(start, stop)}


def test_every_kept_token_is_served_about_once_a_pass_and_shuffled() -> None:
    steps = 36 * 9 // 12  # contexts 4 to 39, nine tokens of each
    batches = served(live(), 0, steps)
    assert sorted(batches) == list(range(steps))
    tokens = [token for batch in batches.values() for token in batch]
    assert min(tokens) >= 4 * SIZE  # none that is held out
    assert all(token % SIZE for token in tokens)  # no special token
    # What doesn't fill a batch at the end of a mix is left out.
    assert len(set(tokens)) > 0.85 * len(tokens)
    neighbours = np.mean(np.diff(batches[5]) == 1)
    assert neighbours < 0.2
    # A batch mixes contexts of two blocks.
    assert len({token // SIZE // 8 for token in batches[10]}) >= 2


def test_a_killed_run_goes_on_with_what_an_unbroken_one_sees() -> None:
    whole = served(live(), 0, 60)
    for start in (1, 5, 17, 40):
        model = Model()
        stream = live(model)
        model.read.clear()
        rest = served(stream, start, 60)
        assert rest == {step: batch for step, batch in whole.items() if step >= start}
    model = Model()
    stream = live(model)
    model.read.clear()
    served(stream, 12, 13)
    assert len(model.read) <= 16  # two blocks, however far on
    assert served(live(seed=4), 0, 3) != served(live(), 0, 3)


def test_each_block_goes_through_the_model_once() -> None:
    model = Model()
    stream = live(model)
    model.read.clear()
    served(stream, 0, 20)
    assert len(model.read) == len(set(model.read))


def test_input_and_target_are_the_same_tokens() -> None:
    for _, batch in live().batches(0, 20):
        assert torch.equal(batch.x[:, 0], -batch.target[:, 0])
    one = LiveStream(
        contexts, lambda batch: Model()(batch)[:1], keep=lambda tokens: tokens >= 0,
        block=8, n_held_out=4, batch_size=12,
    )  # fmt: skip
    _, batch = next(one.batches(0, 1))
    assert batch.target is batch.x


def test_ranks_share_the_text_and_agree_on_the_steps() -> None:
    parts = [served(live(ranks=Ranks(rank, 2)), 0, 30) for rank in (0, 1)]
    assert list(parts[0]) == list(parts[1]) == list(range(30))
    first = [{token for batch in list(part.values())[:20] for token in batch} for part in parts]
    assert not first[0] & first[1]
    assert all(len(batch) == 6 for part in parts for batch in part.values())


def test_held_out_contexts_are_the_first() -> None:
    held = torch.cat(list(live().held_out(1000)))[:, 0].int().tolist()
    assert held == [token for token in range(2 * SIZE) if token % SIZE]  # half are evaluation's


def test_a_short_last_block_leaves_no_rank_without_text() -> None:
    for n in (21, 22, 23, 24, 25):
        for size in (1, 2, 4):
            for rank in range(size):
                stream = LiveStream(
                    lambda n=n: list(contexts())[:n], Model(), keep=lambda t: t % SIZE != 0,
                    block=6, n_held_out=3, batch_size=4, ranks=Ranks(rank, size),
                )  # fmt: skip
                assert len(served(stream, 0, 60)) == 60


def test_too_little_text_or_too_small_a_buffer_is_named() -> None:
    with pytest.raises(TextError, match="the text holds 40 contexts"):
        live(block=37)
    with pytest.raises(TrainingError, match=r"buffer of 8 contexts.*batch of 500"):
        served(live(batch_size=500), 0, 3)


def test_prefetching_keeps_order_passes_errors_on_and_stops() -> None:
    assert list(prefetched(iter(range(50)))) == list(range(50))

    def failing() -> Iterator[int]:
        yield 1
        raise TrainingError("broken")

    items = prefetched(failing())
    assert next(items) == 1
    with pytest.raises(TrainingError, match="broken"):
        next(items)

    made: list[int] = []

    def endless() -> Iterator[int]:
        for number in range(10**9):
            made.append(number)
            yield number

    items = prefetched(endless())
    next(items)
    items.close()
    after = len(made)
    assert after < 10
    assert len(made) == after
