"""The laws of the steering engine: exact, the same however it is computed, and without a trace."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from saesteer.core.hooks import activations, capture
from saesteer.core.model import HookPoint
from saesteer.core.sae import Sae
from saesteer.core.tokens import Tokens
from saesteer.errors import FeatureError, HookPointError, NothingSteeredError, SteeringError
from saesteer.steering.edits import Add, Clamp, Edit
from saesteer.steering.engine import steer
from saesteer.steering.positions import Positions
from saesteer.steering.program import compile_point
from saesteer.steering.steps import Placed, Shared
from tests.test_hooks import BoomError, unchanged
from tests.tiny import BOS, EOS, PAD, UNK, WIDTH, random_ids, tiny_model, tiny_sae, tiny_tokenizer

MIDDLE = HookPoint(1, "resid_post")
CONVENTIONS: list[dict[str, Any]] = [
    {},
    {"apply_b_dec_to_input": False},
    {"normalize_activations": "layer_norm"},
    {"normalize_activations": "constant_norm_rescale"},
    {"center_writing_weights": True},
]
SAES = [(kind, c) for kind in ("standard", "topk", "jumprelu", "gated") for c in CONVENTIONS]
SAES += [("topk", {"rescale_acts_by_decoder_norm": True})]


def vector(seed: int = 0) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def steered(model: PreTrainedModel, edits: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    """The activation at MIDDLE after the edits."""
    with torch.no_grad(), steer(model, edits), capture(model, [MIDDLE]) as found:
        model(ids, **kwargs)
    return found[MIDDLE]


def target(how: str, value: float, activation: Tensor) -> Tensor:
    return {
        "set": torch.full_like(activation, value),
        "min": activation.clamp(min=value),
        "max": activation.clamp(max=value),
        "scale": activation * value,
    }[how]


def slow_reference(sae: Sae, x: Tensor, clamps: list[tuple[int, str, float]]) -> Tensor:
    """Encode densely, put the targets in, decode, add back the reconstruction error; float64."""
    big = sae.to("cpu", torch.float64)
    x = x.double()
    code = big.encode(x).dense(sae.d_sae).view(*x.shape[:-1], -1)
    prepared = big.prepare(x)

    def decode(code: Tensor) -> Tensor:
        if sae.conventions.rescale_acts_by_decoder_norm:
            code = code / big.W_dec.norm(dim=-1)
        out = code @ big.W_dec + big.b_dec
        out = out if prepared.scale is None else out * prepared.scale
        return out if prepared.shift is None else out + prepared.shift

    error = x - decode(code)
    new = code.clone()
    for feature, how, value in clamps:
        new[..., feature] = target(how, value, new[..., feature])
    return decode(new) + error


# --- law 1: exact ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["set", "min", "max", "scale"])
@pytest.mark.parametrize(("kind", "conventions"), SAES)
def test_a_clamp_is_encode_set_decode_add_error(
    kind: str, conventions: dict[str, Any], how: str
) -> None:
    model, ids, sae = tiny_model(), random_ids(3, 9), tiny_sae(kind, **conventions)
    x = activations(model, [MIDDLE], ids)[MIDDLE]
    value = {"set": 3.0, "min": 0.7, "max": 0.4, "scale": 2.5}[how]
    expected = slow_reference(sae, x, [(5, how, value)])
    got = steered(model, Clamp(sae, 5, value, how), ids)  # type: ignore[arg-type]
    assert not torch.equal(got, x)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "conventions"), SAES)
def test_clamps_of_one_sae_read_the_same_unedited_activation(
    kind: str, conventions: dict[str, Any]
) -> None:
    """Also where they differ in kind, and where the second would read otherwise after the first."""
    model, ids, sae = tiny_model(), random_ids(3, 9), tiny_sae(kind, **conventions)
    x = activations(model, [MIDDLE], ids)[MIDDLE]
    clamps = [(5, "set", 8.0), (9, "scale", 3.0), (2, "set", -4.0), (11, "min", 1.0)]
    expected = slow_reference(sae, x, clamps)
    edits = [Clamp(sae, f, v, how) for f, how, v in clamps]  # type: ignore[arg-type]
    torch.testing.assert_close(steered(model, edits, ids).double(), expected, rtol=0, atol=2e-5)


def test_two_clamps_of_one_feature_act_one_after_the_other() -> None:
    model, ids, sae = tiny_model(), random_ids(3, 9), tiny_sae()
    x = activations(model, [MIDDLE], ids)[MIDDLE]
    for clamps in (
        [(5, "min", 0.2), (5, "max", 0.4)],  # a band
        [(5, "set", 3.0), (5, "set", 1.0)],
        [(5, "scale", 2.0), (5, "scale", 3.0)],
        [(5, "set", 3.0), (6, "set", 1.0), (5, "scale", 0.5)],
    ):
        edits = [Clamp(sae, f, v, how) for f, how, v in clamps]  # type: ignore[arg-type]
        expected = slow_reference(sae, x, clamps)
        torch.testing.assert_close(steered(model, edits, ids).double(), expected, rtol=0, atol=1e-5)


def test_an_sae_loaded_twice_is_one_sae() -> None:
    model, ids = tiny_model(), random_ids(3, 9)
    x = activations(model, [MIDDLE], ids)[MIDDLE]
    expected = slow_reference(tiny_sae(), x, [(5, "set", 8.0), (9, "scale", 3.0)])
    edits = [Clamp(tiny_sae(), 5, 8.0), Clamp(tiny_sae(), 9, 3.0, "scale")]
    torch.testing.assert_close(steered(model, edits, ids).double(), expected, rtol=0, atol=1e-5)


def test_other_edits_at_one_place_compose_in_the_order_written() -> None:
    model, ids, sae, other = tiny_model(), random_ids(3, 9), tiny_sae(), tiny_sae(seed=1)
    x = activations(model, [MIDDLE], ids)[MIDDLE]
    v = vector()
    first = slow_reference(sae, x, [(5, "set", 8.0)])
    expected = slow_reference(other, first + 2 * v.double(), [(5, "set", 1.0)])
    got = steered(model, [Clamp(sae, 5, 8.0), Add(v, 2, MIDDLE), Clamp(other, 5, 1.0)], ids)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)
    # In another order it is another function.
    expected = slow_reference(other, slow_reference(sae, x + 2 * v, [(5, "set", 8.0)]), [])
    got = steered(model, [Add(v, 2, MIDDLE), Clamp(sae, 5, 8.0)], ids)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)


def test_an_addition_is_exact() -> None:
    model, ids, v = tiny_model(), random_ids(3, 9), vector()
    x = activations(model, [MIDDLE], ids)[MIDDLE]
    assert torch.equal(steered(model, Add(v, 0.5, MIDDLE), ids), x + 0.5 * v)
    assert torch.equal(steered(model, Add(v, 0.5, "layers.1.resid_post"), ids), x + 0.5 * v)
    # resid_post of one block is resid_pre of the next.
    with steer(model, Add(v, 0.5, "layers.2.resid_pre")):
        here = model(ids).logits
    with steer(model, Add(v, 0.5, "layers.1.resid_post")):
        assert torch.equal(model(ids).logits, here)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_in_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    model, ids, sae = tiny_model().to(dtype), random_ids(3, 9), tiny_sae()
    x = activations(model, [MIDDLE], ids)[MIDDLE]
    assert x.dtype == dtype
    change = slow_reference(sae, x, [(5, "set", 3.0)]) - x.double()
    clamped = (x.float() + change.float()).to(dtype)
    assert torch.equal(steered(model, Clamp(sae, 5, 3.0), ids), clamped)
    v = vector()
    assert torch.equal(steered(model, Add(v, 0.5, MIDDLE), ids), (x.float() + 0.5 * v).to(dtype))


def test_several_saes_at_several_layers_at_once() -> None:
    model, ids = tiny_model(), random_ids(3, 9)
    points = [HookPoint(0, "mlp_out"), HookPoint(1, "resid_post"), HookPoint(2, "attn_out")]
    saes = [tiny_sae(point=p, seed=i) for i, p in enumerate(points)]
    with (
        torch.no_grad(),
        capture(model, points) as before,  # each before its own edit, after those upstream
        steer(model, [Clamp(sae, 3, 2.0) for sae in saes]),
        capture(model, points) as after,
    ):
        model(ids)
    for sae, point in zip(saes, points, strict=True):
        expected = slow_reference(sae, before[point], [(3, "set", 2.0)])
        torch.testing.assert_close(after[point].double(), expected, rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_edit() -> None:
    """Through the clamp (t doesn't depend on x, a does) and to an added vector."""
    model, ids, sae = tiny_model(), random_ids(2, 5), tiny_sae()
    v = vector().requires_grad_()
    embeds = model.get_input_embeddings()(ids).requires_grad_()

    def loss(v: Tensor, embeds: Tensor) -> Tensor:
        with (
            pytest.warns(UserWarning, match="inputs_embeds"),
            steer(model, [Add(v, 1.0, "layers.0.resid_post"), Clamp(sae, 5, 2.0)]),
        ):
            return model(inputs_embeds=embeds).logits[..., 7].sum()

    loss(v, embeds).backward()
    for leaf in (v, embeds):
        assert leaf.grad is not None
        step = torch.randn(leaf.shape, generator=torch.manual_seed(1)) * 1e-3
        slope = (leaf.grad * step).sum()
        with torch.no_grad():
            moved = [
                loss(v + s * step, embeds) if leaf is v else loss(v, embeds + s * step)
                for s in (1, -1)
            ]
        torch.testing.assert_close((moved[0] - moved[1]) / 2, slope, rtol=2e-2, atol=1e-3)


# --- law 2: the same however it is computed ----------------------------------------------------


def rows_of(lengths: list[int]) -> list[Tensor]:
    rows = [random_ids(1, n, seed=i)[0] for i, n in enumerate(lengths)]
    for row in rows:
        row[0] = BOS
    return rows


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width).long()
    for i, row in enumerate(rows):
        at = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return ids, mask


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text", "opt", "bloom", "gpt_neox"])
@pytest.mark.filterwarnings("ignore:.*never bound")
def test_texts_and_logits_agree_alone_and_in_a_batch(arch: str) -> None:
    model, sae, rows = tiny_model(arch), tiny_sae(), rows_of([7, 4, 9])
    edits = [
        Clamp(sae, 5, 3.0, where=Positions(prompt=False)),
        Add(vector(), 0.7, "layers.0.resid_post", where=Positions(generated=False)),
        Clamp(sae, 9, 2.0, "min"),
    ]

    def generate(ids: Tensor, mask: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **how,
        )
        return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)

    texts, logits, counts, places = [], [], [], []
    for row in rows:
        alone = row[None], torch.ones(1, len(row), dtype=torch.long)
        with steer(model, edits) as receipt:
            text, scores = generate(*alone)
        assert (generate(*alone)[1] - scores).abs().max() > 0.01  # it does something
        texts.append(text[0])
        logits.append(scores[0])
        counts.append([edit.counts[0][0] for edit in receipt.edits])
        places.append([edit.positions[0][0] for edit in receipt.edits])
    caches: list[dict[str, Any]] = [{}, {"use_cache": False}, {"cache_implementation": "static"}]
    if arch == "bloom":
        caches.pop()  # transformers' Bloom has no static cache
    for how in caches:
        with steer(model, edits) as receipt:
            text, scores = generate(*padded(rows, "left"), **how)
        assert torch.equal(text, torch.stack(texts))
        torch.testing.assert_close(scores, torch.stack(logits), rtol=0, atol=1e-4)
        for i, edit in enumerate(receipt.edits):
            assert edit.counts == [[count[i] for count in counts]]
            assert edit.positions == [[place[i] for place in places]]


