"""What causes a planted concept, on SAEs whose decoder rows are known to cause it, or not."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saesteer.core.model import HookPoint, load_model
from saesteer.core.sae import Conventions, Sae
from saesteer.directions.fitting import fit_direction
from saesteer.directions.pairs import Pair
from saesteer.effects import planted, planted_causes, planted_score
from saesteer.effects.output_score import output_scores
from saesteer.errors import IndexingError, TextError
from saesteer.steering.edits import Add
from saesteer.world import corpus, exact, lexicon

POINT = HookPoint(1, "resid_post")
SEA, RANDOM, BACKWARDS, SILENT = range(4)
MAX_ACT = [3.0, 3.0, 3.0, 0.0]


@pytest.fixture(scope="module")
def told():
    """The embedded model and its tokenizer."""
    return load_model("planted")


@pytest.fixture(scope="module")
def sae(told) -> Sae:
    """Rows: towards the sea, anywhere, away from the sea, and one that never fired."""
    model, tokenizer = told
    pairs = [Pair(**pair) for pair in corpus.pairs("sea", 64, 0)]
    sea = fit_direction("mean-difference", model, tokenizer, pairs, POINT).vector
    anywhere = torch.randn(len(sea), generator=torch.Generator().manual_seed(0))
    rows = torch.stack([sea, anywhere / anywhere.norm() * sea.norm(), -sea, sea])
    return Sae(
        W_enc=rows.T.contiguous(), b_enc=torch.zeros(4), W_dec=rows, b_dec=torch.zeros(len(sea)),
        architecture="standard", hook_point=POINT, model_id=None,
        conventions=Conventions(apply_b_dec_to_input=False),
    )  # fmt: skip


def test_an_edit_a_row_is_one_edit_after_the_other(told, monkeypatch):
    model, _ = told
    prompts = planted_score.prompts("music", 5, seed=1)
    generator = torch.Generator().manual_seed(1)
    edits = [
        Add(torch.randn(64, generator=generator), strength, POINT) for strength in (0.0, 0.1, 0.3)
    ]
    apart = [planted_score.edited_kl(model, prompts, [edit]) for edit in edits]
    monkeypatch.setattr(planted_causes, "_ROWS", 11)  # two edits at once, then one
    found = planted_causes.edited_kl(model, prompts, edits)
    np.testing.assert_allclose(found, apart, rtol=1e-4)
    none = planted_score.kl(model, prompts.ids, prompts.mask, prompts.target).mean()
    assert found[0] == pytest.approx(float(none), rel=1e-5)


def test_what_causes_the_concept_is_told_from_what_does_not(told, sae):
    shares = planted_causes.closed(
        told[0], sae, "sea", [RANDOM, SEA, SILENT, BACKWARDS], MAX_ACT.__getitem__, n_prompts=8
    )
    assert shares.keys() == {SEA, RANDOM, BACKWARDS, SILENT}
    assert 0.5 < shares[SEA] <= 1
    assert max(shares[RANDOM], shares[BACKWARDS]) < 0.25 and shares[SILENT] == 0
    assert planted_causes.right_features(shares) == {SEA}


def test_the_share_is_of_the_way_to_the_ceiling(told, sae, monkeypatch):
    """An edit that reached the ceiling's own KL would have gone all of the way."""
    test = planted_score.prompts("sea", 6, seed=1)
    ceiling = planted_score.kl(told[0], test.twin_ids, test.twin_mask, test.target).mean()
    monkeypatch.setattr(
        planted_causes, "edited_kl", lambda *given: np.full(len(given[2]), float(ceiling))
    )
    shares = planted_causes.closed(told[0], sae, "sea", [SEA], MAX_ACT.__getitem__, n_prompts=6)
    assert shares[SEA] == pytest.approx(1)


