"""Reading: AUROC against scikit-learn, windows by brute force, what is read token by token."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from saesteer.compare import Material, Prepared
from saesteer.compare.arms.features import sae_add, sae_clamp, sae_topk
from saesteer.compare.arms.prompts import opened_with
from saesteer.compare.arms.vectors import vector
from saesteer.compare.ledger import counting
from saesteer.compare.reading import (
    ABOUT,
    CONTAINS,
    PAIRS,
    auroc,
    occurrences,
    read,
    readers_of,
    reading_of,
    window_labels,
)
from saesteer.core.hooks import activations
from saesteer.core.model import load_model
from saesteer.core.points import HookPoint
from saesteer.directions.answers import side_tokens
from saesteer.directions.pairs import Pair
from saesteer.effects.readings import of_feature, of_vector
from saesteer.errors import PairsError, SteeringError
from saesteer.steering.edits import Add
from saesteer.world import corpus, lexicon
from tests.some_material import SEA, an_index, some_pairs
from tests.some_pairs import planted_pairs
from tests.tiny import WIDTH, random_ids, tiny_model, tiny_sae, tiny_tokenizer

POINT = HookPoint(1, "resid_post")
FAST = {"resamples": 200}
TEXTS = [
    "once upon a time there was a boy and a big ship on the sea in the rain and wind .",
    "the king and the queen walked to the old house .",
    "the dog ate bread and soup with salt , then the boat and the harbour slept .",
    "a bird sang a song over the river and the moon was big and the night was calm .",
]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Material:
    sae = tiny_sae()
    figures = {feature: {"max_act": 20.0 + feature} for feature in range(64)}
    index = an_index(tmp_path_factory.mktemp("index"), sae, figures=figures)
    return Material(tiny_model(), tiny_tokenizer(), some_pairs(32), (), sae, index)


# Scores from a few values, so that there are ties.
tokens = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=12)


@given(st.lists(tokens, min_size=2, max_size=6))
@settings(max_examples=80, deadline=None)
def test_auroc_is_that_of_scikit_learn_however_texts_are_cut(texts):
    flat = [token for text in texts for token in text]
    scores = [[score for score, _ in text] for text in texts]
    labels = [[label for _, label in text] for text in texts]
    if len({label for _, label in flat}) < 2:
        with pytest.raises(SteeringError, match="needs both"):
            auroc(scores, labels, resamples=10)
        return
    found = auroc(scores, labels, resamples=50)
    assert found.value == pytest.approx(roc_auc_score([x for _, x in flat], [x for x, _ in flat]))
    assert found.low <= found.high and found.n == len(texts)
    turned = auroc([[-x for x in text] for text in scores], labels, resamples=50)
    assert turned.value == pytest.approx(1 - found.value)
    assert turned.low == pytest.approx(1 - found.high)  # the same resamples, turned round


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """Texts with a level of their own, as real ones have: tokens of one text are alike."""
    rng = np.random.default_rng(0)
    truth = 0.7602  # Φ(1 / √2): positives are one spread higher, each with spread 1 in all
    covered = 0
    for seed in range(150):
        scores, labels = [], []
        for _ in range(40):
            label = np.arange(10) < 3
            spread = 0.5**0.5
            scores.append(label + spread * (rng.standard_normal() + rng.standard_normal(10)))
            labels.append(label)
        found = auroc(scores, labels, seed=seed, resamples=300)
        covered += found.low <= truth <= found.high
    assert 0.88 <= covered / 150 <= 0.99


def test_one_text_has_no_interval_and_a_seed_one_answer():
    scores, labels = [[1.0, 2.0, 3.0]], [[False, True, True]]
    alone = auroc(scores, labels)
    assert (alone.value, alone.low, alone.high, alone.n) == (1.0, None, None, 1)
    more = ([[1.0, 2.0], [3.0, 0.5], [2.5, 2.0]], [[False, True]] * 3)
    assert auroc(*more, seed=3, **FAST) == auroc(*more, seed=3, **FAST)
    with pytest.raises(SteeringError, match="finite"):
        auroc([[1.0, float("nan")]], [[True, False]])


marks = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2)), max_size=4)


@given(st.integers(1, 24), marks, st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_windows_are_what_they_say(n, drawn, window):
    spans = [(first, first + more) for first, more in drawn if first + more < n]
    contains, about = window_labels(n, spans, window)
    for t in range(n):
        assert contains[t] == any(t - window < last <= t for _, last in spans)
        said = any(t < first <= t + window for first, _ in spans)
        assert about[t] == (1 if said else -1 if t + window > n - 1 else 0)


def test_words_are_found_whole_over_tokens_and_phrases():
    pieces = [" The", " gold", "en", " gate", " is", " Old", ",", " not", " older", " old"]
    assert occurrences(pieces, ["golden", "old"]) == [(1, 2), (5, 5), (9, 9)]
    assert occurrences(pieces, ["golden gate", "golden"]) == [(1, 3)]
    assert occurrences(pieces, ["gold", "der", "", " "]) == []
    assert occurrences(pieces, []) == occurrences([], ["old"]) == []


def test_what_an_arm_reads(material):
    sae = material.sae
    ids = random_ids(2, 6)
    x = activations(material.model, [POINT], ids)[POINT]
    clamp, add = sae_clamp(material, feature=5), sae_add(material, feature=5)
    for made in (reading_of(clamp, sae), reading_of(add, sae), reading_of(clamp)):
        torch.testing.assert_close(made.read(x), of_feature(sae, 5).read(x))
    assert reading_of(add, sae).name == "sae-add"
    # An arm of features whose SAE isn't given is read by the direction that it adds.
    along = of_vector(sae.direction(5), POINT).read(x)
    torch.testing.assert_close(reading_of(add).read(x), along)
    several = sae_topk(material, k=3)
    expected = sum(
        share * of_feature(sae, feature).read(x)
        for share, feature in zip(several.notes["shares"], several.notes["features"], strict=True)
    )
    torch.testing.assert_close(reading_of(several, sae).read(x), expected)
    difference = vector(material, method="mean-difference", points=[POINT])
    made = reading_of(difference, sae)
    assert (made.name, made.point) == ("mean-difference", POINT)
    direction = difference.edits(1.0)[0].vector
    torch.testing.assert_close(made.read(x), x @ direction / direction.norm())
    # Made for a feature, but steers by another vector.
    notes = {"features": [5], "sae": sae.hash}
    targeted = replace(difference, arm="sae-ts", notes=notes)
    torch.testing.assert_close(reading_of(targeted, sae).read(x), made.read(x))


def test_what_has_no_direction_of_its_own_reads_nothing(material):
    model = material.model
    assert reading_of(Prepared("prompt", model, opened_with("Be happy."))) is None
    edits = [Add(torch.ones(WIDTH), 1.0, HookPoint(layer, "resid_post")) for layer in (0, 1)]
    assert reading_of(Prepared("icv", model, edits=lambda _: edits)) is None
    trained = Prepared("sft-lora", model, edits=lambda _: edits[:1], notes={"trained": True})
    assert reading_of(trained) is None
    clamp = Prepared("sae-clamp", model, notes={"features": [1], "sae": "another"})
    with pytest.raises(SteeringError, match="another SAE"):
        reading_of(clamp, material.sae)


def test_scores_are_of_the_right_tokens_whatever_the_batch(material):
    model, tokenizer, sae = material.model, material.tokenizer, material.sae
    readings = [of_feature(sae, 5), of_vector(torch.arange(float(WIDTH)) - 9, POINT)]
    pairs = some_pairs(8, begin=8)
    words = [*SEA, "night"]
    by_batch = [
        read(model, tokenizer, readings, texts=TEXTS, pairs=pairs, words=words, window=3,
             batch_size=size, **FAST)
        for size in (1, 5, 64)
    ]  # fmt: skip
    assert [(one["arm"], one["labels"]) for one in by_batch[0]] == [
        (one.name, labels) for one in readings for labels in (CONTAINS, ABOUT, PAIRS)
    ]
    scores: dict[str, list[float]] = {CONTAINS: [], ABOUT: [], PAIRS: []}
    labels: dict[str, list[bool]] = {CONTAINS: [], ABOUT: [], PAIRS: []}
    for text in TEXTS:
        ids = side_tokens(tokenizer, "", text).ids
        spoken = text.split()
        values = of_feature(sae, 5).read(activations(model, [POINT], torch.tensor([ids]))[POINT])
        for t in range(len(spoken)):
            value = float(values[0, t + 1])  # BOS is before
            scores[CONTAINS].append(value)
            labels[CONTAINS].append(any(word in words for word in spoken[max(0, t - 2) : t + 1]))
            ahead = any(word in words for word in spoken[t + 1 : t + 4])
            if ahead or t + 3 < len(spoken):
                scores[ABOUT].append(value)
                labels[ABOUT].append(ahead)
    for pair in pairs:
        for answer, label in ((pair.chosen, True), (pair.rejected, False)):
            side = side_tokens(tokenizer, pair.prompt, answer)
            x = activations(model, [POINT], torch.tensor([side.ids]))[POINT]
            scores[PAIRS].append(float(of_feature(sae, 5).read(x)[0, side.start :].mean()))
            labels[PAIRS].append(label)
    for found in by_batch:
        for one in found[:3]:
            name = one["labels"]
            expected = roc_auc_score(labels[name], np.round(scores[name], 6))
            assert one["auroc"]["value"] == pytest.approx(expected, abs=1e-9)
            assert set(one["auroc"]) == {"value", "low", "high", "n", "how"}
    assert by_batch[0][0]["auroc"]["n"] == 4 and by_batch[0][2]["auroc"]["n"] == 8
    assert "within 3 tokens" in by_batch[0][0]["auroc"]["how"]


def test_everything_is_read_in_one_pass(material):
    model, tokenizer = material.model, material.tokenizer
    points = [HookPoint(0, "resid_post"), POINT]
    readings = [of_vector(torch.randn(WIDTH), point) for point in points * 3]
    pairs = some_pairs(4)
    with counting(model) as count:
        read(model, tokenizer, readings, texts=TEXTS, pairs=pairs, words=SEA, batch_size=1, **FAST)
    once = sum(len(side_tokens(tokenizer, "", text).ids) for text in TEXTS)
    for pair in pairs:
        once += sum(
            len(side_tokens(tokenizer, pair.prompt, answer).ids)
            for answer in (pair.chosen, pair.rejected)
        )
    assert count.tokens == once


def test_without_the_words_only_pairs_are_read(material):
    given = (material.model, material.tokenizer, [of_feature(material.sae, 5)])
    found = read(*given, texts=TEXTS, pairs=some_pairs(4), words=["kitchen"], **FAST)
    assert [one["labels"] for one in found] == [PAIRS]
    assert read(*given, texts=[], pairs=[], words=[], **FAST) == []
    with pytest.raises(PairsError, match="pair 1"):
        read(*given, texts=[], pairs=[Pair("the", "<eos>", " sea")], words=[], **FAST)


def test_on_the_planted_language_the_mean_difference_reads_its_concept():
    model, tokenizer = load_model("planted")
    concept, point = "sea", HookPoint(1, "resid_post")
    material = Material(model, tokenizer, planted_pairs(concept, 64))
    arms = [vector(material, method=name, points=[point]) for name in ("mean-difference", "random")]
    with pytest.warns(UserWarning, match="9 contrast pairs"):  # from ten on it is fitted six times
        ccs = readers_of(model, tokenizer, material.pairs[:9], point)
    readings = [*map(reading_of, arms), *ccs]
    assert [one.name for one in readings] == ["mean-difference", "random", "ccs"]
    texts = [corpus.text(story.words) for story in corpus.stories(100, seed=5)]
    words = lexicon.CONCEPTS[lexicon.INDEX[concept]].words
    found = {
        (one["arm"], one["labels"]): one["auroc"]
        for one in read(model, tokenizer, readings, texts=texts, words=words,
                        pairs=planted_pairs(concept, 40, seed=9), **FAST)
    }  # fmt: skip
    assert len(found) == 9
    assert found["mean-difference", PAIRS]["low"] > 0.9
    assert found["mean-difference", CONTAINS]["low"] > 0.5
    assert found["mean-difference", ABOUT]["low"] > 0.5
    assert found["random", PAIRS]["value"] < found["mean-difference", PAIRS]["value"]