def test_rows_do_not_touch_one_another() -> None:
    """A row's logits are the same beside any other rows, also with padding on the right."""
    model, sae, rows = tiny_model("qwen3"), tiny_sae("topk"), rows_of([7, 4, 9])
    edits = [Clamp(sae, 5, 3.0), Add(vector(), 0.7, "layers.0.resid_post")]
    ids, mask = padded(rows, "right")
    with steer(model, edits):
        alone = [model(row[None]).logits[0] for row in rows]
        together = model(ids, attention_mask=mask).logits
    for row, logits, expected in zip(rows, together, alone, strict=True):
        torch.testing.assert_close(logits[: len(row)], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "how", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str
)
def test_beams_are_steered_with_a_cache_and_without(how: dict[str, Any]) -> None:
    model, sae = tiny_model(), tiny_sae()
    ids, mask = padded(rows_of([7, 4]), "left")
    options: dict[str, Any] = {"max_new_tokens": 5, "attention_mask": mask, **how}
    texts = []
    for cache in (True, False):
        with steer(model, Clamp(sae, 5, 3.0)):
            texts.append(model.generate(ids, use_cache=cache, **options))
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], model.generate(ids, **options))


def test_assisted_generation_is_the_same_text() -> None:
    model, sae, ids = tiny_model(), tiny_sae(), random_ids(1, 6)
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    with steer(model, Clamp(sae, 5, 3.0)):
        plain = model.generate(ids, **options)
        for helper in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": tiny_model(seed=1)}):
            assert torch.equal(model.generate(ids, **options, **helper), plain)


