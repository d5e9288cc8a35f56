"""Captures and edits land exactly where they say, in every architecture, and leave no trace."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saesteer.core.hooks import activations, capture, edit
from saesteer.core.model import SITES, HookPoint, decoder_layers, final_norm, site_module
from saesteer.errors import HookPointError, SteeringError
from tests.tiny import ARCHITECTURES, LAYERS, WIDTH, random_ids, tiny_model

ALL_POINTS = [HookPoint(layer, site) for layer in range(LAYERS) for site in SITES]
MIDDLE = HookPoint(1, "resid_post")


def state(model: nn.Module) -> list[Any]:
    """Everything a hook could leave behind in a model: every dictionary of every module."""
    found: list[Any] = []
    for module in model.modules():
        entries = {k: v for k, v in vars(module).items() if k not in ("_modules", "_parameters")}
        found.append({k: list(v.items()) if isinstance(v, dict) else v for k, v in entries.items()})
    return found


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Fails where the body leaves the model other than it was, or computing otherwise."""
    ids = random_ids(2, 5, seed=9)
    logits, before = model(ids).logits, state(model)
    try:
        yield
    finally:
        assert state(model) == before
        assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_capture_is_the_hidden_state(arch: str) -> None:
    model, ids = tiny_model(arch), random_ids(2, 7)
    hidden = model(ids, output_hidden_states=True).hidden_states
    with unchanged(model), capture(model, ALL_POINTS) as found:
        model(ids)
    for layer in range(LAYERS):
        pre, post, mlp, attn = (found[HookPoint(layer, site)] for site in SITES)
        assert torch.equal(pre, hidden[layer])
        # transformers' last hidden state is after the final norm.
        last = layer == LAYERS - 1
        assert torch.equal(final_norm(model)(post) if last else post, hidden[layer + 1])
        # What the halves are said to add is what is added: sandwich norms, parallel halves and
        # halves that add the residual themselves included.
        torch.testing.assert_close(pre + attn + mlp, post, rtol=0, atol=2e-6)
        assert attn.abs().max() > 1e-3
        assert mlp.abs().max() > 1e-3


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_edit_lands_exactly_there(arch: str) -> None:
    model, ids = tiny_model(arch), random_ids(2, 7)
    patch = torch.randn(WIDTH, generator=torch.manual_seed(0))
    clean = activations(model, ALL_POINTS, ids)
    for site in SITES:
        point = HookPoint(1, site)
        with (
            unchanged(model),
            edit(model, {point: lambda x, tokens: x + patch}),
            capture(model, ALL_POINTS) as found,
        ):
            model(ids)
        assert torch.equal(found[point], clean[point] + patch)
        before_it = [p for p in ALL_POINTS if p.layer < 1]
        assert all(torch.equal(found[p], clean[p]) for p in before_it)
        # And the rest of the model has seen it.
        assert torch.equal(found[HookPoint(2, "resid_pre")], found[HookPoint(1, "resid_post")])
        parts = [found[HookPoint(1, s)] for s in ("resid_pre", "attn_out", "mlp_out")]
        expected = sum(parts) + (patch if site == "resid_post" else 0)
        torch.testing.assert_close(found[HookPoint(1, "resid_post")], expected, rtol=0, atol=1e-5)


