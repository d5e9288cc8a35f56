"""The receipt's numbers, recomputed by hand."""

import json
from typing import Any

import pytest
import torch

from saesteer.core.hooks import activations, capture
from saesteer.core.model import HookPoint
from saesteer.steering.edits import Add, Clamp, Project
from saesteer.steering.engine import steer
from saesteer.steering.positions import Positions
from saesteer.steering.schedules import Linear
from tests.tiny import BOS, EOS, PAD, WIDTH, random_ids, tiny_model, tiny_sae

POINT = HookPoint(1, "resid_post")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows behind a BOS, the first padded on the left by two."""
    ids = random_ids(2, 7)
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = PAD, 0
    ids[0, 2] = ids[1, 0] = BOS
    return ids, mask


@pytest.mark.parametrize("kind", ["standard", "topk"])
def test_numbers_of_a_forward_pass(kind: str) -> None:
    model, sae, (ids, mask) = tiny_model(), tiny_sae(kind), batch()
    v = torch.linspace(-1, 1, WIDTH)
    with capture(model, [POINT]) as found:
        model(ids, attention_mask=mask)
    x = found[POINT]
    chosen = (mask == 1) & (ids != BOS)
    with steer(model, [Clamp(sae, 5, 0.3, "max"), Clamp(sae, 9, 2.0), Add(v, 3.0, POINT)]) as got:
        model(ids, attention_mask=mask)
    cap, hold, add = got.edits
    assert (got.forwards, got.prompts) == (1, 1)

    a = sae.activation(x, [5, 9])
    t = torch.stack([a[..., 0].clamp(max=0.3), torch.full_like(a[..., 1], 2.0)], -1)
    change = (t - a) @ sae.W_dec[[5, 9]]
    relative = float((change.norm(dim=-1) / x.norm(dim=-1))[chosen].mean())
    for edit, i in ((cap, 0), (hold, 1)):
        before, after = a[..., i][chosen], t[..., i][chosen]
        assert edit.counts == [[4, 6]]
        assert edit.positions == [[[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]]
        assert edit.n_edited == 10
        assert edit.n_changed == int((before != after).sum())
        assert edit.relative_size == pytest.approx(relative, rel=1e-5)
        assert edit.before_mean == pytest.approx(float(before.mean()), rel=1e-5)
        assert edit.before_max == pytest.approx(float(before.max()), rel=1e-5)
        assert edit.after_mean == pytest.approx(float(after.mean()), rel=1e-5)
        assert edit.after_max == pytest.approx(float(after.max()), rel=1e-5)
    assert 0 < cap.n_changed < 10
    size = (3 * v.norm() / (x + change).norm(dim=-1))[chosen].mean()
    assert add.relative_size == pytest.approx(float(size), rel=1e-5)
    assert add.n_changed == add.n_edited == 10
    assert add.before_mean is None


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_counts_every_token_once(use_cache: bool) -> None:
    """Past the 64 passes after which numbers are added up, with a cache and without."""
    model, sae, (ids, mask) = tiny_model("gpt2"), tiny_sae(), batch()
    with steer(model, Clamp(sae, 5, 2.0)) as receipt:
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=70,
            min_new_tokens=70,
            do_sample=False,
            suppress_tokens=[PAD, BOS, EOS],
            use_cache=use_cache,
        )
    (edit,) = receipt.edits
    assert receipt.forwards == 70
    assert edit.counts == [[4 + 69, 6 + 69]]
    assert edit.positions == [[[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]]
    # All that was read, from one pass over the text that came of it: the steered stream, less
    # what was added to it.
    ids, mask = out[:, :-1], torch.cat([mask, torch.ones(2, 69, dtype=torch.long)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with capture(model, [POINT]) as found, steer(model, Clamp(sae, 5, 2.0)):
        model(ids, attention_mask=mask, position_ids=positions)
    chosen = (mask == 1) & (ids != BOS)
    before = sae.activation(found[POINT], [5])[..., 0][chosen]
    assert edit.n_edited == before.numel()
    assert edit.before_mean == pytest.approx(float(before.mean()), rel=1e-4)
    assert edit.before_max == pytest.approx(float(before.max()), rel=1e-4)
    assert edit.after_mean == edit.after_max == 2.0


def test_positions_are_those_of_the_prompt_and_counts_of_all() -> None:
    model, ids = tiny_model(), random_ids(1, 6)
    with steer(model, Clamp(tiny_sae(), 5, 2.0), prompt_length=4) as receipt:
        model(ids)
    assert receipt.edits[0].counts == [[6]]
    assert receipt.edits[0].positions == [[[0, 1, 2, 3]]]


def test_every_prompt_has_its_own_rows() -> None:
    model, sae = tiny_model(), tiny_sae()
    with steer(model, Clamp(sae, 5, 2.0)) as receipt:
        for i in range(20):
            model(random_ids(1 + i % 2, 3, seed=i))
    (edit,) = receipt.edits
    assert receipt.prompts == 20
    assert edit.counts == [[3], [3, 3]] * 10
    # The positions themselves are kept for the first ones only.
    assert edit.positions == [[[0, 1, 2]], [[0, 1, 2]] * 2] * 8


def test_a_cache_grown_to_more_rows_begins_new_rows() -> None:
    """Best-of-n by hand: one prompt read once, its cache repeated."""
    model, sae, ids = tiny_model(), tiny_sae(), random_ids(1, 4)
    with steer(model, Clamp(sae, 5, 2.0)) as receipt:
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(3)
        model(random_ids(3, 1), past_key_values=cache)
    assert receipt.edits[0].counts == [[4], [1, 1, 1]]
    assert receipt.edits[0].positions == [[[0, 1, 2, 3]], [[4], [4], [4]]]


def test_it_can_be_read_while_the_context_lasts() -> None:
    model, sae = tiny_model(), tiny_sae()
    with steer(model, Clamp(sae, 5, 2.0)) as receipt:
        assert receipt.forwards == 0
        assert receipt.edits[0].n_edited == 0
        assert receipt.edits[0].before_mean is None
        model(random_ids(1, 4))
        assert receipt.edits[0].n_edited == 4
        model(random_ids(1, 5))
    assert receipt.edits[0].n_edited == 9


def test_it_prints_as_a_table_and_saves_as_json() -> None:
    model, sae = tiny_model(), tiny_sae()
    edits = [
        Clamp(sae, 5, 2.0),
        Add(torch.ones(WIDTH), 0.5, "layers.0.mlp_out", where=Positions(special=True)),
    ]
    with steer(model, edits) as receipt:
        model(random_ids(2, 4))
    header, clamp, add = str(receipt).splitlines()
    assert header.split() == ["edit", "positions", "changed", "before", "after", "‖Δ‖/‖x‖"]
    assert clamp.startswith("feature 5 set 2 at layers.1.resid_post")
    assert clamp.split()[-5:-3] == ["8", "8"]
    assert add.startswith("add 0.5 × vector at layers.0.mlp_out")
    assert len({len(line) for line in (header, clamp, add)}) == 1
    back = json.loads(json.dumps(receipt.to_dict(), allow_nan=False))
    assert back["forwards"] == back["prompts"] == 1
    assert back["edits"][0]["counts"] == [[4, 4]]
    assert back["edits"][1]["before_mean"] is None


def test_a_clamp_shares_its_change_with_its_neighbours_only() -> None:
    """Clamps of two SAEs are two changes."""
    model, ids = tiny_model(), random_ids(2, 4)
    sae, other = tiny_sae(), tiny_sae(seed=1)
    x = activations(model, [POINT], ids)[POINT]
    with steer(model, [Clamp(sae, 5, 2.0), Clamp(other, 5, 0.0)]) as receipt:
        model(ids)
    change = (2.0 - sae.activation(x, [5])) @ sae.W_dec[[5]]
    size = (change.norm(dim=-1) / x.norm(dim=-1)).mean()
    assert receipt.edits[0].relative_size == pytest.approx(float(size), rel=1e-5)
    x = x + change
    change = -other.activation(x, [5]) @ other.W_dec[[5]]
    size = (change.norm(dim=-1) / x.norm(dim=-1)).mean()
    assert receipt.edits[1].relative_size == pytest.approx(float(size), rel=1e-4)


@pytest.mark.parametrize("how", [{"schedule": Linear(0.5, 0.5)}, {"keep_norm": True}])
def test_the_size_is_that_of_the_change_made(how: dict[str, Any]) -> None:
    """Also where a schedule weakens it, or a norm is kept."""
    model, ids = tiny_model(), random_ids(2, 5).clamp(min=4)
    point = HookPoint(1, "resid_post")
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    rows = [[Add(direction, 2.0, point, **how)], [Add(direction, 1.0, point, **how)]]
    sae = tiny_sae()
    kinds: list[Any] = [
        rows[0], rows, [Project(direction, point, 3.0, **how)], [Clamp(sae, 5, 9.0, **how)]
    ]  # fmt: skip
    with torch.no_grad(), capture(model, [point]) as found:
        model(ids)
    x = found[point]
    for edits in kinds:
        with torch.no_grad(), steer(model, edits) as receipt, capture(model, [point]) as found:
            model(ids)
        sizes = (found[point] - x).norm(dim=-1) / x.norm(dim=-1)
        for edit in receipt.edits:
            mine = sizes if edit.row is None else sizes[edit.row]
            assert edit.relative_size == pytest.approx(float(mine.mean()), rel=1e-4)
