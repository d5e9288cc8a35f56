"""Generation: a row's text depends on its own prompt and seed and on nothing else."""

import pytest
import torch

from saesteer.core.generate import GumbelRows, generate
from saesteer.errors import TextError
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["the boy saw a ship", "she", "once upon a time there was the old sea"]


@pytest.fixture(scope="module")
def pair():
    return tiny_model("llama"), tiny_tokenizer()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_alone_is_the_same_as_in_a_batch(pair, temperature):
    how = {"max_new_tokens": 12, "temperature": temperature}
    together = generate(*pair, PROMPTS, seed=[5, 6, 7], **how)
    alone = [
        generate(*pair, [p], seed=s, **how)[0] for p, s in zip(PROMPTS, [5, 6, 7], strict=True)
    ]
    assert together == alone
    assert all(text.startswith(p) for text, p in zip(together, PROMPTS, strict=True))


def test_the_seed_decides_and_nothing_global_is_touched(pair):
    how = {"max_new_tokens": 12}
    state = torch.random.get_rng_state()
    first = generate(*pair, PROMPTS, seed=1, **how)
    assert generate(*pair, PROMPTS, seed=1, **how) == first
    assert generate(*pair, PROMPTS, seed=2, **how) != first
    assert torch.equal(torch.random.get_rng_state(), state)


def test_gumbel_noise_samples_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    n, temperature = 20_000, 0.7
    rows = GumbelRows(range(n), temperature)
    picks = rows(torch.zeros(n, 1, dtype=torch.long), logits.expand(n, 4)).argmax(-1)
    share = torch.bincount(picks, minlength=4) / n
    expected = torch.softmax(logits / temperature, -1)
    assert (share - expected).abs().max() < 4 * (expected.max() / n) ** 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "not between 0 and 100"),
        ({"temperature": float("nan")}, "not between 0 and 100"),
        ({"max_new_tokens": 0}, "expected 1 or more"),
        ({"max_new_tokens": 1000}, "do not fit into the model's 128 positions"),
        ({"seed": [1, 2]}, "2 seeds for 3 prompts"),
    ],
)
def test_bad_settings_are_named(pair, change, message):
    with pytest.raises(TextError, match=message):
        generate(*pair, PROMPTS, **change)


def test_an_empty_prompt_is_a_bos_or_an_error(pair):
    model, _ = pair
    assert generate(model, tiny_tokenizer(), [""], max_new_tokens=3)
    with pytest.raises(TextError, match="empty prompt"):
        generate(model, tiny_tokenizer(bos=False), [""], max_new_tokens=3)


def test_a_tokenizer_without_pad_or_eos_works(pair):
    model, _ = pair
    bare = tiny_tokenizer(bos=False, eos=False, pad=False)
    texts = generate(model, bare, PROMPTS[:2], max_new_tokens=4)
    alone = [generate(model, bare, [p], max_new_tokens=4)[0] for p in PROMPTS[:2]]
    assert texts == alone