# --- law 3: nothing leaks, and no-ops are none -------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda sae: [Add(vector(), 0.0, MIDDLE)], id="add 0"),
        pytest.param(lambda sae: [Add(torch.zeros(WIDTH), 0.0, MIDDLE)], id="add zeros"),
        pytest.param(lambda sae: [Clamp(sae, 5, 1.0, "scale")], id="scale 1"),
        pytest.param(lambda sae: [Clamp(sae, 5, 0.0, "min")], id="floor that never binds"),
        pytest.param(lambda sae: [Clamp(sae, 5, 1e6, "max")], id="cap that never binds"),
        pytest.param(
            lambda sae: (
                [Clamp(sae, i, 1.0, "scale") for i in range(4)]
                + [Add(vector(), 0.0, "layers.0.mlp_out")]
            ),
            id="several",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu"])
@pytest.mark.filterwarnings("ignore:.*never bound")
def test_no_ops_are_bit_identical(kind: str, make: Callable[[Sae], list[Any]]) -> None:
    sae = tiny_sae(kind, normalize_activations="layer_norm")
    for dtype in (torch.float32, torch.bfloat16):
        model, ids = tiny_model().to(dtype), random_ids(2, 6)
        logits = model(ids).logits
        with steer(model, make(sae)):
            assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize(
    "edit",
    [
        Add(vector(), 0.0, MIDDLE),
        Clamp(tiny_sae(), 5, 1.0, "scale"),
        Clamp(tiny_sae("topk"), 5, 1e6, "max"),
    ],
    ids=str,
)
def test_no_ops_keep_even_the_sign_of_zero(edit: Edit) -> None:
    """−0 + 0 is +0, which torch.equal does not see."""
    tokens = Tokens(
        shape=torch.Size((1, 3)),
        device=torch.device("cpu"),
        input_ids=random_ids(1, 3),  # type: ignore[arg-type]
        past_length=0,
        prompt_length=None,
        forward_index=0,
        prompt_index=0,
        first_new=0,
        kept=3,
        mask=None,
        special_ids=frozenset([BOS]),
        generating=False,
        rows=1,
        reordered=False,
        ids_so_far=None,
    )
    x = torch.stack([vector(i) for i in range(3)])[None]
    x[..., ::2] = -0.0
    shared = Shared(lambda t, where: where.mask(t), {}, 0, tokens.device)
    run = compile_point(MIDDLE, [Placed(edit)], shared)
    assert torch.equal(run(x, tokens).view(torch.int32), x.view(torch.int32))


def test_a_clamp_leaves_tokens_where_it_does_not_bind_as_they_are_to_the_bit() -> None:
    model, ids, sae = tiny_model(), random_ids(4, 9), tiny_sae()
    x = activations(model, [MIDDLE], ids)[MIDDLE]
    activation = sae.activation(x, [5])[..., 0]
    cap = float(activation.max()) / 2
    got = steered(model, Clamp(sae, 5, cap, "max"), ids)
    binds = activation > cap
    assert 0 < binds.sum() < binds.numel()
    assert torch.equal(got[~binds], x[~binds])
    assert (got[binds] != x[binds]).any(-1).all()


def test_after_the_context_the_model_is_as_before() -> None:
    model, ids, sae = tiny_model(), random_ids(2, 6), tiny_sae()
    edits = [Clamp(sae, 5, 3.0), Add(vector(), 1.0, "layers.0.attn_out")]
    with unchanged(model), steer(model, edits):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    with unchanged(model), pytest.raises(BoomError), steer(model, edits):
        raise BoomError
    with (
        unchanged(model),
        pytest.raises(HookPointError),
        steer(model, [*edits, Add(vector(), 1.0, "layers.9.resid_post")]),
    ):
        pass
    with unchanged(model), pytest.raises(SteeringError), steer(model, edits, prompt_length=-1):
        pass
    with unchanged(model), pytest.raises(NothingSteeredError), steer(model, edits):
        pass


def test_contexts_nest() -> None:
    model, ids, sae = tiny_model(), random_ids(2, 6), tiny_sae()
    x = activations(model, [MIDDLE], ids)[MIDDLE]
    with unchanged(model), steer(model, Add(vector(), 2.0, MIDDLE)) as outer:
        once = model(ids).logits
        got = steered(model, Clamp(sae, 5, 3.0), ids)
        assert torch.equal(model(ids).logits, once)
    expected = slow_reference(sae, x + 2.0 * vector(), [(5, "set", 3.0)])
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
    assert outer.prompts == 3


def test_two_threads_with_two_models() -> None:
    models, sae = [tiny_model(), tiny_model(seed=1)], tiny_sae()
    ids = random_ids(2, 6)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    edits = [Clamp(sae, 5, 3.0), Clamp(sae, 9, 5.0)]
    expected = []
    for model, edit in zip(models, edits, strict=True):
        with steer(model, edit):
            expected.append(model.generate(ids, **options))
    right = [0, 0]

    def work(i: int) -> None:
        for _ in range(5):
            with steer(models[i], edits[i]):
                right[i] += torch.equal(models[i].generate(ids, **options), expected[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [5, 5]


# --- law 4: special tokens and padding ---------------------------------------------------------


def test_special_tokens_and_padding_are_left_alone_unless_asked() -> None:
    model, ids = tiny_model(), random_ids(2, 6)
    ids[:, 0], ids[1, 4], ids[0, 3] = BOS, EOS, UNK
    mask = torch.ones_like(ids)
    mask[0, 5], ids[0, 5] = 0, PAD
    with capture(model, [MIDDLE]) as found:
        model(ids, attention_mask=mask)
    x = found[MIDDLE]

    def touched(where: Positions, **kwargs: Any) -> list[list[int]]:
        with (
            steer(model, Add(vector(), 1.0, MIDDLE, where=where), **kwargs),
            capture(model, [MIDDLE]) as found,
        ):
            model(ids, attention_mask=mask)
        return (found[MIDDLE] != x).any(-1).int().tolist()

    assert touched(Positions()) == [[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1]]
    assert touched(Positions(special=True)) == [[1, 1, 1, 1, 1, 0], [1] * 6]
    # The tokenizer knows of more.
    knows_unk = touched(Positions(), tokenizer=tiny_tokenizer())
    assert knows_unk == [[0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 0, 1]]
    assert touched(Positions(prompt=False), prompt_length=3) == [
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 0, 1],
    ]
    assert touched(Positions(generated=False), prompt_length=3) == [
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
    ]


def test_rows_that_have_ended_are_not_steered_on() -> None:
    """`generate` fills them with pad tokens, whose mask it sets to 1."""
    model, sae, ids = tiny_model(), tiny_sae(), random_ids(2, 4)
    first = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)[0, 5]
    with steer(model, Add(vector(), 0.0, sae.hook_point)) as receipt:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            eos_token_id=int(first),
            pad_token_id=PAD,
            do_sample=False,
        )
    assert out[0, 6:].eq(PAD).all()
    assert receipt.edits[0].counts[0][0] == 4 + 2  # the prompt, one token, and the one that ended
    assert receipt.edits[0].counts[0][1] == 4 + out.shape[1] - 4 - 1


