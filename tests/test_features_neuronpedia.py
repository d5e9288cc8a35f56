"""Neuronpedia's exports: what is written, what is read back, what is refused."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from some_features import SOME

from saesteer.errors import IndexingError
from saesteer.features import neuronpedia
from saesteer.features.neuronpedia_example import spelled, words_at
from saesteer.features.neuronpedia_import import ABSENT, NO_WORDS, load
from saesteer.features.records import Example, Feature, Histogram, Neighbour, Note
from saesteer.features.search import Index


def example(text: str, firing: int, value: float, group: Any = "top") -> Example:
    pieces = tuple(f" {word}" for word in text.split())
    values = tuple(value if i == firing else 0.0 for i in range(len(pieces)))
    return Example(value, 0, firing, None, firing, tuple(range(len(pieces))), pieces, values, group)


BOATS = Feature(
    0, "boats", 0.5, 0.02, 2.0, 4.0, 16, 1.0, 1.0,
    promotes=((" sail", 1.5), (" oar", 1.25)),
    suppresses=((" road", -2.0),),
    neighbours=(Neighbour(2, 0.75),),
    activations=Histogram((0.0, 1.0, 2.0, 3.0, 4.0), (1, 2, 10, 3)),
    logits=Histogram((-2.0, 0.0, 2.0), (7, 9)),
    examples=(
        example("the old boat was blue", 2, 4.0),
        example("a boat sank", 1, 3.5),
        example("the boats came home", 1, 3.0, 9),
        example("no ship today", 1, 0.5, 0),
    ),
)  # fmt: skip
BREAD = replace(
    BOATS, id=2, label="bread", examples=(example("warm bread and butter", 1, 2.0),),
    note=Note("bakery", ("food",)), label_source="judge", activations=None, logits=None,
)  # fmt: skip
DEAD = SOME[2].feature


def exported(folder: Path, *features: Feature) -> Path:
    place = folder / "tiny" / "1-mine"
    n = neuronpedia.export(
        place, iter(features), model="tiny", source="1-mine", hook="blocks.1.hook_resid_post"
    )
    assert n == len(features)
    return place


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.open(path, "rt")]


def write(folder: Path, kind: str, rows: Sequence[Any], name: str = "batch-0.jsonl") -> None:
    (folder / kind).mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / kind / name).write_text(text)


def test_export_has_the_fields_of_neuronpedia(tmp_path: Path) -> None:
    place = exported(tmp_path, BOATS, replace(DEAD, id=1), BREAD)
    boats, dead, _ = lines(place / "features/batch-0.jsonl.gz")
    assert (boats["modelId"], boats["layer"], boats["index"]) == ("tiny", "1-mine", "0")
    assert (boats["maxActApprox"], boats["frac_nonzero"]) == (4.0, 0.02)
    assert boats["freq_hist_data_bar_values"] == [0.5, 1.5, 2.5, 3.5]
    assert boats["freq_hist_data_bar_heights"] == [1, 2, 10, 3]
    assert (boats["pos_str"], boats["pos_values"]) == ([" sail", " oar"], [1.5, 1.25])
    assert (boats["neg_str"], boats["topkCosSimIndices"]) == ([" road"], [2])
    assert (dead["index"], dead["maxActApprox"]) == ("1", 0.0)
    first, _, tenth, _, other = lines(place / "activations/batch-0.jsonl.gz")
    assert first["tokens"] == [" the", " old", " boat", " was", " blue"]
    assert first["values"] == [0.0, 0.0, 4.0, 0.0, 0.0]
    assert (first["maxValue"], first["maxValueTokenIndex"], first["binContains"]) == (4.0, 2, -1)
    assert (tenth["binMin"], tenth["binMax"], tenth["binContains"]) == (3.0, 3.0, 0.1)
    assert (other["index"], other["qualifyingTokenIndex"]) == ("2", 1)
    said = lines(place / "explanations/batch-0.jsonl.gz")
    assert [(row["index"], row["description"]) for row in said] == [("0", "boats"), ("2", "bakery")]
    for name in ("model", "release", "sourceset", "source"):
        (line,) = (place / f"{name}.jsonl").read_text().splitlines()
        assert json.loads(line)["creatorId"] == "saesteer"


def test_batches_hold_1024_features_each(tmp_path: Path) -> None:
    place = exported(tmp_path, *(replace(DEAD, id=i) for i in range(2049)))
    found = [lines(place / f"features/batch-{i}.jsonl.gz") for i in range(3)]
    assert [len(rows) for rows in found] == [1024, 1024, 1]
    assert [int(row["index"]) for rows in found for row in rows] == list(range(2049))
    assert not (place / "features/batch-3.jsonl.gz").exists()


def test_own_export_is_read_back_with_gaps_filled(tmp_path: Path) -> None:
    place = exported(tmp_path, BREAD, replace(DEAD, id=3), BOATS)  # in no order
    path = tmp_path / "features.sqlite"
    assert load(place, path) is None
    with Index.open(path) as index:
        assert index.meta["imported_from"] == "neuronpedia tiny/1-mine"
        assert (index.meta["model_id"], index.meta["n_features"]) == ("tiny", 4)
        boats, gap, bread, dead = (index.feature(i) for i in range(4))
        for name in ("label", "density", "max_act", "n_fired", "neighbours"):
            assert getattr(boats, name) == getattr(BOATS, name), name
        for name in ("promotes", "suppresses", "activations", "logits"):
            assert getattr(boats, name) == getattr(BOATS, name), name
        kept = ("value", "position", "firing", "pieces", "activations", "group")
        for ours, theirs in zip(boats.examples, BOATS.examples, strict=True):
            assert [getattr(ours, k) for k in kept] == [getattr(theirs, k) for k in kept]
        assert boats.mean_act == pytest.approx((0.5 + 2 * 1.5 + 10 * 2.5 + 3 * 3.5) / 16)
        assert (boats.label_source, bread.label, bread.label_source) == (
            "evidence",
            "bakery",
            "judge",
        )
        assert (gap.label, gap.n_fired, gap.examples) == (ABSENT, 0, ())
        assert (dead.n_fired, dead.max_act) == (0, 0.0)
        assert [hit.id for hit in index.search("boat")] == [0]
        assert [hit.id for hit in index.search("bakery")] == [2]
        assert [hit.id for hit in index.search("is:dead")] == [1, 3]


def test_words_of_examples_are_counted_against_all_examples(tmp_path: Path) -> None:
    exported(tmp_path, BOATS, BREAD)
    path = tmp_path / "features.sqlite"
    load(tmp_path / "tiny" / "1-mine", path)
    with Index.open(path) as index:
        words = {word.text: word for word in index.feature(0).words}
    # 11 of its activation: boat twice (7.5), boats (3), ship (.5); 19 words in all the examples.
    assert set(words) == {"boat", "boats", "ship"}
    assert words["boat"].share == pytest.approx(7.5 / 11, abs=1e-5)
    assert words["boat"].base == pytest.approx(2 / 19, abs=1e-5)
    assert words["boat"].lift == pytest.approx((2 / 4) / (2 / 19), abs=1e-4)


def test_an_export_as_the_site_writes_it(tmp_path: Path) -> None:
    """Fields that are null, other tokenizers' spaces, an explanation in a folder of its own."""
    write(tmp_path, "features", [
        {"modelId": "gemma", "layer": "20-res", "index": "10", "maxActApprox": 9.0,
         "frac_nonzero": 0.5, "pos_str": ["▁sea"], "pos_values": [1.0], "neg_str": [],
         "neg_values": [], "freq_hist_data_bar_heights": [], "freq_hist_data_bar_values": [],
         "topkCosSimIndices": None, "topkCosSimValues": None, "hookName": None},
    ])  # fmt: skip
    rows = [
        {"index": "10", "tokens": ["<bos>", "▁The", "▁har", "bour", "."],
         "values": [0, 0, 1.0, 9.0, 0], "binMin": None, "binContains": None},
        {"index": "10", "tokens": ["Ġa", "Ġsea"], "values": [0, 0]},
    ]  # fmt: skip
    write(tmp_path, "activations", rows)
    said = {"index": "10", "description": "harbours", "explanationModelName": "gpt"}
    write(tmp_path, "explanations-gpt", [said, said | {"description": "second"}])
    path = tmp_path / "features.sqlite"
    assert load(tmp_path, path) is None
    with Index.open(path) as index:
        assert index.n_features == 11
        record = index.feature(10)
        assert (record.label, record.label_source) == ("harbours", "judge")
        assert record.promotes == ((" sea", 1.0),)
        # The second doesn't fire, so that it is no example.
        assert [x.pieces for x in record.examples] == [("<bos>", " The", " har", "bour", ".")]
        assert [word.text for word in record.words] == ["harbour"]
        assert (record.activations, record.n_fired, record.neighbours) == (None, 1, ())


