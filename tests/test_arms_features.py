"""The arms of features, each against its definition."""

from dataclasses import replace

import pytest
import torch

from saesteer.compare import Material, Prepared
from saesteer.compare.arms import ARMS, arm, gated
from saesteer.compare.arms.candidates import (
    activation_differences,
    answer_means,
    by_auroc,
    candidates,
)
from saesteer.compare.arms.features import (
    gate,
    sae_add,
    sae_clamp,
    sae_output_filtered,
    sae_topk,
)
from saesteer.compare.arms.targeted import Effects, fit_effects, measured, sae_ts, targeted
from saesteer.compare.prepared import margins_of, noisy
from saesteer.core.hooks import activations, capture
from saesteer.core.points import HookPoint
from saesteer.directions import fitting
from saesteer.directions.answers import side_tokens
from saesteer.directions.pairs import Pair
from saesteer.effects.output_score import output_scores
from saesteer.errors import (
    ConfigError,
    FeatureError,
    IndexingError,
    PairsError,
    SaeError,
    SteeringError,
    TextError,
)
from saesteer.steering.conditions import Feature, When
from saesteer.steering.engine import steer
from tests.some_material import an_index, some_pairs
from tests.tiny import BOS, WIDTH, random_ids, tiny_model, tiny_sae, tiny_tokenizer

POINT = HookPoint(1, "resid_post")


@pytest.fixture(scope="module")
def sae():
    return tiny_sae()


@pytest.fixture(scope="module")
def material(sae, tmp_path_factory) -> Material:
    index = an_index(tmp_path_factory.mktemp("index"), sae, figures=TALL)
    return Material(
        tiny_model(), tiny_tokenizer(), some_pairs(), some_pairs(8, begin=24), sae, index
    )


# So tall that nothing is more active on BOS.
TALL = {feature: {"max_act": 20.0 + feature} for feature in range(64)}


def steered_logits(material: Material, prepared: Prepared, strength: float, ids) -> torch.Tensor:
    with torch.no_grad(), steer(material.model, prepared.edits(strength)):
        return material.model(ids).logits


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_differences_are_means_over_the_answers_tokens(material, architecture):
    sae = tiny_sae(architecture)
    pairs = [*some_pairs(5), Pair("", " sea", " once upon a time")]
    expected = torch.zeros(sae.d_sae, dtype=torch.float64)
    for pair in pairs:
        for answer, sign in ((pair.chosen, 1), (pair.rejected, -1)):
            side = side_tokens(material.tokenizer, pair.prompt, answer)
            x = activations(material.model, [POINT], torch.tensor([side.ids]))[POINT][0]
            a = sae.activation(x[side.start :], range(sae.d_sae))
            expected += sign * a.double().mean(0) / len(pairs)
    for batch_size in (1, 3, 32):
        found = activation_differences(
            material.model, material.tokenizer, sae, pairs, batch_size=batch_size
        )
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert expected.abs().max() > 0.1


def test_swapped_sides_turn_the_differences_round(material, sae):
    swapped = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in material.pairs]
    given = material.model, material.tokenizer, sae
    one = activation_differences(*given, material.pairs)
    torch.testing.assert_close(activation_differences(*given, swapped), -one)


def test_an_answer_without_tokens_is_refused(material, sae):
    with pytest.raises(PairsError, match="pair 2: ' <eos>' has no tokens"):
        activation_differences(
            material.model, material.tokenizer, sae, [*some_pairs(1), Pair("the", " <eos>", " sea")]
        )


def test_candidates_leave_out_the_dense_the_dead_and_those_of_bos(material, sae, tmp_path):
    order, differences = candidates(material)
    expected = sorted(
        (f for f in range(sae.d_sae) if differences[f] > 0), key=lambda f: -differences[f]
    )
    assert order == expected
    on_bos = activations(material.model, [POINT], torch.tensor([[BOS]]))[POINT]
    bos = sae.activation(on_bos, range(sae.d_sae))[0, 0]
    first_on_bos = next(f for f in order if bos[f] > 0.2)
    dense, dead = (f for f in order[:4] if f != first_on_bos and f != order[0]), order[0]
    dense = next(dense)
    figures = {
        **TALL,
        dense: {"max_act": 20.0, "density": 0.0101},
        dead: {"max_act": 0.0},
        first_on_bos: {"max_act": float(bos[first_on_bos]) - 0.1},
    }
    other = replace(material, index=an_index(tmp_path, sae, figures=figures))
    assert candidates(other)[0] == [f for f in order if f not in (dense, dead, first_on_bos)]
    assert dense in candidates(other, densest=0.02)[0]
    with pytest.raises(FeatureError, match="no feature is more active on the chosen"):
        candidates(other, densest=0.001)


