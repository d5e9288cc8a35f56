"""Generation: a row's text depends on its own prompt and seed and on nothing else."""

import pytest
import torch

from saesteer.core.generate import GumbelRows, Stream, write
from saesteer.errors import TextError
from tests.tiny import BOS, EOS, PAD, generate, tiny_model, tiny_tokenizer

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


def test_what_was_written_is_told_as_tokens_and_as_text(pair):
    model, tokenizer = pair
    found = write(model, tokenizer, PROMPTS, seed=[5, 6, 7], max_new_tokens=12)
    assert [one.text for one in found] == generate(
        model, tokenizer, PROMPTS, seed=[5, 6, 7], max_new_tokens=12
    )
    for prompt, one in zip(PROMPTS, found, strict=True):
        assert one.prompt == (BOS, *tokenizer(prompt)["input_ids"])
        assert one.text == prompt + one.reply
        assert one.text == tokenizer.decode([*one.prompt, *one.new], skip_special_tokens=True)


def test_nothing_is_told_behind_the_end_token(pair):
    model, tokenizer = pair
    # Of these, some end before others, and are then padded.
    found = write(model, tokenizer, ["the boy"] * 40, seed=range(40), max_new_tokens=24)
    ended = [one for one in found if EOS in one.new]
    assert 0 < len(ended) < 40 and len({len(one.new) for one in ended}) > 1
    for one in ended:
        assert one.new.index(EOS) == len(one.new) - 1
    (alone,) = write(model, tokenizer, ["the boy"], seed=found.index(ended[0]), max_new_tokens=24)
    assert alone == ended[0]
    bare = tokenizer_without_specials()
    again = write(model, bare, [[BOS, *tokenizer("the boy")["input_ids"]]] * 40, seed=range(40),
                  max_new_tokens=24)  # fmt: skip
    assert [one.new for one in again] == [one.new for one in found]


def tokenizer_without_specials():
    return tiny_tokenizer(bos=False, eos=False, pad=False)


def test_rows_of_ids_are_taken_as_they_are(pair):
    model, tokenizer = pair
    ids = [PAD + 9, BOS, 12, 30]
    (one,) = write(model, tokenizer, [ids], max_new_tokens=3)
    assert one.prompt == tuple(ids)
    (text,) = write(model, tokenizer, ["the boy"], max_new_tokens=3)
    assert write(model, tokenizer, [text.prompt], max_new_tokens=3) == [text]


@pytest.mark.parametrize("skip", [True, False])
def test_text_is_handed_on_while_it_is_written(pair, skip):
    model, tokenizer = pair
    pieces = []
    stream = Stream(tokenizer, pieces.append, skip_prompt=skip)
    (one,) = write(model, tokenizer, PROMPTS[:1], seed=4, max_new_tokens=8, streamer=stream)
    assert "".join(pieces).split() == (one.reply if skip else one.text).split()
    assert len(pieces) > 4
    (plain,) = write(model, tokenizer, PROMPTS[:1], seed=4, max_new_tokens=8)
    assert plain == one
    with pytest.raises(TextError, match="3 prompts can't be streamed"):
        generate(model, tokenizer, PROMPTS, streamer=stream)


def test_no_prompt_is_an_error(pair):
    with pytest.raises(TextError, match="no prompt to continue"):
        generate(*pair, [])