# --- law 5, and what is refused ----------------------------------------------------------------


def test_nothing_steered_is_an_error() -> None:
    model, sae, ids = tiny_model(), tiny_sae(), random_ids(2, 4)
    clamp = Clamp(sae, 5, 3.0)
    with pytest.raises(NothingSteeredError, match="no forward pass"), steer(model, clamp):
        pass
    bos = torch.full((1, 3), BOS)
    with pytest.raises(NothingSteeredError, match="row 0 of prompt 0"), steer(model, clamp):
        model(bos)
    # One row of several, in one prompt of several, by one edit of several.
    late = Clamp(sae, 9, 3.0, where=Positions(special=True))
    mixed = torch.cat([ids, torch.full((1, 4), BOS)])
    with (
        pytest.raises(NothingSteeredError, match=r"feature 5 .* row 2 of prompt 1"),
        steer(model, [late, clamp]),
    ):
        model(ids)
        model(mixed)
    # Generated tokens in a bare forward pass, or where only one is written.
    generated = Clamp(sae, 5, 3.0, where=Positions(prompt=False))
    with pytest.raises(NothingSteeredError, match="generated tokens"), steer(model, generated):
        model(ids)
    with pytest.raises(NothingSteeredError), steer(model, generated):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)
    # Forward passes that stop before they come to the edit.
    with pytest.raises(NothingSteeredError, match="stopped"), steer(model, clamp):
        activations(model, [HookPoint(0, "resid_post")], ids)


