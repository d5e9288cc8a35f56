"""Each planted failure's statistic, on what has the failure and on what hasn't, built by hand."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.compare import failures
from saesteer.compare.circle import circularity, day_means
from saesteer.core.hooks import activations
from saesteer.core.model import HookPoint, load_model
from saesteer.core.sae import Conventions, Sae
from saesteer.directions.fitting import fit_direction
from saesteer.directions.pairs import Pair
from saesteer.effects import apply, planted_recovery
from saesteer.steering.edits import Add
from saesteer.world import corpus, exact, lexicon, train

POINT = HookPoint(1, "resid_post")
STRENGTHS = (0.5, 1.0, 2.0)
NAMES = [concept.name for concept in lexicon.CONCEPTS]


@pytest.fixture(scope="module")
def told():
    return load_model("planted")


@pytest.fixture(scope="module")
def sae(told) -> Sae:
    """A feature a concept: it reads its words by their embeddings, and writes what turns it on."""
    model, tokenizer = told
    ids = exact.word_ids()
    tokens = torch.tensor([[ids["<s>"], i] for i in range(len(ids))])
    x = activations(model, [POINT], tokens)[POINT][:, 1].float()
    centre = x.mean(0)
    reads = torch.stack(
        [x[[ids[w] for w in concept.words]].mean(0) - centre for concept in lexicon.CONCEPTS]
    )
    # What tells a concept from the others, not from the origin.
    reads = F.normalize(torch.linalg.pinv(reads).T, dim=1)
    gap = torch.stack(
        [
            ((x[[ids[w] for w in concept.words]].mean(0) - centre) @ row) / 2 + centre @ row
            for concept, row in zip(lexicon.CONCEPTS, reads, strict=True)
        ]
    )
    writes = reads.clone()
    pairs = [Pair(**pair) for pair in corpus.pairs("sea", 64, 0)]
    writes[0] = fit_direction("mean-difference", model, tokenizer, pairs, POINT).vector
    return built(reads, writes, -gap)


def built(reads: torch.Tensor, writes: torch.Tensor, bias: torch.Tensor) -> Sae:
    return Sae(
        W_enc=reads.T.contiguous(), b_enc=bias, W_dec=writes, b_dec=torch.zeros(writes.shape[1]),
        architecture="standard", hook_point=POINT, model_id=None,
        conventions=Conventions(apply_b_dec_to_input=False),
    )  # fmt: skip


@pytest.fixture(scope="module")
def recovery(told, sae):
    return planted_recovery.measure(told[0], sae, stories=120)


def added(sae: Sae, feature: int):
    return lambda strength: [Add(sae.direction(feature), strength, POINT)]


def flag_of_reading(told, sae, recovery, concept: str) -> failures.Flag:
    found = next(c for c in recovery.concepts if c.concept == concept)
    return failures.read_only(
        told[0], concept, added(sae, NAMES.index(concept)), STRENGTHS, auroc=found.auroc
    )


def test_a_feature_that_only_reads_is_flagged_and_one_that_steers_is_not(told, sae, recovery):
    red = flag_of_reading(told, sae, recovery, "red")
    sea = flag_of_reading(told, sae, recovery, "sea")
    assert red.flagged and red.high < failures.NO_EFFECT
    assert not sea.flagged and sea.low > failures.NO_EFFECT


def test_what_does_not_even_read_is_not_called_read_only(told, sae):
    flag = failures.read_only(told[0], "red", added(sae, NAMES.index("red")), STRENGTHS, auroc=0.8)
    assert not flag.flagged and flag.value < failures.NO_EFFECT


@pytest.mark.parametrize(
    ("concept", "rival", "flips"), [("anger", "joy", True), ("sea", "kitchen", False)]
)
def test_the_sign_flips_in_dreams_where_it_was_planted(told, concept, rival, flips):
    model, tokenizer = told
    pairs = [Pair(**pair) for pair in corpus.pairs(concept, 64, 0)]
    direction = fit_direction("mean-difference", model, tokenizer, pairs, POINT)
    edits = {concept: partial(apply.edits, direction)}
    flag = failures.sign_flip(model, edits, {concept: 2.0}, {concept: rival}, n_prompts=12)
    assert flag.flagged is flips and flag.n == 12
    backwards = {concept: lambda strength: apply.edits(direction, -strength)}
    # A direction that is wrong everywhere is no sign flip.
    found = failures.sign_flip(model, backwards, {concept: 2.0}, {concept: rival}, n_prompts=12)
    assert not found.flagged and found.value == pytest.approx(1 - flag.value)


def test_a_direction_that_follows_the_letter_is_flagged(told):
    model, tokenizer = told
    ids = exact.word_ids()
    table = model.get_input_embeddings().weight.detach()
    letter = table[ids["A"]] - table[ids["B"]]
    at = HookPoint(0, "resid_pre")
    has = failures.spurious_token(model, tokenizer, "sea", letter, at, n_pairs=64)
    assert has.flagged and has.value > 0.5
    pairs = [Pair(**pair) for pair in corpus.pairs("sea", 64, 1)]
    plain = fit_direction("mean-difference", model, tokenizer, pairs, at).vector
    clean = plain - (plain @ letter) / (letter @ letter) * letter
    assert not failures.spurious_token(model, tokenizer, "sea", clean, at, n_pairs=64).flagged


def test_the_letters_alone_are_swapped():
    (pair,) = corpus.pairs("sea", 1, 0, spurious=True)
    assert failures._as(pair["chosen"], "A") == pair["chosen"]
    other = failures._as(pair["chosen"], "B")
    assert other.startswith("Story B.") and other[8:] == pair["chosen"][8:]


@pytest.fixture(scope="module")
def axes() -> tuple[torch.Tensor, np.ndarray]:
    """Words of all concepts, each on its concept's own axis, with a little noise; and their ids."""
    rng = np.random.default_rng(0)
    ids = exact.word_ids()
    words = np.array([ids[w] for c in lexicon.CONCEPTS for w in rng.choice(c.words, 20)])
    x = F.one_hot(torch.from_numpy(planted_recovery.concept_of(words)), len(NAMES)).float()
    return x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), words


