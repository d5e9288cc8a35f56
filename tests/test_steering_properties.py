"""Law 2 as a property: over architectures, caches, padding and kinds of edit, one answer.

Also where the edits of the other property tests come from.
"""

import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
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
from saesteer.steering.conditions import Feature, Projection, When
from saesteer.steering.edits import Add, Affine, Clamp, Edit, Project, Rotate
from saesteer.steering.engine import steer
from saesteer.steering.positions import Positions
from saesteer.steering.schedules import Decay, Linear
from tests.tiny import ARCHITECTURES, BOS, PAD, VOCAB, WIDTH, random_ids, tiny_model, tiny_sae

model_of = cache(tiny_model)

# Architectures of SAEs, and what they do to their input.
SAES: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "topk": ("topk", {}),
    "jumprelu": ("jumprelu", {}),
    "gated": ("gated", {"apply_b_dec_to_input": False}),
    "centred": ("standard", {"center_writing_weights": True}),
    "layer norm": ("standard", {"normalize_activations": "layer_norm"}),
    "norm": ("jumprelu", {"normalize_activations": "constant_norm_rescale"}),
    "decoder norms": ("topk", {"rescale_acts_by_decoder_norm": True}),
}
HEAD_WIDTH = 8


@cache
def sae_at(point: HookPoint, kind: str = "standard") -> Sae:
    architecture, conventions = SAES[kind]
    return tiny_sae(architecture, point=point, seed=point.layer, **conventions)


def vector(seed: int, width: int = WIDTH) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def rounded(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda x: round(x, 2))


points = st.builds(HookPoint, st.integers(0, 2), st.sampled_from(SITES))
few_wheres = st.sampled_from([Positions(), Positions(special=True), Positions(generated=False)])
clamps = st.builds(
    lambda point, feature, value, how, where: Clamp(
        sae_at(point), feature, value, how, where=where
    ),
    points,
    st.integers(0, 63),
    rounded(0, 4),
    st.sampled_from(["set", "min", "max", "scale"]),
    few_wheres,
)
adds = st.builds(
    lambda point, seed, strength, where: Add(vector(seed), strength, point, where=where),
    points,
    st.integers(0, 9),
    rounded(-1, 1),
    few_wheres,
)
narrowings: dict[str, st.SearchStrategy[Any]] = {
    "special": st.booleans(),
    "spans": st.sampled_from([None, ((1, 4),), ((0, 2), (3, None))]),
    "every": st.sampled_from([1, 1, 2]),
    "after": st.sampled_from([None, None, None, "a"]),
}
ends = st.sampled_from([None, None, 2])
wheres = st.one_of(
    st.builds(Positions, first=ends, last=ends, **narrowings),
    st.builds(Positions, generated=st.just(False), first=ends, last=ends, **narrowings),
    st.builds(Positions, prompt=st.just(False), **narrowings),
)
conditions = st.one_of(
    st.none(),
    st.tuples(st.integers(0, 9), rounded(-1, 1), st.sampled_from(["while", "from", "until"])),
)
schedules = st.sampled_from([None, None, Linear(1.0, 0.0, 3), Linear(0.5, 2.0, 2), Decay(2.0)])


# SAEs whose activations never jump.
CONTINUOUS = ["standard", "centred", "layer norm"]


@st.composite
def edits(draw: Any, gates: bool = True) -> Edit:
    """Any edit there is. gates: whether it may jump on or off between one number and the next."""
    point, saes = draw(points), list(SAES) if gates else CONTINUOUS
    how: dict[str, Any] = {
        "where": draw(wheres),
        "schedule": draw(schedules),
        "keep_norm": draw(st.booleans()),
    }
    given_when = draw(conditions)
    if gates and given_when is not None:
        seed, above, lasting = given_when
        # Read at the edit's own place or at the beginning of its block.
        read = draw(st.sampled_from([point, HookPoint(point.layer, "resid_pre")]))
        reads = (
            Projection(vector(seed), read)
            if draw(st.booleans())
            else Feature(sae_at(read, draw(st.sampled_from(saes))), seed)
        )
        how["when"] = When(reads, above, lasting)
    kinds = ["clamp", "clamp", "add", "project", "affine", "by", "to", "head"]
    kind = draw(st.sampled_from(kinds))
    seed = draw(st.integers(0, 9))
    if kind == "clamp":
        sae = sae_at(point, draw(st.sampled_from(saes)))
        way = draw(st.sampled_from(["set", "min", "max", "scale"]))
        return Clamp(sae, seed, draw(rounded(0, 4)), way, **how)
    if kind == "add":
        return Add(vector(seed), draw(rounded(-1, 1)), point, **how)
    if kind == "head":
        how.pop("when", None)
        head = HookPoint(point.layer, "head.2")
        return Add(vector(seed, HEAD_WIDTH), draw(rounded(-2, 2)), head, **how)
    if kind == "project":
        return Project(vector(seed), point, draw(rounded(-2, 2)), **how)
    if kind == "affine":
        matrix = torch.eye(WIDTH) + 0.05 * vector(seed, WIDTH * WIDTH).view(WIDTH, WIDTH)
        return Affine(matrix, vector(seed + 1) * 0.1, point, **how)
    return Rotate(vector(seed), vector(seed + 1), draw(rounded(-3, 3)), point, kind, **how)


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


def test_two_contexts_open_at_once_on_two_models_do_not_meet() -> None:
    """Every pass of one model begins together with one of the other."""
    models, ids = [tiny_model("llama"), tiny_model("gpt2")], random_ids(2, 6)
    # What a condition remembers from pass to pass is its context's own.
    when = When(Projection(vector(2), HookPoint(0, "resid_post")), 0.5, "from")
    some: list[Edit] = [
        Clamp(sae_at(HookPoint(1, "resid_post")), 5, 3.0),
        Add(vector(1), 2.0, "layers.1.mlp_out", when=when),
    ]
    how: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    how |= {"attention_mask": torch.ones_like(ids), "pad_token_id": PAD}

    def written(i: int, meet: threading.Barrier | None = None) -> Any:
        def together(*_: Any) -> None:
            if meet is not None:
                meet.wait()

        hook = models[i].register_forward_pre_hook(together)
        try:
            with steer(models[i], some[i]) as receipt:
                text = models[i].generate(ids, **how).tolist()
                together()  # neither context ends before the other's last pass
            return text, receipt.edits
        finally:
            hook.remove()

    expected = [written(i) for i in range(2)]
    meet = threading.Barrier(2, timeout=20)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda i: written(i, meet), range(2))) == expected
    assert expected[0] != expected[1]
