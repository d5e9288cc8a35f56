"""What the weights alone say: the logit lens on norms that differ, histograms, sets of tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from saesteer.core.model import final_norm, unembedding
from saesteer.errors import ModelError
from saesteer.features import token_sets, weights
from saesteer.features.weights import Projection, describe, linear_part, logit_lens
from tests.tiny import VOCAB, WIDTH, tiny_model

CPU = torch.device("cpu")


def stated_gain(arch: str, norm: nn.Module) -> torch.Tensor:
    """The gain as the architecture's own source states it."""
    weight = norm.weight.detach()
    return 1 + weight if arch.startswith("gemma") else weight


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma", "gemma2", "opt", "olmo2"])
def test_gain_and_centring_are_found_by_asking_the_norm(arch: str) -> None:
    norm = final_norm(tiny_model(arch))
    gain, centred = linear_part(norm, WIDTH, CPU, torch.float32)
    torch.testing.assert_close(gain, stated_gain(arch, norm), rtol=1e-4, atol=1e-5)
    assert centred == isinstance(norm, nn.LayerNorm)


@pytest.mark.parametrize("norm", [nn.LayerNorm(7), nn.RMSNorm(7), nn.LayerNorm(1 + 8)])
def test_odd_widths(norm: nn.Module) -> None:
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, len(norm.weight)))
    gain, centred = linear_part(norm, len(norm.weight), CPU, torch.float32)
    torch.testing.assert_close(gain, norm.weight.detach(), rtol=1e-4, atol=1e-5)
    assert centred == isinstance(norm, nn.LayerNorm)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma"])
