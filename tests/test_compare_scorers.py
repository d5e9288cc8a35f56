"""Scores of texts without a judge: on the planted model, between their fixed points."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.compare.evaluate import Bench
from saesteer.compare.generation import baseline
from saesteer.compare.problem import Behaviour
from saesteer.compare.scorers import FULL, SCORERS, Basis, lexicon, make
from saesteer.compare.texts import Text, cross_entropies, information, log_likelihoods
from saesteer.core.model import load_model
from saesteer.directions.pairs import Pair
from saesteer.effects.damage import repetition
from saesteer.errors import PairsError, SteeringError
from saesteer.world import corpus
from tests.some_material import SEA, some_pairs
from tests.tiny import tiny_model, tiny_tokenizer

SAME = Behaviour("sea", concept="sea")


@pytest.fixture(scope="module")
def basis() -> Basis:
    """Texts of the planted model, and pairs about the sea."""
    model, tokenizer = load_model("planted")
    pairs = [Pair(**pair) for pair in corpus.pairs("sea", 80, 0)]
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs[40:]))[:32]
    clean = [corpus.text(story.words)[:300] for story in corpus.stories(2, 1)]
    written = baseline(Bench(model, tokenizer, clean), prompts, max_new_tokens=30)
    return Basis(model, tokenizer, SAME, written.texts, pairs[:40])


@pytest.fixture(scope="module")
def scorers(basis):
    made, not_run = make(tuple(SCORERS), basis)
    assert not not_run and set(made) == set(SCORERS)
    return made


def a_text(basis, text: str, prompt: str = "It was Friday.") -> Text:
    ids = basis.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return Text(prompt, text, tuple(ids))


def mean(scorer, texts) -> float:
    return float(np.mean(scorer.score(texts)))


def test_fixed_points_are_the_means_of_what_they_say(basis, scorers):
    own, written = information(basis.model, basis.tokenizer, basis.base)
    assert written.tolist() == [bool(one.tokens) for one in basis.base] and written.sum() > 20
    assert scorers["relevance"].fixed["2"] == pytest.approx(own[written].mean())
    ce, _ = cross_entropies(basis.model, basis.tokenizer, basis.base)
    assert scorers["fluency"].fixed["2"] == pytest.approx(ce[written].mean())
    words = basis.model.get_input_embeddings().num_embeddings
    assert ce[written].mean() < scorers["fluency"].fixed["0"] <= math.log(words)
    # In between the scale is a straight line.
    zero, two = (scorers["relevance"].fixed[at] for at in "02")
    expected = np.where(written, np.clip(2 * (own - zero) / (two - zero), 0, 2), 0)
    assert scorers["relevance"].score(basis.base) == pytest.approx(expected.tolist())


def test_what_the_model_writes_itself_is_relevant_and_fluent(basis, scorers):
    assert mean(scorers["relevance"], basis.base) > 1.2
    assert mean(scorers["fluency"], basis.base) > 1.5
    turned = [*basis.base[5:], *basis.base[:5]]
    moved = [
        replace(one, prompt=other.prompt) for one, other in zip(basis.base, turned, strict=True)
    ]
    assert mean(scorers["relevance"], moved) < mean(scorers["relevance"], basis.base) - 0.5
    assert mean(scorers["lexicon"], moved) == mean(scorers["lexicon"], basis.base)


def test_words_alone_are_not_enough(basis, scorers):
    words = basis.behaviour.lexicon
    stuffed = [a_text(basis, " ".join([words[0], words[1]] * 12), t.prompt) for t in basis.base]
    assert mean(scorers["lexicon"], stuffed) == 2
    assert mean(scorers["fluency"], stuffed) < 0.1
    assert mean(scorers["relevance"], stuffed) < mean(scorers["relevance"], basis.base) - 0.5


def test_a_text_that_repeats_itself_loses_what_it_repeats(basis, scorers):
    longest = [one for one in basis.base if len(one.tokens) >= 20][:8]
    texts = [Text(one.prompt, "", (one.tokens[:8] * 4)) for one in longest]
    ce, _ = cross_entropies(basis.model, basis.tokenizer, texts)
    zero, two = (scorers["fluency"].fixed[at] for at in "02")
    likely = np.clip(2 * (zero - ce) / (zero - two), 0, 2)
    # Of 29 4-grams eight or fewer are new.
    lost = np.array([repetition([one.tokens]) for one in texts])
    assert lost.min() > 0.7 and likely.min() > 0.5
    assert scorers["fluency"].score(texts) == pytest.approx((likely * (1 - lost)).tolist())


def test_gibberish_scores_low(basis, scorers):
    rng = np.random.default_rng(0)
    ids = rng.integers(5, len(basis.tokenizer), (len(basis.base), 30)).tolist()
    texts = [
        Text(one.prompt, basis.tokenizer.decode(row), tuple(row))
        for one, row in zip(basis.base, ids, strict=True)
    ]
    assert mean(scorers["fluency"], texts) < 0.1 and mean(scorers["relevance"], texts) < 0.5


def test_stories_about_the_sea_show_the_concept(basis, scorers):
    rng = np.random.default_rng(0)
    told = [corpus.tell(rng, {"sea"}).words for _ in range(12)]
    about = [a_text(basis, corpus.text(words[:60])) for words in told]
    for name in ("lexicon", "classifier"):
        assert mean(scorers[name], about) > mean(scorers[name], basis.base) + 0.7, name


@settings(max_examples=12, deadline=None)
@given(ids=st.lists(st.integers(4, 200), max_size=20), begins=st.booleans())
def test_every_score_lies_between_0_and_2(basis, scorers, ids, begins):
    prompt = basis.base[0].prompt if begins else "Once"
    text = Text(prompt, basis.tokenizer.decode(ids), tuple(ids))
    for name, scorer in scorers.items():
        (score,) = scorer.score([text])
        assert 0 <= score <= 2
        assert ids or score == 0, f"{name}: a text without a token"
        together = scorer.score([basis.base[0], text, basis.base[1]])
        assert together[1] == pytest.approx(score, abs=1e-4)


@given(of=st.integers(0, 12), others=st.integers(0, 60), seed=st.integers(0, 9))
def test_the_lexicon_by_its_formula(of, others, seed):
    words = [*["Sea"] * of, *["stone"] * others]
    np.random.default_rng(seed).shuffle(words)
    behaviour = Behaviour("sea", pairs="x", words=("sea", "golden gate"))
    score = lexicon(Basis(None, None, behaviour, ())).score
    (found,) = score([Text("", " ".join(words), (5,))])
    expected = 1 + min(1, of / (of + others) / FULL) if of else 0
    assert found == pytest.approx(expected)


def test_the_lexicon_counts_whole_words_and_all_of_an_entry():
    behaviour = Behaviour("sea", pairs="x", words=("sea", "golden", "golden gate"))
    scorer = lexicon(Basis(None, None, behaviour, ()))
    texts = ["the seaside", "in the SEA, " + "a " * 37, "Golden gate " + "a " * 38, ""]
    assert scorer.score([Text("", text, (5,)) for text in texts]) == pytest.approx(
        [0, 1.25, 1.5, 0]
    )


def test_log_likelihoods_are_those_of_a_plain_pass(basis):
    model = basis.model
    texts, contexts = [(9, 8, 7, 30), (), (12,)], [(1, 4), (1,), (1, 5, 6, 7)]
    found = log_likelihoods(model, contexts, texts)
    for text, context, one in zip(texts, contexts, found, strict=True):
        logits = model(torch.tensor([[*context, *text]])).logits[0].log_softmax(-1)
        places = range(len(context), len(context) + len(text))
        plain = [float(logits[i - 1, [*context, *text][i]]) for i in places]
        assert one == pytest.approx(np.mean(plain) if plain else 0, abs=1e-5)


def test_information_without_bos_leaves_the_first_token_out():
    model = tiny_model()
    text = Text("the boy", "saw sea", (20, 30, 31))
    with_bos, _ = information(model, tiny_tokenizer(), [text])
    without, counted = information(model, tiny_tokenizer(bos=False), [text, Text("a", "", (20,))])
    boy = tiny_tokenizer()("the boy", add_special_tokens=False)["input_ids"]
    after, alone = log_likelihoods(model, [[*boy, 20], [20]], [(30, 31), (30, 31)])
    assert without[0] == pytest.approx(after - alone) and without[0] != with_bos[0]
    assert counted.tolist() == [True, False] and without[1] == 0


def test_what_has_no_scale_is_not_run(basis):
    plain = Behaviour("sea", pairs="x")
    for name, changed, error, match in (
        ("lexicon", replace(basis, behaviour=plain), SteeringError, "no words"),
        ("classifier", replace(basis, pairs=basis.pairs[:4]), PairsError, "4 pairs"),
        ("classifier", replace(basis, pairs=mixed(basis.pairs)), SteeringError, "can't tell"),
        ("relevance", replace(basis, base=[replace(t, prompt="Once") for t in basis.base]),
         SteeringError, "all prompts are the same"),
        ("relevance", replace(basis, base=random_texts(basis)), SteeringError, "doesn't depend"),
        ("fluency", replace(basis, base=random_texts(basis)), SteeringError, "no likelier"),
        ("fluency", replace(basis, base=[Text("a", "", ()), Text("b", "", ())]),
         SteeringError, "0 texts"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            SCORERS[name](changed)
        made, not_run = make([name, "judge"], changed)
        assert not made and [one["what"] for one in not_run] == [f"scorer {name}"]
        assert match in not_run[0]["why"]
    with pytest.raises(SteeringError, match="did you mean 'lexicon'"):
        make(["lexicons"], basis)


def mixed(pairs):
    """Half of them the wrong way round."""
    swapped = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in pairs[::2]]
    return [*pairs[1::2], *swapped]


def random_texts(basis):
    rng = np.random.default_rng(1)
    rows = rng.integers(5, len(basis.tokenizer), (len(basis.base), 20)).tolist()
    return [
        Text(one.prompt, basis.tokenizer.decode(row), tuple(row))
        for one, row in zip(basis.base, rows, strict=True)
    ]


def test_the_classifier_is_of_the_words_that_the_pairs_part_by():
    base = [Text("the boy saw the", "old stone house", (20, 21))] * 3
    scorer = SCORERS["classifier"](Basis(None, None, SAME, base, some_pairs(24)))
    texts = [f"a {word} and a stone" for word in [*SEA, "bread", "soup", "hill"]]
    scores = scorer.score([Text("", text, (5,)) for text in texts])
    assert min(scores[:6]) > 0.3 and max(scores[6:8]) == 0 and scores[8] < min(scores[:6])
    assert scorer.fixed["2"] > 1, "log-odds, of answers whose words were all seen"
    # Answers of words of their own are learnt by heart, which says nothing of others.
    alone = [Pair("the", f" one{i}", f" other{i}") for i in range(20)]
    with pytest.raises(SteeringError, match="can't tell"):
        SCORERS["classifier"](Basis(None, None, SAME, base, alone))
