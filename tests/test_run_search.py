"""A run's searches by what features do, against the same figures worked out by hand."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saesteer import enrich, run_text, stages
from saesteer.core.hooks import activations
from saesteer.effects import output_score
from saesteer.errors import CacheError, FeatureError, IndexingError, SaeError, TextError
from saesteer.features import store
from saesteer.features.stored_texts import stored_texts
from saesteer.run import Run
from saesteer.run_text import batches

TEXT = "Story A. Once there was a girl named Lily. It was Monday. The man saw a boat."
OTHER = "Story B. The king sat in the castle."


@pytest.fixture
def opened(small_run) -> Run:
    return Run.open(small_run.path)


@pytest.fixture
def own(small_run, tmp_path) -> Run:
    """A copy of the small run that a test may change."""
    shutil.copytree(small_run.path, tmp_path / "run")
    return Run.open(tmp_path / "run")


def dense(run: Run, text: str) -> np.ndarray:
    """Activations of all features on each token of a text, BOS before it left out."""
    ids = run.tokenizer(text, add_special_tokens=False)["input_ids"]
    lead = [run.tokenizer.bos_token_id] if run.sae.prepend_bos else []
    (x,) = activations(run.model, [run.hook_point], torch.tensor([lead + ids])).values()
    return run.sae.activation(x[0, len(lead) :], range(run.sae.d_sae)).numpy()


def test_like_lists_what_fires_on_the_text_more_than_elsewhere(opened):
    rate = (dense(opened, TEXT) > 0).mean(axis=0)
    base = opened.index.column("density")
    found = opened.like(TEXT, limit=128)
    assert {hit.id for hit in found} == set(np.flatnonzero(rate > base).tolist())
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
    assert opened.like(TEXT, limit=3) == found[:3]
    assert f"fires on {rate[found[0].id]:.0%} of the text" in found[0].why
    with pytest.raises(TextError):
        opened.like("")


def test_contrast_ranks_by_auroc_and_says_which_side(opened):
    positive, negative = [TEXT, TEXT + " The boat sank."], [OTHER, OTHER + " The end."]
    means = [[dense(opened, t).mean(axis=0) for t in side] for side in (positive, negative)]
    found = opened.contrast(positive, negative, limit=128)
    for hit in found[:20]:
        pairs = [
            (p[hit.id] > n[hit.id]) + 0.5 * (p[hit.id] == n[hit.id])
            for p in means[0]
            for n in means[1]
        ]
        area = float(np.mean(pairs))
        assert hit.score == pytest.approx(max(area, 1 - area))
        assert ("more in the positive" in hit.why) == (area > 0.5)
    swapped = opened.contrast(negative, positive, limit=128)
    assert [hit.score for hit in swapped] == [hit.score for hit in found]
    with pytest.raises(IndexingError, match="two or more"):
        opened.contrast([TEXT], negative)


def test_near_takes_neighbours_and_company_in_turn(opened):
    alike = [hit.id for hit in opened.index.neighbours(3)]
    together = [hit.id for hit in opened.index.coactive(3)]
    found = [hit.id for hit in opened.near(3, limit=6)]
    assert found[:2] == [alike[0], next(i for i in together if i != alike[0])]
    assert len(set(found)) == 6 and set(found) <= {*alike, *together}
    with pytest.raises(FeatureError):
        opened.near(128)


def test_a_reading_is_the_sae_s_own_code(opened):
    tokens = opened.read(TEXT, top=200)
    for token, row in zip(tokens, dense(opened, TEXT), strict=True):
        assert {one.feature for one in token.fired} == set(np.flatnonzero(row > 0).tolist())
        for one in token.fired:
            assert one.activation == pytest.approx(float(row[one.feature]), rel=1e-4)
            assert one.times == pytest.approx(one.activation / opened.index.max_act(one.feature))
    assert "".join(token.text for token in tokens).split() == TEXT.split()


def test_effects_are_measured_on_demand_once_and_order_the_hits(own, monkeypatch):
    before = own.search("the", limit=5)
    assert all(hit.own_effect is None for hit in before)
    found = own.search("the", limit=5, sort="effect")
    assert any(hit.own_effect is not None for hit in found)
    known = store.measured(own.index.path)
    assert {hit.id for hit in [*before, *found]} <= known
    order = own.index.search("the", limit=5, sort="effect")
    assert found == order
    # What is known isn't measured again, and needs no model.
    fresh = Run.open(own.path)
    monkeypatch.setattr(enrich, "effects", None)
    assert fresh.search("the", limit=5, sort="effect") == found
    assert "_loaded" not in vars(fresh)


def test_where_effects_can_not_be_kept_the_hits_are_shown_with_a_warning(own, monkeypatch):
    found = own.search("the", limit=5)
    # What a folder that can't be written to is to a writer.
    lock = own.path / ".features.sqlite.lock"
    lock.unlink(missing_ok=True)
    lock.mkdir()
    monkeypatch.setattr(enrich, "effects", None)  # nor is time lost on measuring
    with pytest.warns(UserWarning, match=r"features can't be kept \(cannot write beside") as said:
        assert own.search("the", limit=5, sort="effect") == found
    assert len(said) == 1 and "\n" not in str(said[0].message)
    own.index.meta["sae_hash"] = "another"  # another fault is not taken for that one
    with pytest.raises(IndexingError, match="made for another SAE"):
        own.search("the", sort="effect")


def test_an_error_while_effects_are_kept_leaves_the_hits(own, monkeypatch):
    def full(*_):
        raise IndexingError("database or disk is full")

    monkeypatch.setattr(store, "keep_outputs", full)
    with pytest.warns(UserWarning, match="disk is full"):
        assert own.search("the", limit=5, sort="effect") == own.search("the", limit=5)


def test_text_without_separators_is_told(own):
    """Examples are each from another document, of which there is one."""

    def seen(documents):
        values = np.array([[2.0, 0.0], [3.0, 1.0]])
        examples = SimpleNamespace(values=values, documents=np.array(documents))
        return SimpleNamespace(examples=examples, n_contexts=2)

    with pytest.warns(UserWarning, match=r"one document.*'<\|endoftext\|>'.*document_separator"):
        run_text.warn_of_one_document(own, seen([[4, -1], [4, 4]]))
    run_text.warn_of_one_document(own, seen([[4, -1], [5, 4]]))
    short = seen([[4, -1], [4, 4]])
    short.n_contexts = 1
    run_text.warn_of_one_document(own, short)


def test_a_run_without_cached_activations_names_the_option_for_text(own):
    """F23: what a judge's labels are scored on, in a run around a borrowed SAE."""
    shutil.rmtree(own.path / "activations")
    bare = dataclasses.replace(own.config, text=dataclasses.replace(own.config.text, source=""))
    with pytest.raises(CacheError, match="--text FILE"):
        next(batches(Run(own.path, bare), None, 1000, held_out=True))


