"""The store: each thing once, whatever happens to the process."""

import json

import pytest

from saesteer.compare.store import Store
from saesteer.errors import RunError

KEY = {"arm": "a", "setting": {"point": "layers.1.resid_post"}, "strength": 0.1, "split": "test"}


def refuse():
    raise AssertionError("computed again")


def test_a_value_is_made_once_and_found_again_by_the_next_process(tmp_path):
    value = {"margins": [0.1, 1 / 3], "cost": None}
    store = Store(tmp_path, {"seed": 1})
    assert KEY not in store
    assert store.once(KEY, lambda: value) == value
    assert store.once(dict(reversed(KEY.items())), refuse) == value and KEY in store
    store = Store(tmp_path, {"seed": 1})
    assert store.once(KEY, refuse) == value
    assert store.count(arm="a") == 1 and store.count(arm="b") == 0
    assert list(store.select(split="test")) == [(KEY, value)]


def test_a_torn_last_line_is_dropped_and_computed_again(tmp_path):
    store = Store(tmp_path, {})
    store.once({"arm": "a"}, lambda: {"x": 1})
    store.once({"arm": "b"}, lambda: {"x": 2})
    path = tmp_path / "evaluations.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    store = Store(tmp_path, {})
    assert {"arm": "a"} in store and {"arm": "b"} not in store
    store.once({"arm": "b"}, lambda: {"x": 3})
    store = Store(tmp_path, {})
    assert store.once({"arm": "b"}, refuse) == {"x": 3}
    lines = path.read_text().splitlines()
    assert [json.loads(line)["value"]["x"] for line in lines] == [1, 3]


def test_damage_in_the_middle_is_named(tmp_path):
    store = Store(tmp_path, {})
    store.once({"arm": "a"}, lambda: {"x": 1})
    path = tmp_path / "evaluations.jsonl"
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(RunError, match="line 1 is damaged"):
        Store(tmp_path, {})


def test_another_configuration_is_refused_by_name(tmp_path):
    Store(tmp_path, {"seed": 1, "n": (1, 3)})
    Store(tmp_path, {"n": [1, 3], "seed": 1})
    with pytest.raises(RunError, match="another seed"):
        Store(tmp_path, {"seed": 2, "n": [1, 3]})


def test_a_pass_that_computes_on_held_out_items_is_one_look(tmp_path):
    store = Store(tmp_path, {})
    store.once({"split": "validation"}, dict)
    assert store.looks == 0
    for strength in (1.0, 2.0):
        store.once({"split": "test", "strength": strength}, dict)
    store.once({"split": "ood"}, dict)
    assert store.looks == 1
    store = Store(tmp_path, {})
    store.once({"split": "test", "strength": 1.0}, refuse)
    assert store.looks == 1
    # A look counts from before the evaluation on, which may be killed.
    with pytest.raises(AssertionError):
        store.once({"split": "test", "strength": 3.0}, refuse)
    assert store.looks == 2


def test_nothing_is_kept_of_what_fails(tmp_path):
    store = Store(tmp_path, {})
    with pytest.raises(AssertionError):
        store.once({"arm": "a"}, refuse)
    assert {"arm": "a"} not in store
    assert not (tmp_path / "evaluations.jsonl").exists()