def test_a_clamp_is_encode_set_decode_and_the_error_added_back(material, sae):
    prepared = sae_clamp(material)
    (feature,) = prepared.notes["features"]
    assert feature == candidates(material)[0][0]
    ids = random_ids(3, 9)
    x = activations(material.model, [POINT], ids)[POINT]
    code = sae.activation(x, range(sae.d_sae))
    error = x - (code @ sae.W_dec + sae.b_dec)
    code[..., feature] = -2.5 * (20 + feature)
    expected = code @ sae.W_dec + sae.b_dec + error
    with steer(material.model, prepared.edits(-2.5)), capture(material.model, [POINT]) as found:
        material.model(ids)
    size = expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found[POINT] / size, expected / size, atol=1e-5, rtol=0)


def test_add_adds_so_many_times_max_act(material, sae):
    prepared = sae_add(material, feature=7)
    ids = random_ids(2, 6)
    with torch.no_grad():
        plain = material.model(ids).logits
    assert torch.equal(steered_logits(material, prepared, 0.0, ids), plain)
    x = activations(material.model, [POINT], ids)[POINT]
    with steer(material.model, prepared.edits(0.5)), capture(material.model, [POINT]) as found:
        material.model(ids)
    torch.testing.assert_close(found[POINT] - x, (0.5 * 27 * sae.W_dec[7]).expand_as(x))


def test_the_top_one_is_add_and_the_top_k_are_a_weighted_sum(material, sae):
    ids = random_ids(2, 6)
    one = steered_logits(material, sae_topk(material, k=1), 0.3, ids)
    assert torch.equal(one, steered_logits(material, sae_add(material), 0.3, ids))
    order, differences = candidates(material)
    vector = sum(
        differences[f] / differences[order[0]] * (20 + order[0]) * sae.W_dec[f].double()
        for f in order[:5]
    )
    (edit,) = sae_topk(material, k=5).edits(0.3)
    torch.testing.assert_close(edit.vector.double(), vector, atol=1e-5, rtol=1e-5)
    assert edit.strength == 0.3
    with pytest.raises(SteeringError, match="k=0"):
        sae_topk(material, k=0)


def test_output_filtered_takes_the_first_that_scores_enough(material, sae):
    order = candidates(material)[0]
    scores = {
        one.feature: one.score
        for one in output_scores(
            material.model,
            material.tokenizer,
            sae,
            order,
            max_act=lambda feature: 20.0 + feature,
            own_tokens=lambda feature: (),
            prompts=["of the king"],
            amplification=0.1,
        )
    }
    # A line that the first candidate fails and another passes.
    later = max(order[1:], key=lambda feature: scores[feature])
    assert scores[later] > scores[order[0]]
    line = (scores[later] + scores[order[0]]) / 2
    expected = next(feature for feature in order if scores[feature] >= line)
    options = {"most": len(order), "prompts": ["of the king"], "amplification": 0.1}
    prepared = sae_output_filtered(material, at_least=line, **options)
    assert prepared.notes["features"] == [expected] != order[:1]
    assert prepared.notes["output_score"] == pytest.approx(scores[expected], abs=1e-6)
    assert prepared.notes["amplification"] == 0.1
    (edit,), (add,) = prepared.edits(1.0), sae_add(material, feature=expected).edits(1.0)
    assert torch.equal(edit.vector, add.vector)
    with pytest.raises(FeatureError, match=f"none has an output score of 2.*feature {later}"):
        sae_output_filtered(material, at_least=2.0, **options)


