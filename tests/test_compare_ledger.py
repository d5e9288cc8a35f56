"""The ledger: counts against torch's own, costs by hand, K* against algebra, n* by its rule."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from saesteer.compare import ledger
from saesteer.compare.ledger import (
    Cost,
    Shared,
    break_even,
    counting,
    k_curve,
    n_star,
    parameters_up_to,
    vector_flops,
)
from saesteer.compare.sae_cost import (
    FEW,
    indexing_flops,
    sae_flops,
    step_flops,
    training_flops,
)
from saesteer.core.hooks import activations
from saesteer.core.points import HookPoint
from saesteer.directions import answer_cache
from saesteer.errors import ConfigError, TrainingError
from saesteer.training import step
from saesteer.training.architectures import ARCHITECTURES
from saesteer.training.pairs import DensePairs
from saesteer.training.step import Plan, loss_and_gradients
from tests.tiny import LAYERS, VOCAB, WIDTH, random_ids, tiny_model

POINT = HookPoint(1, "resid_post")


def torch_counts(run) -> float:
    """FLOPs of matrix products that torch's own counter saw, but for attention's own."""
    with FlopCounterMode(display=False) as counter:
        run()
    found = counter.get_flop_counts()["Global"]
    return float(sum(found.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm)))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "gemma2", "gpt_neox"])
def test_counted_flops_are_those_of_torch_and_of_the_formula(arch):
    model = tiny_model(arch)
    ids = random_ids(3, 7)
    with counting(model) as count:
        theirs = torch_counts(lambda: model(ids))
    assert (count.tokens, count.rows) == (21, 3)
    assert count.flops == theirs == 2 * parameters_up_to(model) * 21


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_a_pass_that_stops_early_costs_what_it_ran(arch, layer, site):
    model, point = tiny_model(arch), HookPoint(layer, site)
    with counting(model) as count:
        activations(model, [point], random_ids(2, 5))
    assert count.flops == 2 * parameters_up_to(model, point) * 10
    blocks = layer + (site == "resid_post")
    assert (count.flops == 0) == (blocks == 0)


def test_parameters_by_hand():
    # A Llama block: q and o 32 × 32, k and v 16 × 32, three matrices of 48 × 32.
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
    model = tiny_model()
    assert parameters_up_to(model, POINT) == 2 * block
    assert parameters_up_to(model) == LAYERS * block + VOCAB * WIDTH


def test_a_backward_pass_is_counted_as_torch_counts_it():
    model = tiny_model()
    model.requires_grad_(True)

    def train() -> None:
        model(random_ids(2, 6)).logits.sum().backward()

    with counting(model) as count:
        theirs = torch_counts(train)
    # Nothing needs a gradient of the embeddings' input, but of their output, which is learnt.
    assert count.flops == theirs == 3 * 2 * parameters_up_to(model) * 12


def test_an_added_vector_that_is_trained_needs_no_gradient_of_weights():
    model = tiny_model()
    vector = torch.zeros(WIDTH, requires_grad=True)
    block = model.model.layers[1]
    handle = block.register_forward_hook(lambda _, __, out: out + vector)
    try:
        with counting(model) as count:
            theirs = torch_counts(lambda: model(random_ids(1, 4)).logits.sum().backward())
    finally:
        handle.remove()
    one = parameters_up_to(model, HookPoint(0, "resid_post"))
    after = one + VOCAB * WIDTH  # the last block and the unembedding
    assert count.flops == theirs == 2 * 4 * (2 * one + 2 * after)


def test_copies_count_and_nothing_is_left_behind():
    model = tiny_model()
    shared = {id(p): p for p in model.parameters()}
    with pytest.raises(ZeroDivisionError), counting(model) as count:
        copy.deepcopy(model, shared)(random_ids(1, 9))
        assert answer_cache.key(model, [([5], [0])]) is not None  # it hooks nothing on the model
        raise ZeroDivisionError
    assert count.tokens == 9
    model(random_ids(1, 3))
    assert count.tokens == 9


def test_costs_by_hand():
    assert vector_flops(1_000, 128, 10.0) == 2 * 1_000 * 256 * 10
    # 64 → 256 latents, 8 fire: 2·64·256 before the choice, 8·(6·64 + 2·64) after it.
    shape = {"d_in": 64, "d_out": 64, "d_sae": 256}
    for architecture in ("topk", "batchtopk", "matryoshka"):
        assert step_flops(architecture, **shape, active=8) == 32_768 + 4_096
    # Dense: 10 · d · m.
    assert step_flops("standard", **shape, active=100) == 10 * 64 * 256
    assert step_flops("gated", **shape, active=100) == 14 * 64 * 256
    # 4 of 256 fire, fewer than one in 40: sparse.
    assert step_flops("jumprelu", **shape, active=4, aux=False) == 32_768 + 4 * 512
    # 40 dead: 32 of them are revived, through dense products over the 40.
    aux = 2 * 64 * 40 + 40 * 512
    assert step_flops("topk", **shape, active=8, dead=40) == 36_864 + aux
    assert step_flops("topk", **shape, active=8, dead=40, aux=False) == 36_864
    # 2,000 dead are more than 16 for each of the 32 revived: sparse.
    wide = {**shape, "d_sae": 4096}
    more = step_flops("topk", **wide, active=8, dead=2_000)
    assert more - step_flops("topk", **wide, active=8) == 2 * 64 * 2_000 + 32 * 512
    assert indexing_flops(tokens=100, d_in=4, d_out=4, d_sae=10, vocabulary=7) == 8_000 + 80 * 17
    again = indexing_flops(
        tokens=100, d_in=4, d_out=4, d_sae=10, vocabulary=0, neighbours=False, parameters=50
    )
    assert again == 8_000 + 10_000
    assert sae_flops(50, 1_000, 7.0) == 100_007


def test_training_is_added_up_over_its_logged_steps():
    shape = {"d_in": 8, "d_out": 8, "d_sae": 32}
    lines = [
        {"tokens": 100, "l0": 2.0, "dead_fraction": 0.0},
        {"tokens": 300, "l0": 4.0, "dead_fraction": 0.25},
    ]
    expected = 100 * step_flops("topk", **shape, active=2) + 200 * step_flops(
        "topk", **shape, active=4, dead=8
    )
    assert training_flops(lines, "topk", **shape) == expected
    with pytest.raises(TrainingError, match="no logged steps"):
        training_flops([], "topk", **shape)
    with pytest.raises(TrainingError, match="no dead_fraction, l0"):
        training_flops([{"tokens": 1}], "topk", **shape)
    with pytest.raises(TrainingError, match="'relu'"):
        step_flops("relu", **shape, active=1)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_a_dense_step_costs_what_torch_counts(architecture):
    about, (n, d, m) = ARCHITECTURES[architecture], (16, 8, 24)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    weights = {"encoder": normal(m, d), "decoder": normal(m, d)}
    weights |= {"b_enc": torch.zeros(m), "b_dec": torch.zeros(d)}
    weights |= {name: torch.full((m,), value) for name, value in about.extra}
    plan = Plan(about, n, 1.0, 4, (m,), aux_coefficient=0.0)
    x = normal(n, d)
    theirs = torch_counts(lambda: loss_and_gradients(plan, weights, x, x, sparsity=0.01))
    # Besides, once a batch: all latents' gradients times the encoder, for b_dec.
    once = 2 * d * m
    ours = step_flops(architecture, d_in=d, d_out=d, d_sae=m, active=m / 2, aux=False)
    assert theirs == n * ours + once


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_a_sparse_step_makes_one_dense_product_and_touches_its_pairs(architecture, monkeypatch):
    about, (n, d, m, k) = ARCHITECTURES[architecture], (16, 8, 24, 3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    rows = torch.nn.functional.normalize(torch.randn(m, d, generator=generator), dim=1)
    weights = {"encoder": rows, "decoder": rows.clone()}
    weights |= {"b_enc": torch.ones(m), "b_dec": torch.zeros(d)}
    touched = []

    class Watched(step.SparsePairs):
        def decode(self, values, decoder):
            touched.append(2 * len(values) * decoder.shape[1])
            return super().decode(values, decoder)

        def products(self, left, right):
            touched.append(2 * len(self.rows) * left.shape[1])
            return super().products(left, right)

        def gathered(self, values, source):
            touched.append(2 * len(values) * source.shape[1])
            return super().gathered(values, source)

    monkeypatch.setattr(step, "SparsePairs", Watched)
    widths = (6, 12, m) if about.nested else (m,)
    plan = Plan(about, n, 1.0, k, widths, aux_coefficient=0.0)
    result = None

    def run() -> None:
        nonlocal result
        result = loss_and_gradients(plan, weights, x, x)

    run()
    l0 = float(result.l0)
    expected = n * step_flops(architecture, d_in=d, d_out=d, d_sae=m, active=l0, aux=False)
    dense = 2.0 * d * m * n
    assert sum(touched) + dense == pytest.approx(expected)


def test_reviving_costs_what_torch_counts():
    about, (n, d, m, dead) = ARCHITECTURES["topk"], (16, 8, 64, 40)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    rows = torch.randn(m, d, generator=generator)
    weights = {"encoder": rows, "decoder": rows.clone()}
    weights |= {"b_enc": torch.ones(m), "b_dec": torch.zeros(d)}
    plan = Plan(about, n, 1.0, 4, (m,))

    def flops(latents):
        return torch_counts(lambda: loss_and_gradients(plan, weights, x, x, dead=latents))

    theirs = flops(torch.arange(dead)) - flops(None)
    shape = {"d_in": d, "d_out": d, "d_sae": m, "active": 4}
    ours = step_flops("topk", **shape, dead=dead) - step_flops("topk", **shape)
    assert theirs == n * ours + 2 * d * dead  # the last, once a batch, for b_dec


def test_the_turn_to_dense_products_is_the_steps_own():
    assert FEW == step._FEW
    assert DensePairs is step.DensePairs


amounts = st.floats(0, 1e15)


@given(amounts, amounts, amounts, amounts)
@settings(max_examples=200, deadline=None)
def test_break_even_is_where_the_curves_meet(s, c, t, e):
    a, b = Cost(s, c), Cost(t, e)
    found = break_even(a, b)
    assert found == break_even(b, a)
    if found is not None:
        assert found >= 1
        assert math.isclose(a.at(found), b.at(found), rel_tol=1e-6, abs_tol=1e-6)
    else:  # whoever is cheaper for one concept is so for any number
        sides = {np.sign(a.at(k) - b.at(k)) for k in (1, 2, 1e3, 1e6)} - {0}
        close = math.isclose(a.at(1), b.at(1), rel_tol=1e-6)
        assert len(sides) < 2 or close


def test_break_even_and_the_k_curve_by_hand():
    sae, vector = Cost(1_000.0, 1.0), Cost(0.0, 11.0)
    assert break_even(sae, vector) == 100
    assert break_even(Cost(5.0, 1.0), vector) is None  # at half a concept
    assert break_even(sae, sae) is None
    curve = k_curve({"sae": sae, "vector": vector, "other": None}, (1, 100, 1_000))
    assert curve == [
        {"K": 1, "costs": {"sae": 1_001.0, "vector": 11.0, "other": None}},
        {"K": 100, "costs": {"sae": 11.0, "vector": 11.0, "other": None}},
        {"K": 1_000, "costs": {"sae": 2.0, "vector": 11.0, "other": None}},
    ]
    with pytest.raises(ConfigError, match="at 0 concepts"):
        k_curve({"sae": sae}, (0, 1))


def differences(mean: float, draws: int = 10, prompts: int = 40) -> np.ndarray:
    return mean + 0.1 * np.random.default_rng(0).standard_normal((draws, prompts))


def test_n_star_is_the_least_n_from_which_on_it_holds():
    worse, as_good, better = differences(-0.5), differences(0.0), differences(0.5)
    star = {"margin": 0.2, "resamples": 500}
    assert n_star({1: worse, 3: worse, 8: as_good, 32: better}, **star) == 8
    assert n_star({32: better, 8: as_good, 1: worse}, **star) == 8  # in whatever order
    assert n_star({1: as_good, 3: worse, 8: as_good}, **star) == 8  # one lucky n is none
    assert n_star({1: as_good, 8: worse}, **star) is None
    assert n_star({1: better, 8: as_good}, **star) == 1
    assert n_star({}, **star) is None
    # Barely worse than the feature less the margin: not shown.
    assert n_star({8: differences(-0.199)}, **star) is None
    with pytest.raises(ConfigError):
        n_star({8: better}, 0.0)


def behaviour(**flops: float) -> dict:
    kinds = {"sae": "features", "vector": "vector"}
    arms = [
        {"arm": arm, "kind": kinds[arm], "noise": 0.0, "ledger": {"flops": each}}
        for arm, each in flops.items()
    ]
    none = {"arm": "none", "kind": "none", "noise": 0.0, "ledger": {"flops": 0.0}}
    noisy = {**arms[0], "noise": 0.25, "ledger": {"flops": 1e30}}
    return {"arms": [none, *arms, noisy]}


def test_the_ledger_of_a_report():
    behaviours = [behaviour(sae=1.0, vector=10.0), behaviour(sae=3.0, vector=14.0)]
    shared = Shared(900.0, 100.0, "Counted from metrics.jsonl.")
    found = ledger.ledger(behaviours, shared, ("sae", "vector"), (1, 10))
    assert found["k_curve"] == [
        {"K": 1, "costs": {"sae": 1_002.0, "vector": 12.0}},
        {"K": 10, "costs": {"sae": 102.0, "vector": 12.0}},
    ]
    assert found["k_star"] == {"a": "sae", "b": "vector", "K": 100.0}
    assert found["shared"] == {
        "sae_training": 900.0, "indexing": 100.0, "note": "Counted from metrics.jsonl."
    }  # fmt: skip


def test_what_isnt_known_is_not_free():
    shared = Shared(None, 100.0, "The SAE was trained by someone else.")
    found = ledger.ledger([behaviour(sae=1.0, vector=10.0)], shared, ("sae", "vector"), (1,))
    assert found["k_curve"] == [{"K": 1, "costs": {"sae": None, "vector": 10.0}}]
    assert found["k_star"] is None
    assert "isn't known" in found["shared"]["note"]
    without = ledger.ledger([behaviour(vector=10.0)], None, ("sae", "vector"), (1,))
    assert without["shared"] is None and without["k_star"] is None
