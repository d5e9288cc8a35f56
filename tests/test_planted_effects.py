"""The planted scores, against the same computed by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.core.model import HookPoint, load_model
from saesteer.effects import planted_score, planted_search
from saesteer.steering.edits import Add
from saesteer.world import corpus, exact, lexicon

POINT = HookPoint(1, "resid_post")


@pytest.fixture(scope="module")
def model():
    return load_model("planted")[0]


def test_kl_is_the_definition_one_prompt_at_a_time(model):
    made = planted_score.prompts("sea", 4, seed=3)
    together = planted_score.kl(model, made.ids, made.mask, made.target)
    ids = exact.word_ids()
    for row, prompt in enumerate(corpus.prompts("sea", 4, seed=3)):
        logits = model(torch.tensor([[ids[w] for w in prompt.words]])).logits[0, -1].double()
        q = torch.softmax(logits, -1).numpy()
        p = exact.Reader(prompt.words).distribution(do="sea")
        on = p > 0
        assert float(together[row]) == pytest.approx(
            float((p[on] * np.log(p[on] / q[on])).sum()), abs=1e-5
        )


def test_the_chosen_candidate_is_the_best_on_validation_not_on_test(model):
    good = torch.randn(64, generator=torch.Generator().manual_seed(0))
    arms = {
        "arm": [
            planted_score.Candidate("nothing", (Add(good, 0.0, POINT),)),
            planted_score.Candidate("harm", (Add(good, 50.0, POINT),)),
        ]
    }
    score = planted_score.score_concept(
        model, "sea", arms=arms, point=POINT, random_norm=1.0, n_prompts=4, seed=0
    )
    assert score.chosen["arm"] == "nothing"
    assert score.kl["arm"] == pytest.approx(score.kl["none"], abs=1e-9)
    assert score.kl["ceiling"] < score.kl["none"]


def test_random_directions_have_the_norm_asked_for(model):
    found = planted_score._random_directions(model, 3.0, seed=1)
    assert len(found) == 20
    assert all(float(v.norm()) == pytest.approx(3.0, rel=1e-5) for v in found)
    assert not torch.equal(found[0], found[1])


def test_closed_is_the_share_of_the_way():
    scores = {"none": 1.0, "ceiling": 0.2, "half": 0.6, "worse": 1.2}
    assert planted_score.closed(scores, "half") == pytest.approx(0.5)
    assert planted_score.closed(scores, "worse") == pytest.approx(-0.25)


def test_auroc_is_the_share_of_pairs_in_order_ties_one_half():
    rng = np.random.default_rng(0)
    ids = exact.word_ids()
    sea = [ids[w] for w in lexicon.CONCEPTS[0].words]
    tokens = np.concatenate([rng.choice(sea, 30), np.full(50, ids["the"])])
    activations = torch.from_numpy(rng.integers(0, 3, (80, 2)).astype(np.float32))
    table = planted_search.auroc(activations, tokens)
    for feature in range(2):
        x = activations[:, feature].numpy()
        pairs = [(a > b) + (a == b) / 2 for a in x[:30] for b in x[30:]]
        assert table[feature, 0] == pytest.approx(np.mean(pairs))
    assert np.isnan(table[:, lexicon.INDEX["castle"]]).all()


def test_a_feature_is_right_only_for_its_best_concept():
    table = np.full((3, len(lexicon.CONCEPTS)), 0.5)
    table[0, :2] = 0.95, 0.93  # both over the bar: right for the first alone
    table[1, 1] = 0.91
    table[2, 0] = 0.89
    names = [concept.name for concept in lexicon.CONCEPTS[:2]]
    assert planted_search.right_features(table, names[0]) == {0}
    assert planted_search.right_features(table, names[1]) == {1}


def test_search_score_by_hand():
    names = [concept.name for concept in lexicon.CONCEPTS[:2]]
    right = {names[0]: {0}, names[1]: {1, 2}}
    score = planted_search.score_search(lambda _: [0, 1, 2], right.__getitem__, names, seed=0)
    assert score.precision_at_1 == 0.5 and score.mrr == 0.75
    assert {concept for concept, _ in score.misses} == {names[1]}
    assert score.distinct == 0.5  # one first hit for two names
    queries = planted_search.queries(names[0], seed=0)
    assert queries[0] == names[0] and len(set(queries)) == 4
    assert set(queries) <= set(lexicon.CONCEPTS[0].words)


def test_a_concept_without_a_right_feature_and_a_search_without_hits_only_miss():
    names = [concept.name for concept in lexicon.CONCEPTS[:3]]
    score = planted_search.score_search(lambda _: [7], lambda _: set(), names, seed=0)
    assert score.precision_at_1 == score.mrr == 0 and len(score.misses) == 12
    score = planted_search.score_search(lambda _: [], lambda _: {7}, names, seed=0)
    assert score.precision_at_1 == score.mrr == score.distinct == 0
    assert planted_search.reciprocal_rank([4, 9, 7], {7, 9}) == 0.5


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), unique=True), st.sets(st.integers(0, 5)))
def test_reciprocal_rank_is_1_only_where_the_first_hit_is_right(hits, right):
    found = planted_search.reciprocal_rank(hits, right)
    assert (found == 1) == bool(hits and hits[0] in right)
    assert (found == 0) == (not right & set(hits))
