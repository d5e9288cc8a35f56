"""Several hook points from one pass: the same as one by one, and only what is missing is made."""

import json

import numpy as np
import pytest
import torch

from saesteer.core.hooks import activations
from saesteer.core.model import HookPoint
from saesteer.core.shard_files import shard_name
from saesteer.core.shards import Shards
from saesteer.errors import CacheError
from saesteer.training import cache, cache_fill, cache_pass
from saesteer.training.packing import Context
from tests.test_cache import ABOUT, SIZE, N, cached, contexts, everything, three_contexts_a_shard
from tests.tiny import WIDTH, tiny_model

__all__ = ["three_contexts_a_shard"]

A, B, C = HookPoint(0, "resid_pre"), HookPoint(1, "mlp_out"), HookPoint(2, "resid_post")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_each_point_is_what_it_would_be_alone(tmp_path, architecture):
    model = tiny_model(architecture)
    together = cached(tmp_path / "all", model, points=[B, C, A], batch_size=2)
    assert [shards.hook_point for shards in together] == [B, C, A]
    assert [shards.folder for shards in together] == [
        tmp_path / "all",
        tmp_path / "all" / "layers.2.resid_post",
        tmp_path / "all" / "layers.0.resid_pre",
    ]
    for point, shards in zip([B, C, A], together, strict=True):
        cached(tmp_path / str(point), model, points=[point], batch_size=2)
        assert everything(shards.folder) == everything(tmp_path / str(point))
        np.testing.assert_array_equal(shards.tokens, together[0].tokens)
        alone = Shards(tmp_path / str(point)).statistics
        assert torch.equal(shards.statistics.mean, alone.mean)


def test_one_forward_pass_serves_all_points_and_stops_after_the_deepest(tmp_path):
    model, ran = tiny_model("llama"), []
    layers = model.model.layers
    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    cached(tmp_path, model, points=[HookPoint(1, "resid_post"), A], batch_size=N)
    # 3 contexts a shard: 4 passes. The hook that stops the model is the last one of its block.
    assert ran == [0, 1] * 4


def test_a_point_asked_for_later_is_made_alone_and_ends_the_same(tmp_path, monkeypatch):
    model = tiny_model("llama")
    cached(tmp_path / "once", model, points=[B, C], batch_size=2)
    cached(tmp_path / "twice", model, points=[B], batch_size=2)
    before = everything(tmp_path / "twice")
    real, asked = cache_pass.reading, []
    monkeypatch.setattr(
        cache_pass,
        "reading",
        lambda model, points: (asked.append(list(points)), real(model, points))[1],
    )
    cached(tmp_path / "twice", model, points=[B, C])  # no batch size: that of the first
    assert asked and all(points == [C] for points in asked)
    assert everything(tmp_path / "twice") == before
    for folder in ("", str(C)):
        assert everything(tmp_path / "twice" / folder) == everything(tmp_path / "once" / folder)
    asked.clear()
    cached(tmp_path / "twice", model, points=[B, C])
    assert not asked


def test_a_damaged_shard_of_one_point_alone_is_made_again(tmp_path, monkeypatch):
    cached(tmp_path, points=[B, C])
    before = everything(tmp_path / str(C))
    (tmp_path / str(C) / shard_name(1)).unlink()
    real, written = cache_fill.write_shard, []
    monkeypatch.setattr(
        cache_fill, "write_shard", lambda *args: (written.append(args[:2]), real(*args))[1]
    )
    cached(tmp_path, points=[B, C])
    assert written == [(tmp_path / str(C), 1)]
    assert everything(tmp_path / str(C)) == before


@pytest.mark.parametrize("dies_at", [0, 2, 5, 9])
def test_killed_anywhere_all_points_end_the_same_to_the_bit(tmp_path, dies_at):
    def dying():
        for i, context in enumerate(contexts()):
            if i == dies_at:
                raise KeyboardInterrupt
            yield context

    cached(tmp_path / "whole", points=[B, C], batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "killed", points=[B, C], stream=dying, batch_size=2)
    cached(tmp_path / "killed", points=[B, C], batch_size=2)
    for folder in ("", str(C)):
        assert everything(tmp_path / "killed" / folder) == everything(tmp_path / "whole" / folder)


def test_another_cache_at_any_point_is_refused(tmp_path):
    cached(tmp_path, points=[B, C])
    path = tmp_path / str(C) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["made_from"]["fingerprint"] = "of another model"
    path.write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match=r"resid_post holds other.*fingerprint was 'of another"):
        cached(tmp_path, points=[B, C])
    assert cached(tmp_path, points=[B])[0].hook_point == B
    with pytest.raises(CacheError, match=r"hook_point was 'layers\.1\.mlp_out', asked for is"):
        cached(tmp_path, points=[C, B])


def test_a_later_point_of_another_text_is_refused(tmp_path):
    def changed():
        for context in contexts():
            yield Context(context.tokens[::-1].copy(), context.documents)

    cached(tmp_path, points=[B])
    with pytest.raises(CacheError, match="text or the tokenizer has changed"):
        cached(tmp_path, points=[B, C], stream=changed)
    with pytest.raises(CacheError, match="missing"):
        Shards(tmp_path / str(C))


def test_shards_of_another_length_are_made_anew_beside_those_there(tmp_path, monkeypatch):
    model = tiny_model("llama")
    cached(tmp_path, model, points=[B])
    monkeypatch.setattr(cache, "SHARD_BYTES", 4 * SIZE * WIDTH * 4)
    (alone,) = cached(tmp_path / str(C), model, points=[C])
    assert [e["contexts"] for e in alone.manifest["shards"]] == [4, 4, 2]
    every = np.arange(alone.n_tokens)
    x = alone.rows(every)
    _, shards = cached(tmp_path, model, points=[B, C])
    assert [e["contexts"] for e in shards.manifest["shards"]] == [3, 3, 3, 1]
    assert torch.equal(shards.rows(every), x)


def test_the_same_point_twice_is_refused(tmp_path):
    with pytest.raises(CacheError, match=r"layers\.1\.mlp_out twice"):
        cached(tmp_path, points=[B, B])
    with pytest.raises(CacheError, match="no hook point"):
        cache.cache_activations(
            tiny_model("llama"), contexts, [], tmp_path, n_contexts=N, context_size=SIZE,
            d_model=WIDTH, dtype="float32", made_from=ABOUT,
        )  # fmt: skip


def test_rows_are_what_plain_activations_are(tmp_path):
    model = tiny_model("llama")
    for shards in cached(tmp_path, model, points=[A, B, C]):
        ids = torch.from_numpy(shards.tokens).long()
        expected = activations(model, [shards.hook_point], ids)[shards.hook_point]
        got = shards.rows(np.arange(shards.n_tokens))
        torch.testing.assert_close(got, expected.flatten(0, 1), atol=1e-5, rtol=1e-5)
