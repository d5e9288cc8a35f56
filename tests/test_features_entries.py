"""The record and the searchable text of every feature, from statistics and weights."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from saesteer.core.shards import ContextBatch
from saesteer.errors import IndexingError
from saesteer.features import entries as module
from saesteer.features import store
from saesteer.features.collect import collect
from saesteer.features.entries import entries
from saesteer.features.records import Entry, Feature
from saesteer.features.search import Index
from saesteer.features.statistics import Statistics
from saesteer.features.weights import WeightChunk, describe, logit_lens
from tests.sea_and_land import (
    AXES,
    BOAT,
    COMMON,
    DEAD,
    LAND,
    LAND_WORDS,
    LEXICON,
    SEA,
    THE,
    TOKENIZER,
    an_sae,
    some_batches,
    word_id,
)  # fmt: skip
from tests.tiny import BOS, VOCAB, WIDTH, tiny_model

SPECIAL = range(4)


def collected(batches: list[ContextBatch]) -> Statistics:
    return collect(batches, an_sae(), special_ids=SPECIAL, lexicon=LEXICON)


def described() -> list[WeightChunk]:
    texts = TOKENIZER.convert_ids_to_tokens(list(range(VOCAB)))
    return list(describe(tiny_model("llama"), an_sae().W_dec, texts, exclude=SPECIAL))


def made() -> list[Entry]:
    return list(entries(collected(some_batches()), described(), TOKENIZER))


def test_a_record_holds_what_was_counted() -> None:
    """Each figure against its definition, worked out from the text itself."""
    tokens = np.concatenate([batch.tokens for batch in some_batches()])
    sea, boat, the, dead, _ = (entry.feature for entry in made())
    # What follows "the": all pairs of the text lie in one document each.
    followed = tokens[:, :-1] == word_id("the")
    after = tokens[:, 1:][followed]
    assert sum(t.count for t in the.next_tokens) <= len(after)
    ids, counts = np.unique(after, return_counts=True)
    times = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    base = np.bincount(tokens[:, 2:].reshape(-1), minlength=VOCAB) / tokens[:, 2:].size
    for stat in the.next_tokens:
        assert stat.count == times[stat.id]
        assert stat.base == pytest.approx(base[stat.id], rel=1e-4)
        assert stat.lift == pytest.approx(stat.count / len(after) / base[stat.id], rel=1e-4)
    shares = [stat.share for stat in the.next_tokens]
    assert shares == sorted(shares, reverse=True)
    places = np.array([int(p).bit_length() for p in np.nonzero(tokens == word_id("the"))[1]])
    every = np.array([int(p).bit_length() for p in np.nonzero(tokens != BOS)[1]])
    n, size = len(the.positions), (len(places), len(every))
    expected = np.bincount(places, minlength=n) / size[0]
    expected /= np.maximum(1, np.bincount(every, minlength=n)) / size[1]
    np.testing.assert_allclose(the.positions, expected, rtol=1e-4)
    for feature in (sea, boat, the):
        assert feature.activations is not None
        assert sum(feature.activations.counts) == feature.n_fired
        assert feature.activations.edges[-1] / 2 <= feature.max_act <= feature.activations.edges[-1]
        assert feature.decoder_norm == pytest.approx(
            float(an_sae().W_dec[feature.id].norm()), rel=1e-3
        )
        assert feature.logits is not None
        assert sum(feature.logits.counts) == VOCAB - 4
        assert {n.feature for n in feature.neighbours} == set(range(5)) - {feature.id}
        drawn = [e for e in feature.examples if e.group != "top"]
        assert len(drawn) == 30
        x = torch.cat([batch.activations for batch in some_batches()])[:, 1:]
        every = an_sae().encode(x).dense(5)[:, feature.id]
        for e in drawn:
            below = float((every[every > 0] < e.value).float().mean())
            assert isinstance(e.group, int) and abs(e.group + 0.5 - 10 * below) < 1
        assert [e.value for e in drawn] == sorted((e.value for e in drawn), reverse=True)
        assert [e.group for e in drawn] == sorted((e.group for e in drawn), reverse=True)
        for example in feature.examples:
            assert example.tokens[example.firing] == tokens[example.context, example.position]
            assert example.activations[example.firing] == pytest.approx(example.value, rel=1e-5)
    # "boat" fires only where the sea does, and on a sixth of it.
    partner = next(n for n in boat.coactive if n.feature == SEA)
    assert partner.n == boat.n_fired
    assert partner.value == pytest.approx(920 / sea.n_fired, rel=1e-3)
    assert dead.activations is None
    assert dead.examples == dead.next_tokens == dead.positions == dead.coactive == ()
    assert len(dead.neighbours) == 4


def test_entries_do_not_depend_on_how_many_are_made_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    statistics, weights = collected(some_batches()), described()

    def by(at_once: int) -> list[Entry]:
        monkeypatch.setattr(module, "_FEATURES", at_once)
        return list(entries(statistics, weights, TOKENIZER))

    assert by(1) == by(2) == by(100)


def test_without_weights_nothing_is_said_of_them() -> None:
    without = entries(collected(some_batches()), None, TOKENIZER)
    for one, other in zip(made(), without, strict=True):
        assert other.texts["promotes"] == ""
        assert other.feature == replace(
            one.feature,
            **{x: getattr(Feature, x) for x in (
                "decoder_norm", "neighbours", "promotes", "suppresses", "logits", "token_set",
                "token_set_score",
            )},
        )  # fmt: skip


def test_only_features_that_fire_early_are_said_to() -> None:
    """One word at the start of every document, one anywhere."""
    rng = np.random.default_rng(1)
    tokens = rng.choice([word_id(w) for w in [*COMMON, *LAND_WORDS]], (40, 24)).astype(np.int32)
    tokens[:, 0], tokens[:, 1] = BOS, word_id("boat")
    documents = np.repeat(np.arange(40, dtype=np.int32)[:, None], 24, axis=1)
    x = torch.zeros(40, 24, WIDTH)
    for token, axis in AXES.items():
        x[..., axis] = torch.from_numpy(tokens == token).float()
    statistics = collected([ContextBatch(tokens, documents, x, 0)])
    found = [entry.feature.label for entry in entries(statistics, None, TOKENIZER)]
    assert found[BOAT].endswith(" at the start")
    assert not any(found[i].endswith(" at the start") for i in (THE, LAND, DEAD))


@pytest.mark.parametrize("n", [3, 7])
def test_statistics_of_another_sae_are_refused(n: int) -> None:
    chunks = describe(tiny_model("llama"), torch.ones(n, WIDTH), [""] * VOCAB)
    with pytest.raises(IndexingError, match=f"{n} features and statistics of 5"):
        list(entries(collected(some_batches()), chunks, TOKENIZER))


def test_promoted_and_suppressed_tokens_are_the_two_ends_of_the_lens() -> None:
    lens = logit_lens(tiny_model("llama"), an_sae().W_dec, exclude=SPECIAL)
    for entry in made():
        f = entry.feature
        np.testing.assert_allclose(
            [x for _, x in f.promotes], lens.promoted_logits[f.id], rtol=1e-5
        )
        np.testing.assert_allclose(
            [x for _, x in f.suppresses], lens.suppressed_logits[f.id], rtol=1e-5
        )


def test_no_phrase_runs_from_one_example_or_promoted_token_into_the_next(tmp_path: Path) -> None:
    store.write(tmp_path / "i.sqlite", made(), {})
    sea = made()[SEA].feature
    top = [
        [word for word in "".join(x.pieces).split() if word.isalpha()]
        for x in sea.examples
        if x.group == "top"
    ]
    text = " | ".join(" ".join(words) for words in top)
    joins = [(a[-1], b[0]) for a, b in pairwise(top)]
    last, first = next(pair for pair in joins if " ".join(pair) not in text)
    with Index.open(tmp_path / "i.sqlite") as index:
        within = top[0]
        assert SEA in [hit.id for hit in index.search(f'context:"{within[0]} {within[1]}"')]
        assert SEA not in [hit.id for hit in index.search(f'context:"{last} {first}"')]
        (one, _), (other, _) = sea.promotes[:2]
        assert index.search(f'promotes:"{one.strip()} {other.strip()}"') == []
        assert index.search(f'promotes:"{one.strip()}" promotes:"{other.strip()}"')
