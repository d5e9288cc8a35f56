"""Where numbers run out: low precision, gates at their thresholds, ties.

An edit is computed in float32 and rounded to the model's dtype, whose eps is the distance from 1 to
the next number: one rounding is wrong by at most eps / 2 of the result.
"""

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from saesteer.core.hooks import activations, capture
from saesteer.core.model import HookPoint
from saesteer.errors import NothingSteeredError
from saesteer.steering.conditions import Feature, Projection, When
from saesteer.steering.edits import Add, Affine, Clamp, Edit, Project, Rotate
from saesteer.steering.engine import steer
from saesteer.steering.schedules import Linear
from tests import slow
from tests.test_steering_properties import SAES, edits, model_of, run, sae_at, vector
from tests.test_steering_slow import SPECIAL, decided, judged, padded, rows_of, slowly
from tests.tiny import ARCHITECTURES, PAD, WIDTH, random_ids, tiny_model, tiny_sae, tiny_tokenizer

HERE = HookPoint(1, "resid_post")
AT = 4  # the token whose gate is put where it is wanted
LOW = [torch.bfloat16, torch.float16]
# A mixture of experts chooses them by a gate of its own, which rounding moves as well.
UNGATED = [arch for arch in ARCHITECTURES if arch not in ("mixtral", "qwen3_moe")]


@cache
def low(arch: str, dtype: torch.dtype) -> PreTrainedModel:
    return tiny_model(arch).to(dtype)


# --- low precision -------------------------------------------------------------------------------


def some_edits() -> dict[str, Edit]:
    sae = sae_at(HERE)
    small = torch.eye(WIDTH) * 0.01
    return {
        "add": Add(vector(1), 3.0, HERE),
        "strong add": Add(vector(1), 300.0, HERE),
        "clamp": Clamp(sae, 5, 3.0),
        "strong clamp": Clamp(sae, 5, 300.0),
        "ablate": Clamp(sae, 5, 0.0),
        "TopK clamp": Clamp(sae_at(HERE, "topk"), 5, 3.0),
        "JumpReLU clamp": Clamp(sae_at(HERE, "norm"), 5, 3.0),
        "project out": Project(vector(1), HERE),
        "shrink": Affine(small, vector(3) * 0.01, HERE),
        "rotate": Rotate(vector(1), vector(2), 1.0, HERE),
        "add, same norm": Add(vector(1), 3.0, HERE, keep_norm=True),
        "clamp, same norm": Clamp(sae, 5, 3.0, keep_norm=True),
    }


@pytest.mark.parametrize("kind", some_edits())
@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
def test_an_edit_is_rounded_once(dtype: torch.dtype, kind: str) -> None:
    """What is written is the exact result, rounded to the nearest number of the dtype."""
    model, ids, edit = (
        low("llama", dtype),
        random_ids(1, 8, seed=2).clamp(min=4),
        some_edits()[kind],
    )
    with torch.no_grad(), capture(model, [HERE]) as found:
        model(ids)
    x = found[HERE][0].double()
    with torch.no_grad(), steer(model, edit), capture(model, [HERE]) as found:
        model(ids)
    exact = torch.stack([slow.applied(row, [(edit, 1.0)]) for row in x])
    # What float32 adds up on the way: of numbers as large as those that go into the sum.
    on_the_way = 1e-6 * (x.abs() + (exact - x).abs() + x.norm(dim=1, keepdim=True))
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + on_the_way
    assert bool(((found[HERE][0].double() - exact).abs() <= allowed).all())


