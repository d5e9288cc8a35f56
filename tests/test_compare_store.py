"""The store: each thing once, whatever happens to the process."""

import json
import shutil

import pytest

from saesteer.compare.store import Store
from saesteer.errors import RunError

KEY = {"arm": "a", "setting": {"point": "layers.1.resid_post"}, "strength": 0.1, "split": "test"}


def a_store(folder, config):
    return Store(folder, config, folder / "looks.json", "data")


def refuse():
    raise AssertionError("computed again")


def test_a_value_is_made_once_and_found_again_by_the_next_process(tmp_path):
    value = {"margins": [0.1, 1 / 3], "cost": None}
    store = a_store(tmp_path, {"seed": 1})
    assert KEY not in store
    assert store.once(KEY, lambda: value) == value
    assert store.once(dict(reversed(KEY.items())), refuse) == value and KEY in store
    store = a_store(tmp_path, {"seed": 1})
    assert store.once(KEY, refuse) == value
    assert store.count(arm="a") == 1 and store.count(arm="b") == 0
    assert list(store.select(split="test")) == [(KEY, value)]


def test_a_torn_last_line_is_dropped_and_computed_again(tmp_path):
    store = a_store(tmp_path, {})
    store.once({"arm": "a"}, lambda: {"x": 1})
    store.once({"arm": "b"}, lambda: {"x": 2})
    path = tmp_path / "evaluations.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    store = a_store(tmp_path, {})
    assert {"arm": "a"} in store and {"arm": "b"} not in store
    store.once({"arm": "b"}, lambda: {"x": 3})
    store = a_store(tmp_path, {})
    assert store.once({"arm": "b"}, refuse) == {"x": 3}
    lines = path.read_text().splitlines()
    assert [json.loads(line)["value"]["x"] for line in lines] == [1, 3]


def test_damage_in_the_middle_is_named(tmp_path):
    store = a_store(tmp_path, {})
    store.once({"arm": "a"}, lambda: {"x": 1})
    path = tmp_path / "evaluations.jsonl"
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(RunError, match="line 1 is damaged"):
        a_store(tmp_path, {})


def test_another_configuration_is_refused_by_name(tmp_path):
    a_store(tmp_path, {"seed": 1, "n": (1, 3)})
    a_store(tmp_path, {"n": [1, 3], "seed": 1})
    with pytest.raises(RunError, match=r"another seed.*another look at the test split"):
        a_store(tmp_path, {"seed": 2, "n": [1, 3]})


def test_a_pass_that_computes_on_held_out_items_is_one_look(tmp_path):
    store = a_store(tmp_path, {})
    store.once({"split": "validation"}, dict)
    assert store.looks == 0
    for strength in (1.0, 2.0):
        store.once({"split": "test", "strength": strength}, dict)
    store.once({"split": "ood"}, dict)
    store.finish()
    assert store.looks == 1
    store = a_store(tmp_path, {})
    store.once({"split": "test", "strength": 1.0}, refuse)
    assert store.looks == 1
    # A look counts from before the evaluation on, which may be killed.
    with pytest.raises(AssertionError):
        store.once({"split": "test", "strength": 3.0}, refuse)
    assert store.looks == 2


def test_a_pass_that_was_stopped_and_is_gone_on_with_is_one_look(tmp_path):
    for strength in (1.0, 2.0, 3.0):
        store = a_store(tmp_path, {})
        store.once({"split": "test", "strength": strength}, dict)
        assert store.looks == 1
    store.finish()
    a_store(tmp_path, {}).finish()
    store = a_store(tmp_path, {})
    store.once({"split": "test", "strength": 4.0}, dict)
    assert store.looks == 2


def test_looks_are_counted_over_all_folders_of_a_run(tmp_path):
    looks = tmp_path / "looks.json"

    def look(name, strength, data="sea", seed=1):
        store = Store(tmp_path / name, {"seed": seed}, looks, data)
        store.once({"split": "test", "strength": strength}, dict)
        return store

    first = look("a", 1.0)
    first.finish()
    assert look("b", 1.0).looks == 2 == first.looks  # stopped
    first = look("a", 2.0)
    assert first.looks == 3
    # b is not the one that was stopped last, and an end in b is none of a's.
    other = Store(tmp_path / "b", {"seed": 1}, looks, "sea")
    other.finish()
    assert look("a", 3.0).looks == 3
    assert look("c", 1.0, "music").looks == 1
    # Emptied and begun anew with something else, under the name that is open.
    shutil.rmtree(tmp_path / "a")
    assert look("a", 1.0, seed=2).looks == 4
    assert json.loads(looks.read_text()) == {
        "sea": {"looks": 4, "open": str(tmp_path / "a")},
        "music": {"looks": 1, "open": str(tmp_path / "c")},
    }


@pytest.mark.parametrize("text", ["{", "[1]", '{"data": 3}', '{"data": {"looks": 1}}'])
def test_looks_that_cannot_be_read_are_named(tmp_path, text):
    store = a_store(tmp_path, {})
    (tmp_path / "looks.json").write_text(text)
    with pytest.raises(RunError, match=r"looks\.json can't be read"):
        store.once({"split": "test"}, refuse)


def test_nothing_is_kept_of_what_fails(tmp_path):
    store = a_store(tmp_path, {})
    with pytest.raises(AssertionError):
        store.once({"arm": "a"}, refuse)
    assert {"arm": "a"} not in store
    assert not (tmp_path / "evaluations.jsonl").exists()
