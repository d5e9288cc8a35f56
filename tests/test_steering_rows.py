"""Rows with edits of their own, conditions that last, positions and schedules, in `generate`."""

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.core.clock import SteeringWarning
from saesteer.core.hooks import capture
from saesteer.core.model import HookPoint
from saesteer.errors import NothingSteeredError, SteeringError
from saesteer.steering.conditions import Feature, Projection, When
from saesteer.steering.edits import Add, Clamp, Edit, Project, Rotate
from saesteer.steering.engine import steer
from saesteer.steering.positions import Positions
from saesteer.steering.schedules import Decay, Linear
from tests.tiny import BOS, EOS, PAD, WIDTH, random_ids, tiny_model, tiny_sae, tiny_tokenizer

MIDDLE = HookPoint(1, "resid_post")
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}


def vector(seed: int = 0, width: int = WIDTH) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def texts(model: Any, ids: Tensor, edits: Any, **how: Any) -> list[list[int]]:
    """Greedy texts; without edits those of the model as it is."""
    with steer(model, edits) if edits else nullcontext():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **how).tolist()


# --- rows ----------------------------------------------------------------------------------------


def lists() -> list[list[Edit]]:
    sae, topk = tiny_sae(), tiny_sae("topk")
    return [
        [],
        [Clamp(sae, 5, 8.0)],
        [Clamp(sae, 9, 8.0), Clamp(sae, 5, 0.0), Add(vector(1), 2.0, "layers.0.resid_post")],
        [Add(vector(2), 1.0, "layers.0.resid_post"), Clamp(topk, 5, 4.0)],
        [Clamp(sae, 5, 8.0), Clamp(sae, 5, 2.0, "scale"), Project(vector(3), MIDDLE, 2.0)],
    ]


@pytest.mark.parametrize("use_cache", [True, False])
def test_every_row_has_its_own_edits_as_if_it_were_alone(use_cache: bool) -> None:
    model, ids = tiny_model(), random_ids(1, 5)
    together = texts(model, ids.expand(5, -1), lists(), use_cache=use_cache)
    alone = [texts(model, ids, edits)[0] for edits in lists()[1:]]
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY).tolist()
    assert together == [*plain, *alone]
    assert len({tuple(text) for text in together}) == 5


def test_rows_go_with_their_beams_and_return_sequences() -> None:
    model, ids = tiny_model(), random_ids(2, 5)
    edits: list[list[Edit]] = [[Add(vector(), 2.0, MIDDLE)], []]
    how = {"num_beams": 3, "num_return_sequences": 2}
    together = texts(model, ids, edits, **how)
    first = texts(model, ids[:1], edits[0], **how)
    second = model.generate(
        ids[1:], attention_mask=torch.ones_like(ids[1:]), **GREEDY, **how
    ).tolist()
    assert together == [*first, *second]


def test_a_batch_of_other_than_as_many_rows_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(SteeringError, match="5 lists of edits for a batch of 2 rows"):
        texts(model, random_ids(2, 4), lists())
    with (
        pytest.raises(SteeringError, match="mixed"),
        steer(model, [Add(vector(), 1.0, MIDDLE), []]),
    ):  # type: ignore[list-item]
        pass
    with pytest.raises(SteeringError, match="no edits"), steer(model, [[], []]):
        pass


def test_the_receipt_names_rows_and_only_a_rows_own_tokens_must_be_touched() -> None:
    model, ids = tiny_model(), random_ids(2, 4)
    ids[0] = BOS  # nothing to steer in row 0, and nothing is to be
    with torch.no_grad(), steer(model, [[], [Add(vector(), 1.0, MIDDLE)]]) as receipt:
        model(ids)
    (edit,) = receipt.edits
    assert edit.row == 1 and edit.counts == [[0, int((ids[1] > 3).sum())]]
    with (
        torch.no_grad(),
        pytest.raises(NothingSteeredError, match="row 0"),
        steer(model, [[Add(vector(), 1.0, MIDDLE)], []]),
    ):
        model(ids)


def test_gradients_flow_to_the_vectors_of_rows() -> None:
    model, ids = tiny_model(), random_ids(2, 4)
    vectors = [vector(i).requires_grad_() for i in range(2)]
    with steer(model, [[Add(v, 1.0, MIDDLE)] for v in vectors]):
        model(ids).logits[0].sum().backward()
    assert vectors[0].grad is not None and bool(vectors[0].grad.any())
    assert vectors[1].grad is None or not bool(vectors[1].grad.any())


