"""Recovery of planted concepts, and absorption, on SAEs built by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor

from saesteer.core.model import load_model
from saesteer.core.points import HookPoint
from saesteer.core.sae import Codes, Conventions, Sae
from saesteer.effects import planted_recovery, planted_search
from saesteer.world import exact, lexicon

POINT = HookPoint(1, "resid_post")
PARENT, CHILD = "animals", "birds"
N = 2000


def sae_of(encoder: Tensor, decoder: Tensor, bias: Tensor | None = None) -> Sae:
    """A ReLU SAE of d_sae rows: encoder [d_sae, d], decoder [d_sae, d]."""
    return Sae(
        W_enc=encoder.T.contiguous(),
        b_enc=torch.zeros(len(encoder)) if bias is None else bias,
        W_dec=decoder,
        b_dec=torch.zeros(decoder.shape[1]),
        architecture="standard",
        hook_point=POINT,
        model_id=None,
        conventions=Conventions(apply_b_dec_to_input=False),
    )


@pytest.fixture(scope="module")
def words() -> np.ndarray:
    """Word ids in which every concept occurs, among neutral words."""
    rng = np.random.default_rng(0)
    names = [w for c in lexicon.CONCEPTS for w in c.words] + list(lexicon.NEUTRAL.words) * 4
    ids = exact.word_ids()
    drawn = rng.choice(np.array([ids[w] for w in names]), N)
    return np.concatenate([drawn, [ids[c.words[0]] for c in lexicon.CONCEPTS]]).astype(np.int64)


@pytest.fixture(scope="module")
def axes(words: np.ndarray) -> Tensor:
    """An axis a concept, 1 on its words, and the parent's also on the child's; a little noise."""
    concept = planted_recovery.concept_of(words)
    x = torch.zeros(len(words), len(lexicon.CONCEPTS) + 4)
    for row, number in enumerate(concept):
        if number >= 0:
            x[row, number] = 1
        if number == lexicon.INDEX[CHILD]:
            x[row, lexicon.INDEX[PARENT]] = 1
    x += 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return x


def faithful(axes: Tensor) -> Sae:
    """A feature a concept, each reading and writing its own axis."""
    rows = torch.eye(axes.shape[1])[: len(lexicon.CONCEPTS)]
    return sae_of(rows, rows, torch.full((len(rows),), -0.1))


def absorbing(axes: Tensor) -> Sae:
    """The child's feature writes the parent too, and the parent's is silent where the child is."""
    sae = faithful(axes)
    encoder, decoder = sae.W_enc.T.clone(), sae.W_dec.clone()
    parent, child = lexicon.INDEX[PARENT], lexicon.INDEX[CHILD]
    encoder[parent, child] = -1
    decoder[child, parent] = 1
    return sae_of(encoder, decoder, sae.b_enc)


def test_concepts_are_the_lexicon_s(words: np.ndarray) -> None:
    found = planted_recovery.concept_of(words)
    back = {number: word for word, number in exact.word_ids().items()}
    for word, number in zip(words[:300], found[:300], strict=True):
        owners = [i for i, c in enumerate(lexicon.CONCEPTS) if back[int(word)] in c.words]
        assert [number] == (owners or [-1])


@pytest.mark.parametrize("levels", [3, 10_000], ids=["many ties", "few ties"])
def test_sparse_auroc_is_the_dense_one(words: np.ndarray, levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    dense = torch.randint(-levels, levels, (len(words), 30), generator=generator).float().relu()
    dense[:, 7] = 0  # never fires
    dense[:, 8] = 1  # always, alike
    rows, latents = dense.nonzero(as_tuple=True)
    codes = Codes(rows, latents, dense[rows, latents], len(words))
    found = planted_recovery.auroc(codes, planted_recovery.concept_of(words), 30)
    np.testing.assert_allclose(found, planted_search.auroc(dense, words), atol=1e-12)
    assert found[7] == pytest.approx(0.5) and found[8] == pytest.approx(0.5)


def test_auroc_of_nothing_fired_and_of_a_concept_that_never_comes(words: np.ndarray) -> None:
    none = torch.zeros(0, dtype=torch.long)
    kept = words[planted_recovery.concept_of(words) != 0]
    codes = Codes(none, none, torch.zeros(0), len(kept))
    table = planted_recovery.auroc(codes, planted_recovery.concept_of(kept), 3)
    assert np.isnan(table[:, 0]).all() and (table[:, 1:] == 0.5).all()


def test_a_faithful_sae_recovers_every_concept(words: np.ndarray, axes: Tensor) -> None:
    sae = faithful(axes)
    found = planted_recovery.score(sae, axes, sae.encode(axes), words)
    assert found.recovered == found.distinct == 1
    assert [c.own_feature for c in found.concepts] == list(range(len(lexicon.CONCEPTS)))
    assert found.mean_auroc > 0.99 and found.tokens == len(words)


def test_a_feature_that_suits_another_concept_better_recovers_only_that(
    words: np.ndarray, axes: Tensor
) -> None:
    """One feature for two concepts, stronger on the first."""
    sae = faithful(axes)
    first, second = lexicon.INDEX["sea"], lexicon.INDEX["kitchen"]
    encoder = sae.W_enc.T.clone()
    encoder[first, second] = 0.5
    encoder[second] = 0
    merged = sae_of(encoder, sae.W_dec, sae.b_enc)
    found = planted_recovery.score(merged, axes, merged.encode(axes), words)
    by_name = {c.concept: c for c in found.concepts}
    assert by_name["sea"].own_feature == first
    assert by_name["kitchen"].feature == first and (by_name["kitchen"].auroc or 0) > 0.9
    assert not by_name["kitchen"].recovered and by_name["kitchen"].own_feature is None
    n = len(lexicon.CONCEPTS)
    assert found.recovered == found.distinct == pytest.approx((n - 1) / n)


def test_absorption_is_found_where_it_is_and_not_where_it_is_not(
    words: np.ndarray, axes: Tensor
) -> None:
    for sae, rate in ((faithful(axes), 0.0), (absorbing(axes), 1.0)):
        (found,) = planted_recovery.score(sae, axes, sae.encode(axes), words).absorption
        assert (found.parent, found.child) == (PARENT, CHILD)
        assert found.parent_feature == lexicon.INDEX[PARENT]
        assert found.child_feature == lexicon.INDEX[CHILD]
        assert found.read == pytest.approx(1) and found.missed == pytest.approx(0)
        assert found.rate == pytest.approx(rate) and found.flagged == (rate > 0)


def test_absorption_in_part_is_that_part(words: np.ndarray, axes: Tensor) -> None:
    """A parent's feature that misses a third of everything is no absorption by the child."""
    x = axes.clone()
    parent, child = lexicon.INDEX[PARENT], lexicon.INDEX[CHILD]
    spare = len(lexicon.CONCEPTS)
    x[::3, spare] = 1  # on these the parent's feature will be silent, whatever they are
    sae = faithful(axes)
    encoder, decoder = sae.W_enc.T.clone(), sae.W_dec.clone()
    encoder[parent, spare] = -2
    decoder[child, parent] = 1  # the child's feature carries the parent without need
    forgetful = sae_of(encoder, decoder, sae.b_enc)
    (found,) = planted_recovery.score(forgetful, x, forgetful.encode(x), words).absorption
    assert found.missed == pytest.approx(1 / 3, abs=0.12)
    assert found.absorbed == pytest.approx(1 / 3, abs=0.12)
    assert found.rate is not None and found.rate < 0.2


