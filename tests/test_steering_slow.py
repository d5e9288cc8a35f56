"""Every edit, place, time and row against `tests.slow`, however the engine computes it."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from saesteer.core.blocks import point_width
from saesteer.core.model import SITES, HookPoint
from saesteer.core.sae import Sae
from saesteer.errors import HookPointError, NothingSteeredError, SteeringError
from saesteer.steering.conditions import Feature, Projection, When
from saesteer.steering.edits import Add, Affine, Clamp, Edit, Project, Rotate, place
from saesteer.steering.engine import steer
from saesteer.steering.positions import Positions
from saesteer.steering.schedules import Decay, Linear
from tests import slow
from tests.test_steering_properties import model_of, run
from tests.tiny import ARCHITECTURES, BOS, EOS, PAD, UNK, VOCAB, WIDTH, tiny_sae, tiny_tokenizer

SPECIAL = {PAD, BOS, EOS, UNK}
KINDS = ("standard", "topk", "jumprelu", "gated")


@cache
def sae_at(kind: str, point: HookPoint) -> Sae:
    return tiny_sae(kind, point=point, seed=point.layer)


def vector(seed: int, width: int = WIDTH) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def rounded(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda x: round(x, 2))


points = st.builds(HookPoint, st.integers(0, 2), st.sampled_from(SITES))
spans = st.sampled_from([None, ((1, 4),), ((0, 2), (3, None))])
wheres = st.builds(
    lambda special, last, spans, every, after: Positions(
        special=special, last=last, spans=spans, every=every, after=after
    ),
    st.booleans(),
    st.sampled_from([None, None, 2]),
    spans,
    st.sampled_from([1, 1, 2]),
    st.sampled_from([None, None, None, "a"]),
)
conditions = st.one_of(
    st.none(),
    st.builds(
        lambda seed, above, lasting: (seed, above, lasting),
        st.integers(0, 9),
        rounded(-1, 1),
        st.sampled_from(["while", "from", "until"]),
    ),
)
schedules = st.sampled_from([None, None, Linear(1.0, 0.0, 3), Linear(0.5, 2.0, 2), Decay(2.0)])


@st.composite
def edits(draw: Any) -> Edit:
    point = draw(points)
    how: dict[str, Any] = {
        "where": draw(wheres),
        "schedule": draw(schedules),
        "keep_norm": draw(st.booleans()),
    }
    given_when = draw(conditions)
    if given_when is not None:
        seed, above, lasting = given_when
        # Read at the edit's own place or at the beginning of its block.
        at = draw(st.sampled_from([point, HookPoint(point.layer, "resid_pre")]))
        reads = (
            Projection(vector(seed), at)
            if draw(st.booleans())
            else Feature(sae_at("jumprelu", at), seed)
        )
        how["when"] = When(reads, above, lasting)
    kind = draw(st.sampled_from(["clamp", "clamp", "add", "project", "affine", "by", "to"]))
    seed = draw(st.integers(0, 9))
    if kind == "clamp":
        sae = sae_at(draw(st.sampled_from(KINDS)), point)
        way = draw(st.sampled_from(["set", "min", "max", "scale"]))
        return Clamp(sae, seed, draw(rounded(0, 4)), way, **how)
    if kind == "add":
        return Add(vector(seed), draw(rounded(-1, 1)), point, **how)
    if kind == "project":
        return Project(vector(seed), point, draw(rounded(-2, 2)), **how)
    if kind == "affine":
        matrix = torch.eye(WIDTH) + 0.05 * vector(seed, WIDTH * WIDTH).view(WIDTH, WIDTH)
        return Affine(matrix, vector(seed + 1) * 0.1, point, **how)
    return Rotate(vector(seed), vector(seed + 1), draw(rounded(-3, 3)), point, kind, **how)


@pytest.mark.filterwarnings("ignore:.*never (bound|applied)")
@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    arch=st.sampled_from(ARCHITECTURES),
    lists=st.lists(st.lists(edits(), min_size=0, max_size=3), min_size=1, max_size=3),
    own=st.booleans(),
    seed=st.integers(0, 99),
    cut=st.integers(7, 8),
)
def test_the_engine_agrees_with_the_slow_reference(
    arch: str, lists: list[list[Edit]], own: bool, seed: int, cut: int
) -> None:
    """own: rows have lists of their own; else the first list is for all."""
    if not own and not lists[0]:
        lists[0] = [Add(vector(0), 0.5, HookPoint(1, "resid_post"))]
    model, tokenizer = model_of(arch), tiny_tokenizer()
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(4, VOCAB, (n,), generator=generator) for n in (10, 9, 10)[: len(lists)]]
    prompt = 6  # columns; rows are padded on the left
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width).long()
    expected = []
    for i, row in enumerate(rows):
        row[0] = BOS
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
        of_row = lists[i] if own else lists[0]
        length = prompt - (width - len(row))
        how = {"special": SPECIAL, "prompt_length": length, "tokenizer": tokenizer}
        expected.append(slow.logits(model, row.tolist(), of_row, **how))
    given_edits: Any = lists if own else lists[0]
    if own and not any(lists):
        return  # no edits at all: refused
    for steps in ([width], [prompt, cut, width], [prompt, *range(prompt + 1, width + 1)]):
        with torch.no_grad():
            try:
                with steer(model, given_edits, tokenizer=tokenizer, prompt_length=prompt):
                    found = run(model, ids, mask, steps)
            except NothingSteeredError:
                return  # an edit that is for no token: the engine says so
        for i, row in enumerate(rows):
            torch.testing.assert_close(
                found[i, width - len(row) :], expected[i], rtol=1e-3, atol=2e-4
            )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_single_heads_are_steered(arch: str) -> None:
    model = model_of(arch)
    point = HookPoint(1, "head.2")
    width = point_width(model, point)
    row = [BOS, 5, 6, 7, 8]
    some: list[Edit] = [
        Add(vector(0, width), 1.5, point),
        Project(vector(1, width), HookPoint(1, "head.0"), 0.5),
    ]
    expected = slow.logits(model, row, some, special=SPECIAL)
    with torch.no_grad(), steer(model, some):
        found = model(torch.tensor([row])).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    plain = model(torch.tensor([row])).logits[0]
    assert float((plain - found).abs().max()) > 1e-3


def test_a_head_out_of_range_and_a_vector_of_another_width_are_refused() -> None:
    model = model_of("llama")
    with (
        pytest.raises(HookPointError, match=r"head\.0 to head\.3"),
        steer(model, Add(vector(0, 8), 1.0, "layers.1.head.4")),
    ):
        pass
    with (
        pytest.raises(SteeringError, match="32 dimensions and the model has 8"),
        steer(model, Add(vector(0), 1.0, "layers.1.head.1")),
    ):
        pass
    assert place(Add(vector(0, 8), 1.0, "layers.1.head.1")).head == 1