# --- conditions ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*never applied")
def test_a_condition_holds_row_by_row_and_lasts_over_cached_steps() -> None:
    """What is generated with a cache and without, alone and in a batch, is one text."""
    model, ids = tiny_model(), random_ids(4, 5)
    for lasting in ("while", "from", "until"):
        for reads in (Feature(tiny_sae(), 7), Projection(vector(4), "layers.0.resid_post")):
            when = When(reads, 0.5, lasting)  # type: ignore[arg-type]
            edit = Add(vector(), 1.0, MIDDLE, when=when)
            cached = texts(model, ids, edit, use_cache=True)
            assert cached == texts(model, ids, edit, use_cache=False)
            assert cached == [texts(model, row[None], edit)[0] for row in ids]


def test_a_lasting_condition_starts_afresh_with_each_prompt() -> None:
    model = tiny_model()
    ids = random_ids(1, 6)
    with capture(model, [MIDDLE]) as found:
        model(ids)
    x = found[MIDDLE][0]
    direction = x[2] - x.mean(0)
    level = float((x @ direction).topk(2).values.mean())  # only the token at 2 is above it
    edit = Add(vector(), 1.0, MIDDLE, when=When(Projection(direction, MIDDLE), level, "from"))
    with torch.no_grad(), steer(model, edit) as receipt:
        for _ in range(2):
            model(ids)
    assert receipt.edits[0].positions == [[[2, 3, 4, 5]]] * 2


def test_a_lasting_condition_forgets_what_was_taken_back_and_refuses_what_it_never_saw() -> None:
    model, ids = tiny_model(), random_ids(1, 6).clamp(min=4)
    with capture(model, [MIDDLE]) as found:
        model(ids)
    x = found[MIDDLE][0]
    direction = x[5] - x[:5].mean(0)
    level = float(((x[5] + x[:5].mean(0)) / 2) @ direction)  # only the last token is above it
    when = When(Projection(direction, MIDDLE), level, "from")
    with (
        torch.no_grad(),
        pytest.warns(SteeringWarning, match="held nowhere on all 7 tokens"),
        steer(model, Add(vector(), 1.0, MIDDLE, when=when)) as receipt,
    ):
        out = model(ids, use_cache=True)
        out.past_key_values.crop(-1)
        model(ids[:, :2], past_key_values=out.past_key_values)
    # The sixth token is another one now, and the receipt speaks of that.
    assert [token.edited for token in receipt.traces()[0][0]] == [False] * 7
    assert [token.id for token in receipt.traces()[0][0]] == [*ids[0, :5], *ids[0, :2]]
    cache = model(ids, use_cache=True).past_key_values
    with (
        torch.no_grad(),
        pytest.raises(SteeringError, match="the cache was filled elsewhere"),
        steer(model, Add(vector(), 1.0, MIDDLE, when=when)),
    ):
        model(ids[:, :2], past_key_values=cache)


def test_a_condition_that_never_holds_is_warned_of_and_counted() -> None:
    model, when = tiny_model(), When(Projection(vector(), MIDDLE), 1e6)
    with (
        torch.no_grad(),
        pytest.warns(SteeringWarning, match="held nowhere on all 5 tokens"),
        steer(model, Add(vector(), 1.0, MIDDLE, when=when)) as receipt,
    ):
        model(random_ids(1, 5, seed=3).clamp(min=4))
    assert (receipt.edits[0].n_eligible, receipt.edits[0].n_edited) == (5, 0)


def test_conditions_that_cannot_work_are_refused() -> None:
    model = tiny_model()
    later = When(Projection(vector(), "layers.2.resid_pre"), 0.0)
    with (
        pytest.raises(SteeringError, match="comes later"),
        steer(model, Add(vector(), 1.0, MIDDLE, when=later)),
    ):
        pass
    narrow = When(Projection(vector(0, 8), MIDDLE), 0.0)
    with (
        pytest.raises(SteeringError, match="8 dimensions"),
        steer(model, Add(vector(), 1.0, MIDDLE, when=narrow)),
    ):
        pass
    lasting = When(Projection(vector(), MIDDLE), 0.0, "from")
    with pytest.raises(SteeringError, match="beam search"):
        texts(model, random_ids(1, 4), Add(vector(), 1.0, MIDDLE, when=lasting), num_beams=2)
    with pytest.raises(SteeringError, match="lasting='ever'"):
        When(Projection(vector(), MIDDLE), 0.0, "ever")  # type: ignore[arg-type]


