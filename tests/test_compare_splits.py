"""Splits of whole groups, and draws of pairs."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.compare.problem import Behaviour, Splits
from saesteer.compare.splits import Item, draw, split
from saesteer.directions.pair_checks import stems_of
from saesteer.errors import PairsError

SHARES = Splits(pairs=200)


def file_of(path, groups):
    """A file of pairs, so many of each group."""
    rows = [
        {"prompt": f"{group} says {i}", "chosen": " yes", "rejected": " no", "group": group}
        for group, n in groups.items()
        for i in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return Behaviour("b", pairs=str(path))


def sides(made):
    return {"fit": made.fit, "validation": made.validation, "test": made.test}


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=3, max_size=14), seed=st.integers(0, 99))
def test_no_group_is_in_two_splits_and_no_pair_is_lost(tmp_path_factory, sizes, seed):
    groups = {f"g{i}": n for i, n in enumerate(sizes)}
    behaviour = file_of(tmp_path_factory.mktemp("s") / "p.jsonl", groups)
    made = split(behaviour, SHARES, seed=seed)
    assert all(sides(made).values())
    of = {name: {item.group for item in side} for name, side in sides(made).items()}
    assert sum(map(len, of.values())) == len(sizes)
    ids = sorted(item.id for side in sides(made).values() for item in side)
    assert ids == list(range(sum(sizes)))


def test_ten_equal_groups_are_split_four_one_five(tmp_path):
    made = split(file_of(tmp_path / "p.jsonl", {f"g{i}": 20 for i in range(10)}), SHARES)
    assert [len(side) for side in sides(made).values()] == [80, 20, 100]


def test_the_same_seed_gives_the_same_split_and_another_another(tmp_path):
    behaviour = file_of(tmp_path / "p.jsonl", {f"g{i}": 5 for i in range(12)})
    assert split(behaviour, SHARES, seed=1) == split(behaviour, SHARES, seed=1)
    assert split(behaviour, SHARES, seed=1) != split(behaviour, SHARES, seed=2)


def test_without_groups_pairs_of_one_prompt_stay_together(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": f"q{i % 20}", "chosen": f" yes {i}", "rejected": " no"} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    made = split(Behaviour("b", pairs=str(path)), SHARES)
    stems = [stems_of(item.pair for item in side) for side in sides(made).values()]
    assert not stems[0] & stems[1] and not stems[1] & stems[2] and not stems[0] & stems[2]


def test_groups_that_share_a_prompt_are_one(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [
        {"prompt": "same" if i < 2 else f"q{i}", "chosen": f" y{i}", "rejected": " n", "group": i}
        for i in range(8)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    made = split(Behaviour("b", pairs=str(path)), SHARES)
    holding = [name for name, side in sides(made).items() for i in side if i.pair.prompt == "same"]
    assert len(holding) == 2 and len(set(holding)) == 1


def test_two_groups_are_too_few(tmp_path):
    with pytest.raises(PairsError, match="2 groups"):
        split(file_of(tmp_path / "p.jsonl", {"a": 9, "b": 9}), SHARES)


def test_a_template_is_a_group():
    behaviour = Behaviour("h", template="configs/problems/happy-sad.templates.toml")
    made = split(behaviour, SHARES)
    assert {item.group for side in sides(made).values() for item in side} == {
        f"template {i}" for i in range(1, 11)
    }


def test_most_test_is_a_share_of_every_group(tmp_path):
    behaviour = file_of(tmp_path / "p.jsonl", {f"g{i}": 20 for i in range(10)})
    made = split(behaviour, Splits(most_test=30, most_validation=5))
    assert len(made.test) == 30 and len(made.validation) == 5
    assert len({item.group for item in made.test}) > 1


def test_ood_pairs_are_new(tmp_path):
    behaviour = file_of(tmp_path / "p.jsonl", {f"g{i}": 5 for i in range(10)})
    other = tmp_path / "o.jsonl"
    other.write_text(json.dumps({"prompt": "new", "chosen": " yes", "rejected": " no"}))
    made = split(Behaviour("b", pairs=behaviour.pairs, ood=str(other)), SHARES)
    assert [item.pair.prompt for item in made.ood] == ["new"]
    assert made.ood[0].id not in {item.id for side in sides(made).values() for item in side}
    with pytest.raises(PairsError, match="stand among the other pairs"):
        split(Behaviour("b", pairs=behaviour.pairs, ood=behaviour.pairs), SHARES)


def test_ab_questions_are_asked_once(tmp_path):
    behaviour = Behaviour("h", template="configs/problems/happy-sad.templates.toml")
    made = split(behaviour, SHARES, deployment="ab")
    pairs = [item.pair for side in sides(made).values() for item in side]
    assert {pair.chosen for pair in pairs} == {" (A)", " (B)"}
    assert abs(sum(pair.chosen == " (A)" for pair in pairs) - 100) <= 1
    path = tmp_path / "ab.jsonl"
    path.write_text("\n".join(json.dumps(vars(pair)) for pair in pairs))
    again = split(Behaviour("h", pairs=str(path)), SHARES, deployment="ab")
    assert {i.pair for side in sides(again).values() for i in side} == set(pairs)


def test_chat_needs_a_template():
    behaviour = Behaviour("sea", concept="sea")
    with pytest.raises(PairsError, match="no chat template"):
        split(behaviour, Splits(pairs=40), deployment="chat")


def test_draws_are_nested_in_n_and_differ_by_number_and_seed():
    fit = [Item(i, None, str(i)) for i in range(50)]  # type: ignore[arg-type]
    assert draw(fit, 8, 0, 0) == draw(fit, 32, 0, 0)[:8]
    assert len({draw(fit, 8, number, seed) for number in range(5) for seed in range(2)}) == 10
    assert len(set(draw(fit, 50, 1, 0))) == 50
    with pytest.raises(PairsError, match="51 pairs of 50"):
        draw(fit, 51, 0, 0)
