"""From activations to a searchable index, and what it looks like in a terminal."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from saesteer.core.model import fingerprint
from saesteer.features import view
from saesteer.features.build import build_index, write_index
from saesteer.features.collect import collect
from saesteer.features.labels import NEVER
from saesteer.features.search import Index
from saesteer.features.weights import logit_lens
from tests.sea_and_land import (
    BOAT,
    DEAD,
    LAND,
    LEXICON,
    SEA,
    SEA_WORDS,
    THE,
    TOKENIZER,
    an_sae,
    some_batches,
    word_id,
)
from tests.tiny import BOS, tiny_model


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    path = tmp_path_factory.mktemp("run") / "features.sqlite"
    model = tiny_model("llama")
    build_index(path, some_batches(), model, TOKENIZER, an_sae(), made_from={"text": "stories"})
    with Index.open(path) as index:
        yield index


def test_meta_says_what_made_it(index: Index) -> None:
    sae = an_sae()
    expected = {
        "text": "stories",
        "sae_hash": sae.hash,
        "model_id": "tiny",
        "model_fingerprint": fingerprint(tiny_model("llama")),
        "hook_point": "layers.1.resid_post",
        "n_tokens": 40 * 23,
        "n_features": 5,
        "n_alive": 4,
    }
    assert expected.items() <= index.meta.items()


def test_labels(index: Index) -> None:
    labels = [index.feature(i).label for i in range(5)]
    assert set(labels[SEA].split(", ")) <= set(SEA_WORDS)
    assert len(labels[SEA].split(", ")) == 5
    assert labels[BOAT].startswith("'boat'")
    assert labels[THE].startswith("'the'")
    assert labels[DEAD] == NEVER
    assert index.feature(BOAT).confidence > 0.9


def test_figures_are_those_of_the_text(index: Index) -> None:
    tokens = np.concatenate([batch.tokens for batch in some_batches()])
    boat = index.feature(BOAT)
    count = int((tokens == word_id("boat")).sum())
    assert boat.n_fired == count == boat.tokens[0].count
    assert boat.density == pytest.approx(count / 920, rel=1e-3)
    assert boat.tokens[0].lift == pytest.approx(920 / count, rel=1e-3)
    assert boat.words[0].recall(boat.density) == pytest.approx(1, rel=1e-3)
    assert boat.tokens[0].share == 1
    assert boat.max_act < 1.5 + 1e-6  # BOS had 50
    assert index.feature(SEA).breadth == pytest.approx(6, abs=0.5)
    assert index.feature(SEA).company > 2 > index.feature(BOAT).company == 1


def test_search_finds_the_concept_the_word_and_the_promoted_token(index: Index) -> None:
    assert [hit.id for hit in index.search("boat")][:2] == [SEA, BOAT]
    assert index.search("wave")[0].id == SEA
    assert index.search("hills")[0].id == LAND
    assert index.search("anchor")[0].id == SEA
    assert index.search("violin kazoo") == [] or all(h.id != DEAD for h in index.search("violin"))
    assert "«" in index.search("boat")[0].example


def test_examples_hold_the_document_and_no_other(index: Index) -> None:
    for example in index.feature(SEA).examples:
        assert example.pieces[example.firing].strip() in SEA_WORDS
        assert example.tokens[example.firing] == word_id(example.pieces[example.firing].strip())
        assert example.activations[example.firing] == example.value
        assert BOS not in example.tokens
        assert example.document == example.context
    assert len({e.document for e in index.feature(SEA).examples}) == 20


def test_promoted_tokens_are_the_lens(index: Index) -> None:
    lens = logit_lens(tiny_model("llama"), an_sae().W_dec)
    text, logit = index.feature(SEA).promotes[0]
    assert text.strip() == "anchor"
    assert logit == pytest.approx(lens.promoted_logits[SEA, 0], rel=1e-3)
    assert not any("<" in text for i in range(5) for text, _ in index.feature(i).promotes)


def test_merged_statistics_make_the_same_index(index: Index, tmp_path: Path) -> None:
    parts = [
        collect(batches, an_sae(), special_ids=[0, 1, 2, 3], lexicon=LEXICON)
        for batches in (some_batches()[:2], some_batches()[2:])
    ]
    path = tmp_path / "merged.sqlite"
    merged = parts[0].merge(parts[1])
    assert write_index(path, merged, tiny_model("llama"), TOKENIZER, an_sae()) is None
    with Index.open(path) as other:
        for i in range(5):
            assert other.feature(i) == index.feature(i)


def plain(text: str) -> str:
    return re.sub(r"\033\[\d*m", "", text)


def test_hit_list_fits_a_terminal(index: Index) -> None:
    found = index.search("boat")
    shown = view.hits(found, "boat")
    assert "\033" not in shown
    assert all(len(line) <= 80 for line in shown.split("\n"))
    assert shown.startswith(f" 1. feature {SEA}  ")
    assert "«" in shown
    coloured = view.hits(found, "boat", colour=True)
    assert "«" not in coloured
    assert all(len(plain(line)) <= 80 for line in coloured.split("\n"))
    assert "no feature matches 'zz'" in view.hits([], "zz")


def test_feature_page_fits_a_terminal(index: Index) -> None:
    shown = view.feature(index.feature(SEA))
    assert all(len(line) <= 80 for line in shown.split("\n"))
    for expected in ("feature 0: ", "promotes", "suppresses", "anchor", "boat", "«", "label conf"):
        assert expected in shown, shown
    assert "\033[1m" in view.feature(index.feature(SEA), colour=True)
    assert NEVER in view.feature(index.feature(DEAD))


def test_control_characters_never_reach_the_terminal(index: Index) -> None:
    record = index.feature(SEA)
    evil = "\033[2Jx\r\n\u202e\0"
    pieces = tuple(evil for _ in record.examples[0].pieces)
    record = replace(
        record,
        label=evil,
        promotes=((evil, 1.0),),
        examples=(replace(record.examples[0], pieces=pieces),),
        tokens=(replace(record.tokens[0], text=evil),),
    )
    shown = view.feature(record)
    assert not any(ord(c) < 32 and c != "\n" for c in shown)
    assert "\u202e" not in shown
    hit = replace(index.search("boat")[0], label=evil, example=f"a «{evil}» b", why=evil)
    assert not any(ord(c) < 32 and c != "\n" for c in view.hits([hit], evil))


@pytest.mark.skipif(
    not os.environ.get("SAESTEER_TEST_MODEL"), reason="SAESTEER_TEST_MODEL names no model folder"
)
def test_pieces_of_a_real_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from saesteer.features.words import Pieces, words_in

    tokenizer = AutoTokenizer.from_pretrained(os.environ["SAESTEER_TEST_MODEL"])
    text = 'Once upon a time, a grasshopper saw an umbrella. "Don\'t!" said the café owner.'
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = Pieces(tokenizer).window(ids)
    assert "".join(pieces).strip() == text
    words = set(words_in(pieces))
    assert {"grasshopper", "umbrella", "Don't", "café", "Once"} <= words