def test_lens_is_the_derivative_of_the_logits(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along a direction that leaves the norm's own statistics alone, logits move as the lens says.

    x is chosen orthogonal to d (and without mean, where the norm centres), so that a small step
    along d changes the size of x in second order only.
    """
    monkeypatch.setattr(weights, "_CHUNK", 3 * VOCAB)  # several chunks
    model = tiny_model(arch)
    norm, matrix = final_norm(model), unembedding(model)
    rng = torch.Generator().manual_seed(0)
    directions = torch.randn(8, WIDTH, generator=rng)
    lens = logit_lens(model, directions, top=VOCAB)
    for i, direction in enumerate(directions):
        d = direction / direction.norm()
        x = torch.randn(WIDTH, generator=rng)
        x = x - x.mean()
        flat = d - d.mean()
        x = x - (x @ flat) / (flat @ flat) * flat
        if arch != "gpt2":
            x = x - (x @ d) * d
        size = x.square().mean().sqrt()
        step = 0.02
        with torch.no_grad():
            moved = (norm(x + step * d) - norm(x - step * d)) @ matrix.T / (2 * step) * size
        expected = np.empty(VOCAB, np.float32)
        expected[lens.promoted[i]] = lens.promoted_logits[i]
        np.testing.assert_allclose(moved.numpy(), expected, atol=1e-3)


def test_top_and_bottom_tokens() -> None:
    model = tiny_model("llama")
    directions = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    lens = logit_lens(model, directions, top=4, exclude=[2, 7])
    gain, _ = linear_part(final_norm(model), WIDTH, CPU, torch.float32)
    logits = (directions / directions.norm(dim=1, keepdim=True) * gain) @ unembedding(model).T
    logits[:, [2, 7]] = torch.nan
    order = np.argsort(logits.numpy(), axis=1)[:, : VOCAB - 2]  # NaN sorts last
    np.testing.assert_array_equal(lens.suppressed, order[:, :4])
    np.testing.assert_array_equal(lens.promoted, order[:, ::-1][:, :4])
    assert (np.diff(lens.promoted_logits) <= 0).all()
    assert (np.diff(lens.suppressed_logits) >= 0).all()
    # The length of a direction says nothing.
    again = logit_lens(model, directions * 100, top=4, exclude=[2, 7])
    np.testing.assert_array_equal(again.promoted, lens.promoted)
    np.testing.assert_allclose(again.promoted_logits, lens.promoted_logits, rtol=1e-4)


def test_no_directions_and_few_tokens() -> None:
    model = tiny_model("llama")
    assert logit_lens(model, torch.zeros(0, WIDTH)).promoted.shape == (0, 10)
    assert logit_lens(model, torch.zeros(1, WIDTH), top=500).promoted.shape == (1, VOCAB)


def test_directions_of_another_width_are_refused() -> None:
    with pytest.raises(ModelError, match="width 5"):
        logit_lens(tiny_model("llama"), torch.zeros(3, 5))


def some_directions(n: int) -> Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(3)) * 2


# Of the tiny vocabulary: capitals, numbers and plain words in turn, so that sets can be told.
TEXTS = [(" Cap", " 12", " word", "ing", "!")[i % 5] for i in range(VOCAB)]


@pytest.mark.parametrize("rows", [3, 1024])
def test_a_description_is_that_of_all_logits(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one chunk, or in several of a few features."""
    monkeypatch.setattr(weights, "_ROWS", rows)
    model, directions, hidden = tiny_model("gemma"), some_directions(11), [0, 1, 9]
    chunks = list(describe(model, directions, TEXTS, top=4, neighbours=3, exclude=hidden))
    assert [len(chunk) for chunk in chunks] == ([11] if rows > 11 else [3, 3, 3, 2])
    lens = logit_lens(model, directions, top=4, exclude=hidden)
    logits = Projection(model, hidden).logits(directions).numpy()
    shown = np.delete(np.arange(VOCAB), hidden)
    start = 0
    for chunk in chunks:
        assert chunk.logits is not None
        for i in range(len(chunk)):
            own = logits[start + i]
            np.testing.assert_array_equal(chunk.logits.lens.promoted[i], lens.promoted[start + i])
            np.testing.assert_array_equal(
                chunk.logits.lens.suppressed[i], lens.suppressed[start + i]
            )
            np.testing.assert_array_equal(
                chunk.logits.lens.promoted[i], shown[np.argsort(-own)[:4]]
            )
            assert chunk.logits.low[i] == pytest.approx(own.min(), rel=1e-5)
            assert chunk.logits.high[i] == pytest.approx(own.max(), rel=1e-5)
            # A value on an edge may fall on either side of it, by rounding.
            counts, _ = np.histogram(own, chunk.logits.histogram.shape[1])
            assert chunk.logits.histogram[i].sum() == len(own) == VOCAB - 3
            assert np.abs(np.cumsum(chunk.logits.histogram[i]) - np.cumsum(counts)).max() <= 1
        part = directions[start : start + len(chunk)]
        np.testing.assert_allclose(chunk.norms, part.norm(dim=1), rtol=1e-6)
        start += len(chunk)
    unit = nn.functional.normalize(directions, dim=1)
    best = (unit @ unit.T).fill_diagonal_(-2).topk(3, dim=1)
    found = np.concatenate([chunk.neighbours for chunk in chunks])
    np.testing.assert_array_equal(found, best.indices)
    np.testing.assert_allclose(
        np.concatenate([chunk.cosines for chunk in chunks]), best.values, rtol=1e-5
    )


def test_a_direction_towards_a_set_of_tokens_names_it() -> None:
    model = tiny_model("llama")
    columns = Projection(model).columns
    numbers = torch.tensor([text == " 12" for text in TEXTS])
    towards = columns[:, numbers].mean(dim=1) - columns.mean(dim=1)
    nowhere = some_directions(60)
    (chunk,) = describe(model, torch.cat([towards[None], nowhere]), TEXTS, neighbours=0)
    assert chunk.logits is not None
    assert chunk.logits.token_sets[0] == "numbers"
    # Of random directions none stands out.
    assert set(chunk.logits.token_sets[1:]) == {None}
    assert chunk.logits.token_set_scores[1:].max() < chunk.logits.token_set_scores[0]
    assert chunk.neighbours.shape == (61, 0)


def test_padding_of_the_unembedding_is_no_token() -> None:
    (chunk,) = describe(tiny_model("llama"), some_directions(9), TEXTS[:50], neighbours=0)
    assert chunk.logits is not None
    assert chunk.logits.lens.promoted.max() < 50
    assert (chunk.logits.histogram.sum(axis=1) == 50).all()


def test_a_head_writes_no_logits() -> None:
    (chunk,) = describe(tiny_model("llama"), torch.eye(8)[:5], TEXTS, neighbours=2)
    assert chunk.logits is None
    assert chunk.neighbours.shape == (5, 2)
    np.testing.assert_array_equal(chunk.norms, 1)


def test_sets_by_spelling() -> None:
    texts = [" Boat", "BOAT", " 7", "1984", ".", "!", " (", "»", " running", "walked", "\n", " the",
             "her", " café", " лодка", "船", " x", "ness", " three", " I"]  # fmt: skip
    belongs = {
        name: {text for text in texts if rule(text)} for name, rule in token_sets.SETS.items()
    }
    assert belongs["capitalised words"] == {" Boat"}
    assert belongs["words in capitals"] == {"BOAT"}
    assert belongs["numbers"] == {" 7", "1984"}
    assert belongs["years"] == {"1984"}
    assert belongs["ends of sentences"] == {".", "!"}
    assert belongs["opening brackets and quotes"] == {" ("}
    assert belongs["closing brackets and quotes"] == {"»"}
    assert belongs["white space"] == {"\n"}
    assert belongs["words in -ing"] == {" running"}
    assert belongs["words in -ed"] == {"walked"}
    assert belongs["articles and demonstratives"] == {" the"}
    assert belongs["possessives"] == {"her"} == belongs["pronouns"] - {" I"}
    assert belongs["number words"] == {" three"}
    assert belongs["accented letters"] == {" café"}
    assert belongs["Cyrillic script"] == {" лодка"}
    assert belongs["CJK script"] == {"船"}
    assert belongs["single letters"] == {" x", " I", "船"}
    assert " running" in belongs["beginnings of words"]
    assert "ness" in belongs["continuations of words"]
    names, members = token_sets.membership(["a", "b"] * 3)  # none is filled by some and not all
    assert names == ()
    assert members.shape == (0, 6)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    size=st.integers(1, 29),
    seed=st.integers(0, 1000),
    scale=st.floats(0.1, 10),
    shift=st.floats(-5, 5),
)
def test_score_of_a_set(size: int, seed: int, scale: float, shift: float) -> None:
    """z of the set's mean among all draws of as many tokens; units and origin don't count."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(3, 30)))
    members = torch.zeros(1, 30, dtype=torch.float64)
    members[0, rng.choice(30, size, replace=False)] = 1
    one = torch.ones(1, dtype=torch.float64)
    found = token_sets.scores(logits, members, one)[:, 0].numpy()
    inside = members[0].bool().numpy()
    every = logits.numpy()
    draws = np.sqrt(every.var(axis=1) / size * (30 - size) / 29)
    np.testing.assert_allclose(
        found, (every[:, inside].mean(axis=1) - every.mean(axis=1)) / draws, rtol=1e-9
    )
    again = token_sets.scores(logits * scale + shift, members, one)[:, 0].numpy()
    np.testing.assert_allclose(found, again, rtol=1e-6, atol=1e-9)
    # The rest of the tokens lies as far on the other side.
    rest = token_sets.scores(logits, 1 - members, one)[:, 0].numpy()
    np.testing.assert_allclose(found, -rest, rtol=1e-9)


def test_spread_is_that_over_random_directions() -> None:
    """A set whose tokens share a part of their columns scores high on any direction."""
    rng = torch.Generator().manual_seed(0)
    columns = torch.randn(64, 400, generator=rng)
    members = torch.zeros(2, 400)
    members[0, :100] = 1  # shares a part
    members[1, ::7] = 1
    columns[:, :100] += torch.randn(64, 1, generator=rng)
    spread = token_sets.spread(columns, members)
    directions = nn.functional.normalize(torch.randn(4000, 64, generator=rng), dim=1)
    z = token_sets.scores(directions @ columns, members, torch.ones(2))
    np.testing.assert_allclose(z.std(dim=0), spread, rtol=0.1)
    assert spread[0] > 4 > 2 > spread[1]
