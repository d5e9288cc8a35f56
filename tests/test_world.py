"""The planted language: its grammar, its exact predictor, its generators."""

import itertools
from collections import Counter

import numpy as np
import pytest

from saesteer.errors import TextError
from saesteer.world import corpus, exact, grammar, lexicon
from saesteer.world.grammar import BOS

STORIES = list(corpus.stories(400, seed=11))


def slow_posterior(words):
    """P(hidden set | words), one set and one word at a time, straight from the definition."""
    state, evidence = grammar.State(), []
    for word in words[1:]:
        here = grammar.coming(state)
        if here.slot and word not in [w for w, _ in here.fixed]:
            evidence.append((lexicon.SLOTS.index(here.slot), here.dream, here.theme, word))
        state = grammar.step(state, word)
    members, prior = exact.sets()
    weights = []
    for row, p in zip(members, prior, strict=True):
        names = [c.name for c, on in zip(exact.HIDDEN, row, strict=True) if on]
        for at, dream, theme, word in evidence:
            p *= slow_slot(names, at, dream, theme).get(word, 0.0)
        weights.append(p)
    return np.array(weights) / np.sum(weights)


def slow_slot(names, at, dream, theme):
    """p(word) of a slot given the concepts that are on, from the lexicons."""
    total = 1.5 + len(names)
    p = Counter(
        {w: 1.5 / total / len(lexicon.NEUTRAL.slots[at]) for w in lexicon.NEUTRAL.slots[at]}
    )
    for name in names:
        if dream:
            name = {"joy": "anger", "anger": "joy"}.get(name, name)
        words = lexicon.CONCEPTS[lexicon.INDEX[name]].slots[at]
        for word in words:
            p[word] += 1 / total / len(words)
    if theme:
        p = Counter({word: share / 2 for word, share in p.items()})
        words = lexicon.CONCEPTS[lexicon.INDEX[theme]].slots[at]
        p.update({word: 0.5 / len(words) for word in words})
    return p


def test_no_word_belongs_to_two_concepts_and_every_name_is_one_of_its_words():
    counts = Counter(w for c in (*lexicon.CONCEPTS, lexicon.NEUTRAL) for w in c.words)
    assert max(counts.values()) == 1
    assert all(c.name in c.words for c in lexicon.CONCEPTS)
    assert len(lexicon.ordinary()) >= 16


def test_the_prior_is_a_distribution_over_at_most_three_concepts_and_a_child_has_its_parent():
    members, prior = exact.sets()
    assert prior.sum() == pytest.approx(1)
    assert members.sum(axis=1).max() == 3
    birds, animals = exact.COLUMN["birds"], exact.COLUMN["animals"]
    assert members[members[:, birds]][:, animals].all()
    on = prior @ members
    both = prior @ (members[:, exact.COLUMN["kitchen"]] & members[:, exact.COLUMN["garden"]])
    independent = on[exact.COLUMN["kitchen"]] * on[exact.COLUMN["garden"]]
    pair = prior @ (members[:, exact.COLUMN["kitchen"]] & members[:, exact.COLUMN["weather"]])
    unrelated = on[exact.COLUMN["kitchen"]] * on[exact.COLUMN["weather"]]
    assert both / independent > 2 * pair / unrelated
    assert on[exact.COLUMN["circus"]] < 0.01 < on[exact.COLUMN["night"]]


def test_every_next_word_distribution_sums_to_one_and_allows_what_comes():
    for story in STORIES[:60]:
        reader = exact.Reader([BOS])
        for word in (*story.words, BOS):
            p = reader.distribution()
            assert p.sum() == pytest.approx(1) and p.min() >= 0
            assert p[exact.word_ids()[word]] > 0
            reader.see(word)


@pytest.mark.parametrize("story", [s for s in STORIES if 30 < len(s.words) < 60][:3])
def test_p_star_is_the_sum_over_all_hidden_sets(story):
    cuts = [i for i, w in enumerate(story.words) if w in ("The", "the")][2:5]
    for cut in cuts:
        words = (BOS, *story.words[: cut + 1])
        posterior = slow_posterior(words)
        reader = exact.Reader(words)
        np.testing.assert_allclose(reader.posterior, posterior, atol=1e-12)
        here = grammar.coming(reader.state)
        at = lexicon.SLOTS.index(here.slot)
        for do in (None, "sea", "joy", "birds"):
            expected = np.zeros(len(grammar.vocabulary()))
            for row, weight in zip(exact.sets()[0], posterior, strict=True):
                names = {c.name for c, on in zip(exact.HIDDEN, row, strict=True) if on}
                for word, p in slow_slot(
                    names | ({do} if do else set()), at, here.dream, here.theme
                ).items():
                    expected[exact.word_ids()[word]] += weight * p
            np.testing.assert_allclose(reader.distribution(do), expected, atol=1e-12)


def test_p_star_is_calibrated_on_sampled_stories():
    """The expected number of each opening and of each concept's words is the number that comes."""
    expected = np.zeros(len(grammar.vocabulary()))
    seen = np.zeros(len(grammar.vocabulary()))
    variance = np.zeros(len(grammar.vocabulary()))
    for story in STORIES:
        reader = exact.Reader([BOS])
        for word in (*story.words, BOS):
            p = reader.distribution()
            expected += p
            variance += p * (1 - p)
            seen[exact.word_ids()[word]] += 1
            reader.see(word)
    often = expected > 20
    assert often.sum() > 150
    z = (seen - expected)[often] / np.sqrt(variance[often].clip(1e-9))
    z = z[variance[often] > 1]
    assert np.abs(z).max() < 4.5  # about 300 words: a fair draw passes 4.5 once in 500 seeds
    assert 0.7 < z.std() < 1.3