@settings(derandomize=True)
@given(st.lists(st.text(alphabet="ab' .,\n", max_size=4), max_size=12))
def test_every_piece_knows_its_word(pieces: list[str]) -> None:
    at, words = words_at(pieces)
    assert len(at) == len(pieces)
    joined = "".join(pieces)
    for piece, word in zip(pieces, at, strict=True):
        assert (word is None) == (not piece.strip())
        if word is not None:
            assert words[word] in joined
            core = piece.strip()
            assert words[word] in core or core in words[word] or set(core) & set(words[word])
    # Each is named by some piece, in their order.
    named = [word for word in at if word is not None]
    assert named == sorted(named)


def test_words_in_pieces() -> None:
    assert words_at([" har", "bour", ", don", "'t", " ", "?!", "a b"]) == (
        [0, 0, 1, 1, None, 2, 3], ["harbour", "don't", "?!", "a", "b"]
    )  # fmt: skip


def test_a_window_is_cut_around_the_firing_token() -> None:
    tokens = [f" w{i}" for i in range(100)]
    values = [float(i == 50) for i in range(100)]
    found, words = spelled({"tokens": tokens, "values": values})
    assert found.pieces == [f" w{i}" for i in range(38, 59)] and found.firing == 12
    assert (found.position, found.around, len(words)) == (50, ("w49", "w50", "w51"), 100)
    assert found.fired == [("w50", 1.0)]


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("features", {"index": "x"}, "invalid literal"),
        ("features", {}, "there is no 'index'"),
        ("features", {"index": -1}, "no feature's number"),
        ("features", {"index": 10**12}, "no feature's number"),
        ("features", [], "line 1"),
        ("features", {"index": 0}, "line 1: feature 0 comes a second time"),
        ("features", {"index": 1, "frac_nonzero": float("nan")}, "line 1: NaN is no number"),
        ("features", {"index": 1, "maxActApprox": float("inf")}, "line 1: Infinity is no number"),
        ("features", {"index": 1, "maxActApprox": "inf"}, "no finite number"),
        ("features", {"index": 1, "frac_nonzero": 2}, "frac_nonzero is 2; expected a share"),
        ("features", {"index": 1, "frac_nonzero": "x"}, "feature 1 is malformed"),
        ("features", {"index": 1, "maxActApprox": 2.0}, "feature 1 .* has no frac_nonzero"),
        ("features", {"index": 1, "frac_nonzero": None, "freq_hist_data_bar_values": [1, 2],
                      "freq_hist_data_bar_heights": [3, 4]}, "has no frac_nonzero"),
        ("activations", {"index": 0, "tokens": ["a"], "values": [1.0]}, "has no frac_nonzero"),
        ("activations", {"index": 0, "tokens": ["a"], "values": [float("nan")]}, "no number"),
        ("activations", {"index": 0, "tokens": ["a"], "values": ["nan"]}, "no finite number"),
        ("features", {"index": 1, "pos_str": ["a"], "pos_values": []}, "feature 1 is malformed"),
        ("activations", {"index": 0, "tokens": ["a"], "values": []}, "1 tokens and 0 activations"),
        ("activations", {"index": 0, "tokens": ["a"], "values": ["b"]}, "malformed example"),
        ("activations", {"index": 0, "values": [1.0]}, "malformed example"),
    ],
)  # fmt: skip
def test_a_malformed_line_is_named(tmp_path: Path, kind: str, row: Any, said: str) -> None:
    write(tmp_path, "features", [{"index": "0"}])
    write(tmp_path, kind, [row], "batch-1.jsonl")
    with pytest.raises(IndexingError, match=said):
        load(tmp_path, tmp_path / "features.sqlite")
    assert not (tmp_path / "features.sqlite").exists()


