"""Law 2 as a property: over architectures, caches, padding and kinds of edit, one answer."""

import inspect
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from saesteer.core.model import SITES, HookPoint
from saesteer.core.sae import Sae
from saesteer.steering.edits import Add, Clamp, Edit
from saesteer.steering.engine import steer
from saesteer.steering.positions import Positions
from tests.tiny import ARCHITECTURES, BOS, PAD, VOCAB, WIDTH, tiny_model, tiny_sae

model_of = cache(tiny_model)

points = st.builds(HookPoint, st.integers(0, 2), st.sampled_from(SITES))
wheres = st.sampled_from([Positions(), Positions(special=True), Positions(generated=False)])
clamps = st.builds(
    lambda point, feature, value, how, where: Clamp(
        sae_at(point), feature, value, how, where=where
    ),
    points,
    st.integers(0, 63),
    st.floats(0, 4).map(lambda x: round(x, 2)),
    st.sampled_from(["set", "min", "max", "scale"]),
    wheres,
)
adds = st.builds(
    lambda point, seed, strength, where: Add(
        torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)),
        strength,
        point,
        where=where,
    ),
    points,
    st.integers(0, 9),
    st.floats(-1, 1).map(lambda x: round(x, 2)),
    wheres,
)


@cache
def sae_at(point: HookPoint) -> Sae:
    return tiny_sae(point=point, seed=point.layer)


def run(model: PreTrainedModel, ids: Tensor, mask: Tensor, steps: list[int]) -> Tensor:
    """Logits [batch, seq, vocab] of passes that end at `steps`, with a cache between them."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    takes = "position_ids" in inspect.signature(model.forward).parameters
    past, start, logits = None, 0, []
    for stop in steps:
        call: dict[str, Any] = {"position_ids": positions[:, start:stop]} if takes else {}
        if len(steps) > 1:
            call |= {"past_key_values": past, "use_cache": True}
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], **call)
        past, start = out.past_key_values if len(steps) > 1 else None, stop
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.filterwarnings("ignore:.*never bound")
@settings(
    max_examples=24,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    arch=st.sampled_from(ARCHITECTURES),
    edits=st.lists(st.one_of(clamps, adds), min_size=1, max_size=4),
    lengths=st.lists(st.integers(2, 10), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    cut=st.integers(2, 5),
)
def test_one_answer_however_it_is_computed(
    arch: str, edits: list[Edit], lengths: list[int], seed: int, cut: int
) -> None:
    model = model_of(arch)
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(4, VOCAB, (n,), generator=generator) for n in lengths]
    for row in rows:
        row[0] = BOS
    width = max(lengths)
    expected, counts = [], []
    with torch.no_grad():
        for row in rows:
            with steer(model, edits) as receipt:
                expected.append(run(model, row[None], torch.ones(1, len(row)).long(), [len(row)]))
            counts.append([edit.counts[0][0] for edit in receipt.edits])
        for side in ("left", "right"):
            ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width).long()
            kept = []
            for i, row in enumerate(rows):
                at = slice(width - len(row), None) if side == "left" else slice(0, len(row))
                ids[i, at], mask[i, at] = row, 1
                kept.append(at)
            ways = [[width]] if side == "right" else [[width], [*range(cut, width, cut), width]]
            for steps in ways:
                with steer(model, edits) as receipt:
                    logits = run(model, ids, mask, steps)
                for i, row in enumerate(rows):
                    torch.testing.assert_close(
                        logits[i, kept[i]], expected[i][0, : len(row)], rtol=0, atol=1e-4
                    )
                for j, edit in enumerate(receipt.edits):
                    assert edit.counts == [[count[j] for count in counts]]