@pytest.mark.filterwarnings("ignore:.*never (bound|applied)")
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_agrees_with_the_slow_reference(dtype: torch.dtype) -> None:
    """Of a model in that dtype, batched, padded and cached.

    Tolerance: three blocks round what they hand on some ten times each, by eps / 2 at most, and
    another layout of the batch rounds it otherwise. Errors of both signs add up like a random
    walk: √30 · eps / 2 = 2.7 eps of the largest logit; 4 are allowed.
    """
    eps, tokenizer = torch.finfo(dtype).eps, tiny_tokenizer()
    counts: Counter[str] = Counter()
    largest = 0.0

    @settings(max_examples=25, **slowly)
    @given(
        arch=st.sampled_from(UNGATED),
        lists=st.lists(st.lists(edits(gates=False), max_size=2), min_size=2, max_size=3),
        seed=st.integers(0, 99),
    )
    def agree(arch: str, lists: list[list[Edit]], seed: int) -> None:
        nonlocal largest
        lists[0] = lists[0] or [Add(vector(0), 0.5, HERE)]
        model = low(arch, dtype)
        rows = rows_of([10, 8, 9][: len(lists)], seed)
        ids, mask = padded(rows)
        for steps in ([10], [6, *range(7, 11)]):
            try:
                with torch.no_grad(), steer(model, lists, tokenizer=tokenizer, prompt_length=6):
                    found = run(model, ids, mask, steps)
            except NothingSteeredError:
                pass
            for i, row in enumerate(rows):
                pad = 10 - len(row)
                expected = slow.logits(
                    model, row, lists[i], special=SPECIAL, prompt_length=6 - pad,
                    tokenizer=tokenizer,
                ).float()  # fmt: skip
                off = float((found[i, pad:].float() - expected).abs().max() / expected.abs().max())
                largest = max(largest, off / eps)
                counts["tokens"] += len(row)
                assert off <= 15 * eps or print(arch, off / eps, lists)

    agree()
    judged(counts, f"{dtype}, at most {largest:.2g} eps apart", least=500)


@pytest.mark.filterwarnings("ignore:.*never (bound|applied)")
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "opt"])
def test_what_changes_nothing_is_bit_identical(arch: str, dtype: torch.dtype) -> None:
    model = low(arch, dtype)
    ids, mask = padded(rows_of([9, 6, 8], 1))
    closed = When(Projection(vector(2), HERE), 1e6)
    never = When(Feature(sae_at(HERE, "topk"), 3), 1e6, "from")
    nothing: list[Edit] = [
        Add(vector(1) * 100, 0.0, HERE),
        Add(vector(1), 0.0, HERE, keep_norm=True),
        Add(vector(1), 5.0, HERE, schedule=Linear(0.0, 0.0)),
        Add(vector(1), 5.0, HERE, when=closed),
        Project(vector(1), HERE, 5.0, when=never),
        Rotate(vector(1), vector(2), 1.0, HERE, when=closed, keep_norm=True),
        *(Clamp(sae_at(HERE, kind), 5, 1.0, "scale") for kind in SAES),
        *(Clamp(sae_at(HERE, kind), 6, 0.0, "min", keep_norm=True) for kind in SAES),
        *(Clamp(sae_at(HERE, kind), 7, 1e6, "max") for kind in SAES),
    ]
    something: list[Edit] = [Add(vector(1), 2.0, HERE), Clamp(sae_at(HERE), 5, 3.0)]
    how: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "pad_token_id": PAD}
    how |= {"max_new_tokens": 4, "min_new_tokens": 4}
    how |= {"output_logits": True, "return_dict_in_generate": True}

    def outcomes() -> list[Tensor]:
        """[batch, seq, vocab] of each way to compute."""
        with torch.no_grad():
            passes = [run(model, ids, mask, steps) for steps in ([9], [5, 7, 8, 9])]
        ways = [model.generate(ids, use_cache=use, **how).logits for use in (True, False)]
        return [*passes, *(torch.stack(logits, 1) for logits in ways)]

    def bits(outcome: Tensor) -> Tensor:
        return outcome.contiguous().view(torch.uint8)

    plain = outcomes()
    for given_edits in (nothing, [nothing, nothing, nothing], [nothing, something, []]):
        with steer(model, given_edits):  # type: ignore[arg-type]
            found = outcomes()
        for expected, got in zip(plain, found, strict=True):
            assert torch.equal(bits(got[[0, 2]]), bits(expected[[0, 2]]))
            assert torch.equal(bits(got[1]), bits(expected[1])) == (something not in given_edits)


# --- gates and ties ------------------------------------------------------------------------------