def test_blocks_that_return_tuples_and_bare_tensors_are_both_covered() -> None:
    kinds = set()
    for arch in ("llama", "bloom"):
        model = tiny_model(arch)

        def see(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            kinds.add(type(output))

        decoder_layers(model)[1].register_forward_hook(see)
        model(random_ids(1, 3))
    assert kinds == {Tensor, tuple}


def test_an_edit_that_changes_nothing_returns_the_very_same_output() -> None:
    model, ids = tiny_model("llama"), random_ids(2, 7)
    logits = model(ids).logits
    with edit(model, {p: lambda x, tokens: x for p in ALL_POINTS}):
        assert torch.equal(model(ids).logits, logits)


def test_hidden_states_of_transformers_show_the_edit() -> None:
    """Its own hooks were there first, and must still see the activation after the edit."""
    model, ids = tiny_model("llama"), random_ids(2, 7)
    clean = model(ids, output_hidden_states=True).hidden_states
    with unchanged(model), edit(model, {MIDDLE: lambda x, tokens: x + 1}):
        steered = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(steered[2], clean[2] + 1)
    assert torch.equal(steered[1], clean[1])


def test_contexts_nest_in_the_order_written() -> None:
    model, ids = tiny_model("gpt2"), random_ids(2, 7)
    clean = activations(model, [MIDDLE], ids)[MIDDLE]
    with (
        unchanged(model),
        edit(model, {MIDDLE: lambda x, tokens: x + 1}),
        edit(model, {MIDDLE: lambda x, tokens: x * 2}),
        capture(model, [MIDDLE]) as found,
    ):
        model(ids)
    assert torch.equal(found[MIDDLE], (clean + 1) * 2)


def test_halves_are_checked_beneath_edits_of_any_context() -> None:
    """The check of a capture must not mistake an edit made inside or outside it for a fault."""
    model, ids = tiny_model("llama"), random_ids(2, 7)
    shift = {p: lambda x, tokens: x + 1 for p in ALL_POINTS}
    half = HookPoint(1, "attn_out")
    model(ids, output_hidden_states=True)  # transformers installs hooks of its own, for good
    with edit(model, shift), capture(model, [half]), edit(model, shift):
        model(ids)
    with unchanged(model), edit(model, shift), edit(model, shift), capture(model, [half]):
        model(ids, output_hidden_states=True)


@pytest.mark.parametrize(
    "make_wrong",
    [
        pytest.param(lambda model: tiny_model("opt", do_layer_norm_before=False), id="post-norm"),
        pytest.param(
            lambda model: tiny_model("bloom", apply_residual_connection_post_layernorm=True),
            id="normed residual",
        ),
    ],
)
def test_halves_that_are_not_what_is_added_are_refused(make_wrong: Any) -> None:
    model = make_wrong(None)
    for point in (HookPoint(1, "attn_out"), HookPoint(1, "mlp_out")):
        with (
            unchanged(model),
            pytest.raises(HookPointError, match="not what it adds"),
            capture(model, [point]),
        ):
            model(random_ids(1, 5))
    # The stream itself is what it is.
    assert activations(model, [MIDDLE], random_ids(1, 5))[MIDDLE].shape == (1, 5, WIDTH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_pass_the_check_in_low_precision(dtype: torch.dtype) -> None:
    for arch in ("llama", "gemma2", "falcon", "bloom", "opt"):
        model = tiny_model(arch).to(dtype)
        assert activations(model, [HookPoint(1, "mlp_out")], random_ids(4, 16))


class BoomError(Exception):
    pass


def test_nothing_is_left_after_an_exception_in_the_body() -> None:
    model = tiny_model("llama")
    for error in (BoomError, KeyboardInterrupt):
        with (
            unchanged(model),
            pytest.raises(error),
            edit(model, {MIDDLE: lambda x, tokens: x + 1}),
            capture(model, ALL_POINTS),
        ):
            model(random_ids(1, 3))
            raise error


def test_nothing_is_left_after_an_exception_in_the_model() -> None:
    model = tiny_model("llama")

    def fail(x: Tensor, tokens: Any) -> Tensor:
        raise BoomError

    with unchanged(model), pytest.raises(BoomError), edit(model, {MIDDLE: fail}):
        model(random_ids(1, 3))


def test_nothing_is_left_after_an_exception_in_the_set_up() -> None:
    model = tiny_model("llama")
    good, bad = MIDDLE, HookPoint(7, "resid_post")
    with (
        unchanged(model),
        pytest.raises(HookPointError, match="3 blocks"),
        edit(model, {good: lambda x, tokens: x + 1, bad: lambda x, tokens: x}),
    ):
        pass
    with unchanged(model), pytest.raises(HookPointError), capture(model, [good, bad]):
        pass
    with unchanged(model), pytest.raises(HookPointError):
        activations(model, [good, bad], random_ids(1, 3))


def test_the_order_of_hooks_that_were_there_before_is_kept() -> None:
    model, ids = tiny_model("llama"), random_ids(1, 3)
    model(ids, output_hidden_states=True)  # transformers installs its own, for good
    block = decoder_layers(model)[1]
    block.register_forward_hook(lambda *_: None)
    with unchanged(model), edit(model, {MIDDLE: lambda x, tokens: x + 1}):
        model(ids)


def test_an_edit_of_the_wrong_shape_is_refused() -> None:
    model = tiny_model("llama")
    with (
        pytest.raises(SteeringError, match=r"returned shape \(1, 3\)"),
        edit(model, {MIDDLE: lambda x, tokens: x[..., 0]}),
    ):
        model(random_ids(1, 3))


def test_gradients_flow_through_captures_and_edits() -> None:
    model, ids = tiny_model("gpt2"), random_ids(2, 5)
    shift = torch.zeros(WIDTH, requires_grad=True)
    with edit(model, {MIDDLE: lambda x, tokens: x + shift}), capture(model, [MIDDLE]) as found:
        logits = model(ids).logits
        target = logits[..., 0].sum()
        (by_capture,) = torch.autograd.grad(target, found[MIDDLE], allow_unused=True)
        target = model(ids).logits[..., 0].sum()
        target.backward()
    assert shift.grad is not None
    # A capture is a copy beside the stream: what depends on it has gradients to the edit.
    assert by_capture is None
    eps = 1e-2
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            moved = torch.zeros(WIDTH)
            moved[3] = sign * eps
            with edit(model, {MIDDLE: lambda x, tokens, moved=moved: x + moved}):
                ends.append(model(ids).logits[..., 0].double().sum())
    torch.testing.assert_close(
        shift.grad[3].double(), (ends[0] - ends[1]) / (2 * eps), rtol=2e-2, atol=1e-2
    )


@pytest.mark.parametrize("point", [HookPoint(1, site) for site in SITES], ids=str)
def test_activations_stop_after_the_deepest_point(point: HookPoint) -> None:
    model, ids = tiny_model("llama"), random_ids(2, 5)
    ran: list[int] = []
    for i, block in enumerate(decoder_layers(model)):
        block.self_attn.register_forward_hook(lambda *_, i=i: ran.append(i))
    with capture(model, [point]) as found:
        model(ids)
    ran.clear()
    stopped = activations(model, [point, HookPoint(0, "resid_post")], ids)
    assert torch.equal(stopped[point], found[point])
    assert not stopped[point].requires_grad
    assert ran == ([0] if point.site == "resid_pre" else [0, 1])


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "bloom", "gemma3_text"])
def test_activations_do_not_depend_on_padding(arch: str) -> None:
    model, row = tiny_model(arch), random_ids(1, 6)
    pad = torch.zeros(1, 3, dtype=torch.long)
    mask = torch.ones_like(row)
    alone = activations(model, [MIDDLE], row)[MIDDLE]
    for left in (True, False):
        parts = [pad, row] if left else [row, pad]
        masks = [pad, mask] if left else [mask, pad]
        padded = activations(model, [MIDDLE], torch.cat(parts, 1), torch.cat(masks, 1))[MIDDLE]
        kept = padded[:, 3:] if left else padded[:, :6]
        torch.testing.assert_close(kept, alone, rtol=0, atol=2e-5)