def test_effects_at_index_time_are_those_of_output_scores_and_outlive_a_new_index(own):
    index = own.index
    chosen = enrich.best_labelled(index, 3)
    assert enrich.effects(own, chosen) == 3
    assert enrich.effects(own, chosen) == 0
    expected = output_score.output_scores(
        own.model,
        own.tokenizer,
        own.sae,
        chosen,
        max_act=index.max_act,
        own_tokens=lambda i: output_score.own_tokens(index.feature(i)),
        prompts=enrich.neutral_prompts(),
    )
    kept = {one.feature: (one.score, one.own) for one in expected}
    assert {i: (f.output_score, f.own_effect) for i in chosen for f in [index.feature(i)]} == kept
    assert len(store.measured(index.path)) == 3
    again = stages.index(own)
    assert again.feature(chosen[0]).output_score == kept[chosen[0]][0]


def test_a_judge_s_labels_and_scores_are_kept_and_not_asked_for_twice(own):
    asked = []

    def write(prompts):
        asked.extend(prompts)
        return ["yes" if "yes or no" in p else "things at sea" for p in prompts]

    def contexts():
        return batches(own, None, 20_000, held_out=True)

    # Features that are silent through whole windows.
    rare = [f.id for f in own.index.features(range(128)) if f.n_fired > 100 and f.density < 0.05]
    chosen = rare[:2]
    assert list(enrich.labels(own, chosen, write, model="m")) == chosen
    assert own.index.feature(chosen[0]).label_score is None
    assert list(enrich.labels(own, chosen, write, model="m", contexts=contexts())) == chosen
    record = own.index.feature(chosen[0])
    assert (record.label, record.label_source) == ("things at sea", "judge")
    assert record.label_score == 0.5  # it always says yes
    assert own.search('label:"things at sea"')
    n = len(asked)
    assert list(enrich.labels(own, chosen, write, model="m", contexts=contexts())) == chosen
    assert len(asked) == n
    with pytest.raises(IndexingError, match="no text to take silent contexts from"):
        list(enrich.labels(own, chosen, write, model="m", contexts=[]))