def test_an_error_in_flight_is_not_masked() -> None:
    with pytest.raises(BoomError), steer(tiny_model(), Clamp(tiny_sae(), 5, 3.0)):
        raise BoomError


def test_only_a_bos_prompt_is_fine_once_something_is_generated() -> None:
    model = tiny_model()
    with steer(model, Clamp(tiny_sae(), 5, 3.0)) as receipt:
        model.generate(max_new_tokens=4, min_new_tokens=4)
    assert receipt.edits[0].counts == [[3]]


def test_a_cap_or_floor_that_never_bound_is_warned_of_once() -> None:
    model, sae, ids = tiny_model(), tiny_sae(), random_ids(2, 4)
    edits = [Clamp(sae, 5, 1e6, "max"), Clamp(sae, 5, 0.1, "min")]
    with (
        pytest.warns(UserWarning, match=r"feature 5 max 1e\+06 .* never bound") as caught,
        steer(model, edits),
    ):
        model(ids)
        model(ids)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_edits_that_do_not_fit_are_refused_before_anything_runs() -> None:
    model, sae = tiny_model(), tiny_sae()
    for edits, error, message in (
        ([], SteeringError, "no edits"),
        ([vector()], SteeringError, "Tensor is not an edit"),
        ([Add(torch.ones(7), 1.0, MIDDLE)], SteeringError, "7 dimensions and the model has 32"),
        ([Clamp(tiny_sae(d_in=8), 5, 1.0)], SteeringError, "reads 8 dimensions"),
        ([Clamp(sae, 5, 1.0, point="layers.4.resid_post")], HookPointError, "3 blocks"),
    ):
        with unchanged(model), pytest.raises(error, match=message), steer(model, edits):
            pytest.fail("the body ran")
    for make, error, message in (
        (lambda: Clamp(sae, 64, 1.0), FeatureError, "features 0 to 63"),
        (lambda: Clamp(sae, -1, 1.0), FeatureError, "feature -1"),
        (lambda: Clamp(sae, 1.5, 1.0), FeatureError, r"feature 1\.5"),  # type: ignore[arg-type]
        (lambda: Clamp(sae, 5, float("nan")), SteeringError, "finite"),
        (lambda: Clamp(sae, 5, "8x"), SteeringError, "plain number"),  # type: ignore[arg-type]
        (lambda: Clamp(sae, 5, 1.0, "sett"), SteeringError, "did you mean 'set'"),  # type: ignore[arg-type]
        (lambda: Clamp(sae, 5, 1.0, point="layers.1"), HookPointError, "layers.<layer>"),
        (lambda: Add(vector(), float("inf"), MIDDLE), SteeringError, "finite"),
        (lambda: Add(vector() / 0, 1.0, MIDDLE), SteeringError, "NaN or infinite"),
        (lambda: Add(torch.ones(2, 32), 1.0, MIDDLE), SteeringError, r"\(2, 32\)"),
        (lambda: Positions(prompt=False, generated=False), SteeringError, "neither"),
    ):
        with pytest.raises(error, match=message):
            make()