def test_strengths_are_chosen_on_validation_prompts_alone(told, sae, monkeypatch):
    """Of five strengths the best on validation is taken, whatever it does on the test prompts."""
    asked = []

    def kl_of(model, prompts, edits):
        asked.append((prompts, [edit.strength for edit in edits]))
        return np.abs(np.array([edit.strength for edit in edits]) - 0.9)

    monkeypatch.setattr(planted_causes, "edited_kl", kl_of)
    planted_causes.closed(told[0], sae, "sea", [SEA], MAX_ACT.__getitem__, n_prompts=3, seed=4)
    (validation, tried), (test, chosen) = asked
    assert tried == pytest.approx([3 * s for s in planted_score.FEATURE_STRENGTHS])
    assert chosen == pytest.approx([0.9])
    assert torch.equal(validation.ids, planted_score.prompts("sea", 3, seed=8).ids)
    assert torch.equal(test.ids, planted_score.prompts("sea", 3, seed=9).ids)


def test_a_concept_that_changes_nothing_has_no_share(told, sae):
    for concept in ("red", "no such concept"):
        with pytest.raises(TextError, match="causal"):
            planted_causes.closed(told[0], sae, concept, [SEA], MAX_ACT.__getitem__)


def test_neutral_prompts_are_stories_cut_where_a_concept_could_speak(told):
    found = planted_causes.neutral_prompts()
    assert len(set(found)) == 16 and found == planted_causes.neutral_prompts()
    for text in found:
        words = text.replace(".", " .").replace(",", " ,").split()
        p = exact.Reader(["<s>", *words]).distribution()
        content = [
            exact.word_ids()[w] for c in (*lexicon.CONCEPTS, lexicon.NEUTRAL) for w in c.words
        ]
        assert p[content].sum() > 0.7


def test_own_effect_tells_causing_from_the_rest(told, sae):
    model, tokenizer = told
    own = [exact.word_ids()[word] for word in lexicon.CONCEPTS[lexicon.INDEX["sea"]].words]
    found = list(
        output_scores(
            model,
            tokenizer,
            sae,
            [SEA, RANDOM, BACKWARDS, SILENT],
            max_act=MAX_ACT.__getitem__,
            own_tokens=lambda _: own,
            prompts=planted_causes.neutral_prompts(),
        )
    )
    sea, anywhere, backwards, silent = (one.own for one in found)
    assert sea > 0.02 and sea > 4 * abs(anywhere) and backwards <= 0 and silent is None


class FakeIndex:
    """An index of the SAE above: every query finds the backwards row before the sea's."""

    path = "nowhere"

    def __init__(self, own: list[float | None]) -> None:
        self.own = own

    def max_act(self, feature: int) -> float:
        return MAX_ACT[feature]

    def feature(self, feature: int) -> SimpleNamespace:
        return SimpleNamespace(own_effect=self.own[feature])

    def search(self, query: str, sort: str = "match") -> list[SimpleNamespace]:
        order = [BACKWARDS, SEA] if sort == "match" else [SEA, BACKWARDS]
        return [SimpleNamespace(id=i, own_effect=self.own[i]) for i in order]


def test_search_is_scored_by_both_truths(told, sae, monkeypatch):
    monkeypatch.setattr(lexicon, "causal", lambda: ["sea"])
    monkeypatch.setattr(planted, "FRESH_STORIES", 30)
    index = FakeIndex([0.4, 0.0, -0.1, None])
    report = planted.measure_search(told[0], sae, index)
    assert report.causes["match"].precision_at_1 == 0 and report.causes["match"].mrr == 0.5
    assert report.causes["effect"].precision_at_1 == 1
    asked = {concept for concept, _ in report.fires_on.misses}
    assert "red" in asked and report.fires_on.distinct == pytest.approx(1 / 24)
    (red,) = report.read_only
    assert red.concept == "red" and red.own_effect == index.own[red.feature]
    assert red.mrr.keys() == {"match", "effect"}
    if red.feature in (SEA, BACKWARDS):
        assert {red.mrr["match"], red.mrr["effect"]} == {0.5, 1.0}


def test_search_by_effect_needs_output_scores(told, sae):
    with pytest.raises(IndexingError, match="output scores"):
        planted.measure_search(told[0], sae, FakeIndex([None] * 4))
