"""Passes of the model: the batch size found, workers side by side, products that agree."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from saesteer.core.hooks import activations, reading
from saesteer.core.model import HookPoint
from saesteer.errors import CacheError
from saesteer.training import cache_fill, cache_pass
from saesteer.training.cache_products import fast_products
from tests.test_cache import POINT, SIZE, N, cached, contexts, everything, three_contexts_a_shard
from tests.tiny import random_ids, tiny_model

__all__ = ["three_contexts_a_shard"]


def search(seconds_of, n_contexts=1000, device="cpu", least=1, monkeypatch=None):
    """The size found where a pass over n contexts takes seconds_of(n), on a clock of our own."""
    clock = [0.0]
    sizes = []

    def one_pass(batch, first):
        sizes.append(len(batch))
        clock[0] += seconds_of(len(batch))
        return []

    monkeypatch.setattr(cache_pass.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(cache_pass, "LEAST_TOKENS_A_PASS", least)
    some = list(itertools.islice(itertools.cycle(contexts()), n_contexts))
    with ThreadPoolExecutor(1) as pool:
        return cache_pass.found_batch_size(one_pass, some, pool, 1, device), max(sizes)


def test_the_search_doubles_while_it_gains(monkeypatch):
    # 1 ms a pass and .4 ms a context: the gain of each doubling is half of the one before, and
    # that from 128 contexts to 512 the first below 2%.
    assert search(lambda n: 1e-3 + 4e-4 * n, monkeypatch=monkeypatch) == (512, 512)
    monkeypatch.setitem(cache_pass.MOST_TOKENS_A_PASS, "cpu", 2048 * SIZE)
    assert search(lambda n: 1e-3 + 4e-4 * n, 4096, monkeypatch=monkeypatch) == (512, 512)


def test_the_search_ends_soon_where_nothing_is_gained(monkeypatch):
    assert search(lambda n: 1e-3 * n, monkeypatch=monkeypatch) == (1, 4)


def test_one_bad_doubling_does_not_end_the_search(monkeypatch):
    seconds = {1: 1.0, 2: 2.0, 4: 1.0, 8: 1.0, 16: 2.0, 32: 4.0}
    assert search(seconds.__getitem__, monkeypatch=monkeypatch)[0] == 8


def test_the_search_stays_within_the_contexts_and_the_bound(monkeypatch):
    assert search(lambda n: 1.0, n_contexts=5, monkeypatch=monkeypatch) == (4, 4)
    monkeypatch.setitem(cache_pass.MOST_TOKENS_A_PASS, "cpu", 8 * SIZE)
    assert search(lambda n: 1.0, monkeypatch=monkeypatch) == (8, 8)


def test_the_search_begins_where_a_cpu_is_busy(monkeypatch):
    assert search(lambda n: 1e-3 * n, least=16 * SIZE, monkeypatch=monkeypatch) == (16, 64)
    assert search(lambda n: 1.0, n_contexts=3, least=16 * SIZE, monkeypatch=monkeypatch) == (3, 3)


def test_full_memory_ends_the_search(monkeypatch):
    def seconds_of(n):
        if n > 4:
            raise torch.OutOfMemoryError
        return 1.0

    assert search(seconds_of, device="cuda", monkeypatch=monkeypatch)[0] == 4

    def never(n):
        raise torch.OutOfMemoryError

    with pytest.raises(CacheError, match="not even one context"):
        search(never, device="cuda", monkeypatch=monkeypatch)


def test_the_size_found_is_kept_and_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_fill, "SEARCHED_TOKENS", 1)
    sizes = iter([2])
    monkeypatch.setattr(cache_fill, "found_batch_size", lambda *_: next(sizes))

    def dying():
        yield from list(contexts())[:7]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "a", stream=dying)
    shards = cached(tmp_path / "a")  # a second search would raise StopIteration
    assert {entry["batch_size"] for entry in shards.manifest["shards"]} == {2}
    cached(tmp_path / "b", batch_size=2)
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_little_text_is_not_searched_over(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_fill, "found_batch_size", lambda *_: pytest.fail("searched"))
    cached(tmp_path)


def test_a_real_search_ends_and_shows_what_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache_fill, "SEARCHED_TOKENS", 1)
    monkeypatch.setattr(cache_pass, "TRIED_SECONDS", 0.01)
    size = cached(tmp_path).manifest["shards"][0]["batch_size"]
    assert size in (1, 2, 3)
    assert f"{size} contexts a pass" in capsys.readouterr().err


def test_a_pass_too_large_for_the_memory_is_halved_and_the_shard_begun_again(tmp_path, monkeypatch):
    real, sizes = cache_pass.reading, []

    @contextmanager
    def small(model, points):
        with real(model, points) as read:

            def bounded(ids):
                sizes.append(len(ids))
                if len(ids) > 1:
                    raise torch.OutOfMemoryError
                return read(ids)

            yield bounded

    monkeypatch.setattr(cache_pass, "TOKENS_A_PASS", {"cpu": 4 * SIZE})
    with monkeypatch.context() as patch:
        patch.setattr(cache_pass, "reading", small)
        shards = cached(tmp_path / "small")
        assert {entry["batch_size"] for entry in shards.manifest["shards"]} == {1}
        live = list(cache_pass.activation_batches(tiny_model("llama"), contexts(), POINT))
        assert [len(batch.tokens) for batch in live] == [1] * N
        with pytest.raises(torch.OutOfMemoryError):  # what was asked for is not changed
            cached(tmp_path / "fixed", batch_size=4)
    assert sizes[0] == 3
    cached(tmp_path / "one", batch_size=1)
    assert everything(tmp_path / "small") == everything(tmp_path / "one")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "mixtral"])
def test_workers_side_by_side_give_the_same_bits(tmp_path, architecture):
    model = tiny_model(architecture)
    points = [HookPoint(1, "mlp_out"), POINT, HookPoint(2, "attn_out")]
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            cached(tmp_path / str(threads), model, points=points, batch_size=1)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for folder in ("", *map(str, points[1:])):
        assert everything(tmp_path / "1" / folder) == everything(tmp_path / "4" / folder)


def test_several_threads_read_one_model_each_its_own():
    model = tiny_model("opt")
    point = HookPoint(1, "mlp_out")
    ids = [random_ids(1 + i % 3, 4 + i % 5, seed=i) for i in range(24)]
    expected = [activations(model, [point], each)[point] for each in ids]
    inside = threading.Barrier(3)
    waits = iter(range(3))

    def slow(*_):  # three passes are certainly inside at once
        if next(waits, None) is not None:
            inside.wait(timeout=30)
            time.sleep(0.01)

    model.get_input_embeddings().register_forward_hook(slow)
    with reading(model, [point]) as read, ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda each: read(each)[point], ids))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_fast_products_change_rounding_only_and_leave_the_model_as_it_was(architecture):
    model = tiny_model(architecture)
    ids = random_ids(3, 9)
    with torch.no_grad():
        before = model(ids).logits
        with fast_products(model):
            with fast_products(model):  # one within another
                pass
            inside = model(ids).logits
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert model(ids).logits.isfinite().all()
        assert torch.equal(model(ids).logits, before)
    torch.testing.assert_close(inside, before, atol=1e-5, rtol=1e-5)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_forward_that_somebody_replaced_is_left_to_them():
    model = tiny_model("llama")
    module = model.model.layers[0].mlp.up_proj
    module.forward = lambda x: torch.zeros(*x.shape[:-1], module.out_features)
    mine = module.forward
    with fast_products(model):
        assert module.forward is mine
    assert module.forward is mine


def test_fast_products_leave_it_when_an_error_is_raised():
    model = tiny_model("llama")
    with pytest.raises(KeyboardInterrupt), fast_products(model):
        raise KeyboardInterrupt
    assert not any("forward" in vars(module) for module in model.modules())


def test_activations_of_a_batch_are_those_of_its_contexts():
    model = tiny_model("llama")
    some = list(contexts())
    with cache_pass.passing(model, [POINT]) as one_pass:
        (together,) = one_pass(some, 0)
        alone = torch.cat([one_pass([context], i)[0] for i, context in enumerate(some)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    ids = torch.from_numpy(np.stack([context.tokens for context in some])).long()
    plain = activations(model, [POINT], ids)[POINT]
    torch.testing.assert_close(together, plain, atol=1e-5, rtol=1e-5)