def test_told_the_set_the_predictor_does_no_worse():
    losses = [
        (
            exact.cross_entropy((BOS, *s.words, BOS)).sum(),
            exact.cross_entropy((BOS, *s.words, BOS), given=s.concepts).sum(),
        )
        for s in STORIES[:200]
    ]
    blind, told = np.sum(losses, axis=0)
    assert told < blind


def test_an_impossible_set_or_word_or_concept_is_named():
    with pytest.raises(TextError, match="at most three"):
        exact.Reader(given=["birds"])
    with pytest.raises(TextError, match="'rowed' cannot stand here"):
        exact.Reader([BOS, "rowed"])
    with pytest.raises(TextError, match="no concept 'oceans'"):
        exact.Reader([BOS]).distribution(do="oceans")
    with pytest.raises(TextError, match="no concept 'oceans'"):
        corpus.pairs("oceans", 1, seed=0)


def test_the_same_seed_tells_the_same_stories():
    again = list(corpus.stories(5, seed=11))
    assert again == STORIES[:5]
    assert list(corpus.stories(5, seed=12)) != again
    assert corpus.pairs("sea", 3, seed=1) == corpus.pairs("sea", 3, seed=1)
    assert corpus.prompts("sea", 3, seed=1) == corpus.prompts("sea", 3, seed=1)


def test_the_name_the_pronoun_and_the_verb_agree_through_a_story():
    for story in STORIES:
        words = story.words
        name = words[words.index("named") + 1]
        assert ("She" if name in lexicon.BOYS else "He") not in words
        assert not set(words) & (set(lexicon.GIRLS + lexicon.BOYS) - {name})
        for subject, verb in itertools.pairwise(words):
            if verb in ("was", "were") and subject in grammar.slot_words("subject"):
                assert (verb == "were") == (subject in lexicon.PLURALS)


def test_the_days_go_round():
    for prompt, day in corpus.days(30, seed=0):
        seen = [w for w in prompt if w in lexicon.DAYS]
        assert lexicon.DAYS.index(day) == (lexicon.DAYS.index(seen[-1]) + 1) % 7
        p = exact.Reader(prompt).distribution()
        assert p[exact.word_ids()[day]] == 1


@pytest.mark.parametrize("concept", ["sea", "birds", "circus", "joy"])
def test_prompts_have_the_concept_off_and_their_twins_have_it_on(concept):
    column = exact.COLUMN[concept]
    members, _ = exact.sets()
    own = set(lexicon.CONCEPTS[lexicon.INDEX[concept]].words)
    for prompt in corpus.prompts(concept, 12, seed=3):
        assert prompt.words[0] == prompt.twin[0] == BOS
        assert len(prompt.twin) > len(prompt.words)
        before = exact.Reader(prompt.words)
        after = exact.Reader(prompt.twin)
        assert before.state == after.state
        assert grammar.coming(before.state).slot
        extra = len(prompt.twin) - len(prompt.words)
        if concept not in lexicon.FLIPS:  # in a dream they speak with each other's words
            assert not own & set(prompt.words)
        assert after.posterior @ members[:, column] > before.posterior @ members[:, column]
        assert extra >= corpus.TWIN_SENTENCES * 4


def test_planted_read_only_concept_changes_nothing_of_what_comes():
    for story in STORIES[:20]:
        reader = exact.Reader((BOS, *story.words[:30]))
        np.testing.assert_array_equal(reader.distribution(), reader.distribution(do="red"))
    headed = [("red" in s.concepts) == ("Its" in s.words) for s in STORIES]
    assert all(headed)


def test_planted_sign_flip_a_dream_turns_joy_into_anger():
    ids = exact.word_ids()
    joy = [ids[w] for w in lexicon.CONCEPTS[lexicon.INDEX["joy"]].words]
    for dream, sign in ((False, 1), (True, -1)):
        for prompt in corpus.prompts("joy", 5, seed=0, dream=dream):
            reader = exact.Reader(prompt.words)
            anger_off = reader.posterior @ exact.sets()[0][:, exact.COLUMN["anger"]] < 0.5
            change = (reader.distribution(do="joy") - reader.distribution())[joy].sum()
            if anger_off and grammar.coming(reader.state).slot:
                assert np.sign(change) == sign or abs(change) < 0.02


def test_planted_spurious_token_goes_with_the_label():
    for pair in corpus.pairs("sea", 10, seed=0, spurious=True):
        assert pair["prompt"] == ""
        assert pair["chosen"].startswith("Story A.")
        assert pair["rejected"].startswith("Story B.")
    letters = {p["prompt"][6] for p in corpus.pairs("sea", 30, seed=0)}
    assert letters == {"A", "B"}


def test_chosen_sides_hold_the_concept_and_rejected_sides_do_not():
    own = set(lexicon.CONCEPTS[lexicon.INDEX["castle"]].words)
    for pair in corpus.pairs("castle", 30, seed=4):
        assert own & set(pair["chosen"].replace(".", "").replace(",", "").split())
        assert not own & set(pair["rejected"].replace(".", "").replace(",", "").split())


def test_a_read_only_concept_has_no_prompts_to_turn_it_on_in():
    with pytest.raises(TextError, match="read-only"):
        corpus.prompts(lexicon.READ_ONLY.name, 1, seed=0)
