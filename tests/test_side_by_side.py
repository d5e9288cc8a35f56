"""Texts with and without edits: what a sweep's rows are, and what is measured in each text."""

import math
from dataclasses import replace

import pytest
import torch

from saesteer.core.hooks import activations
from saesteer.core.model import HookPoint
from saesteer.effects import readings, side_by_side
from saesteer.effects.damage import distinct_n
from saesteer.effects.side_by_side import Sampling, measures
from saesteer.errors import SteeringError
from saesteer.steering.edits import Add, Clamp, Project, Rotate
from tests.tiny import EOS, WIDTH, generate, tiny_model, tiny_sae, tiny_tokenizer

HOW = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(), tiny_tokenizer(), tiny_sae()


def test_ce_is_the_mean_surprise_of_the_counted_tokens():
    # Probabilities of the three tokens after each position.
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.25, 0.5, 0.25], [1 / 3] * 3])
    ids = torch.tensor([0, 2, 1, 1])
    counted = torch.tensor([False, False, True, True])
    assert measures(p.log(), ids, counted, None).ce == pytest.approx(
        -(math.log(0.2) + math.log(0.5)) / 2
    )
    every = torch.tensor([True] * 4)
    expected = -(math.log(0.25) + math.log(0.2) + math.log(0.5)) / 3
    assert measures(p.log(), ids, every, None).ce == pytest.approx(expected)
    assert measures(p.log(), ids, torch.zeros(4, dtype=torch.bool), None).ce is None


def test_distinct_n_counts_n_grams_of_one_text():
    assert distinct_n([[1, 2, 1, 2, 1]], 2) == 2 / 4
    assert distinct_n([[1, 2, 1, 2, 1]], 1) == 2 / 5
    assert distinct_n([[1, 2, 3]], 2) == 1
    assert distinct_n([[1]], 2) is None


def test_measures_are_of_the_counted_tokens_alone():
    counted = torch.tensor([False, True, False, True])
    values = torch.tensor([100.0, 1.0, 100.0, 4.0])
    found = measures(torch.zeros(4, 5), torch.tensor([1, 2, 3, 2]), counted, values)
    assert found.n_tokens == 2 and found.activation == 2.5 and found.distinct_2 == 1
    assert found.ce == pytest.approx(math.log(5))
    none = measures(torch.zeros(4, 5), torch.tensor([1, 2, 3, 2]), counted & False, values)
    assert (none.n_tokens, none.ce, none.distinct_2, none.activation) == (0, None, None, None)


