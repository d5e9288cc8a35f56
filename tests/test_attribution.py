"""Attribution patching against activation patching, and both against a planted circuit."""

import json
from dataclasses import replace

import pytest
import torch

from saesteer.core.hooks import activations
from saesteer.core.model import HookPoint, load_model
from saesteer.directions.margin import margins as pair_margins
from saesteer.directions.pairs import Pair
from saesteer.effects.attribution import Effect, Score, attribute, gradients
from saesteer.effects.attribution_view import shown
from saesteer.effects.contrast import contrast_batches, margins, read_contrasts
from saesteer.effects.nodes import (
    Node,
    baseline,
    changes,
    feature_change,
    mean_baseline,
    model_nodes,
    points_of,
)
from saesteer.effects.patching import check, patched_margins, rank_correlation
from saesteer.errors import ConfigError, HookPointError, PairsError, SteeringError
from saesteer.world import corpus
from tests.planted_circuit import HEAD, MLP, PLANTED, contrasts, planted_model, planted_sae
from tests.tiny import tiny_model, tiny_sae, tiny_tokenizer

SOME = [
    Pair("the boy saw", " a red ship .", " the sea"),
    Pair("once upon a time", " rain", " wind and cloud"),
    Pair("it was very old", " fish .", " bird"),
]
OTHER = ["the girl heard", "once upon the stone", "it was very big"]


@pytest.fixture(scope="module")
def circuit():
    return planted_model(), tiny_tokenizer()


@pytest.mark.parametrize("with_corrupt", [True, False])
def test_a_planted_circuit_comes_out_on_top_both_ways(circuit, with_corrupt):
    pairs, corrupt = contrasts(24)
    nodes = model_nodes(circuit[0], ["heads", "mlps"])
    given = corrupt if with_corrupt else None
    found = attribute(*circuit, pairs, nodes, corrupt=given)
    assert {effect.node.point for effect in found.nodes[:2]} == {HEAD, MLP}
    measured = check(found, *circuit, pairs, corrupt=given)
    ranked = sorted(measured.nodes, key=lambda one: -abs(one.patched.mean))
    assert {effect.node.point for effect in ranked[:2]} == {HEAD, MLP}
    for one in (*measured.nodes[:2], *ranked[:2]):
        assert one.attribution.mean < 0 and one.patched.mean < 0  # without them it knows less
    # What isn't in the circuit does next to nothing.
    assert abs(ranked[2].patched.mean) < 0.1 * abs(ranked[1].patched.mean)
    if with_corrupt:  # the margin turns round
        assert found.margin.mean > 1 and found.corrupt_margin.mean < -1
        whole = found.corrupt_margin.mean - found.margin.mean
        assert ranked[0].patched.mean == pytest.approx(whole, rel=0.05)


@pytest.mark.parametrize("with_corrupt", [True, False])
def test_the_features_that_carry_the_answer_come_out_on_top(circuit, with_corrupt):
    pairs, corrupt = contrasts(24)
    given, sae = corrupt if with_corrupt else None, planted_sae()
    found = attribute(*circuit, pairs, [], sae=sae, corrupt=given, top_features=10)
    assert {effect.node.feature for effect in found.features[:2]} == PLANTED
    measured = check(found, *circuit, pairs, sae=sae, corrupt=given)
    ranked = sorted(measured.features, key=lambda one: -abs(one.patched.mean))
    assert {effect.node.feature for effect in ranked[:2]} == PLANTED
    assert found.n_features == 64 and found.nodes == ()


