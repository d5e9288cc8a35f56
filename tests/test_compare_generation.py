"""What arms write: the same noise for all, and scores beside it."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from saesteer.compare import generation
from saesteer.compare.evaluate import Bench
from saesteer.compare.generation import Generated, baseline, generate_and_score, prompts_for
from saesteer.compare.prepared import Prepared
from saesteer.compare.problem import Behaviour
from saesteer.compare.scorers import Scorer
from saesteer.compare.splits import Item
from saesteer.core.points import HookPoint
from saesteer.errors import NothingSteeredError, TextError
from saesteer.steering.edits import Add
from saesteer.steering.positions import Positions
from tests.some_material import some_pairs
from tests.tiny import WIDTH, tiny_model, tiny_tokenizer

PROMPTS = [pair.prompt for pair in some_pairs(24)] + ["sea", "the old hill and the river then"]
TOKENIZER = tiny_tokenizer()
VECTOR = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
POINT = HookPoint(1, "resid_post")


def a_bench(positions: str = "all", **how) -> Bench:
    return Bench(
        tiny_model(**how), TOKENIZER, ["the boy saw", "a girl ran home"], positions=positions
    )


def an_arm(bench: Bench, **changed) -> Prepared:
    arm = Prepared("push", bench.model, edits=lambda strength: [Add(VECTOR, strength, POINT)])
    return replace(arm, **changed)


@pytest.fixture(scope="module")
def bench():
    return a_bench()


@pytest.fixture(scope="module")
def base(bench):
    return baseline(bench, PROMPTS, seed=1, max_new_tokens=8)


def fixed(axis: str, *values: float) -> Scorer:
    """Scores that repeat."""
    return Scorer(
        axis, lambda texts: [values[i % len(values)] for i in range(len(texts))], {"0": 0, "2": 2}
    )


def test_an_arm_that_changes_nothing_writes_the_baseline(bench, base):
    for arm in (Prepared("none", bench.model), an_arm(bench)):
        found = generate_and_score(base, arm, 0.0, {})
        assert found.written == list(base.texts) and found.arm == arm.arm
    pushed = generate_and_score(base, an_arm(bench), 6.0, {})
    assert pushed.prompts == PROMPTS and pushed.texts != [one.text for one in base.texts]
    assert generate_and_score(base, an_arm(bench), 6.0, {}) == pushed


def test_a_text_depends_on_its_place_and_the_seed_alone(bench, base, monkeypatch):
    monkeypatch.setattr(generation, "_BATCH", 5)
    assert baseline(bench, PROMPTS, seed=1, max_new_tokens=8).texts == base.texts
    assert baseline(bench, PROMPTS[:7], seed=1, max_new_tokens=8).texts == base.texts[:7]
    other = baseline(bench, PROMPTS, seed=2, max_new_tokens=8).texts
    assert sum(a.text != b.text for a, b in zip(other, base.texts, strict=True)) > 15
    # The same prompt twice is two draws.
    twice = baseline(bench, ["the boy"] * 2, max_new_tokens=8).texts
    assert twice[0].text != twice[1].text


def test_prompts_are_transformed_for_the_model_and_told_as_they_were(bench, base):
    found = generate_and_score(
        base, Prepared("shown", bench.model, lambda prompt: f"once upon a time {prompt}"), 1.0, {}
    )
    there = baseline(bench, [f"once upon a time {p}" for p in PROMPTS], seed=1, max_new_tokens=8)
    assert found.prompts == PROMPTS and found.texts == [one.text for one in there.texts]


def test_an_arm_writes_with_its_own_model(base):
    other = a_bench(seed=5)
    found = generate_and_score(base, Prepared("trained", other.model), 1.0, {})
    there = baseline(other, PROMPTS, seed=1, max_new_tokens=8)
    assert found.texts == [one.text for one in there.texts] != [one.text for one in base.texts]


def test_edits_act_where_the_problem_steers(bench):
    said = {}
    for positions in ("all", "prompt", "generated"):
        one = a_bench(positions)
        base = baseline(one, PROMPTS, max_new_tokens=8, temperature=0)
        said[positions] = generate_and_score(base, an_arm(one), 8.0, {}).tokens
        said["none"] = [list(text.tokens) for text in base.texts]
    assert len({json.dumps(tokens) for tokens in said.values()}) == 4
    # The first token is written before any written token could be edited.
    assert [t[:1] for t in said["generated"]] == [t[:1] for t in said["none"]]
    assert [t[:1] for t in said["prompt"]] == [t[:1] for t in said["all"]]


def test_a_text_that_ends_at_once_is_no_error_and_an_edit_of_nothing_is():
    bench = a_bench("generated")
    base = baseline(bench, PROMPTS, max_new_tokens=1)
    assert generate_and_score(base, an_arm(bench), 8.0, {}).written == list(base.texts)
    bench = a_bench()
    base = baseline(bench, PROMPTS, max_new_tokens=6, temperature=0)
    beyond = Positions(spans=((500, 501),))
    nothing = an_arm(bench, edits=lambda s: [Add(VECTOR, s, POINT, where=beyond)])
    with pytest.raises(NothingSteeredError):
        generate_and_score(base, nothing, 1.0, {})


def test_scores_axes_and_their_harmonic_mean_by_hand(bench, base):
    scorers = {
        "lexicon": fixed("concept", 1.0, 0.0),
        "classifier": fixed("concept", 1.0, 2.0),
        "relevance": fixed("relevance", 2.0),
        "fluency": fixed("fluency", 2.0, 0.0),
    }
    found = generate_and_score(base, Prepared("none", bench.model), 0.0, scorers)
    n = len(PROMPTS)
    assert found.scores["classifier"][:3] == [1.0, 2.0, 1.0]
    assert found.axes["concept"] == [1.0] * n
    assert found.harmonic == pytest.approx([1.5, 0.0] * (n // 2))
    told = found.summary()
    assert told["harmonic"]["value"] == pytest.approx(0.75) and told["harmonic"]["n"] == n
    assert told["harmonic"]["low"] < 0.75 < told["harmonic"]["high"]
    assert told["concept"]["value"] == 1 and told["texts"] == n
    assert told["empty"] == sum(not tokens for tokens in found.tokens)
    assert told["distinct_2"] == found.distinct_2 and 0 < told["distinct_2"] <= 1
    assert Generated(**json.loads(json.dumps(asdict(found)))) == found
    lines = [json.loads(json.dumps(line)) for line in found.lines()]
    assert [line["text"] for line in lines] == found.texts
    assert lines[1]["scores"]["classifier"] == 2 and lines[1]["harmonic"] == 0
    some = {name: scorers[name] for name in ("lexicon", "fluency")}
    found = generate_and_score(base, Prepared("none", bench.model), 0.0, some)
    told = found.summary()
    assert found.harmonic is None and told["harmonic"] is None and told["relevance"] is None
    assert told["fluency"]["value"] == pytest.approx(np.mean([2, 0]))


def test_prompts_come_from_a_file_or_from_the_test_items(tmp_path):
    items = [Item(i, pair, "g") for i, pair in enumerate(some_pairs(4) * 2)]
    behaviour = Behaviour("sea", pairs="x")
    assert prompts_for(behaviour, items) == [pair.prompt for pair in some_pairs(4)]
    assert len(prompts_for(behaviour, items, most=2)) == 2
    file = tmp_path / "prompts.txt"
    file.write_text("the boy saw\n\n  the sea\nthe boy saw\n", encoding="utf-8")
    named = replace(behaviour, prompts=str(file))
    assert prompts_for(named, items) == ["the boy saw", "  the sea"]
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(TextError, match="no prompts"):
        prompts_for(named, items)
    with pytest.raises(TextError, match="can't be read"):
        prompts_for(replace(behaviour, prompts=str(tmp_path / "none.txt")), items)
    with pytest.raises(TextError, match="no prompts"):
        baseline(a_bench(), [])
