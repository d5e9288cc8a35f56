"""The embedded model: how close it is to the exact predictor, and how it was made."""

import numpy as np
import pytest
import torch

from saesteer.core.model import load_model
from saesteer.world import corpus, exact, lexicon, train
from saesteer.world.grammar import BOS

MARGIN = 0.06  # nats a word above the exact Bayes predictor; .041 when it was trained


@pytest.fixture(scope="module")
def planted():
    return load_model("planted")


def test_the_embedded_model_is_within_a_margin_of_the_exact_predictor(planted):
    model, _ = planted
    ours, bayes = train.excess_loss(model, 150, seed=77)
    assert bayes - 0.01 < ours < bayes + MARGIN


def test_it_says_a_day_where_a_day_comes_and_the_name_that_was_given(planted):
    model, _ = planted
    ids = exact.word_ids()
    days = [ids[day] for day in lexicon.DAYS]
    for prompt, _day in corpus.days(10, seed=1):
        if len(prompt) <= train.CONTEXT:
            logits = model(torch.tensor([[ids[w] for w in prompt]])).logits[0, -1]
            assert torch.softmax(logits, -1)[days].sum() > 0.9
    words = "Story A . Once there was a girl named Rosa . It was Monday .".split()  # noqa: SIM905
    logits = model(torch.tensor([[ids[w] for w in (BOS, *words)]])).logits[0, -1]
    likely = torch.softmax(logits, -1)
    assert likely[ids["Rosa"]] > 0.05 > likely[[ids["Anna"], ids["Tom"], ids["He"]]].sum()


def test_token_ids_are_the_world_s_and_text_goes_round(planted):
    _, tokenizer = planted
    for story in corpus.stories(10, seed=5):
        text = corpus.text(story.words)
        tokens = tokenizer(text)["input_ids"]
        assert tokens == [exact.word_ids()[word] for word in story.words]
        assert tokenizer.decode(tokens) == text
    assert tokenizer.bos_token == tokenizer.eos_token == BOS


def test_training_is_deterministic_and_learns():
    settings = {"batch": 8, "lr": 3e-3, "n_stories": 30, "layers": 1, "d_model": 16}
    first, second = (train.train(steps=3, seed=1, **settings) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    longer = train.train(steps=40, seed=1, **settings)
    assert train.excess_loss(longer, 5, 9)[0] < train.excess_loss(first, 5, 9)[0] - 0.5


def test_rows_begin_with_bos_half_of_them_with_a_story():
    tokens = train.stream(20, seed=0)
    rows = train.rows(tokens, 200, np.random.default_rng(0))
    ids = exact.word_ids()
    assert (rows[:, 0] == ids[BOS]).all()
    assert (rows[:100, 1] == ids["Story"]).all()
    assert (rows[100:, 1] == ids["Story"]).float().mean() < 0.2