@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "phi"])  # norms of float64 too
@pytest.mark.parametrize("corrupt", [OTHER, None])
def test_attribution_is_the_slope_of_patching(arch, corrupt):
    """(m(x + ε·change) − m(x − ε·change)) / 2ε, which no gradient takes part in."""
    model, tokenizer = tiny_model(arch).double(), tiny_tokenizer()
    nodes = model_nodes(model)
    (batch,) = contrast_batches(model, tokenizer, SOME, corrupt=corrupt)
    points = points_of(nodes)
    own = activations(model, points, batch.ids, batch.mask)
    other = (
        mean_baseline(model, [batch], nodes)
        if corrupt is None
        else activations(model, points, batch.corrupt, batch.mask)
    )
    step = 1e-4
    found = attribute(model, tokenizer, SOME, nodes, corrupt=corrupt)
    attributed = {effect.node: effect.attribution.mean for effect in found.nodes}
    assert max(map(abs, attributed.values())) > 1e-2
    for node, change in zip(nodes, changes(nodes, batch, own, other), strict=True):
        up, down = (patched_margins(model, batch, node.point, s * change) for s in (step, -step))
        slope = float((up - down).mean()) / (2 * step)
        assert attributed[node] == pytest.approx(slope, rel=1e-4, abs=1e-6), str(node)


