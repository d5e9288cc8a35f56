"""Texts through model and SAE, against one plain forward pass each."""

import numpy as np
import pytest
import torch

from saesteer.core.hooks import activations
from saesteer.core.points import HookPoint
from saesteer.errors import TextError
from saesteer.features.reading import encode, grid, read
from tests.tiny import BOS, EOS, tiny_model, tiny_sae, tiny_tokenizer

TEXTS = [
    "the boy saw the sea",
    "once upon a time a ship",
    "music",
    "the cat ran to the old house and the dog slept under the hill with the moon over it",
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def by_hand(model, tokenizer, sae, text) -> torch.Tensor:
    """Dense code [n, d_sae] of a text's tokens behind a BOS, in one pass of its own."""
    ids = [BOS, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    x = activations(model, [sae.hook_point], torch.tensor([ids]))[sae.hook_point][0, 1:]
    return sae.encode(x).dense(sae.d_sae)


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batched_codes_are_each_text_s_own(model, tokenizer, architecture, batch_size):
    sae = tiny_sae(architecture)
    found = list(encode(model, tokenizer, sae, iter(TEXTS), batch_size=batch_size))
    assert len(found) == len(TEXTS)
    for text, one in zip(TEXTS, found, strict=True):
        assert "".join(one.pieces).split() == text.split()
        assert len(one.ids) == len(one.pieces) == len(one.plain) == one.codes.n_rows
        assert one.plain.all()
        expected = by_hand(model, tokenizer, sae, text)
        got = one.codes.dense(sae.d_sae)
        # A gate within rounding of its threshold may flip.
        clear = (expected - got).abs() < 1e-4
        assert clear.float().mean() > 0.999


def test_special_tokens_are_read_and_not_counted(model, tokenizer):
    sae = tiny_sae()
    (one,) = encode(model, tokenizer, sae, ["the boy <eos> saw"])
    assert one.ids[2] == EOS and one.plain.tolist() == [True, True, False, True]
    assert 2 not in one.codes.rows.tolist()
    plain = one.plain_codes()
    assert plain.n_rows == 3
    expected = by_hand(model, tokenizer, sae, "the boy <eos> saw")[[0, 1, 3]]
    torch.testing.assert_close(plain.dense(sae.d_sae), expected, rtol=1e-4, atol=1e-4)


def test_a_long_text_is_read_in_windows(tokenizer):
    """Each as long as the model has room for, with a BOS of its own."""
    model = tiny_model(max_position_embeddings=8)
    sae = tiny_sae()
    words = TEXTS[3].split()
    (one,) = encode(model, tokenizer, sae, [TEXTS[3]])
    assert len(one.ids) == len(words) == 19
    parts = [" ".join(words[i : i + 7]) for i in range(0, 19, 7)]
    expected = torch.cat([by_hand(model, tokenizer, sae, part) for part in parts])
    torch.testing.assert_close(one.codes.dense(sae.d_sae), expected, rtol=1e-4, atol=1e-4)


def test_a_text_without_a_token_is_refused(model, tokenizer):
    with pytest.raises(TextError, match="without a token"):
        list(encode(model, tokenizer, tiny_sae(), ["the sea", "   "]))


def test_the_table_of_tokens_and_features(model, tokenizer):
    sae = tiny_sae()
    (one,) = encode(model, tokenizer, sae, ["the boy <eos> saw the sea"])
    dense = one.codes.dense(sae.d_sae).numpy()
    rng = np.random.default_rng(0)
    density, max_act = rng.uniform(0.001, 0.9, sae.d_sae), rng.uniform(0.5, 3, sae.d_sae)
    max_act[5] = 0.0
    table = read(one, density=density, max_act=max_act, n_tokens=1000, top=4)
    assert [token.text.strip() for token in table] == ["the", "boy", "<eos>", "saw", "the", "sea"]
    assert [token.special for token in table] == [False, False, True, False, False, False]
    assert table[2].fired == () and table[2].n_fired == 0
    base = (density * 1000 + 0.5) / 1001
    for position, token in enumerate(table):
        on = np.flatnonzero(dense[position])
        assert token.n_fired == len(on)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.minimum(1, dense[position] / max_act)[on]
        best = sorted(
            zip(-share * -np.log(base[on]), on.tolist(), strict=True), key=lambda pair: pair
        )
        assert [fired.feature for fired in token.fired] == [i for _, i in best[:4]]
        for fired in token.fired:
            assert fired.activation == pytest.approx(dense[position, fired.feature])
            times = (
                dense[position, fired.feature] / max_act[fired.feature]
                if fired.feature != 5
                else None
            )
            assert fired.times == (None if times is None else pytest.approx(times))


def test_the_grid_has_the_features_asked_for(model, tokenizer):
    sae = tiny_sae(point=HookPoint(2, "resid_pre"))
    (one,) = encode(model, tokenizer, sae, [TEXTS[0]])
    dense = one.codes.dense(sae.d_sae).numpy()
    np.testing.assert_array_equal(grid(one, [9, 2, 33]), dense[:, [9, 2, 33]])
    assert grid(one, []).shape == (5, 0)
