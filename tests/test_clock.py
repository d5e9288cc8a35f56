"""The token clock: every token is told apart the same way, however the model is run."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from saesteer.core.clock import SteeringWarning
from saesteer.core.hooks import edit
from saesteer.core.model import HookPoint
from saesteer.core.tokens import Tokens
from saesteer.errors import SteeringError
from tests.tiny import BOS, EOS, PAD, random_ids, tiny_model

POINT = HookPoint(1, "resid_post")


def watch(model: PreTrainedModel, run: Callable[[], Any], **kwargs: Any) -> list[Tokens]:
    """The tokens of every forward pass that `run` makes."""
    seen: list[Tokens] = []

    def note(x: Tensor, tokens: Tokens) -> Tensor:
        assert x.shape[:2] == tokens.shape
        seen.append(tokens)
        return x

    with torch.no_grad(), edit(model, {POINT: note}, **kwargs):
        run()
    return seen


def test_a_bare_forward_pass_is_all_prompt() -> None:
    model, ids = tiny_model(), random_ids(2, 4)
    ids[0, 0], ids[1, 3] = BOS, EOS
    (tokens,) = watch(model, lambda: model(ids))
    assert tokens.positions.tolist() == [[0, 1, 2, 3]] * 2
    assert tokens.columns.tolist() == [0, 1, 2, 3]
    assert tokens.is_special.tolist() == [[True, False, False, False], [False, False, False, True]]
    assert not tokens.is_padding.any()
    assert not tokens.is_generated.any()
    assert torch.equal(tokens.input_ids, ids)
    assert (tokens.past_length, tokens.forward_index, tokens.prompt_index) == (0, 0, 0)


def test_prompt_length_marks_the_rest_as_generated() -> None:
    model, ids = tiny_model(), random_ids(2, 4)
    (tokens,) = watch(model, lambda: model(ids), prompt_length=3)
    assert tokens.is_generated.tolist() == [[False, False, False, True]] * 2
    for bad in (-1, 1.5, True):
        with pytest.raises(SteeringError, match="prompt_length"):
            watch(model, lambda: None, prompt_length=bad)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(side: str) -> None:
    model, ids = tiny_model(), random_ids(2, 5)
    mask = torch.ones_like(ids)
    hidden = slice(0, 2) if side == "left" else slice(3, 5)
    ids[0, hidden], mask[0, hidden] = PAD, 0
    (tokens,) = watch(model, lambda: model(ids, attention_mask=mask))
    assert torch.equal(tokens.is_padding, mask == 0)
    assert tokens.positions[0][mask[0] == 1].tolist() == [0, 1, 2]
    assert tokens.positions[1].tolist() == [0, 1, 2, 3, 4]


def test_arguments_may_be_positional_and_masks_of_any_dtype() -> None:
    model, ids = tiny_model(), random_ids(1, 3)
    mask = torch.tensor([[False, True, True]])
    for given in (mask, mask.long(), mask.float()):
        (tokens,) = watch(model, lambda given=given: model(ids, given))
        assert tokens.is_padding.tolist() == [[True, False, False]]


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "gpt2", "gpt_neox", "mistral"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_moves_the_clock_on(arch: str, kind: str) -> None:
    """Over 8 tokens: past the 6 of the sliding windows."""
    model, ids = tiny_model(arch), random_ids(2, 8)
    cache = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=16)
    )
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = PAD, 0

    def run() -> None:
        for start, stop in ((0, 5), (5, 6), (6, 7), (7, 8)):
            model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)

    seen = watch(model, run)
    joined = torch.cat([t.positions for t in seen], 1)
    assert joined[1].tolist() == list(range(8))
    assert joined[0, 2:].tolist() == list(range(6))
    assert torch.cat([t.columns for t in seen]).tolist() == list(range(8))
    assert torch.equal(torch.cat([t.is_padding for t in seen], 1), mask == 0)
    assert [t.past_length for t in seen] == [0, 5, 6, 7]
    assert [t.prompt_index for t in seen] == [0] * 4
    assert [t.first_new for t in seen] == [0] * 4


def test_an_empty_cache_begins_a_new_prompt() -> None:
    model = tiny_model()

    def run() -> None:
        out = model(random_ids(2, 3), use_cache=True)
        model(random_ids(2, 1), past_key_values=out.past_key_values)
        model(random_ids(2, 3))
        model(random_ids(3, 3))

    assert [t.prompt_index for t in watch(model, run)] == [0, 0, 1, 2]


def generate(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    kwargs = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False} | kwargs
    return model.generate(ids, **kwargs)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text", "falcon"])
@pytest.mark.parametrize(
    "how",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}],
    ids=str,
)
def test_generate_tells_prompt_from_generated(arch: str, how: dict[str, Any]) -> None:
    model, ids = tiny_model(arch), random_ids(2, 5)
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = PAD, 0
    seen = watch(model, lambda: generate(model, ids, attention_mask=mask, **how))
    assert {t.prompt_index for t in seen} == {0}

    def new(name: str) -> Tensor:
        return torch.cat([getattr(t, name)[:, t.first_new :] for t in seen], 1)

    # 5 prompt columns and 3 generated ones pass through the model; the 4th is only written.
    assert new("is_generated").tolist() == [[False] * 5 + [True] * 3] * 2
    assert new("positions")[1].tolist() == list(range(8))
    assert new("positions")[0, 2:].tolist() == list(range(6))
    assert new("is_padding").tolist() == [[True] * 2 + [False] * 6, [False] * 8]
    again = [t.first_new for t in seen]
    assert again == ([0, 5, 6, 7] if how == {"use_cache": False} else [0] * len(seen))


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=str)
def test_generate_without_a_mask_takes_pad_tokens_for_padding(how: dict[str, Any]) -> None:
    model, ids = tiny_model(), random_ids(2, 5)
    ids[0, :2] = PAD
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers advises a mask
        seen = watch(model, lambda: generate(model, ids, **how))
    assert seen[0].is_padding.tolist() == [[True, True, False, False, False], [False] * 5]


@pytest.mark.parametrize(
    ("how", "rows"),
    [
        ({"num_beams": 3}, 6),
        ({"num_return_sequences": 2, "do_sample": True}, 4),
        ({"num_beams": 4, "num_return_sequences": 2}, 8),
    ],
    ids=str,
)
def test_beams_and_several_sequences_expand_rows(how: dict[str, Any], rows: int) -> None:
    model, ids = tiny_model(), random_ids(2, 5)
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = PAD, 0
    for cache in ({}, {"cache_implementation": "static"}):
        seen = watch(model, lambda c=cache: generate(model, ids, attention_mask=mask, **how, **c))
        padding = seen[0].is_padding
        assert padding.shape[0] == rows
        assert torch.equal(padding, (mask == 0).repeat_interleave(rows // 2, 0))
        assert not seen[0].is_generated.any()
        assert all(t.is_generated.all() for t in seen[1:])


def test_generate_knows_its_prompt_however_it_is_given() -> None:
    model, ids = tiny_model(), random_ids(1, 4)
    mask = torch.ones_like(ids)
    embeds = model.get_input_embeddings()(ids)
    ways: list[dict[str, Any]] = [
        {"inputs": ids, "attention_mask": mask},
        {"input_ids": ids, "attention_mask": mask},
    ]
    for way in ways:
        seen = watch(model, lambda w=way: model.generate(max_new_tokens=2, **w))
        assert [t.is_generated.tolist() for t in seen] == [[[False] * 4], [[True]]]
    with pytest.warns(SteeringWarning, match="inputs_embeds"):
        seen = watch(
            model,
            lambda: model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=2),
        )
    assert [t.is_generated.tolist() for t in seen] == [[[False] * 4], [[True]]]
    seen = watch(model, lambda: model.generate(max_new_tokens=2, min_new_tokens=2))
    assert [t.is_generated.tolist() for t in seen] == [[[False]], [[True]]]  # BOS is the prompt


def test_each_generate_is_a_prompt_also_without_a_cache() -> None:
    model = tiny_model()

    def run() -> None:
        for length in (3, 5):
            ids = random_ids(1, length)
            generate(model, ids, max_new_tokens=2, min_new_tokens=2, use_cache=False)
        model(random_ids(1, 4))

    seen = watch(model, run)
    assert [t.prompt_index for t in seen] == [0, 0, 1, 1, 2]
    assert [int(t.is_generated.sum()) for t in seen] == [0, 1, 0, 1, 0]


def test_padding_longer_than_the_first_piece_of_a_prompt_is_padding_in_all_of_them() -> None:
    model, ids = tiny_model(), random_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    seen = watch(
        model,
        lambda: model.generate(
            ids, attention_mask=mask, prefill_chunk_size=2, max_new_tokens=3, min_new_tokens=3,
            do_sample=False,
        ),
    )  # fmt: skip
    found = torch.cat([
        torch.ones(t.shape, dtype=torch.bool) if t.is_plain is None else t.is_plain for t in seen
    ], 1)  # fmt: skip
    assert found[0].tolist() == [False] * 4 + [True] * 4 and bool(found[1].all())


def test_assisted_generation_keeps_time() -> None:
    """Guessed tokens that are thrown away are seen again: columns go back, and are not new."""
    model, assistant = tiny_model(), tiny_model(seed=1)
    ids = random_ids(1, 5)
    plain = generate(model, ids, max_new_tokens=8)
    for how in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        assisted: list[Tensor] = []
        seen = watch(
            model, lambda h=how, a=assisted: a.append(generate(model, ids, max_new_tokens=8, **h))
        )
        assert torch.equal(assisted[0], plain)
        assert {t.prompt_index for t in seen} == {0}
        for tokens in seen:
            assert torch.equal(tokens.is_generated[0], tokens.columns >= 5)


def test_embeddings_hide_special_tokens_and_that_is_said_once() -> None:
    model, ids = tiny_model(), random_ids(1, 4)
    ids[0, 0] = BOS
    embeds = model.get_input_embeddings()(ids)

    def run() -> None:
        model(inputs_embeds=embeds)
        model(inputs_embeds=embeds)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = watch(model, run)
    assert [w.category for w in caught] == [SteeringWarning]
    assert not seen[0].is_special.any()
    assert seen[0].input_ids is None


def test_the_base_model_ticks_too_but_not_twice() -> None:
    model, ids = tiny_model(), random_ids(1, 4)
    assert [t.forward_index for t in watch(model, lambda: model(ids))] == [0]
    (tokens,) = watch(model, lambda: model.base_model(ids, torch.tensor([[0, 1, 1, 1]])))
    assert tokens.is_padding.tolist() == [[True, False, False, False]]


def test_a_part_of_the_model_alone_is_refused() -> None:
    model = tiny_model("opt")  # its decoder stands inside its base model
    with pytest.raises(SteeringError, match="part of the model"):
        watch(model, lambda: model.model.decoder(random_ids(1, 4)))

    # Also when the whole model ran just before, and its tokens could be mistaken for these.
    def run() -> None:
        model(random_ids(1, 4))
        model.model.decoder(random_ids(1, 4))

    with pytest.raises(SteeringError, match="part of the model"):
        watch(model, run)


def test_masks_that_cannot_be_read_are_refused() -> None:
    model, ids = tiny_model(), random_ids(1, 4)
    with pytest.raises(SteeringError, match="not \\[batch, sequence\\]"):
        watch(model, lambda: model(ids, attention_mask=torch.zeros(1, 1, 4, 4)))

    def short() -> None:
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], attention_mask=torch.ones(1, 1), past_key_values=cache)

    with pytest.raises(SteeringError, match="cached tokens too"):
        watch(model, short)


def test_models_that_cannot_be_followed_are_refused() -> None:
    model = tiny_model().train()
    model.base_model.gradient_checkpointing = True
    with pytest.raises(SteeringError, match="gradient checkpointing"):
        watch(model, lambda: None)
    model = tiny_model()
    model.config.is_encoder_decoder = True
    with pytest.raises(SteeringError, match="encoder-decoder"):
        watch(model, lambda: None)


def test_generate_is_given_back() -> None:
    model, ids = tiny_model(), random_ids(1, 3)
    before = dict(vars(model))
    with edit(model, {}):
        assert "generate" in vars(model)
        with pytest.raises(ZeroDivisionError), edit(model, {}):
            1 / 0  # noqa: B018
        assert "generate" in vars(model)
    assert vars(model) == before
    # One that was the user's own is put back as it was, and called meanwhile.
    calls: list[int] = []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(model).generate(model, *args, **kwargs)

    vars(model)["generate"] = own
    seen = watch(model, lambda: generate(model, ids))
    assert vars(model)["generate"] is own
    assert calls == [1]
    assert seen[-1].is_generated.all()
    # No other model, nor the class, has seen anything of it.
    assert "generate" not in vars(tiny_model())


def test_a_generate_that_fails_leaves_the_clock_right() -> None:
    model, ids = tiny_model(), random_ids(1, 3)

    def run() -> None:
        with pytest.raises(ValueError, match="max_new_tokens"):
            model.generate(ids, max_new_tokens=-1)
        model(ids)

    (tokens,) = watch(model, run)
    assert not tokens.is_generated.any()


def test_the_text_so_far_forgets_what_was_taken_back() -> None:
    """As an assistant's guesses are: the cache is cut, and other tokens follow."""
    model, ids = tiny_model(), random_ids(2, 6)
    seen = []

    def look(x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        seen.append(tokens.history.clone())
        return x

    with torch.no_grad(), edit(model, {HookPoint(1, "resid_post"): look}):
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-2)
        model(ids[:, :1], past_key_values=cache)
        model(ids[:, 3:5], past_key_values=cache)
    expected = torch.cat([ids[:, :4], ids[:, :1], ids[:, 3:5]], 1)
    assert torch.equal(seen[0], ids)
    assert torch.equal(seen[1], expected[:, :5]) and torch.equal(seen[2], expected)