def test_a_silent_parent_without_a_carrier_is_not_absorbed(words: np.ndarray, axes: Tensor) -> None:
    sae = absorbing(axes)
    decoder = sae.W_dec.clone()
    decoder[lexicon.INDEX[CHILD], lexicon.INDEX[PARENT]] = 0
    broken = sae_of(sae.W_enc.T, decoder, sae.b_enc)
    (found,) = planted_recovery.score(broken, axes, broken.encode(axes), words).absorption
    assert found.absorbed == 0 and not found.flagged


def test_a_child_that_does_not_show_its_parent_cannot_be_measured(
    words: np.ndarray, axes: Tensor
) -> None:
    x = axes.clone()
    x[planted_recovery.concept_of(words) == lexicon.INDEX[CHILD], lexicon.INDEX[PARENT]] = 0
    sae = faithful(x)
    (found,) = planted_recovery.score(sae, x, sae.encode(x), words).absorption
    assert found.rate is None and found.tokens == 0 and not found.flagged


def test_the_embedded_model_s_words_come_with_their_own_activations() -> None:
    """Batched and padded, against one story at a time."""
    from saesteer.core.hooks import activations
    from saesteer.world import corpus
    from saesteer.world.grammar import BOS

    model = load_model("planted")[0]
    d = model.config.hidden_size
    sae = sae_of(torch.eye(d), torch.eye(d))
    x, words = planted_recovery._fresh(model, sae, 40, seed=2)
    ids, at = exact.word_ids(), 0
    for story in corpus.stories(40, seed=10_002):
        tokens = torch.tensor([[ids[BOS], *(ids[w] for w in story.words)]])
        tokens = tokens[:, : model.config.max_position_embeddings]
        n = tokens.shape[1] - 1
        np.testing.assert_array_equal(words[at : at + n], tokens[0, 1:])
        own = activations(model, [POINT], tokens)[POINT][0, 1:]
        torch.testing.assert_close(x[at : at + n], own, rtol=1e-4, atol=1e-4)
        at += n
    assert at == len(words)
    found = planted_recovery.measure(model, sae, stories=40, seed=2)
    assert found.tokens == len(words) and 0 <= found.recovered <= 1
    assert planted_recovery.measure(model, sae, stories=40, seed=2) == found