def test_activations_of_no_points() -> None:
    assert activations(tiny_model("llama"), [], random_ids(1, 3)) == {}


def test_activations_see_the_edits_around_them() -> None:
    model, ids = tiny_model("llama"), random_ids(2, 5)
    clean = activations(model, [MIDDLE], ids)[MIDDLE]
    with edit(model, {MIDDLE: lambda x, tokens: x - 1}) as clock:
        steered = activations(model, [MIDDLE], ids)[MIDDLE]
        assert torch.equal(steered, clean - 1)
        # The model was stopped halfway by an exception of ours; the clock is none the worse.
        assert torch.equal(activations(model, [MIDDLE], ids)[MIDDLE], clean - 1)
        assert clock.forwards == 2


def test_two_threads_with_two_models_do_not_meet() -> None:
    models = [tiny_model("llama", seed=i) for i in range(2)]
    ids = random_ids(2, 6)
    expected = []
    for i, model in enumerate(models):
        with edit(model, {MIDDLE: lambda x, tokens, i=i: x + i + 1}):
            expected.append(model(ids).logits)
    wrong: list[int] = []
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait()
        for _ in range(20):
            with edit(models[i], {MIDDLE: lambda x, tokens: x + i + 1}), torch.no_grad():
                if not torch.equal(models[i](ids).logits, expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_sandwich_norms_are_found() -> None:
    """In these the half's own module is not what is added; its post-norm is."""
    for arch, attn, mlp in (
        ("gemma2", "post_attention_layernorm", "post_feedforward_layernorm"),
        ("gemma3_text", "post_attention_layernorm", "post_feedforward_layernorm"),
        ("olmo2", "post_attention_layernorm", "post_feedforward_layernorm"),
        ("llama", "self_attn", "mlp"),
    ):
        model = tiny_model(arch)
        block = decoder_layers(model)[1]
        assert site_module(model, HookPoint(1, "attn_out"))[0] is getattr(block, attn)
        assert site_module(model, HookPoint(1, "mlp_out"))[0] is getattr(block, mlp)