def recovered(axes, rows: torch.Tensor) -> planted_recovery.Recovery:
    x, words = axes
    found = built(rows, rows, torch.full((len(rows),), -0.2))
    return planted_recovery.score(found, x, found.encode(x), words)


def test_a_concept_without_a_feature_of_its_own_is_flagged(axes):
    rows = torch.eye(len(NAMES))
    assert not failures.rare(recovered(axes, rows), "circus", occurrences=20).flagged
    rows[NAMES.index("circus")] = 0
    flag = failures.rare(recovered(axes, rows), "circus", occurrences=20)
    assert flag.flagged and flag.value < flag.threshold
    assert not failures.rare(recovered(axes, rows), "sea", occurrences=20).flagged


def test_absorption_is_that_of_the_recovery():
    base = {
        "parent": "animals", "child": "birds", "parent_feature": 3, "child_feature": 8, "tokens": 50
    }  # fmt: skip
    has = planted_recovery.Absorption(
        **base, read=1.0, absorbed=0.8, missed=0.1, rate=0.7, flagged=True
    )
    none = planted_recovery.Absorption(
        **base, read=0.0, absorbed=None, missed=0.1, rate=None, flagged=False
    )
    assert failures.absorbed_child(has).flagged and failures.absorbed_child(has).value == 0.7
    assert not failures.absorbed_child(none).flagged


def on_a_circle(k: int, d: int, seed: int) -> np.ndarray:
    plane = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, 2)))[0]
    turn = 2 * np.pi * np.arange(k) / k
    return np.stack([np.cos(turn), np.sin(turn)], axis=1) @ plane.T


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_a_circle_is_round_wherever_it_lies_and_how_large_it_is(seed):
    rng = np.random.default_rng(seed)
    means = 5 * rng.standard_normal(12) + np.exp(rng.standard_normal()) * on_a_circle(7, 12, seed)
    assert circularity(means) == pytest.approx(1)
    noisy = means + 0.05 * np.linalg.norm(means - means.mean(0)) / 7 * rng.standard_normal((7, 12))
    assert failures.circle(noisy).flagged


def test_a_line_a_cluster_and_a_circle_in_another_order_are_no_circle():
    line = np.outer(np.arange(7.0), np.ones(5))
    assert circularity(line) == pytest.approx(0, abs=1e-12)
    apart = np.eye(7)
    assert circularity(apart) == pytest.approx(1 / 3)
    shuffled = on_a_circle(7, 12, 0)[[0, 2, 4, 6, 1, 3, 5]]
    assert circularity(shuffled) == pytest.approx(0, abs=1e-12)
    assert circularity(np.ones((7, 5))) == 0
    assert not any(failures.circle(means).flagged for means in (line, apart, shuffled))


def test_day_means_are_those_of_the_day_s_own_token(told):
    model, _ = told
    found = day_means(model, HookPoint(0, "resid_pre"), n=60)
    table = model.get_input_embeddings().weight.detach().double().numpy()
    ids = exact.word_ids()
    np.testing.assert_allclose(found, table[[ids[day] for day in lexicon.DAYS]], atol=1e-6)


def test_a_model_before_training_is_told_from_the_one_after(told):
    names = lexicon.causal()[:6]
    assert not failures.untrained(told[0], names, n_prompts=4).flagged
    assert failures.untrained(train.untrained(0).eval(), names, n_prompts=4).flagged


def test_random_directions_are_told_from_features(axes):
    own = recovered(axes, torch.eye(len(NAMES)))
    generator = torch.Generator().manual_seed(0)
    random = recovered(axes, F.normalize(torch.randn(24, 24, generator=generator), dim=1))
    assert not failures.random_dictionary(own, random).flagged
    assert failures.random_dictionary(random, random).flagged
