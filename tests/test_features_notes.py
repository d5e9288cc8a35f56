"""What a user writes about features stays, whatever happens to the index."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.errors import FeatureError, IndexingError
from saesteer.features import notes, store
from saesteer.features.migrate import reading, writing
from saesteer.features.records import Note
from tests.some_features import SOME, an_entry

MADE_FROM = {"sae_hash": "abc", "model_fingerprint": "m"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "features.sqlite"
    store.write(path, SOME, MADE_FROM)
    return path


def written(path: Path) -> dict[int, Note]:
    with reading(path) as connection:
        return notes.read(connection)


def found(path: Path, query: str) -> list[int]:
    sql = "SELECT rowid FROM noted WHERE noted MATCH ? ORDER BY rowid"
    with reading(path) as connection:
        return [i for (i,) in connection.execute(sql, (query,))]


def test_a_note_is_part_of_the_record(path: Path) -> None:
    notes.rename(path, 1, "  small\nboats ")
    notes.tag(path, 1, ["Sea", "to-do", "sea"])
    notes.star(path, 1)
    notes.remark(path, 1, "fires on canoes too")
    expected = Note("small boats", ("sea", "to-do"), True, "fires on canoes too")
    with reading(path) as connection:
        assert store.load(connection, [1])[0] == replace(SOME[1].feature, note=expected)
        assert store.load(connection, [0], brief=True)[0].note is None
        assert notes.read(connection, [1, 2]) == {1: expected}


def test_notes_are_found_by_their_words_as_they_are_now(path: Path) -> None:
    notes.rename(path, 1, "Boats")
    notes.tag(path, 3, ["cooking"])
    notes.remark(path, 3, "boats are in the examples")
    assert found(path, "boat") == [1, 3]
    assert found(path, "name : boat") == [1]
    assert found(path, "tags : cooking") == [3]
    notes.rename(path, 1, None)
    notes.untag(path, 3, ["cooking"])
    assert found(path, "boat") == [3]
    assert found(path, "cooking") == []
    notes.remark(path, 3, "")
    assert written(path) == {} and found(path, "boat") == []


def test_a_judged_label_is_found_until_the_user_names_it(path: Path) -> None:
    with writing(path) as connection:
        connection.execute(
            "UPDATE features SET label = 'ships', label_source = 'judge' WHERE id = 0"
        )
        notes.lay(connection, 0)
    assert found(path, "ship") == [0]
    notes.rename(path, 0, "boats")
    assert (found(path, "ship"), found(path, "boat")) == ([], [0])
    notes.rename(path, 0, None)
    assert found(path, "ship") == [0]


CHANGES = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from(["name", "tag", "untag", "star", "text"]),
        st.integers(0, 2),
    ),
    max_size=12,
)
TEXTS = ["a boat", "😀 \0 ", "naïve"]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(changes=CHANGES)
def test_any_changes_leave_what_they_say_and_survive(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("index")
    path = folder / "features.sqlite"
    store.write(path, SOME, MADE_FROM)
    expected = dict.fromkeys(range(4), Note())
    for feature, what, n in changes:
        note = expected[feature]
        match what:
            case "name":
                name = [None, "boats", "海"][n]
                notes.rename(path, feature, name)
                note = replace(note, name=name)
            case "star":
                notes.star(path, feature, n > 0)
                note = replace(note, starred=n > 0)
            case "text":
                notes.remark(path, feature, ["", *TEXTS][n])
                note = replace(note, text=["", *TEXTS][n])
            case "tag":
                notes.tag(path, feature, [f"tag{n}"])
                note = replace(note, tags=tuple(sorted({*note.tags, f"tag{n}"})))
            case "untag" if f"tag{n}" in note.tags:
                notes.untag(path, feature, [f"tag{n}"])
                note = replace(note, tags=tuple(t for t in note.tags if t != f"tag{n}"))
            case "untag":
                with pytest.raises(FeatureError, match="has no tag"):
                    notes.untag(path, feature, [f"tag{n}"])
        expected[feature] = note
    kept = {feature: note for feature, note in expected.items() if note != Note()}
    assert written(path) == kept
    # Into another index of this SAE, and twice is once.
    other = folder / "other.sqlite"
    store.write(other, SOME, MADE_FROM)
    assert notes.export(path, folder / "notes.json") == len(kept)
    for _ in range(2):
        assert notes.load(other, folder / "notes.json") == len(kept)
        assert written(other) == kept
    # Through a new index in the same place.
    before = [found(path, query) for query in ("boat", "tag1", "naive")]
    assert store.write(path, [an_entry(i, land=1.0) for i in range(4)], MADE_FROM) is None
    assert written(path) == kept
    assert [found(path, query) for query in ("boat", "tag1", "naive")] == before


def test_notes_on_another_sae_go_to_a_file_that_can_be_taken_back(path: Path) -> None:
    notes.rename(path, 1, "boats")
    kept = written(path)
    left = store.write(path, SOME, {"sae_hash": "def"})
    assert left == path.with_name("notes-abc.json") and written(path) == {}
    notes.star(path, 2)
    with pytest.raises(IndexingError, match="another SAE"):
        notes.load(path, left)
    assert written(path) == {2: Note(starred=True)}
    assert store.write(path, SOME, MADE_FROM) == path.with_name("notes-def.json")
    notes.load(path, left)
    assert written(path) == kept
    # Going back and forth writes over nothing.
    assert store.write(path, SOME, {"sae_hash": "def"}) == path.with_name("notes-abc-2.json")
    assert store.write(path, SOME, MADE_FROM) is None  # no notes, no file
    notes.load(path, path.with_name("notes-def.json"), force=True)
    assert written(path) == {2: Note(starred=True)}


def test_effects_and_judgements_are_kept_for_one_sae_and_one_model(path: Path) -> None:
    def measured() -> tuple:
        with reading(path) as connection:
            judged = connection.execute("SELECT feature, key, detection FROM judged").fetchall()
            features = store.load(connection, [1, 3])
            column = store.column(connection, "own_effect")
        return judged, [(f.output_score, f.own_effect) for f in features], column

    store.keep_outputs(path, [(1, 0.5, 0.25), (3, None, None)], {"amplification": 8})
    with writing(path) as connection:
        connection.execute("INSERT INTO judged VALUES (1, 'k', 'boats', 0.75, 0.5, 20, 'm')")
    before = measured()
    assert before[:2] == ([(1, "k", 0.75)], [(0.5, 0.25), (None, None)])
    store.write(path, SOME, {**MADE_FROM, "n_tokens": 7})
    assert measured() == before
    measured_anew = [replace(e, feature=replace(e.feature, output_score=1.0)) for e in SOME]
    store.write(path, measured_anew, MADE_FROM)
    assert measured()[1] == [(1.0, None), (1.0, None)]
    store.write(path, SOME, {**MADE_FROM, "model_fingerprint": "n"})
    assert measured()[:2] == ([], [(None, None), (None, None)])


def test_effects_do_not_outlive_the_text_that_they_were_measured_on(path: Path) -> None:
    store.keep_outputs(path, [(1, 0.5, 0.25), (3, 0.5, 0.25)], {"amplification": 0.5})
    other = [
        replace(e, feature=replace(e.feature, **change))
        for e, change in zip(SOME, ({}, {"max_act": 1.5}, {}, {}), strict=True)
    ]
    store.write(path, other, MADE_FROM)
    with reading(path) as connection:
        assert [f.output_score for f in store.load(connection, [1, 3])] == [None, 0.5]
    assert store.measured(path) == {3}


def test_notes_are_carried_over_from_an_index_of_version_2(path: Path) -> None:
    notes.star(path, 2)
    with writing(path) as connection:
        connection.execute("PRAGMA user_version = 2")
    assert store.write(path, SOME, MADE_FROM) is None
    assert written(path) == {2: Note(starred=True)}


@pytest.mark.parametrize("cut", [50, 5_000])
def test_an_index_that_cannot_be_read_is_kept_beside_the_new_one(path: Path, cut: int) -> None:
    notes.star(path, 0)
    damaged = path.read_bytes()[:cut]
    for name in ("features.sqlite.unreadable", "features.sqlite-2.unreadable"):
        path.write_bytes(damaged)
        left = store.write(path, SOME, MADE_FROM)
        assert left == path.with_name(name) and left.read_bytes() == damaged
        assert written(path) == {}


def test_what_is_no_note_is_refused(path: Path) -> None:
    notes.star(path, 0)
    for wrong in (-1, 4, 10**30, True, "3", 2.0):
        with pytest.raises(FeatureError, match="features 0 to 3"):
            notes.star(path, wrong)  # type: ignore[arg-type]
    for name in ("", " \n", "x" * 201):
        with pytest.raises(FeatureError, match="a name has 1 to 200 characters"):
            notes.rename(path, 0, name)
    for tag in ("two words", "a,b", "", "x" * 65):
        with pytest.raises(FeatureError, match="tag"):
            notes.tag(path, 1, ["fine", tag])
    with pytest.raises(FeatureError, match="20,000 characters"):
        notes.remark(path, 0, "x" * 20_001)
    # Of what was refused nothing was written, not even its first half.
    assert written(path) == {0: Note(starred=True)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "can't be read"),
        ("[]", "holds no notes"),
        ('{"saesteer_notes": 2}', "holds no notes"),
        ('{"sae_hash": "abc"}', "holds no notes"),
        ([{"name": "x"}], "note 0 is malformed"),
        ([{"feature": 0}, {"feature": 1, "tags": ["a b"]}], "note 1 is malformed"),
        ([{"feature": 0, "nmae": "x"}], "unknown nmae"),
        ([{"feature": 0, "name": 3}], "note 0 is malformed"),
        ([7], "note 0 is malformed"),
        ([{"feature": 0, "starred": True}, {"feature": 4, "starred": True}], "no feature 4"),
        ([{"feature": "0", "starred": True}], "no feature '0'"),
    ],
)
def test_a_file_of_notes_is_taken_whole_or_refused(
    path: Path, tmp_path: Path, text: str | list, message: str
) -> None:
    if isinstance(text, list):
        text = json.dumps({"saesteer_notes": 1, "sae_hash": "abc", "notes": text})
    (tmp_path / "notes.json").write_text(text)
    with pytest.raises(IndexingError, match=message) as raised:
        notes.load(path, tmp_path / "notes.json")
    assert "\n" not in str(raised.value)
    assert written(path) == {}