def test_a_sweep_is_one_generate_and_each_row_what_it_is_alone(tiny, monkeypatch):
    model, tokenizer, sae = tiny
    vector = torch.linspace(-1, 1, WIDTH)
    edits = [Clamp(sae, 5, 2.0), Add(vector, 2.0, "layers.1.resid_post")]
    calls = []
    generated = type(model).generate

    def counted(self, *args, **kwargs):
        calls.append(kwargs["input_ids"].shape[0])
        return generated(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", counted)
    prompt, seeds = "the boy saw a ship", [3, 3]
    reading = readings.of_feature(sae, 5)
    swept, receipt = side_by_side.sweep(
        model, tokenizer, prompt, edits, [0, 1, 3], seed=3, sampling=HOW, reading=reading
    )
    assert calls == [4]
    assert [side.strength for side in swept.sides] == [None, 0, 1, 3]
    assert [edit.row for edit in receipt.edits] == [1, 1, 2, 2, 3, 3]
    for side in swept.sides[1:]:
        alone = [
            Clamp(sae, 5, 2.0 * side.strength),
            Add(vector, 2.0 * side.strength, edits[1].point),
        ]
        (pair,), _ = side_by_side.pairs(
            model, tokenizer, [prompt], alone, seeds=[3], sampling=HOW, reading=reading
        )
        assert pair.sides[0].written == swept.sides[0].written
        assert pair.sides[1].written == side.written
        assert pair.sides[1].measures == side.measures
        assert [t.edited for t in pair.sides[1].trace] == [t.edited for t in side.trace]
    assert len({side.written.text for side in swept.sides}) > 2
    texts = generate(model, tokenizer, [prompt] * 2, max_new_tokens=8, seed=seeds)
    assert texts == [swept.sides[0].written.text] * 2


def test_measures_are_read_in_the_unsteered_model(tiny):
    model, tokenizer, sae = tiny
    prompts = ["the boy", "once upon a time there was"] * 6
    found, receipt = side_by_side.pairs(
        model, tokenizer, prompts, [Clamp(sae, 5, 40.0)], seeds=range(12),
        sampling=Sampling(max_new_tokens=24), reading=readings.of_feature(sae, 5),
    )  # fmt: skip
    assert any(one.sides[0].written.new[-1] == EOS for one in found)  # it isn't counted
    edited = 0
    for one in found:
        for side in one.sides:
            ids = torch.tensor([[*side.written.prompt, *side.written.new]])
            a = sae.activation(activations(model, [sae.hook_point], ids)[sae.hook_point], [5])
            a = a[0, :, 0].tolist()
            assert [t.before for t in side.trace] == pytest.approx(a, abs=1e-5)
            at = [
                i for i in range(len(side.written.prompt), ids.shape[1]) if int(ids[0, i]) > EOS + 1
            ]
            assert side.measures.n_tokens == len(at)
            assert side.measures.activation == pytest.approx(
                sum(a[i] for i in at) / len(at), abs=1e-5
            )
            with torch.no_grad():
                log_p = model(ids).logits[0].log_softmax(-1)
            ce = -sum(float(log_p[i - 1, int(ids[0, i])]) for i in at) / len(at)
            assert side.measures.ce == pytest.approx(ce, abs=1e-4)
        assert not any(t.edited or t.after is not None for t in one.sides[0].trace)
        assert {t.after for t in one.sides[1].trace if t.edited} == {40.0}
        assert not one.sides[1].trace[0].edited  # BOS
        assert one.top == max(t.before for side in one.sides for t in side.trace)
        edited += sum(t.edited for t in one.sides[1].trace)
    assert edited == receipt.edits[0].n_edited


def test_only_what_has_a_strength_can_be_swept(tiny):
    model, tokenizer, sae = tiny
    assert side_by_side.scaled(Clamp(sae, 5, 2.0, "min"), 4).value == 8
    first, second = torch.eye(WIDTH)[:2]
    turn = side_by_side.scaled(Rotate(first, second, 0.5, "layers.1.resid_post", "to"), 3)
    assert (turn.angle, turn.how) == (1.5, "to")
    assert side_by_side.scaled(Project(first, "layers.1.resid_post", to=-2.0), 2).to == -4
    edit = Project(torch.ones(WIDTH), "layers.1.resid_post")
    with pytest.raises(SteeringError, match="has no strength to multiply"):
        side_by_side.sweep(model, tokenizer, "the boy", [edit], [1.0])
    with pytest.raises(SteeringError, match="no strengths"):
        side_by_side.sweep(model, tokenizer, "the boy", [Clamp(sae, 5, 2.0)], [])


def test_what_an_edit_is_about(tiny):
    _, _, sae = tiny
    x = torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(0))
    clamp = readings.of_edit(Clamp(sae, 7, 1.0))
    assert clamp.name == "feature 7"
    assert torch.equal(clamp.read(x), sae.activation(x, [7])[..., 0])
    moved = readings.of_edit(Clamp(sae, 7, 1.0, point=HookPoint(0, "mlp_out")))
    assert moved.point == HookPoint(0, "mlp_out") != sae.hook_point
    add = readings.of_edit(Add(3 * torch.eye(WIDTH)[4], 2.0, "layers.0.resid_post"))
    assert torch.allclose(add.read(x), x[..., 4])
    out = readings.of_edit(Project(torch.eye(WIDTH)[4], "layers.1.resid_post"))
    assert torch.allclose(out.read(x), x[..., 4])
    turn = Rotate(torch.eye(WIDTH)[0], torch.eye(WIDTH)[1], 1.0, "layers.1.resid_post")
    assert readings.of_edit(turn) is None


def test_a_transcoders_feature_is_read_where_the_transcoder_reads() -> None:
    sae = tiny_sae("jumprelu", point=HookPoint(1, "resid_pre"), apply_b_dec_to_input=False)
    clamp = Clamp(replace(sae, hook_point_out=HookPoint(1, "mlp_out")), 7, 1.0)
    reading = readings.of_edit(clamp)
    assert reading is not None and reading.point == sae.hook_point
    x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reading.read(x), sae.activation(x, [7])[..., 0])