def test_what_the_export_does_not_show_is_not_called_never_fired(tmp_path: Path) -> None:
    bars = {"freq_hist_data_bar_values": [1.0, 2.0, 3.0], "freq_hist_data_bar_heights": [5, 2, 0]}
    write(tmp_path, "features", [
        {"index": 0, "frac_nonzero": 0.1, "maxActApprox": 4.0},  # no examples
        {"index": 1, "frac_nonzero": 0.1, **bars},
        {"index": 2, "frac_nonzero": 0.1},
        {"index": 3},  # nothing at all is said of it
        {"index": 4, "frac_nonzero": 0.0, "maxActApprox": 0.0},
        {"index": 6, "frac_nonzero": 0.1},
    ])  # fmt: skip
    write(tmp_path, "activations", [{"index": 6, "tokens": [" ", "\n"], "values": [0.0, 2.0]}])
    load(tmp_path, tmp_path / "features.sqlite")
    with Index.open(tmp_path / "features.sqlite") as index:
        found = [index.feature(i) for i in range(7)]
    assert [f.label for f in found] == [
        NO_WORDS, NO_WORDS, NO_WORDS, NO_WORDS, "(never fired)", ABSENT, NO_WORDS
    ]  # fmt: skip
    # What is known of how often, and how strongly, is a bound.
    assert [f.n_fired for f in found] == [1, 7, 1, 0, 0, 0, 1]
    assert [f.max_act for f in found] == [4.0, 2.0, 0.0, 0.0, 0.0, 0.0, 2.0]


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(IndexingError, match=r"holds no features; expected a folder"):
            load(folder, tmp_path / "features.sqlite")
    place = exported(tmp_path, BOATS)
    packed = place / "activations/batch-0.jsonl.gz"
    packed.write_bytes(packed.read_bytes()[:100])
    with pytest.raises(IndexingError, match=r"batch-0\.jsonl\.gz"):
        load(place, tmp_path / "features.sqlite")