def gated_edit(kind: str, before: Tensor, x: Tensor, distance: float) -> Edit:
    """An edit of which one gate lies so far above (below: negative) its threshold on x [d].

    before: the tokens before it [n, d].
    """
    x = x.double()
    if kind in ("projection", "from"):
        direction = torch.nn.functional.normalize(x - before.double().mean(0), dim=0).float()
        above = float(x @ direction.double()) - distance
        lasting: Any = "from" if kind == "from" else "while"
        return Add(vector(1), 2.0, HERE, when=When(Projection(direction, HERE), above, lasting))
    sae = sae_at(HERE, "standard" if kind == "feature" else kind)
    pre = slow.preactivations(sae, x)[0]
    # Of a feature that fires beyond doubt, the one with the middle pre-activation.
    feature = int((pre - pre[pre > 0.3].median()).abs().argmin())
    own = float(pre[feature])
    if kind == "feature":
        return Add(vector(1), 2.0, HERE, when=When(Feature(sae, feature), own - distance))
    if kind == "jumprelu" and sae.threshold is not None:
        threshold = sae.threshold.clone()
        threshold[feature] = own - distance
        return Clamp(replace(sae, threshold=threshold), feature, 3.0, "scale")
    others = torch.cat([pre[:feature], pre[feature + 1 :]]).sort(descending=True).values
    edge = 0.0 if kind == "gated" else float(others[(sae.k or 1) - 1])
    b_enc = sae.b_enc.clone()
    b_enc[feature] += edge - own + distance
    # What passes a gate is of a size that can't be overlooked.
    b_mag = None if sae.b_mag is None else sae.b_mag + 2.0
    return Clamp(replace(sae, b_enc=b_enc, b_mag=b_mag), feature, 3.0, "scale")


@pytest.mark.filterwarnings("ignore:.*never applied")
@pytest.mark.parametrize("kind", ["projection", "from", "feature", "jumprelu", "topk", "gated"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_a_gate_is_exact_up_to_rounding(arch: str, kind: str) -> None:
    """2e-5 off its threshold a gate is on the right side; within 1e-5 its tokens are left out."""
    model, ids = model_of(arch), random_ids(1, 8, seed=2)
    row, x = ids[0].tolist(), activations(model, [HERE], ids)[HERE][0]
    sides = []
    for distance in (2e-5, -2e-5, 1e-6, -1e-6):
        edit, margins = gated_edit(kind, x[:AT], x[AT], distance), [float("inf")] * len(row)
        expected = slow.logits(model, row, [edit], special=SPECIAL, margins=margins)
        assert margins[AT] == pytest.approx(abs(distance), abs=1e-6)
        near = abs(distance) < slow.NEAR
        assert decided(margins) == (AT if near else len(row))
        if not near:
            sides.append(expected[AT])
        for steps in ([8], list(range(1, 9))):
            with torch.no_grad(), steer(model, edit):
                found = run(model, ids, torch.ones_like(ids), steps)[0]
            n = decided(margins)
            torch.testing.assert_close(found[:n], expected[:n], rtol=0, atol=1e-4)
    above, below = sides
    assert float((above - below).abs().max()) > 1e-3


@pytest.mark.parametrize(("d_sae", "k"), [(64, 8), (256, 4)])
def test_ties_at_the_edge_of_k_fall_as_in_the_encoder(d_sae: int, k: int) -> None:
    """A column that reads one dimension gives two latents the same number, to the bit."""
    model, ids = model_of("llama"), random_ids(3, 8, seed=1).clamp(min=4)
    x = activations(model, [HERE], ids)[HERE]
    sae = tiny_sae("topk", d_sae=d_sae, apply_b_dec_to_input=False)
    # Latents in fours that read one dimension each: with every k, groups of equals at its edge.
    reads = torch.arange(d_sae) // 4 % WIDTH
    W_enc = torch.nn.functional.one_hot(reads, WIDTH).float().T.contiguous()
    sae = replace(sae, W_enc=W_enc, b_enc=torch.zeros(d_sae), k=k - 1)
    whole = sae.encode(x).dense(d_sae).view(*x.shape[:2], d_sae)
    edge = whole.where(whole > 0, torch.inf).amin(-1, keepdim=True)
    tied = (x[..., reads] == edge) & (whole == 0)
    assert int(tied.any(-1).sum()) == 24  # on every token, some of the equals stayed out
    features = [
        int(f) for f in (tied.any(0).any(0) | (whole == edge).any(0).any(0)).nonzero()[:, 0]
    ]
    some: list[Edit] = [Clamp(sae, feature, 0.0) for feature in features]
    for rows in (ids, ids[:1]):
        with torch.no_grad(), steer(model, some) as receipt:
            model(rows)
        before = torch.tensor(
            [[[t.before for t in row] for row in receipt.traces(i)[0]] for i in range(len(some))]
        )
        assert torch.equal(before.permute(1, 2, 0), whole[: len(rows)][..., features])
    with torch.no_grad(), steer(model, some):
        found = model(ids).logits
    for i, row in enumerate(ids.tolist()):
        expected = slow.logits(model, row, some, special=SPECIAL)
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-4)
