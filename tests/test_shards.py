"""Shards: what is written is read back, row by row and to the bit, or refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from saesteer.core.shard_files import (
    ContextBatch,
    shard_name,
    shard_tensors,
    totalled,
    write_manifest,
    write_shard,
)
from saesteer.core.shards import Shards
from saesteer.errors import CacheError, RunError

CONTEXT, WIDTH = 5, 7


def made(folder, dtype=torch.float32, sizes=(3, 3, 2)):
    """A cache of three shards; returns the shards and everything that was written."""
    generator = torch.Generator().manual_seed(0)
    n = sum(sizes)
    acts = torch.randn(n, CONTEXT, WIDTH, generator=generator).to(dtype)
    tokens = np.arange(n * CONTEXT, dtype=np.int32).reshape(n, CONTEXT)
    documents = (tokens // 7).astype(np.int32)
    entries, parts, first = [], [], 0
    for number, size in enumerate(sizes):
        part = slice(first, first + size)
        batch = ContextBatch(tokens[part], documents[part], acts[part], first)
        parts.append(shard_tensors(batch))
        entries.append(write_shard(folder, number, parts[-1]))
        first += size
    about = {"context_size": CONTEXT, "d_model": WIDTH, "hook_point": "layers.1.resid_post"}
    about |= {"made_from": {}, "statistics": totalled(parts, [], CONTEXT)}
    write_manifest(folder, {**about, "complete": True, "shards": entries})
    return Shards(folder), acts, tokens, documents


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_in_any_order_are_what_was_written(tmp_path, dtype):
    shards, acts, _, _ = made(tmp_path, dtype)
    flat = acts.reshape(-1, WIDTH).float()
    order = np.random.default_rng(0).permutation(shards.n_tokens)
    assert torch.equal(shards.rows(order), flat[order])
    assert torch.equal(shards.rows(np.array([39, 0, 39])), flat[[39, 0, 39]])
    assert shards.rows(np.array([], dtype=np.int64)).shape == (0, WIDTH)


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_contexts_come_in_order_and_batches_stop_at_a_shard_s_end(tmp_path, batch):
    shards, acts, tokens, documents = made(tmp_path, torch.bfloat16)
    got = list(shards.contexts(1, 7, batch=batch))
    assert torch.equal(torch.cat([b.activations for b in got]), acts[1:7])
    np.testing.assert_array_equal(np.concatenate([b.tokens for b in got]), tokens[1:7])
    np.testing.assert_array_equal(np.concatenate([b.documents for b in got]), documents[1:7])
    assert [b.first_context for b in got] == sorted({b.first_context for b in got})
    np.testing.assert_array_equal(shards.tokens, tokens)
    np.testing.assert_array_equal(shards.documents, documents)


def test_a_row_leads_back_to_its_text(tmp_path):
    class Words:
        def decode(self, ids):
            return " ".join(map(str, ids))

    shards, *_ = made(tmp_path)
    assert shards.text(12, Words(), before=1, after=1) == "11 12 13"
    assert shards.text(10, Words(), before=3, after=1) == "10 11"  # not into the context before


def test_a_flipped_bit_is_found_by_verify_and_a_short_file_on_opening(tmp_path):
    shards, *_ = made(tmp_path)
    shards.verify()
    path = tmp_path / shard_name(1)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match=r"acts-00001.*rebuilds this shard"):
        Shards(tmp_path).verify()
    path.write_bytes(data[:-1])
    with pytest.raises(CacheError, match=r"acts-00001"):
        Shards(tmp_path)
    path.unlink()
    with pytest.raises(CacheError, match=r"acts-00001"):
        Shards(tmp_path)


def test_missing_incomplete_damaged_and_foreign_manifests_are_named(tmp_path):
    with pytest.raises(CacheError, match="missing"):
        Shards(tmp_path)
    made(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "complete": False}))
    with pytest.raises(CacheError, match="incomplete"):
        Shards(tmp_path)
    path.write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CacheError, match="format 99"):
        Shards(tmp_path)
    path.write_text("{")
    with pytest.raises(CacheError, match="damaged"):
        Shards(tmp_path)


def test_a_full_disk_leaves_what_was_written_whole(tmp_path, monkeypatch):
    made(tmp_path)
    before = (tmp_path / shard_name(0)).read_bytes()

    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    batch = ContextBatch(
        np.zeros((1, CONTEXT), np.int32), np.zeros((1, CONTEXT), np.int32), torch.zeros(1, 5, 7), 0
    )
    with pytest.raises(RunError, match="disk is full"):
        write_shard(tmp_path, 0, shard_tensors(batch))
    assert (tmp_path / shard_name(0)).read_bytes() == before
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize(
    "broken",
    [
        {"complete": None},
        {"context_size": "5"},
        {"made_from": []},
        {"shards": [{}]},
        {"shards": [[]]},
        {"shards": {}},
    ],
)
def test_a_manifest_with_anything_missing_or_of_another_kind_is_damaged(tmp_path, broken):
    made(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **broken}))
    with pytest.raises(CacheError, match="damaged"):
        Shards(tmp_path)


@pytest.mark.parametrize("wrong", [{"context_size": 6}, {"d_model": 8}])
def test_a_manifest_that_does_not_fit_its_shards_is_refused(tmp_path, wrong):
    made(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
    with pytest.raises(CacheError, match="acts-00000"):
        Shards(tmp_path)


@pytest.mark.parametrize("broken", [{}, {"mean": [1.0]}, {"mean": ["a"] * WIDTH}, {"tokens": None}])
def test_damaged_statistics_are_refused(tmp_path, broken):
    made(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    statistics = {**manifest["statistics"], **broken} if broken else None
    path.write_text(json.dumps({**manifest, "statistics": statistics}))
    with pytest.raises(CacheError, match=r"statistics.*damaged.*cache again"):
        Shards(tmp_path)


def test_a_cache_of_the_format_before_is_to_be_made_again(tmp_path):
    made(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    with pytest.raises(CacheError, match=r"format 1, .* format 2; remove .* and cache again"):
        Shards(tmp_path)


def test_any_flipped_bit_of_a_header_is_a_cache_error_or_harmless(tmp_path):
    _, acts, *_ = made(tmp_path)
    path = tmp_path / shard_name(0)
    data = path.read_bytes()
    for at in range(8 + int.from_bytes(data[:8], "little")):
        for bit in (0, 3, 6, 7):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                shards = Shards(tmp_path)
            except CacheError:
                continue
            shape = shards.rows(np.arange(shards.n_tokens)).shape
            assert shape == (acts.shape[0] * CONTEXT, WIDTH)
            assert shards.tokens.shape == shards.documents.shape == acts.shape[:2]
            with pytest.raises(CacheError, match="acts-00000"):
                shards.verify()


@pytest.mark.parametrize("rows", [[-1], [40], [0, 10**6]])
def test_rows_that_are_not_there_are_refused(tmp_path, rows):
    shards, *_ = made(tmp_path)
    with pytest.raises(CacheError, match="rows 0 to 39"):
        shards.rows(np.array(rows))
    with pytest.raises(CacheError, match="rows 0 to 39"):
        shards.text(rows[-1], None)


def test_a_batch_of_nothing_is_refused(tmp_path):
    shards, *_ = made(tmp_path)
    with pytest.raises(CacheError, match="1 or more"):
        next(shards.contexts(batch=0))


def test_open_shards_hold_no_file_descriptors(tmp_path):
    fds = Path("/proc/self/fd")
    if not fds.is_dir():
        pytest.skip("counts file descriptors in /proc")
    before = len(list(fds.iterdir()))
    shards, *_ = made(tmp_path, sizes=(1,) * 30)
    shards.rows(np.arange(shards.n_tokens))
    assert len(list(fds.iterdir())) <= before + 2


def test_what_is_read_may_be_changed_and_the_shards_stay_as_they_are(tmp_path):
    shards, acts, tokens, _ = made(tmp_path)
    batch = next(shards.contexts(batch=2))
    batch.activations.zero_()
    batch.tokens[:] = 0
    shards.rows(np.arange(4)).zero_()
    shards.verify()
    assert torch.equal(next(shards.contexts(batch=2)).activations, acts[:2])
    np.testing.assert_array_equal(Shards(tmp_path).tokens, tokens)
