"""The margin of contrast pairs: exact, whatever stands beside them."""

import pytest
import torch

from saesteer.core.hooks import edit
from saesteer.core.points import HookPoint
from saesteer.directions.margin import margins
from saesteer.directions.pairs import Pair
from saesteer.effects import contrast
from saesteer.errors import PairsError
from tests.tiny import BOS, UNK, tiny_model, tiny_tokenizer

PAIRS = [
    Pair("the boy saw", " a cat and a dog", " rain"),
    Pair("", " the sea", " the old road was green"),
    Pair("once upon a time there was", " music", " a storm . then"),
]


def log_prob(model, tokenizer, prompt, answer):
    """Token by token, without padding."""
    ids = [BOS, *tokenizer.encode(prompt + answer)]
    start = 1 + len(tokenizer.encode(prompt))
    logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    each = [float(logits[i - 1, ids[i]]) for i in range(start, len(ids))]
    return sum(each) / len(each)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_it_is_the_mean_log_probability_of_the_answers_tokens(arch, batch_size):
    model, tokenizer = tiny_model(arch), tiny_tokenizer()
    expected = [
        log_prob(model, tokenizer, p.prompt, p.chosen)
        - log_prob(model, tokenizer, p.prompt, p.rejected)
        for p in PAIRS
    ]
    found = margins(model, tokenizer, PAIRS, batch_size=batch_size)
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-5, rtol=1e-4)


def test_special_tokens_of_an_answer_do_not_count():
    """They stand there all the same, and what comes after them is predicted from them."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    pair = Pair("the boy saw", " rain<eos>", " the unheard sea")
    assert tokenizer.encode(pair.rejected)[1] == UNK
    ids = [
        [BOS, *tokenizer.encode(pair.prompt + answer)] for answer in (pair.chosen, pair.rejected)
    ]
    logs = [model(torch.tensor([row])).logits[0].double().log_softmax(-1) for row in ids]
    chosen = logs[0][3, ids[0][4]]
    rejected = (logs[1][3, ids[1][4]] + logs[1][5, ids[1][6]]) / 2
    found = margins(model, tokenizer, [pair])
    torch.testing.assert_close(found[0].double(), chosen - rejected, atol=1e-5, rtol=1e-4)
    with pytest.raises(PairsError, match="pair 2: '<eos> unheard' has no token to predict"):
        margins(model, tokenizer, [pair, Pair("the", " sea", "<eos> unheard")])


def test_attribution_has_the_same_margin():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    pairs = [Pair("the boy saw", " a red<eos> ship", " unheard sea"), *PAIRS]
    (batch,) = contrast.contrast_batches(model, tokenizer, pairs)
    assert batch.answers[:2].sum(1).tolist() == [3, 1]
    found = contrast.margins(model, batch)
    torch.testing.assert_close(found, margins(model, tokenizer, pairs), atol=1e-5, rtol=1e-4)


def test_swapped_sides_swap_the_sign_and_no_pairs_give_none():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    swapped = [Pair(p.prompt, p.rejected, p.chosen) for p in PAIRS]
    assert torch.equal(margins(model, tokenizer, swapped), -margins(model, tokenizer, PAIRS))
    assert margins(model, tokenizer, []).shape == (0,)


def test_edits_count_and_gradients_flow():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    plain = margins(model, tokenizer, PAIRS)
    vector = torch.ones(32, requires_grad=True)
    with edit(model, {HookPoint(1, "resid_post"): lambda x, _: x + vector}):
        steered = margins(model, tokenizer, PAIRS)
    assert not torch.allclose(plain, steered)
    steered.sum().backward()
    assert vector.grad is not None and float(vector.grad.norm()) > 0


def test_an_answer_that_nothing_stands_before_is_refused():
    with pytest.raises(PairsError, match="pair 2: ' sea' has no token to predict"):
        margins(tiny_model(), tiny_tokenizer(bos=False), [PAIRS[0], Pair("", " sea", " a boat")])
    with pytest.raises(PairsError, match="pair 1: 203 tokens, but the model's contexts hold 128"):
        margins(tiny_model(), tiny_tokenizer(), [Pair("the", " sea" * 201, " a boat")])