def a_linear_effect(n: int, noise: float) -> tuple[Effects, Effects, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    true = Effects(normal(16, 40), normal(40))
    x = normal(n, 16)
    y = x @ true.M + true.b + noise * normal(n, 40)
    return true, fit_effects(x, y), x


def test_a_planted_linear_effect_is_recovered():
    true, found, _ = a_linear_effect(200, 0.0)
    torch.testing.assert_close(found.M, true.M, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(found.b, true.b, atol=1e-2, rtol=1e-2)
    cosines = []
    for n in (32, 128, 512):
        true, found, _ = a_linear_effect(n, 1.0)
        each = [
            torch.cosine_similarity(targeted(true, j), targeted(found, j), dim=0) for j in range(40)
        ]
        cosines.append(float(torch.stack(each).mean()))
    assert cosines[0] < cosines[1] < cosines[2] and cosines[2] > 0.99


def test_the_targeted_vector_by_hand():
    M = torch.tensor([[3.0, 0.0], [4.0, 2.0]], dtype=torch.float64)
    b = torch.tensor([0.0, 1.0], dtype=torch.float64)
    # M_0/‖M_0‖ = (.6, .8); M b = (0, 2).
    torch.testing.assert_close(targeted(Effects(M, b), 0), torch.tensor([0.6, -0.2]))
    torch.testing.assert_close(targeted(Effects(M, b), 0, aside=0.5), torch.tensor([0.6, 0.3]))
    with pytest.raises(SteeringError, match="no edit changed feature 1"):
        targeted(Effects(M * 0, b), 1)
    with pytest.raises(SteeringError, match=r"\[n, d\] and \[n, d_sae\]"):
        fit_effects(M, b)
    with pytest.raises(SteeringError, match="NaN"):
        fit_effects(M / 0, M)


def test_effects_are_of_what_is_written_under_a_vector_and_nothing_else(material, sae):
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(70, WIDTH, generator=generator) * 20
    vectors[::2] = 0
    given = material.model, material.tokenizer, sae, vectors, ["the boy saw", "once"]
    found = measured(*given, max_new_tokens=5, seed=3)
    assert found.shape == (70, sae.d_sae)
    # Some vectors change no token that is drawn.
    assert not found[::2].any() and found[1::2].any(1).float().mean() > 0.8
    assert torch.equal(found, measured(*given, max_new_tokens=5, seed=3))


def test_sae_ts_is_as_long_as_add_and_repeats_itself(material, sae):
    options = {"n": 40, "max_new_tokens": 5}
    prepared = sae_ts(material, **options)
    (edit,), (add,) = prepared.edits(0.7), sae_add(material).edits(0.7)
    assert float(edit.vector.norm()) == pytest.approx(float(add.vector.norm()), rel=1e-5)
    assert edit.strength == add.strength and prepared.notes["tokens_written"] == 400
    (again,) = sae_ts(material, **options).edits(0.7)
    assert torch.equal(edit.vector, again.vector)
    (other,) = sae_ts(replace(material, seed=1), **options).edits(0.7)
    assert not torch.equal(edit.vector, other.vector)
    with pytest.raises(SteeringError, match="1 edits of size"):
        sae_ts(material, n=1)
    with pytest.raises(TextError):
        sae_ts(material, n=4, max_new_tokens=1000)


def test_a_gate_opens_where_its_feature_fires_row_by_row(material, sae):
    """A condition that holds on some tokens of one row and on none of another."""
    ids = random_ids(4, 12, seed=2)
    x = activations(material.model, [POINT], ids)[POINT]
    read = sae.activation(x, [11])[..., 0]
    above = float(read.flatten().topk(3).values[1:].mean())  # between the second and the third
    holds = read > above
    assert holds.any() and not holds.all(1).any() and not holds.any(1).all()
    prepared = gate(sae_add(material, feature=5), When(Feature(sae, 11), above))
    with steer(material.model, prepared.edits(0.2)), capture(material.model, [POINT]) as found:
        material.model(ids)
    changed = (found[POINT] != x).any(-1)
    assert torch.equal(changed, holds)
    torch.testing.assert_close(
        found[POINT][holds] - x[holds], (0.2 * 25 * sae.W_dec[5]).expand(int(holds.sum()), -1)
    )


def test_gated_by_name(material, sae):
    when = When(Feature(sae, 11), 0.1)
    (edit,) = gated(material, of="sae-clamp", when=when, feature=3).edits(2.0)
    assert edit.when is when and edit.feature == 3 and edit.value == 46.0
    with pytest.raises(SteeringError, match="a condition already"):
        gate(gated(material, of="sae-clamp", when=when), when)
    with pytest.raises(SteeringError, match="nothing to gate"):
        gated(material, of="few-shot", when=when)
    with pytest.raises(SteeringError, match="did you mean 'sae-add'"):
        arm("sae-ad")


def test_margins_are_those_of_the_steered_model(material):
    prepared = sae_add(material)
    plain = margins_of(prepared, material.tokenizer, material.validation, 0.0)
    steered = margins_of(prepared, material.tokenizer, material.validation, 1.0)
    assert plain.shape == (8,) and not torch.equal(plain, steered)
    again = margins_of(prepared, material.tokenizer, material.validation, 0.0)
    assert torch.equal(plain, again)


def test_material_that_lacks_something(material, sae, tmp_path):
    with pytest.raises(SaeError, match="no SAE was given"):
        sae_add(replace(material, sae=None))
    with pytest.raises(IndexingError, match="saesteer index"):
        sae_add(replace(material, index=None))
    with pytest.raises(IndexingError, match="another SAE"):
        sae_add(replace(material, sae=tiny_sae(seed=5)))
    dead = an_index(tmp_path, sae, figures={4: {"max_act": 0.0}})
    with pytest.raises(FeatureError, match="feature 4 never fired"):
        sae_clamp(replace(material, index=dead), feature=4)
    with pytest.raises(FeatureError, match="no feature 64"):
        sae_add(material, feature=64)
    with pytest.raises(PairsError, match="no contrast pairs"):
        replace(material, pairs=[])
    with pytest.raises(PairsError, match="a budget of 0"):
        replace(material, budget=0)


def test_noise_swaps_that_share_of_the_pairs(material):
    for share, n in ((0.0, 0), (0.25, 6), (1.0, 24)):
        noised = noisy(material, share)
        swapped = [a != b for a, b in zip(noised.pairs, material.pairs, strict=True)]
        assert sum(swapped) == n
        for one, was in zip(noised.pairs, material.pairs, strict=True):
            assert {one.chosen, one.rejected} == {was.chosen, was.rejected}
        assert list(noised.validation) == list(material.validation)
    assert noisy(material, 0.25).pairs == noisy(material, 0.25).pairs
    # The same pairs as `fit_method` swaps with that noise.
    swaps = fitting.swapped(len(material.pairs), 0.25, material.seed).tolist()
    turned = [a != b for a, b in zip(noisy(material, 0.25).pairs, material.pairs, strict=True)]
    assert turned == swaps
    assert noisy(replace(material, seed=1), 0.25).pairs != noisy(material, 0.25).pairs
    # All labels turned round, the differences are too.
    given = material.model, material.tokenizer, material.sae
    one, other = (activation_differences(*given, m.pairs) for m in (material, noisy(material, 1)))
    torch.testing.assert_close(one, -other)
    with pytest.raises(ConfigError, match=r"noise=1\.5"):
        noisy(material, 1.5)


def test_every_arm_of_features_is_known_by_name():
    assert [name for name in ARMS if name.startswith("sae-")] == [
        "sae-clamp",
        "sae-add",
        "sae-auroc",
        "sae-topk",
        "sae-output-filtered",
        "sae-ts",
    ]


def test_auroc_puts_first_the_feature_that_tells_the_answers_apart_best(material):
    from sklearn.metrics import roc_auc_score

    found = by_auroc(material)
    assert sorted(found) == sorted(candidates(material)[0])
    of = (material.model, material.tokenizer, material.sae, material.pairs)
    sides = answer_means(*of, found)
    truth = [1] * len(material.pairs) + [0] * len(material.pairs)
    by_hand = [roc_auc_score(truth, torch.cat(sides)[:, i]) for i in range(len(found))]
    assert by_hand == pytest.approx(sorted(by_hand, reverse=True))
    made = ARMS["sae-auroc"](material)
    assert made.arm == "sae-auroc" and made.notes["features"] == [found[0]]


def test_means_of_answers_differ_by_what_the_differences_are(material):
    of = (material.model, material.tokenizer, material.sae, material.pairs)
    chosen, rejected = answer_means(*of, range(material.sae.d_sae), batch_size=3)
    assert torch.allclose((chosen - rejected).mean(0), activation_differences(*of), atol=1e-5)
