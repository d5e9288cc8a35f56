"""Several processes make one cache: the bytes of one process, and no one is left waiting.

Real processes cache in tests/test_fitting.py.
"""

import threading

import pytest
import torch

from saesteer.core.model import HookPoint
from saesteer.errors import CacheError, RunError
from saesteer.training import cache_fill
from saesteer.training.ranks import Ranks
from tests.test_cache import N, cached, contexts, everything, three_contexts_a_shard
from tests.tiny import tiny_model

__all__ = ["three_contexts_a_shard"]

POINTS = [HookPoint(1, "resid_post"), HookPoint(2, "mlp_out")]
FOLDERS = ("", str(POINTS[1]))


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, rank, size, barrier, values):
        super().__init__(rank, size)
        object.__setattr__(self, "barrier", barrier)
        object.__setattr__(self, "values", values)

    def objects(self, value):
        self.values[self.rank] = value
        self.barrier.wait(timeout=30)
        found = list(self.values)
        self.barrier.wait(timeout=30)
        return found


def together(size, work):
    """What `work(ranks)` returned or raised in each of `size` threads."""
    barrier, values, found = threading.Barrier(size), [None] * size, [None] * size

    def run(rank):
        try:
            found[rank] = work(Threads(rank, size, barrier, values))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_make_what_one_process_makes(tmp_path, size):
    cached(tmp_path / "one", points=POINTS, batch_size=2)
    models = [tiny_model("llama") for _ in range(size)]
    ran = [0] * size
    for rank, model in enumerate(models):

        def count(*_, rank=rank):
            ran[rank] += 1

        model.model.layers[0].register_forward_hook(count)
    found = together(
        size,
        lambda ranks: cached(
            tmp_path / "all", models[ranks.rank], points=POINTS, batch_size=2, ranks=ranks
        ),
    )
    for folder in FOLDERS:
        assert everything(tmp_path / "all" / folder) == everything(tmp_path / "one" / folder)
        one, more = ((tmp_path / n / folder / "manifest.json").read_text() for n in ("one", "all"))
        assert one == more
    assert [shards.n_contexts for both in found for shards in both] == [N] * 2 * size
    # Four shards of 3, 3, 3 and 1 contexts: 2, 2, 2 and 1 passes, each by one rank alone.
    assert ran == [sum([2, 2, 2, 1][rank::size]) for rank in range(size)]


def test_an_error_on_one_rank_stops_all(tmp_path):
    models = [tiny_model("llama") for _ in range(2)]
    with torch.no_grad():  # the second rank's second shard
        models[1].get_input_embeddings().weight[list(contexts())[9].tokens[3]] = float("nan")
    found = together(
        2, lambda ranks: cached(tmp_path, models[ranks.rank], batch_size=2, ranks=ranks)
    )
    assert "context 9" in str(found[1]) and "not finite" in str(found[1])
    assert isinstance(found[0], CacheError)
    assert "process 1 of 2 failed (CacheError: the activations of context 9" in str(found[0])
    assert len(cached(tmp_path, batch_size=2).manifest["shards"]) == 4  # and it goes on


def test_another_run_is_refused_on_every_rank_and_the_ranks_of_one_are_not(tmp_path):
    def stream():
        with pytest.raises(RunError, match="another process is writing"):
            cached(tmp_path)
        yield from contexts()

    found = together(2, lambda ranks: cached(tmp_path, stream=stream, ranks=ranks))
    assert [shards.n_contexts for shards in found] == [N, N]

    def second():
        refused.extend(together(2, lambda ranks: cached(tmp_path / "b", ranks=ranks)))
        yield from contexts()

    refused = []
    cached(tmp_path / "b", stream=second)
    assert isinstance(refused[0], RunError)
    assert "process 0 of 2 failed (RunError: another process" in str(refused[1])


def test_the_batch_size_is_the_first_rank_s(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_fill, "SEARCHED_TOKENS", 1)
    searched = []

    def found(*_):
        searched.append(threading.current_thread().name)
        return 2

    monkeypatch.setattr(cache_fill, "found_batch_size", found)
    models = [tiny_model("llama") for _ in range(2)]
    together(2, lambda ranks: cached(tmp_path / "two", models[ranks.rank], ranks=ranks))
    assert len(searched) == 1
    cached(tmp_path / "one", batch_size=2)
    assert everything(tmp_path / "two") == everything(tmp_path / "one")
