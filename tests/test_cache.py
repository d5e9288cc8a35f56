"""The cache: the right activations, found again, resumed after any death, refused when foreign."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from saesteer.core import shard_files
from saesteer.core.hooks import activations
from saesteer.core.model import HookPoint
from saesteer.core.shard_files import shard_name
from saesteer.core.shards import Shards
from saesteer.errors import CacheError, RunError
from saesteer.training import cache, cache_fill, cache_pass, cache_targets
from saesteer.training.packing import Context
from tests.tiny import WIDTH, tiny_model

POINT = HookPoint(1, "resid_post")
SIZE, N = 8, 10
ABOUT = {"model": "tiny", "special_ids": [0, 1, 2]}


def contexts(n=N):
    rng = np.random.default_rng(0)
    for i in range(n):
        tokens = rng.integers(4, 90, SIZE).astype(np.int32)
        tokens[0] = 1
        yield Context(tokens, np.full(SIZE, i, np.int32))


@pytest.fixture(autouse=True)
def three_contexts_a_shard(monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 3 * SIZE * WIDTH * 4)


def cached(folder, model=None, stream=contexts, **changes):
    """The cache of POINT alone, or of the `points` given: a list of them."""
    points = changes.pop("points", None)
    settings = {
        "n_contexts": N,
        "context_size": SIZE,
        "d_model": WIDTH,
        "dtype": "float32",
        "made_from": ABOUT,
        **changes,
    }
    found = cache.cache_activations(
        model or tiny_model("llama"), stream, points or [POINT], Path(folder), **settings
    )
    return found if points else found[0]


def everything(folder):
    return {p.name: p.read_bytes() for p in Path(folder).glob("*.safetensors")}


def test_the_cache_holds_what_the_model_computes(tmp_path):
    model = tiny_model("llama")
    shards = cached(tmp_path, model)
    assert [e["contexts"] for e in shards.manifest["shards"]] == [3, 3, 3, 1]
    for i, context in enumerate(contexts()):
        ids = torch.from_numpy(context.tokens).long()[None]
        expected = activations(model, [POINT], ids)[POINT][0]
        got = shards.rows(np.arange(i * SIZE, (i + 1) * SIZE))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        np.testing.assert_array_equal(shards.tokens[i], context.tokens)
        np.testing.assert_array_equal(shards.documents[i], context.documents)


def test_straight_from_the_model_is_the_same_as_from_the_cache(tmp_path):
    model = tiny_model("llama")
    shards = cached(tmp_path, model, batch_size=3)
    live = list(cache.activation_batches(model, contexts(), POINT, batch_size=3))
    stored = list(shards.contexts(batch=3))
    assert [b.first_context for b in live] == [b.first_context for b in stored] == [0, 3, 6, 9]
    for a, b in zip(live, stored, strict=True):
        assert torch.equal(a.activations, b.activations)
        np.testing.assert_array_equal(a.tokens, b.tokens)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_statistics_are_those_of_the_stored_activations_of_plain_tokens(tmp_path, dtype):
    shards = cached(tmp_path, dtype=dtype)
    every = shards.rows(np.arange(shards.n_tokens)).double()
    plain = ~np.isin(shards.tokens.reshape(-1), ABOUT["special_ids"])
    x = every[plain]
    about = shards.statistics
    assert about.tokens == plain.sum() == N * (SIZE - 1)
    assert about.mean_norm == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-6)
    assert about.median_norm == pytest.approx(float(np.median(x.norm(dim=1))), rel=1e-6)
    variance = (x - x.mean(0)).square().sum(1).mean()
    assert about.variance == pytest.approx(float(variance), rel=1e-5)
    torch.testing.assert_close(about.mean, x.mean(0), atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(shards.norms.reshape(-1), every.norm(dim=1), rtol=1e-6)


def test_the_median_s_sample_takes_every_position(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "MEDIAN_TOKENS", 20)

    def by_position():
        for context in contexts():
            context.tokens[1:] = np.arange(4, 4 + SIZE - 1)
            yield context

    shards = cached(tmp_path, stream=by_position)
    norms = shards.norms[:, 1:]
    assert shards.statistics.median_norm in norms
    spread = np.ptp(norms[0])
    assert abs(shards.statistics.median_norm - np.median(norms)) < 0.3 * spread


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes_round_as_torch_does(tmp_path, dtype):
    exact = cached(tmp_path / "a")
    shards = cached(tmp_path / "b", dtype=dtype)
    every = np.arange(exact.n_tokens)
    rounded = exact.rows(every).to(getattr(torch, dtype)).float()
    torch.testing.assert_close(shards.rows(every), rounded, atol=0, rtol=0)


def test_a_finished_cache_is_found_again_without_running_the_model(tmp_path, monkeypatch):
    cached(tmp_path)
    monkeypatch.setattr(cache_pass, "reading", lambda *_: pytest.fail("the model ran"))
    assert cached(tmp_path).n_contexts == N


@pytest.mark.parametrize("dies_at", range(N))
def test_killed_anywhere_the_cache_ends_the_same_to_the_bit(tmp_path, dies_at):
    cached(tmp_path / "whole", batch_size=1)

    def dying():
        for i, context in enumerate(contexts()):
            if i == dies_at:
                raise KeyboardInterrupt
            yield context

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "killed", stream=dying, batch_size=1)
    with pytest.raises(CacheError, match=r"incomplete|missing"):
        Shards(tmp_path / "killed")
    cached(tmp_path / "killed", batch_size=1)
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")


def test_sigkill_in_the_middle_then_again(tmp_path):
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
        from tests import test_cache
        from saesteer.training import cache, cache_fill
        cache.SHARD_BYTES = 3 * test_cache.SIZE * test_cache.WIDTH * 4
        real, calls = cache_fill.write_shard, []
        def write(*a):
            entry = real(*a)
            calls.append(a)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)  # after the shard, before the manifest
            return entry
        cache_fill.write_shard = write
        test_cache.cached({str(tmp_path / "killed")!r})
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (tmp_path / "killed" / shard_name(1)).exists()
    cached(tmp_path / "whole")
    cached(tmp_path / "killed")
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")


def test_a_damaged_shard_alone_is_made_again(tmp_path, monkeypatch):
    cached(tmp_path)
    before = everything(tmp_path)
    path = tmp_path / shard_name(2)
    path.write_bytes(before[shard_name(2)][:-1] + b"\x55")
    written = []
    real = cache_fill.write_shard
    monkeypatch.setattr(
        cache_fill, "write_shard", lambda *args: (written.append(args[1]), real(*args))[1]
    )
    cached(tmp_path)
    assert written == [2]
    assert everything(tmp_path) == before
    Shards(tmp_path).verify()


def test_another_cache_is_refused_and_the_difference_named(tmp_path):
    cached(tmp_path)
    with pytest.raises(CacheError, match="their model was 'tiny', asked for is 'other'"):
        cached(tmp_path, made_from={**ABOUT, "model": "other"})
    with pytest.raises(CacheError, match="dtype was 'float32'"):
        cached(tmp_path, dtype="float16")
    with pytest.raises(CacheError, match="n_contexts was 10"):
        cached(tmp_path, n_contexts=4)


def test_a_shorter_text_is_cached_whole_and_said(tmp_path):
    with pytest.warns(UserWarning, match=r"80 tokens.*fewer than the 160"):
        shards = cached(tmp_path, n_contexts=20)
    assert shards.n_contexts == N
    with warnings.catch_warnings():  # found again: nothing to say
        warnings.simplefilter("error")
        assert cached(tmp_path, n_contexts=20).n_contexts == N


def test_two_at_once_the_second_is_refused(tmp_path):
    def second():
        with pytest.raises(RunError, match="another process is writing"):
            cached(tmp_path)
        yield from contexts()

    cached(tmp_path, stream=second)


def test_activations_that_are_not_finite_or_too_large_are_named(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[next(contexts()).tokens[3]] = float("nan")
    with pytest.raises(CacheError, match=r"context 0 at layers\.1\.resid_post are not finite"):
        cached(tmp_path / "nan", model)
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e7)
    with pytest.raises(CacheError, match=r"too large for float16.*bfloat16"):
        cached(tmp_path / "large", model, dtype="float16")
    assert cached(tmp_path / "fits", model, dtype="bfloat16").n_contexts == N


def test_unknown_dtype_and_batch_size_are_refused(tmp_path):
    with pytest.raises(CacheError, match="did you mean 'float16'"):
        cached(tmp_path, dtype="flaot16")
    with pytest.raises(CacheError, match="batch size 0"):
        cached(tmp_path, batch_size=0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="cannot write"):
        cached(tmp_path / "run")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        cached(tmp_path / "file" / "run")


def test_a_text_that_changed_under_its_name_is_not_mixed_with_what_it_was(tmp_path):
    def dying():
        yield from list(contexts())[:7]
        raise KeyboardInterrupt

    def changed():
        for context in contexts():
            yield Context(context.tokens[::-1].copy(), context.documents)

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, stream=dying)
    before = everything(tmp_path)
    with pytest.raises(CacheError, match="text or the tokenizer has changed"):
        cached(tmp_path, stream=changed)
    assert everything(tmp_path) == before


def test_resuming_keeps_the_lengths_of_the_shards_that_exist(tmp_path, monkeypatch):
    cached(tmp_path / "whole", batch_size=1)

    def dying():
        yield from list(contexts())[:7]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "killed", stream=dying, batch_size=1)
    monkeypatch.setattr(cache, "SHARD_BYTES", 2 * SIZE * WIDTH * 4)
    shards = cached(tmp_path / "killed", batch_size=1)
    assert [e["contexts"] for e in shards.manifest["shards"]] == [3, 3, 2, 2]
    every = np.arange(shards.n_tokens)
    assert torch.equal(shards.rows(every), Shards(tmp_path / "whole").rows(every))


def test_the_message_names_the_one_value_that_differs_however_deep(tmp_path):
    def about(sha, n=500):
        files = [{"name": f"{i}.txt", "sha256": "00"} for i in range(n)]
        files[7]["sha256"] = sha
        return {**ABOUT, "text": {"files": files, "column": "text"}}

    cached(tmp_path, made_from=about("aa"))
    with pytest.raises(CacheError, match=r"text\.files\.7\.sha256 was 'aa', asked for is 'bb'"):
        cached(tmp_path, made_from=about("bb"))
    with pytest.raises(CacheError, match=r"their text\.files was") as caught:
        cached(tmp_path, made_from=about("aa", 501))
    assert len(str(caught.value)) < 1000


def test_tokens_that_the_model_does_not_know_are_refused(tmp_path):
    def foreign():
        for context in contexts():
            context.tokens[5] = 96
            yield context

    with pytest.raises(CacheError, match="token 96 is not among the 96"):
        cached(tmp_path, stream=foreign)


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path):
    left = tmp_path / f".{shard_name(1)}.12345.partial"
    left.write_bytes(b"half")
    cached(tmp_path)
    assert not left.exists()


def test_the_one_who_is_caching_is_named(tmp_path):
    def second():
        for _ in range(2):  # asking must not wipe the name out
            with pytest.raises(RunError, match=rf"process id {os.getpid()}\)"):
                cached(tmp_path)
        yield from contexts()

    cached(tmp_path, stream=second)
    assert cached(tmp_path).n_contexts == N


@pytest.mark.parametrize("large", [False, True])
def test_checking_a_large_cache_is_shown(tmp_path, monkeypatch, capsys, large):
    cached(tmp_path)
    monkeypatch.setattr(cache_targets, "SHOWN_BYTES", 0 if large else 2**30)
    capsys.readouterr()
    cached(tmp_path)
    assert ("verify" in capsys.readouterr().err) == large


def test_a_full_disk_is_said_and_the_same_command_goes_on(tmp_path, monkeypatch):
    cached(tmp_path / "whole")
    real, written = Path.write_bytes, []

    def full(self, data):
        if len(written) == 2:
            real(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(self)
        return real(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(RunError, match="disk is full"):
            cached(tmp_path / "killed")
    assert sorted(everything(tmp_path / "killed")) == [shard_name(0), shard_name(1)]
    cached(tmp_path / "killed")
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")
