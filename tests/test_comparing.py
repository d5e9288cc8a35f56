"""A whole comparison on a small run: its folder, killed and gone on with, and what it may claim."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from saesteer import comparing
from saesteer.compare import (
    afterwards,
    contenders,
    generation,
    presets,
    reading,
    report,
    report_view,
    scorers,
)
from saesteer.compare.afterwards import Judge
from saesteer.compare.evaluate import Bench
from saesteer.compare.judge import AGAIN
from saesteer.compare.problem import Affordances, Behaviour, Primary, Problem, Splits
from saesteer.compare.problem_file import read
from saesteer.directions.pairs import Pair, write_pairs
from saesteer.errors import ConfigError, ModelError, PairsError, RunError, SteeringError
from saesteer.run import Run

ARMS = ("mean-difference", "sae-clamp", "lat", "random", "gated")
BUDGET = 4


def a_problem(**changes):
    given = {
        "behaviours": (
            Behaviour("sea", concept="sea", query="sea"),
            Behaviour("music", concept="music", query="music"),
        ),
        "affordances": Affordances(),
        "deployment": "completion",
        "delta_ce": 0.5,
        "splits": Splits(most_validation=4, most_test=6, pairs=120),
        "primary": Primary(("sae-clamp vs mean-difference", "mean-difference vs none"), 0.1),
        "n": (8, 32),
        "headline_n": 32,
        "strengths": 2,
        "layers": ("layers.1.resid_post",),
        "arms": ARMS,
    }
    return Problem(**(given | changes))


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Fewer draws and shorter texts: their numbers are the protocol's and tested there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders, "DRAWS", 2)
        patch.setattr(contenders, "CONTROL_DRAWS", 2)
        patch.setattr("saesteer.compare.writing.NEW_TOKENS", 8)
        patch.setattr(afterwards, "NEW_TOKENS", 8)
        patch.setattr(comparing, "_TEXTS", 4)
        prepare = contenders.prepare

        def failing(contender, *given, **how):
            if contender.arm == "lat":
                raise SteeringError("no lat today")
            return prepare(contender, *given, **how)

        patch.setattr(contenders, "prepare", failing)
        yield


@pytest.fixture(scope="module")
def small_run(small_run, tmp_path_factory):
    """A copy, since looks are counted in the run."""
    folder = tmp_path_factory.mktemp("run") / "run"
    return Run.open(Path(shutil.copytree(small_run.path, folder)))


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    path = tmp_path_factory.mktemp("choices") / "choices.jsonl"
    write_pairs(
        path, [Pair("The man saw the", " sea.", " oven."), Pair("Lily had a", " cat.", " .")]
    )
    return a_problem(choices=str(path))


@pytest.fixture(scope="module")
def compared(small_run, problem, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "out"
    return folder, comparing.compare(small_run, problem, folder, budget=BUDGET)


@pytest.fixture
def copied(compared, tmp_path):
    """The finished folder, to go on with."""
    return Path(shutil.copytree(compared[0], tmp_path / "copy"))


def rows_of(folder):
    with (folder / "prompts.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def texts_of(folder):
    lines = (folder / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def without(result, *keys):
    told = {**result, **dict.fromkeys(("made", "seconds", *keys))}
    return json.loads(re.sub(r'("seconds": )[0-9.e+-]+', r"\1 0", json.dumps(told)))


def looks(run):
    """Of the one problem that is tested here most: at most one other has fewer."""
    counted = json.loads((run.path / "looks.json").read_text(encoding="utf-8"))
    return max(one["looks"] for one in counted.values())


def refuse(*_, **__):
    raise AssertionError("computed again")


def test_the_report_has_its_shape_and_renders(compared, problem):
    folder, result = compared
    assert json.loads((folder / "report.json").read_text()) == result
    json.dumps(result, allow_nan=False)
    assert set(result) == {
        "saesteer", "made", "seed", "budget", "looks_at_test", "seconds", "problem", "run",
        "deltas", "behaviours", "across", "matrix", "interactions", "ledger", "not_run", "world",
    }  # fmt: skip
    assert (result["looks_at_test"], result["budget"], result["seed"]) == (1, BUDGET, 0)
    assert result["run"]["sae"] and result["run"]["d_sae"] == 128
    shared = result["ledger"]["shared"]
    assert shared["sae_training"] > shared["indexing"] > 0
    for one in result["behaviours"]:
        assert set(one) == {
            "name", "describe", "splits", "base", "arms", "n_curve", "n_star", "reading",
            "comparisons", "scorers",
        }  # fmt: skip
        assert [a["arm"] for a in one["arms"]] == ["none", "mean-difference", "sae-clamp", "random"]
        spent = {a["arm"]: a["validation_evaluations"] for a in one["arms"]}
        assert spent == {"none": 0} | dict.fromkeys(list(spent)[1:], BUDGET)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page == report.render(result) and "no lat today" in page
    assert max(map(len, report_view.shown(result).splitlines())) <= 80
    assert read(folder / "problem.toml") == problem


def test_every_behaviour_chooses_before_any_is_tested(compared):
    lines = (compared[0] / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    chosen = [i for i, key in enumerate(keys) if key.get("split") == "validation"]
    held_out = [i for i, key in enumerate(keys) if key.get("split") in ("test", "ood")]
    assert {keys[i]["behaviour"] for i in chosen} == {"sea", "music"}
    assert max(chosen) < min(held_out)


def test_an_arm_that_fails_is_told_with_its_message(compared):
    why = {one["what"]: one["why"] for one in compared[1]["not_run"]}
    for behaviour in ("sea", "music"):
        assert why[f"{behaviour}: lat n=32"] == "no lat today"
        assert "a condition" in why[f"{behaviour}: gated"]


def test_the_table_of_prompts_gives_every_effect_again(compared):
    folder, result = compared
    gains = {}
    for row in rows_of(folder):
        key = row["behaviour"], row["arm"], int(row["n"]), float(row["delta"])
        assert float(row["margin"]) - float(row["base_margin"]) == float(row["gain"])
        gains.setdefault(key, []).append(float(row["gain"]))
    seen = 0
    for one in result["behaviours"]:
        for arm in one["arms"][1:]:
            for delta, effect in arm["effect"].items():
                found = gains[one["name"], arm["arm"], arm["n"], float(delta)]
                assert len(found) == arm["draws"] * one["splits"]["test"]
                assert effect["value"] == pytest.approx(np.mean(found), abs=1e-9)
                seen += 1
        for point in one["n_curve"]:
            found = gains[one["name"], point["arm"], point["n"], 0.5]
            assert point["effect"]["value"] == pytest.approx(np.mean(found), abs=1e-9)
    assert seen == 2 * 3 * 4


def test_every_arm_writes_to_every_prompt_and_none_has_texts_and_choices_too(compared):
    folder, result = compared
    texts = texts_of(folder)
    for one in result["behaviours"]:
        own = [text for text in texts if text["behaviour"] == one["name"]]
        prompts = list(dict.fromkeys(text["prompt"] for text in own))
        assert 1 < len(prompts) <= one["splits"]["test"]
        for arm in one["arms"]:
            written = [text for text in own if text["arm"] == arm["arm"]]
            assert [text["prompt"] for text in written] == prompts
            assert arm["generation"]["texts"] == len(prompts)
            for scorer, about in one["scorers"].items():
                found = np.mean([text["scores"][scorer] for text in written])
                assert arm["generation"][about["axis"]]["value"] == pytest.approx(found)
            assert arm["choices"]["n"] == 2
            if arm["chosen"]["0.5"]:
                assert all(isinstance(w["after"], str) for w in arm["worst"][:3])
    by_arm = {a["arm"]: a for a in result["behaviours"][0]["arms"]}
    assert by_arm["none"]["generation"]["fluency"] is not None
    fixed = result["behaviours"][0]["scorers"]["fluency"]["fixed"]
    assert fixed["0"] > fixed["2"] > 0  # nats a token: the unsteered text is the likelier one


def test_reading_is_on_text_that_nothing_was_chosen_on(compared, copied, small_run, problem):
    result = compared[1]
    clean = comparing.clean_texts(small_run, "")
    used = []

    def told(*given, texts, **how):
        used.append(texts)
        return reading_read(*given, texts=texts, **how)

    reading_read = reading.read
    _drop(copied, lambda key: key.get("kind") == "readings" and key["behaviour"] == "sea")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "read", told)
        again = comparing.compare(small_run, problem, copied, budget=BUDGET)
    assert used == [clean[1::2]]
    validation = [len(text) for text in clean[0::2]]
    assert len(validation) == 2 and not set(clean[0::2]) & set(clean[1::2])
    assert without(again, "looks_at_test") == without(result, "looks_at_test")
    arms = {(one["arm"], one["labels"]) for one in result["behaviours"][0]["reading"]}
    assert {("mean-difference", "pairs"), ("sae-clamp", "pairs"), ("ccs", "pairs")} <= arms


def test_a_second_pass_computes_nothing_and_is_no_look(compared, copied, small_run, problem):
    before = looks(small_run)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (Bench, "evaluate"), (Bench, "likelihoods"), (contenders, "prepare"),
            (generation, "baseline"), (generation, "generate_and_score"), (reading, "read"),
            (reading, "readers_of"), (scorers, "make"),
        ):  # fmt: skip
            patch.setattr(module, name, refuse)
        again = comparing.compare(small_run, problem, copied, budget=BUDGET)
    assert without(again, "looks_at_test") == without(compared[1], "looks_at_test")
    assert again["looks_at_test"] == before
    assert texts_of(copied) == texts_of(compared[0])


def _drop(folder, wanted):
    """Take evaluations out of a folder by their keys."""
    path = folder / "evaluations.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    keep = [line for line in lines if not wanted(json.loads(line)["key"])]
    assert 0 < len(keep) < len(lines)
    path.write_text("".join(keep), encoding="utf-8")


def test_killed_twice_it_goes_on_to_the_same_report(compared, copied, small_run, problem):
    folder, result = compared
    before = looks(small_run)
    # As it was before the second behaviour's test items, and before what comes afterwards.
    late = {"texts", "worst", "choices", "scorers", "together"}
    _drop(
        copied,
        lambda key: (
            key.get("kind") in late or (key["behaviour"] == "music" and key.get("split") == "test")
        ),
    )
    for module, name, after in (
        (Bench, "evaluate", 9),  # among the second behaviour's test items
        (generation, "generate_and_score", 2),
    ):
        inner, count = getattr(module, name), [0]

        def killed(*given, inner=inner, count=count, after=after, **how):
            count[0] += 1
            if count[0] > after:
                raise KeyboardInterrupt
            return inner(*given, **how)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, killed)
            with pytest.raises(KeyboardInterrupt):
                comparing.compare(small_run, problem, copied, budget=BUDGET)
        with (copied / "evaluations.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"key": {"arm": "mean-diff')
    again = comparing.compare(small_run, problem, copied, budget=BUDGET)
    assert without(again, "looks_at_test") == without(result, "looks_at_test")
    # Both that were killed and this one are one pass; each of the other tests' may be another.
    assert again["looks_at_test"] == before + 1
    assert rows_of(copied) == rows_of(folder) and texts_of(copied) == texts_of(folder)


@pytest.mark.parametrize(
    ("change", "how", "message"),
    [
        ({}, {"seed": 1}, "seed"),
        ({}, {"budget": 6}, "budget"),
        ({"delta_ce": 0.25}, {}, "problem"),
    ],
)
def test_another_comparison_in_the_same_folder_is_refused(
    copied, small_run, problem, change, how, message
):
    before = (copied / "report.json").read_bytes(), (copied / "problem.toml").read_bytes()
    with pytest.raises(RunError, match=message):
        comparing.compare(small_run, replace(problem, **change), copied, **{"budget": BUDGET} | how)
    assert before == tuple((copied / f).read_bytes() for f in ("report.json", "problem.toml"))


def test_a_file_that_says_something_else_now_is_another_comparison(copied, small_run, problem):
    path = Path(problem.choices)
    before = path.read_bytes()
    try:
        write_pairs(path, [Pair("The man saw the", " oven.", " sea.")])
        with pytest.raises(RunError, match="another data"):
            comparing.compare(small_run, problem, copied, budget=BUDGET)
    finally:
        path.write_bytes(before)


def test_what_cannot_be_asked_is_refused_before_anything_is_computed(
    small_run, problem, tmp_path, monkeypatch
):
    monkeypatch.setattr(Bench, "evaluate", refuse)
    for error, changes, how in (
        (ConfigError, {}, {"budget": 0}),
        (ConfigError, {"preset": "cas"}, {}),
        (PairsError, {"choices": str(tmp_path / "none.jsonl")}, {}),
    ):
        with pytest.raises(error):
            comparing.compare(small_run, replace(problem, **changes), tmp_path / "o", **how)
    assert not (tmp_path / "o" / "evaluations.jsonl").exists()


def test_without_an_index_features_take_no_part_and_the_reason_stands(small_run, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(small_run.path, path, ignore=shutil.ignore_patterns("features.sqlite"))
    small = a_problem(
        behaviours=a_problem().behaviours[:1],
        arms=("sae-clamp", "mean-difference"),
        n=(32,),
    )
    result = comparing.compare(Run.open(path), small, tmp_path / "out", budget=2)
    why = {one["what"]: one["why"] for one in result["not_run"]}
    assert "saesteer index" in why["features of the SAE"]
    assert "the run has no index" in why["sea: sae-clamp"]
    (one,) = result["behaviours"]
    assert [arm["arm"] for arm in one["arms"]] == ["none", "mean-difference"]
    assert one["n_star"] is None and result["ledger"]["shared"] is None
    assert result["across"] is None and result["matrix"] is None
    assert "Could not compare sae-clamp with mean-difference" in report.render(result)


def test_published_figures_of_every_preset(compared, copied, small_run, problem):
    figures, missing = {}, set()
    for name in presets.PRESETS:
        result = comparing.compare(small_run, replace(problem, preset=name), copied, budget=BUDGET)
        assert result["problem"]["preset"] == name
        for one in result["behaviours"]:
            assert one["arms"][0]["published"] == {}  # no edit has no figures
            for arm in one["arms"][1:]:
                assert set(arm["published"]) <= {name}
                figures[one["name"], arm["arm"], name] = arm["published"].get(name)
        missing |= {entry["what"] for entry in result["not_run"] if f": {name} of" in entry["what"]}
        page = report.render(result)
        # A protocol about A/B letters has nothing to tell of whole answers.
        assert ("By published protocols" in page) == (presets.preset(name).deployment != "ab")
        assert "{&#x27;" not in page
    # What can't be told is told: music has no scorer of relevance here.
    assert missing == {
        f"{behaviour}: {name} of {arm}"
        for (behaviour, arm, name), found in figures.items()
        if found is None
    }
    assert {what.split(":")[1].split()[0] for what in missing} <= {
        "caa",
        "tan",
        "axbench",
        "sae-ts",
    }
    letters = [found for (*_, name), found in figures.items() if name in ("caa", "tan")]
    assert letters == [None] * 12
    arm = "sea", "mean-difference"
    (entry,) = (a for a in compared[1]["behaviours"][0]["arms"] if a["arm"] == arm[1])
    assert set(figures[*arm, "pres"]) == {
        f"{how}, {share}" for how in ("raw", "own", "control") for share in ("25%", "50%", "75%")
    }
    assert 0 <= figures[*arm, "sae-ts"]["product"] <= 1
    assert figures[*arm, "sae-ts"]["strength"] <= entry["alpha_max"]


def test_a_judge_stands_beside_our_scores(compared, copied, small_run, problem):
    def write(prompts):
        # Some can't be read, however often they are asked.
        sizes = [len(prompt.removesuffix(AGAIN)) for prompt in prompts]
        return ["what?" if size % 7 == 0 else f"Rating: {size % 3}" for size in sizes]

    judge = Judge(write, "fake", copied / "judge.jsonl")
    result = comparing.compare(small_run, problem, copied, budget=BUDGET, judge=judge)
    unread = 0
    for one, before in zip(result["behaviours"], compared[1]["behaviours"], strict=True):
        for arm, old in zip(one["arms"], before["arms"], strict=True):
            told = arm["generation"]
            assert told["judge"] is None or 0 <= told["judge"]["value"] <= 2
            scored = 0 if told["judge"] is None else told["judge"]["n"]
            assert scored + told["judge_unread"] == told["texts"]
            unread += told["judge_unread"]
            assert {key: told[key] for key in old["generation"]} == old["generation"]
            if told["harmonic"] is None:
                assert told["agreement"] is None
            else:
                assert told["agreement"]["n"] == scored
    assert unread > 0
    page = report.render(result)
    assert "rank correlation" in page and "unread" in page
    assert "rank correlation" not in report.render(compared[1])
    # Asked once: another pass finds the answers kept.
    again = comparing.compare(
        small_run, problem, copied, budget=BUDGET, judge=replace(judge, write=refuse)
    )
    assert without(again, "looks_at_test") == without(result, "looks_at_test")


def test_a_judge_that_is_not_there_costs_its_scores_alone(compared, copied, small_run, problem):
    def write(prompts):
        raise ModelError("nobody answers")

    judge = Judge(write, "fake", copied / "judge.jsonl")
    result = comparing.compare(small_run, problem, copied, budget=BUDGET, judge=judge)
    assert {"what": "sea: texts of none", "why": "nobody answers"} in result["not_run"]
    (first, *_) = result["behaviours"][0]["arms"]
    assert first["generation"] == compared[1]["behaviours"][0]["arms"][0]["generation"]
    assert texts_of(copied) == texts_of(compared[0])


def test_below_sixteen_behaviours_a_note_stands_in_place_of_a_claim(compared):
    across = compared[1]["across"]
    assert across["n_behaviours"] == 2 and "16 or more" in across["note"]
    for found in across["comparisons"]:
        values = [
            one["difference"]["value"]
            for behaviour in compared[1]["behaviours"]
            for one in behaviour["comparisons"]
            if (one["a"], one["b"]) == (found["a"], found["b"])
        ]
        assert found["difference"]["value"] == pytest.approx(np.mean(values), abs=1e-9)
    assert {(one["a"], one["b"]) for one in across["comparisons"]} == {
        ("sae-clamp", "mean-difference"), ("mean-difference", "none"),
    }  # fmt: skip
    ps = [
        sorted(one["p"] for b in compared[1]["behaviours"] for one in b["comparisons"]
               if one["primary"] and one["b"] == "none"),
        sorted(one["p_bh"] for b in compared[1]["behaviours"] for one in b["comparisons"]
               if one["primary"] and one["b"] == "none"),
    ]  # fmt: skip
    assert ps[1] == pytest.approx([min(2 * ps[0][0], ps[0][1]), ps[0][1]])


def test_the_diagonal_of_the_matrix_is_the_first_draw_s_effect(compared):
    folder, result = compared
    first = {}
    for row in rows_of(folder):
        if row["draw"] == "0" and row["n"] == "32" and row["delta"] == "0.5":
            first.setdefault((row["arm"], row["behaviour"]), []).append(float(row["gain"]))
    names = result["matrix"]["behaviours"]
    assert set(result["matrix"]["arms"]) == {"sae-clamp", "mean-difference"}
    for arm, rows in result["matrix"]["arms"].items():
        for i, name in enumerate(names):
            cell = rows[i][i]
            assert cell["value"] == pytest.approx(np.mean(first[arm, name]), abs=1e-9)