# --- schedules and positions ---------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_schedule_counts_generated_tokens(use_cache: bool) -> None:
    model, ids = tiny_model(), random_ids(1, 4).clamp(min=4)
    for schedule, factors in (
        (Linear(1.0, 0.0, 2), [1.0] * 5 + [0.5, 0.0, 0.0]),
        (Decay(1.0), [1.0] * 5 + [0.5, 0.25, 0.125]),
    ):
        edit = Add(vector(), 1.0, MIDDLE, schedule=schedule, where=Positions(special=True))
        sizes: list[float] = []
        with steer(model, edit) as receipt:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), use_cache=use_cache,
                min_new_tokens=5, max_new_tokens=5, do_sample=False, pad_token_id=PAD,
            )  # fmt: skip
        sizes = [float(token.edited) for token in receipt.traces()[0][0]]
        assert sizes == [float(factor != 0) for factor in factors]


def test_a_string_is_looked_for_in_the_text_and_not_in_the_names_of_special_tokens() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    name = tokenizer.bos_token
    ids = torch.tensor([[BOS, *tokenizer("the boy saw the dog").input_ids]])
    for after, first in ((name[1:-1], None), (name, 1), ("the", 2)):
        edit = Add(vector(), 1.0, MIDDLE, where=Positions(after=after))
        expected = pytest.raises(NothingSteeredError) if first is None else nullcontext()
        with torch.no_grad(), expected, steer(model, edit, tokenizer=tokenizer) as receipt:
            model(ids)
        assert receipt.edits[0].positions == [[list(range(first or 6, 6))]]


