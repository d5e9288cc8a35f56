"""The planted benchmark, small: the shape of what it says, and what stands behind the figures."""

import numpy as np
import pytest
import torch

from saesteer.compare import world, world_arms, world_flags, world_pool, world_score
from saesteer.compare.arms.candidates import activation_differences
from saesteer.core.model import HookPoint
from saesteer.directions.fitting import fit_direction
from saesteer.directions.pairs import Pair
from saesteer.effects import planted_score
from saesteer.errors import SteeringError
from saesteer.steering.edits import Add
from saesteer.world import corpus, lexicon

POINT = HookPoint(1, "resid_post")
SMALL = {
    "arms": ("none", "random", "sae-add", "sae-search", "leace"),
    "n": (1, 8), "draws": 2, "concepts": ("sea", "music"), "validation": 2, "test": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def told(small_run):
    return small_run.model, small_run.tokenizer, small_run.sae, small_run.index


@pytest.fixture(scope="module")
def pool(told):
    return world_pool.read_pool(*told, "sea", points=[POINT], n_pairs=32, n_found=4, seed=0)


@pytest.fixture(scope="module")
def found(told):
    with pytest.MonkeyPatch.context() as patch:  # they have tests of their own
        patch.setattr(world_flags, "measure", lambda *args, **how: ([], []))
        patch.setattr(world, "PAIRS", 16)
        return world.measure(*told, **SMALL)


def test_it_has_what_was_promised(found):
    keys = {"score", "low", "high", "anti_steerable", "delta_ce"}
    assert set(found["arms"]) == {*SMALL["arms"], "mean-difference"}
    assert all(keys <= set(row) for row in found["arms"].values())
    assert [row["n"] for row in found["n_curve"]] == [1, 8]
    assert all({"n", "score", "low", "high"} <= set(row) for row in found["n_curve"])
    assert found["n_star"] in (None, 1, 8) and found["seconds"] > 0
    assert {key: found["arms"]["none"][key] for key in keys} == dict.fromkeys(keys, 0.0)
    assert found["arms"]["random"]["draws"] == 20 and found["arms"]["sae-search"]["draws"] == 1


def test_every_arm_had_the_same_number_of_evaluations(found):
    counts = {r["validation_evaluations"] for a, r in found["arms"].items() if a != "none"}
    assert counts == {2 * world_arms.OPTIONS * len(world_arms.VECTOR_STRENGTHS)}
    assert len(world_arms.VECTOR_STRENGTHS) == len(world_arms.FEATURE_STRENGTHS) == 14


def test_a_score_is_the_share_of_the_way_from_none_to_the_ceiling(found):
    none, ceiling = found["kl"]["none"], found["kl"]["ceiling"]
    for row in found["arms"].values():
        assert row["score"] == pytest.approx((none - row["kl"]) / (none - ceiling), abs=1e-9)
        assert row["low"] <= row["score"] <= row["high"]


def test_the_same_seed_says_the_same(told, found, monkeypatch):
    monkeypatch.setattr(world_flags, "measure", lambda *args, **how: ([], []))
    monkeypatch.setattr(world, "PAIRS", 16)
    small = {**SMALL, "arms": ("random",), "n": (1,), "concepts": ("sea",)}
    again = [world.measure(*told, **small) for _ in range(2)]
    for one in again:
        del one["seconds"]
    assert again[0] == again[1]


def test_many_edits_at_once_are_one_after_the_other(told, pool):
    model = told[0]
    prompts = planted_score.prompts("sea", 4, seed=1)
    rows = np.arange(8)
    edits = []
    for arm in ("mean-difference", "sae-clamp", "leace", "sae-topk"):
        options = world_arms.ARMS[arm](pool, rows, 0)
        mine = [next(iter(options.values()))(strength) for strength in (0.1, 0.5)]
        together = world_score.edited_kl(model, prompts, mine)
        alone = [planted_score.edited_kl(model, prompts, each) for each in mine]
        np.testing.assert_allclose(together.mean(1), alone, atol=1e-5)
        edits += mine
    alone = [world_score.edited_kl(model, prompts, [each])[0] for each in edits]
    np.testing.assert_allclose(world_score.edited_kl(model, prompts, edits), alone, atol=1e-5)


def test_a_draw_of_the_pool_is_what_fitting_its_pairs_gives(told, pool):
    model, tokenizer, sae, _ = told
    pairs = [Pair(**pair) for pair in corpus.pairs("sea", 32, 0)]
    rows = np.arange(32)
    (edit,) = world_arms.ARMS["mean-difference"](pool, rows, 0)[str(POINT)](2.0)
    fitted = fit_direction("mean-difference", model, tokenizer, pairs, POINT)
    assert isinstance(edit, Add) and edit.strength == 2.0
    torch.testing.assert_close(edit.vector, fitted.vector, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(
        pool.features["sae"].mean(0),
        activation_differences(model, tokenizer, sae, pairs).numpy(),
        atol=1e-6,
    )


def test_an_arm_chooses_on_validation_and_never_sees_the_test(told, pool):
    model, tokenizer, *_ = told
    looked_at, tested = (planted_score.prompts("sea", 3, seed=s) for s in (0, 1))
    other = planted_score.prompts("magic", 3, seed=5)
    clean = world_score.clean_stories(model, tokenizer, 0)
    how = {"draws": 2, "seed": 0}
    first, second = (
        world.score_arm(model, pool, "mean-difference", 8, (looked_at, test), clean, **how)
        for test in (tested, other)
    )
    assert first.chosen == second.chosen and not np.allclose(first.kl, second.kl)
    grid = [
        (name, s) for name in map(str, pool.sides) for s in world_arms.strengths("mean-difference")
    ]
    rows = np.random.default_rng([0, 12, 0]).permutation(pool.n)[:8]
    options = world_arms.ARMS["mean-difference"](pool, rows, 0)
    looks = [planted_score.edited_kl(model, looked_at, options[name](s)) for name, s in grid]
    assert (first.chosen.option, first.chosen.strength) == grid[int(np.argmin(looks))]


def test_a_random_dictionary_is_the_size_of_the_sae_and_drawn_by_seed(told):
    sae = told[2]
    one, same, other = (world_pool.random_dictionary(sae, k=8, seed=s) for s in (0, 0, 1))
    assert (one.d_sae, one.k, one.hook_point) == (sae.d_sae, 8, sae.hook_point)
    assert torch.equal(one.W_dec, same.W_dec) and not torch.equal(one.W_dec, other.W_dec)


def test_prompts_of_the_read_only_concept_have_it_off_and_no_target_of_their_own(told):
    made = world_score.prompts_in("red", 3, 0)
    assert made.target.sum(1).allclose(torch.ones(3, dtype=torch.float64))
    ids = told[1].convert_tokens_to_ids([f"▁{w}" for w in lexicon.READ_ONLY.words])
    assert not torch.isin(made.ids, torch.tensor(ids)).any()


@pytest.mark.parametrize(
    ("how", "says"),
    [({"arms": ("sae-clmp",)}, "did you mean"), ({"draws": 0}, "draws=0"), ({"n": ()}, "n=")],
)
def test_what_cannot_be_measured_is_refused(told, how, says):
    with pytest.raises(SteeringError, match=says):
        world.measure(*told, **{**SMALL, **how})