@pytest.mark.parametrize(
    ("architecture", "conventions"),
    [
        ("standard", {}),
        ("topk", {}),
        ("jumprelu", {"normalize_activations": "layer_norm"}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
        ("transcoder", {"apply_b_dec_to_input": False}),
    ],
)
@pytest.mark.parametrize("corrupt", [OTHER, None])
def test_feature_attribution_is_the_slope_of_patching(architecture, conventions, corrupt):
    model, tokenizer = tiny_model("gpt2").double(), tiny_tokenizer()
    if architecture == "transcoder":
        sae = replace(tiny_sae(**conventions), hook_point_out=HookPoint(2, "mlp_out"))
    else:
        sae = tiny_sae(architecture, **conventions)
    sae = sae.to("cpu", torch.float64)
    (batch,) = contrast_batches(model, tokenizer, SOME, corrupt=corrupt)
    points = points_of([], sae)
    own = activations(model, points, batch.ids, batch.mask)
    other = (
        mean_baseline(model, [batch], [], sae)
        if corrupt is None
        else activations(model, points, batch.corrupt, batch.mask)
    )
    found = attribute(model, tokenizer, SOME, [], sae=sae, corrupt=corrupt, top_features=64)
    attributed = {effect.node.feature: effect.attribution.mean for effect in found.features}
    assert len(attributed) > 10 and max(map(abs, attributed.values())) > 1e-3
    step = 1e-4
    for feature in range(sae.d_sae):
        change = feature_change(feature, sae, batch, own, other)
        up, down = (
            patched_margins(model, batch, sae.write_point, s * change) for s in (step, -step)
        )
        slope = float((up - down).mean()) / (2 * step)
        assert attributed.get(feature, 0.0) == pytest.approx(slope, rel=1e-3, abs=1e-6), feature


def test_replacing_every_part_of_the_stream_gives_the_corrupt_margin():
    """Patching is exact: the last block's whole output swapped leaves nothing of the clean run."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    (batch,) = contrast_batches(model, tokenizer, SOME, corrupt=OTHER)
    last = HookPoint(2, "resid_post")
    own, other = (
        activations(model, [last], ids, batch.mask)[last] for ids in (batch.ids, batch.corrupt)
    )
    found = patched_margins(model, batch, last, other - own)
    # Only the answers' own ids count on both sides, and these are the same.
    with torch.no_grad():
        torch.testing.assert_close(
            found, margins(model, batch, batch.corrupt), rtol=1e-4, atol=1e-5
        )
    assert float((found - margins(model, batch)).abs().min()) > 1e-3


def test_the_metric_is_the_pairs_margin_and_padding_does_not_change_it():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    (together,) = contrast_batches(model, tokenizer, SOME)
    alone = contrast_batches(model, tokenizer, SOME, batch_size=1)
    with torch.no_grad():
        each = torch.cat([margins(model, batch) for batch in alone])
        torch.testing.assert_close(margins(model, together), each)
        torch.testing.assert_close(each, pair_margins(model, tokenizer, SOME))


def test_batch_size_does_not_matter_and_nothing_is_left_on_the_model():
    model, tokenizer, sae = tiny_model(), tiny_tokenizer(), tiny_sae("topk")
    nodes = model_nodes(model)
    (batch,) = contrast_batches(model, tokenizer, SOME)
    before = margins(model, batch)
    one, many = (
        attribute(model, tokenizer, SOME, nodes, sae=sae, batch_size=size) for size in (1, 8)
    )
    for name in ("nodes", "features"):
        a, b = ({e.node: e.attribution.mean for e in getattr(found, name)} for found in (one, many))
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    assert torch.equal(margins(model, batch), before)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_gradients_are_of_each_pair_alone():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    point = HookPoint(1, "mlp_out")
    (batch,) = contrast_batches(model, tokenizer, SOME)
    _, _, slopes = gradients(model, batch, [point])
    for i, single in enumerate(contrast_batches(model, tokenizer, SOME, batch_size=1)):
        _, _, own = gradients(model, single, [point])
        width = single.ids.shape[1]
        torch.testing.assert_close(
            slopes[point][2 * i : 2 * i + 2, :width], own[point], rtol=1e-4, atol=1e-6
        )


def test_on_the_embedded_model_attribution_correlates_with_patching():
    """Stories in which a concept came up, against the same stories where it didn't."""
    model, tokenizer = load_model("planted")
    pairs, corrupt = [], []
    for one, next_ in zip(
        corpus.pairs("animals", 160, 0), corpus.pairs("animals", 160, 1), strict=True
    ):
        clean, other = (f"{one['prompt']} {one[side].strip()}" for side in ("chosen", "rejected"))
        if len(tokenizer.encode(clean)) == len(tokenizer.encode(other)) and len(pairs) < 32:
            pairs.append(Pair(clean, next_["chosen"], next_["rejected"]))
            corrupt.append(other)
    assert len(pairs) == 32
    nodes = model_nodes(model)
    found = attribute(model, tokenizer, pairs, nodes, corrupt=corrupt)
    measured = check(found, model, tokenizer, pairs, corrupt=corrupt)
    assert found.margin.mean > found.corrupt_margin.mean
    rho = rank_correlation(measured.nodes)
    print(f"Spearman's rho {rho:.3f}")
    assert rho > 0.85
    table = shown(measured, measured=True)
    assert max(map(len, table.splitlines())) <= 80
    assert f"24 of them: {rho:.2f}" in table and "after the corrupt prompts" in table


def test_in_bfloat16_the_same_nodes_come_out_on_top(circuit):
    model = planted_model().to(torch.bfloat16)
    pairs, corrupt = contrasts(24)
    nodes = model_nodes(model, ["heads", "mlps"])
    rough, exact = (
        attribute(one, circuit[1], pairs, nodes, sae=planted_sae(), corrupt=corrupt)
        for one in (model, circuit[0])
    )
    assert {effect.node.point for effect in rough.nodes[:2]} == {HEAD, MLP}
    assert {effect.node.feature for effect in rough.features[:2]} == PLANTED
    assert rough.nodes[0].attribution.mean == pytest.approx(
        exact.nodes[0].attribution.mean, rel=0.1
    )


def test_rank_correlation_by_hand():
    def effects(*values):
        node = Node("mlp", HookPoint(0, "mlp_out"))
        return [Effect(node, Score(a, None), Score(b, None)) for a, b in values]

    assert rank_correlation(effects((1, 10), (2, 20), (3, 30))) == pytest.approx(1)
    assert rank_correlation(effects((1, 30), (2, 20), (3, 10))) == pytest.approx(-1)
    # d = (0, 1, 1): 1 − 6·2 / (3·8)
    assert rank_correlation(effects((1, 10), (2, 30), (3, 20))) == pytest.approx(0.5)
    assert rank_correlation(effects((1, 1), (1, 2), (1, 3))) is None
    assert rank_correlation(effects((1, 1), (2, 2))) is None


def test_nodes_of_a_model():
    model = tiny_model()
    assert len(model_nodes(model)) == 3 * (1 + 4 + 1)
    assert [str(node) for node in model_nodes(model, ["mlps"])] == [
        f"layers.{i}.mlp_out" for i in range(3)
    ]
    assert str(model_nodes(model, ["blocks"])[1]) == "layers.1, the block"
    with pytest.raises(ConfigError, match="did you mean 'heads'"):
        model_nodes(model, ["head"])
    with pytest.raises(HookPointError):
        attribute(model, tiny_tokenizer(), SOME, [Node("mlp", HookPoint(9, "mlp_out"))])


def test_what_is_refused():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    nodes = model_nodes(model, ["mlps"])
    with pytest.raises(
        PairsError, match="pair 2: the prompt has 5 tokens and the corrupt prompt 3"
    ):
        attribute(model, tokenizer, SOME, nodes, corrupt=[OTHER[0], "the sea", OTHER[2]])
    with pytest.raises(PairsError, match="2 corrupt prompts for 3 pairs"):
        attribute(model, tokenizer, SOME, nodes, corrupt=OTHER[:2])
    with pytest.raises(PairsError, match="no contrast pairs"):
        attribute(model, tokenizer, [], nodes)
    with pytest.raises(PairsError, match="pair 1: '<eos>' has no token to predict"):
        attribute(model, tokenizer, [Pair("the", "<eos>", " sea")], nodes)
    with pytest.raises(PairsError, match="contexts hold 128"):
        attribute(model, tokenizer, [Pair("sea " * 130, " sea", " sun")], nodes)
    with pytest.raises(SteeringError, match="nothing to rank"):
        attribute(model, tokenizer, SOME, [])
    (batch,), sae = contrast_batches(model, tokenizer, SOME), tiny_sae()
    with pytest.raises(PairsError, match="a batch without corrupt prompts, and no means"):
        baseline(model, batch, points_of(nodes), None)
    own = activations(model, points_of([], sae), batch.ids, batch.mask)
    with pytest.raises(SteeringError, match="no mean of feature 3"):
        feature_change(3, sae, batch, own, mean_baseline(model, [batch], []))


def test_reading_contrasts(tmp_path):
    path, tokenizer = tmp_path / "pairs.jsonl", tiny_tokenizer()

    def write(*records):
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        return read_contrasts(path, tokenizer)

    a = {"prompt": "the sea", "chosen": " good", "rejected": " bad"}
    b = {"prompt": "the sun", "chosen": " bad", "rejected": " good"}
    assert write(a, b, a) == ([Pair(**a), Pair(**b)], None)
    pairs, corrupt = write(a | {"corrupt": "the sun"}, b | {"corrupt": "the sea"})
    assert pairs == [Pair(**a), Pair(**b)] and corrupt == ["the sun", "the sea"]
    with pytest.raises(PairsError, match="1 of 2 pairs have a 'corrupt' prompt"):
        write(a | {"corrupt": "the sun"}, b)
    with pytest.raises(PairsError, match="line 1: 'corrupt' is no text"):
        write(a | {"corrupt": 3})


def test_measured_effects_come_first_and_wrong_attributions_are_marked():
    def one(layer, told, found):
        node = Node("mlp", HookPoint(layer, "mlp_out"))
        return Effect(node, Score(told, 0.1), Score(found, 0.1))

    nodes = (one(0, 2.0, 1.0), one(1, -1.0, 0.5), one(2, 0.5, 4.0), one(3, 0.0, 0.0))
    found = replace(
        attribute(tiny_model(), tiny_tokenizer(), SOME, model_nodes(tiny_model(), ["mlps"])),
        nodes=nodes,
    )
    rows = [line for line in shown(found, measured=True).splitlines() if "mlp_out" in line]
    assert [line.split(".")[1] for line in rows] == ["2", "0", "1", "3"]
    assert [line.endswith("*") for line in rows] == [True, False, True, False]
    assert "factor of 3" in shown(found, measured=True)
    plain = [line for line in shown(found).splitlines() if "mlp_out" in line]
    assert [line.split(".")[1] for line in plain] == ["0", "1", "2", "3"]
    assert not any(line.endswith("*") for line in plain)
    assert "mlp_out" in shown(found, limit=1, measured=True).split("layers.2")[1]