def test_after_a_string_waits_for_it_also_among_generated_tokens() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = torch.tensor([[BOS, *tokenizer("the boy saw the dog and ran").input_ids]])
    edit = Add(vector(), 1.0, MIDDLE, where=Positions(after="saw the"))
    with torch.no_grad(), steer(model, edit, tokenizer=tokenizer) as receipt:
        model(ids)
    assert receipt.edits[0].positions == [[[5, 6, 7]]]
    with pytest.raises(SteeringError, match="needs the tokenizer"), steer(model, edit):
        model(ids)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Positions(prompt=False, generated=False), "neither"),
        (lambda: Positions(first=0), "first=0"),
        (lambda: Positions(every=-1), "every=-1"),
        (lambda: Positions(prompt=False, last=2), "switched off"),
        (lambda: Positions(after=""), "give the string"),
        (lambda: Positions(spans=((3, 3),)), "from 3 up to 3"),
        (lambda: Linear(over=0), "over 1 token"),
        (lambda: Decay(0.0), "half-life"),
        (lambda: Rotate(vector(), vector() * 2, 1.0, MIDDLE), "parallel"),
        (lambda: Project(torch.zeros(WIDTH), MIDDLE), "no direction"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        make()


def test_a_trace_tells_tokens_and_readings_apart() -> None:
    model, sae, ids = tiny_model(), tiny_sae(), random_ids(1, 4)
    ids[0, 0] = BOS
    with steer(model, Clamp(sae, 5, 8.0)) as receipt:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    (trace,) = receipt.traces()[0]
    assert [token.id for token in trace] == out[0, :-1].tolist()
    assert not trace[0].edited and all(t.edited == (t.id > EOS + 1) for t in trace if t.id)
    assert all(token.after == 8.0 for token in trace if token.edited)
    assert all(token.after == token.before for token in trace if not token.edited)


# --- models of other kinds -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it loads its compiler
def test_a_compiled_model_is_refused_by_name() -> None:
    model = tiny_model()
    with (
        pytest.raises(SteeringError, match="compiled"),
        steer(
            torch.compile(model),  # type: ignore[arg-type]
            Add(vector(), 1.0, MIDDLE),
        ),
    ):
        pass
    model.compile()
    with pytest.raises(SteeringError, match="compiled"), steer(model, Add(vector(), 1.0, MIDDLE)):
        pass


class Int8Linear(torch.nn.Module):
    """As bitsandbytes keeps a linear layer: packed int8 weights, made whole in each call."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().amax(1, keepdim=True) / 127
        packed = (linear.weight / self.scale).round().to(torch.int8).view(-1, 1)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.weight.view(self.out_features, self.in_features).to(x.dtype) * self.scale
        return torch.nn.functional.linear(x, whole)


def test_quantised_linear_layers_are_steered_like_others() -> None:
    model, ids = tiny_model(), random_ids(2, 5).clamp(min=4)
    for block in model.model.layers:
        for half in (block.self_attn, block.mlp):
            for name, linear in list(half.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(half, name, Int8Linear(linear))
    with capture(model, [MIDDLE]) as plain:
        model(ids)
    for site, width in (("resid_post", WIDTH), ("head.3", 8), ("mlp_out", WIDTH)):
        edit = Add(vector(0, width), 1.0, HookPoint(1, site))
        with torch.no_grad(), steer(model, edit) as receipt, capture(model, [MIDDLE]) as found:
            model(ids)
        assert receipt.edits[0].counts == [[5, 5]]
        changed = found[MIDDLE] - plain[MIDDLE]
        assert bool(changed.any(-1).all())
        if site != "head.3":
            torch.testing.assert_close(changed, edit.vector.expand(2, 5, -1))


def test_what_the_mask_leaves_out_is_not_steered_whatever_its_id() -> None:
    """In a bare pass, also after cached ones, padding may be any token."""
    model, ids = tiny_model(), random_ids(2, 6).clamp(min=4)
    mask = torch.ones_like(ids)
    mask[0, 5] = mask[1, 0] = mask[1, 4] = 0
    with torch.no_grad(), steer(model, Add(vector(), 1.0, MIDDLE)) as receipt:
        past = model(ids[:, :3], attention_mask=mask[:, :3], use_cache=True).past_key_values
        model(ids[:, 3:], attention_mask=mask, past_key_values=past)
    assert receipt.edits[0].counts == [[5, 4]]
    assert receipt.edits[0].positions == [[[0, 1, 2, 3, 4], [0, 1, 2, 3]]]


# --- transcoders ---------------------------------------------------------------------------------


def transcoder(architecture: str, **conventions: Any) -> Any:
    sae = tiny_sae(architecture, point=HookPoint(1, "resid_pre"), **conventions)
    skip = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9))
    return dataclasses.replace(sae, hook_point_out=HookPoint(1, "mlp_out"), W_skip=skip)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_a_transcoder_is_read_at_its_input_and_written_at_its_output(architecture: str) -> None:
    model, ids = tiny_model(), random_ids(2, 5).clamp(min=4)
    sae = transcoder(architecture, apply_b_dec_to_input=False)
    points = [sae.hook_point, sae.hook_point_out]
    with torch.no_grad(), capture(model, points) as plain:
        model(ids)
    x, y = (plain[point] for point in points)
    code = sae.encode(x).dense(sae.d_sae).view(2, 5, -1)
    expected = y + (3.0 - code[..., 5:6]) * sae.W_dec[5] + code[..., 7:8] * sae.W_dec[7]
    edits = [Clamp(sae, 5, 3.0), Clamp(sae, 7, 2.0, "scale")]
    # What is added at its input first comes after the reading.
    before = Add(vector(), 0.5, sae.hook_point)
    for some in (edits, [before, *edits], [*edits, before]):
        with torch.no_grad(), steer(model, some) as receipt, capture(model, points) as found:
            model(ids)
        y_now = expected if some is edits else None
        if y_now is not None:
            torch.testing.assert_close(found[points[1]], y_now, atol=1e-4, rtol=0)
        clamp = receipt.edits[some.index(edits[0])]
        assert clamp.before_mean == pytest.approx(float(code[..., 5].mean()), abs=1e-5)
        assert clamp.after_mean == 3.0 and clamp.counts == [[5, 5]]
    rows = texts(model, ids, [edits, []])
    assert rows == [texts(model, ids[:1], edits)[0], texts(model, ids[1:], [])[0]]
    assert texts(model, ids, edits, use_cache=False) == texts(model, ids, edits, use_cache=True)


def test_a_transcoders_clamp_stays_where_it_belongs() -> None:
    sae = transcoder("jumprelu", apply_b_dec_to_input=False)
    with pytest.raises(SteeringError, match="clamped there alone"):
        Clamp(sae, 5, 1.0, point="layers.0.mlp_out")
    again = dataclasses.replace(Clamp(sae, 5, 1.0), value=2.0)
    assert str(again) == "feature 5 set 2 at layers.1.mlp_out"
    late = When(Projection(vector(), "layers.1.attn_out"), 0.0)
    with (
        pytest.raises(SteeringError, match="comes later"),
        steer(tiny_model(), Clamp(sae, 5, 1.0, when=late)),
    ):
        pass
