"""The protocol: equal budgets, choices before tests, the same result however often it is killed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from saesteer.compare import contenders, protocol
from saesteer.compare.evaluate import Bench
from saesteer.compare.prepared import Prepared, margins_of
from saesteer.compare.problem import Affordances, Primary
from saesteer.compare.problem_file import to_dict
from saesteer.compare.store import Store
from saesteer.compare.trial import Trial
from saesteer.core.points import HookPoint
from saesteer.directions.pairs import Pair
from saesteer.effects.damage import Reference
from saesteer.errors import PairsError, SaesteerError, SteeringError
from saesteer.steering.edits import Add
from saesteer.steering.positions import Positions
from tests.some_material import an_index
from tests.some_trial import TEXTS, a_bench, a_problem, a_split, a_trial
from tests.tiny import WIDTH, tiny_model, tiny_sae


def compare(trial):
    return protocol.test_all(trial, protocol.choose_all(trial))


def a_store(trial):
    """Of the same folder, as the next process opens it."""
    folder = trial.store.folder
    looks = folder.with_name(f"{folder.name}-looks.json")
    return Store(folder, to_dict(trial.problem), looks, "data")


def without_seconds(report):
    """The report less what the clock says."""
    told = json.loads(json.dumps(report))
    for arm in told["arms"]:
        del arm["ledger"]["seconds"]
    return told


def choices(report):
    return {(arm["arm"], arm["n"]): arm["chosen"] for arm in report["arms"]}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    trial = a_trial(tmp_path_factory.mktemp("compared"), a_problem(n=(1, 32)))
    return trial, compare(trial)


def test_every_arm_gets_the_same_budget_and_it_is_counted(compared):
    trial, found = compared
    spent = {arm["arm"]: arm["validation_evaluations"] for arm in found.report["arms"]}
    assert spent == {"none": 0, "mean-difference": 4, "sae-clamp": 4, "sae-search": 4}
    for key, tuned in found.tuned.items():
        arm, n, noise = key
        kept = trial.store.count(arm=arm, n=n, noise=noise, split="validation")
        assert kept == tuned.evaluations == 4
    assert found.not_run == []


def test_draws_and_rows_are_complete_and_agree_with_the_report(compared):
    trial, found = compared
    draws = {arm["arm"]: arm["draws"] for arm in found.report["arms"]}
    assert draws == {"none": 1, "mean-difference": 10, "sae-clamp": 10, "sae-search": 1}
    for arm in found.report["arms"][1:]:
        rows = [
            r for r in found.rows if (r["arm"], r["n"], r["delta"]) == (arm["arm"], arm["n"], 0.5)
        ]
        assert len(rows) == arm["draws"] * len(trial.split.test)
        mean = np.mean([row["gain"] for row in rows])
        assert arm["effect"]["0.5"]["value"] == pytest.approx(mean, abs=1e-9)
    assert {(one["arm"], one["n"]) for one in found.report["n_curve"]} == {
        (arm, n) for arm in ("mean-difference", "sae-clamp") for n in (1, 32)
    }
    (declared, *_) = found.report["comparisons"]
    assert (declared["a"], declared["b"], declared["primary"]) == (
        "sae-clamp",
        "mean-difference",
        True,
    )
    json.dumps([found.report, found.rows], allow_nan=False)


def test_what_was_chosen_keeps_within_its_cost_on_validation(compared):
    for arm in compared[1].report["arms"]:
        for delta, choice in arm["chosen"].items():
            if choice:
                assert choice["validation_delta_ce"] <= float(delta)
                assert choice["validation_gain"] > 0


def test_test_items_come_after_all_choices(compared):
    trial, _ = compared
    kept = [key.get("split") for key, _ in trial.store.select() if key["arm"] != "none"]
    assert max(i for i, s in enumerate(kept) if s == "validation") < kept.index("test")
    assert trial.store.looks == 1


def test_test_labels_change_no_choice(compared, tmp_path):
    trial, found = compared
    swapped = tuple(
        replace(item, pair=Pair(item.pair.prompt, item.pair.rejected, item.pair.chosen))
        for item in trial.split.test
    )
    other = a_trial(tmp_path, a_problem(), split=replace(trial.split, test=swapped))
    again = compare(other)
    assert choices(again.report) == choices(found.report)
    assert again.report["base"]["margin"]["value"] == pytest.approx(
        -found.report["base"]["margin"]["value"], abs=1e-6
    )


def test_a_killed_comparison_goes_on_to_the_same_result(compared, tmp_path, monkeypatch):
    _, found = compared
    trial = a_trial(tmp_path, a_problem(n=(1, 32)))
    evaluate, count = Bench.evaluate, [0]

    def killed(*args, **more):
        count[0] += 1
        if count[0] > 30:
            raise KeyboardInterrupt
        return evaluate(*args, **more)

    monkeypatch.setattr(Bench, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        compare(trial)
    with (trial.store.folder / "evaluations.jsonl").open("a") as file:
        file.write('{"key": {"arm": "mean-diff')
    monkeypatch.undo()
    again = compare(a_trial(tmp_path, a_problem(n=(1, 32))))
    assert without_seconds(again.report) == without_seconds(found.report)
    assert again.rows == found.rows


def test_what_is_finished_is_computed_no_more(compared, monkeypatch):
    trial, found = compared

    def refuse(*_, **__):
        raise AssertionError("computed again")

    other = replace(trial, store=a_store(trial))
    monkeypatch.setattr(Bench, "evaluate", refuse)
    monkeypatch.setattr(contenders, "prepare", refuse)
    assert compare(other).report == found.report
    assert other.store.looks == 1


def test_random_has_twenty_directions_of_the_same_pairs(tmp_path):
    problem = a_problem(arms=("random",), layers=("layers.1.resid_post",))
    trial = a_trial(tmp_path, problem)
    made = next(iter(compare(trial).tuned.values())).made
    assert trial.store.count(arm="random", split="test", text=True) % 20 == 0
    first, second = (trial.material(replace(made, draw=draw)) for draw in (0, 1))
    assert first.pairs == second.pairs and first.seed != second.seed


def test_arms_that_may_not_run_say_why(tmp_path):
    problem = a_problem(
        arms=("sae-clamp", "sft-lora", "prompt", "gated", "sae-search", "act-add", "few-shot"),
        affordances=Affordances(),
        n=(32,),
    )
    found = compare(a_trial(tmp_path, problem, sae=None, index=None))
    why = {one["what"].removeprefix("sea: "): one["why"] for one in found.not_run}
    assert "the run has no SAE" in why["sae-clamp"]
    assert "weights is false" in why["sft-lora"]
    assert "tokens is 0" in why["prompt"] and "tokens is 0" in why["few-shot"]
    assert "a condition" in why["gated"] and "has no SAE" in why["sae-search"]
    assert found.report["arms"][0]["arm"] == "none"
    assert found.report["n_star"] is None


def test_an_arm_that_fails_ends_with_its_message_and_not_the_comparison(tmp_path):
    # Features that are too dense are no candidates.
    problem = a_problem(arms=("sae-add", "mean-difference"), n=(32,))
    trial = a_trial(tmp_path, problem)
    (tmp_path / "dense").mkdir()
    figures = {feature: {"density": 0.5} for feature in range(64)}
    trial.index = an_index(tmp_path / "dense", trial.sae, figures=figures)
    found = compare(trial)
    (one,) = found.not_run
    assert one["what"] == "sea: sae-add n=32" and "no feature is more active" in one["why"]
    assert [arm["arm"] for arm in found.report["arms"]] == ["none", "mean-difference"]


def test_choosing_looks_at_no_test_item(tmp_path):
    trial = a_trial(tmp_path, a_problem())
    protocol.choose_all(trial)
    assert {key.get("split") for key, _ in trial.store.select()} == {None, "validation"}
    assert trial.store.looks == 0


def test_a_package_that_is_missing_is_told_and_not_kept(compared, tmp_path, monkeypatch):
    _, found = compared
    prepare = contenders.prepare
    only = a_problem(n=(1, 32))

    def missing(contender, *given, **how):
        if contender.arm == "sae-clamp":
            raise SaesteerError("fine-tuning needs peft")
        return prepare(contender, *given, **how)

    def without():
        with monkeypatch.context() as patch:
            patch.setattr(contenders, "prepare", missing)
            return compare(a_trial(tmp_path, only))

    def told(one):
        return {entry["what"]: entry["why"] for entry in one.not_run}

    why = dict.fromkeys(("sea: sae-clamp n=32", "sea: sae-clamp n=1"), "fine-tuning needs peft")
    # Before it is made, before α_max is known, and before it is tested.
    first = without()
    assert told(first) == why and ("sae-clamp", 32, 0.0) not in first.tuned
    trial = a_trial(tmp_path, only)
    assert trial.store.count(arm="sae-clamp") == 0 < trial.store.count(arm="mean-difference")
    find = Trial.ceiling

    def interrupted(self, made, *given):
        if made.contender.arm == "sae-clamp":
            raise KeyboardInterrupt
        return find(self, made, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Trial, "ceiling", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(trial)
    kinds = {key.get("kind") for key, _ in a_trial(tmp_path, only).store.select(arm="sae-clamp")}
    assert kinds == {"making"}
    assert told(without()) == why
    protocol.choose_all(a_trial(tmp_path, only))
    second = without()
    assert told(second) == why and ("sae-clamp", 32, 0.0) not in second.tuned
    assert "sae-clamp" not in {arm["arm"] for arm in second.report["arms"]}
    again = compare(a_trial(tmp_path, only))
    assert again.not_run == [] and again.rows == found.rows


def test_prompts_are_settings_without_strengths(tmp_path):
    problem = a_problem(arms=("few-shot",), affordances=Affordances(tokens=-1), n=(32,))
    found = compare(a_trial(tmp_path, problem))
    (arm,) = found.report["arms"][1:]
    assert arm["kind"] == "prompt" and arm["alpha_max"] is None and arm["slope"]["raw"] is None
    assert arm["validation_evaluations"] == 4 == len(arm["dose"]) * 4
    short = a_problem(arms=("few-shot",), affordances=Affordances(tokens=20), n=(32,))
    (why,) = compare(a_trial(tmp_path, short, store="short")).not_run
    assert "tokens longer" in why["why"]


def test_noise_is_for_the_arms_of_the_family(tmp_path):
    problem = a_problem(
        arms=("mean-difference", "lat"),
        noise=(0.25,),
        n=(32,),
        primary=Primary(("mean-difference vs none",), 0.1),
    )
    found = compare(a_trial(tmp_path, problem))
    assert [(arm["arm"], arm["noise"]) for arm in found.report["arms"]] == [
        ("none", 0.0),
        ("mean-difference", 0.0),
        ("mean-difference", 0.25),
        ("lat", 0.0),
    ]


def test_too_few_pairs_for_the_headline_are_refused(tmp_path):
    with pytest.raises(PairsError, match="headline takes 64 pairs"):
        compare(a_trial(tmp_path, a_problem(headline_n=64)))
    with pytest.raises(SteeringError, match="no arm 'mean-diff'"):
        compare(a_trial(tmp_path, a_problem(arms=("mean-diff",)), store="other"))


def test_margins_and_costs_are_those_of_the_rooms_below(tmp_path):
    problem = a_problem()
    bench, items = a_bench(problem), a_split(tmp_path, problem).validation
    vector = torch.ones(WIDTH)
    prepared = Prepared("x", bench.model, edits=lambda s: [Add(vector, s, "layers.1.resid_post")])
    found = bench.evaluate(prepared, 0.3, items, text=bench.validation_text)
    expected = margins_of(prepared, bench.tokenizer, [item.pair for item in items], 0.3)
    assert found.margins == expected.tolist()
    reference = Reference(bench.model, bench.tokenizer, TEXTS[0::2])
    assert found.cost == reference.cost(prepared.edits(0.3))


def test_a_model_of_its_own_and_a_prompt_cost_what_they_change():
    bench = a_bench(a_problem())
    text = bench.validation_text
    same = text.cost(Prepared("x", tiny_model()), [])
    assert abs(same.delta_ce) < 1e-6 and same.kl < 1e-6
    assert text.cost(Prepared("x", tiny_model(seed=1)), []).kl > 0.01
    edit = [Add(torch.ones(WIDTH), 0.3, "layers.1.resid_post")]
    own, plain = (
        text.cost(Prepared("x", tiny_model()), edit),
        text.cost(Prepared("x", bench.model), edit),
    )
    assert own.delta_ce == pytest.approx(plain.delta_ce, abs=1e-5)
    assert own.kl == pytest.approx(plain.kl, abs=1e-5) and own.n_tokens == plain.n_tokens
    prompted = text.cost(Prepared("x", bench.model, lambda prompt: "the sad king . " + prompt), [])
    assert prompted.n_tokens == plain.n_tokens and prompted.kl > 1e-4


def test_edits_of_the_answer_or_of_the_prompt_alone(tmp_path):
    items = a_split(tmp_path, a_problem()).validation
    vector = torch.ones(WIDTH)

    def margins(positions, where):
        bench = a_bench(a_problem(positions=positions))
        edits = [Add(vector, 0.5, "layers.1.resid_post", where=where)]
        return bench.evaluate(Prepared("x", bench.model, edits=lambda s: edits), 1.0, items).margins

    everywhere = Positions()
    found = {p: margins(p, everywhere) for p in ("all", "prompt", "generated")}
    assert len({tuple(one) for one in found.values()}) == 3
    for positions, where in (
        ("prompt", Positions(generated=False)),
        ("generated", Positions(prompt=False)),
    ):
        assert margins("all", where) == found[positions]
    # By hand: the prompts here all have as many tokens, and come after BOS.
    with pytest.raises(SteeringError, match="neither prompt nor generated"):
        margins("generated", Positions(generated=False))


def test_layers_are_four_with_the_saes_own_among_them():
    deep = tiny_model(num_hidden_layers=12)
    sae = tiny_sae(point=HookPoint(6, "resid_pre"))
    found = [str(point) for point in contenders.layers(a_problem(layers=()), deep, sae)]
    assert len(found) == 4 and "layers.6.resid_pre" in found
    assert len(set(contenders.layers(a_problem(layers=()), tiny_model(), None))) == 3