@pytest.mark.parametrize("key", ["sae_hash", "model_fingerprint"])
def test_an_index_of_another_sae_or_model_is_named_and_refused(own, key):
    own.index.meta[key] = "another"
    for ask in (
        lambda: own.like(TEXT),
        lambda: own.read(TEXT),
        lambda: own.contrast([TEXT] * 2, [OTHER] * 2),
        lambda: enrich.effects(own, [3]),
        lambda: own.edits(clamp={3: "2x"}),
    ):
        with pytest.raises(IndexingError, match=r"made for another (SAE|model) \(another\) than"):
            ask()


def test_keyword_search_tells_an_index_of_another_sae_without_loading_it(own):
    changed = dataclasses.replace(own.sae, b_enc=own.sae.b_enc + 1)
    changed.save(own.path / "sae")
    with pytest.raises(IndexingError, match=r"(?s)made for another SAE .*run\s`saesteer index"):
        Run.open(own.path).search("boat")
    shutil.rmtree(own.path / "sae")  # an index alone can be searched
    assert Run.open(own.path).search("the")


def test_an_exported_index_comes_back_as_one_to_look_at(own, tmp_path):
    from saesteer.cli.main import main

    out = tmp_path / "out"
    assert main(["export", str(own.path), str(out), "--format", "neuronpedia"]) == 0
    made = Run.from_export(tmp_path / "imported", out)
    assert made.index.n_features == 128
    assert made.index.feature(3).label == own.index.feature(3).label
    assert made.search("the")
    for ask in (
        lambda: made.like(TEXT),
        lambda: made.read(TEXT),
        lambda: made.contrast([TEXT] * 2, [OTHER] * 2),
        lambda: made.search("the", sort="effect"),  # none is measured, none can be
        lambda: stages.index(made),
    ):
        with pytest.raises(SaeError, match=r"imported to be looked at .*saesteer new OTHER"):
            ask()
    assert not Path(tmp_path / "imported" / "features.partial").exists()


def test_a_record_alone_gives_the_texts_that_it_is_found_by(opened):
    """What another text engine is given, against what the index's own was given."""
    index = opened.index
    words = {hit.id for hit in index.search('context:"a boy"', limit=128)}
    wanted = {
        i
        for i in range(index.n_features)
        for texts in [stored_texts(index.feature(i))]
        if "a boy" in f"{texts['near']}\n{texts['contexts']}".casefold()
    }
    assert words and words <= wanted
    record = index.feature(min(words))
    assert stored_texts(record)["near"].split()[1].casefold() in {
        word.text.casefold() for word in record.words
    }
