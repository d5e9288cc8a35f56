"""What a comparison found, in words: every outcome, its interval, and what may not be claimed."""

from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from some_report import comparison, estimate, report

from saesteer.compare import report_charts as charts
from saesteer.compare import report_words as words
from saesteer.compare.problem import Problem
from saesteer.compare.problem_file import parse
from saesteer.compare.report_numbers import amount, at, listed, number, origins
from saesteer.compare.report_numbers import estimate as shown


def problem_of(result: dict[str, Any]) -> Problem:
    return parse(result["problem"], "here")


def arm(behaviour: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in behaviour["arms"] if one["arm"] == name)


def told(result: dict[str, Any]) -> str:
    return "\n".join(words.limits(result, problem_of(result)))


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (
            "better",
            "The feature arm sae-clamp beats the vector mean-difference by 0.480 nats a token "
            "(interval 0.380 to 0.580, n = 200; p = 0.012 after Holm).",
        ),
        (
            "worse",
            "The vector mean-difference beats the feature arm sae-clamp by 0.480 nats a token "
            "(interval 0.380 to 0.580, n = 200; p = 0.012 after Holm).",
        ),
        (
            "as good as",
            "The feature arm sae-clamp is as good as the vector mean-difference, within the margin "
            "of 0.100 set beforehand: the difference is 0.480 nats a token (interval 0.380 to "
            "0.580, n = 200; TOST p = 0.041 after Holm).",
        ),
        (
            "undecided",
            "Undecided between the feature arm sae-clamp and the vector mean-difference: the "
            "difference is 0.480 nats a token (interval 0.380 to 0.580, n = 200; p = 0.012 after "
            "Holm). They were neither told apart nor shown to be equal within 0.100.",
        ),
    ],
)
def test_each_outcome_has_its_sentence(verdict: str, expected: str) -> None:
    behaviour = report()["behaviours"][0]
    found = comparison(
        "sae-clamp", "mean-difference", -0.48 if verdict == "worse" else 0.48, verdict
    )
    assert words.sentence(found, behaviour, 0.1) == expected


@given(st.floats(-5, 5), st.floats(0.001, 2))
def test_a_loss_is_told_as_the_gain_of_the_winner(difference: float, half: float) -> None:
    lost = {
        **comparison("a", "b", difference, "worse"), "difference": estimate(difference, half),
    }  # fmt: skip
    won = {
        **comparison("b", "a", -difference, "better"), "difference": estimate(-difference, half),
    }  # fmt: skip
    assert words.sentence(lost, None, 0.1) == words.sentence(won, None, 0.1)


def test_one_without_an_interval_says_so() -> None:
    found = {**comparison("a", "b", 0.3, "undecided"), "difference": estimate(0.3, None, 1)}
    found["p"] = found["p_holm"] = None
    assert "(no interval, n = 1; p not measured)" in words.sentence(found, None, 0.1)


def test_a_pair_of_the_family_that_was_not_compared_is_named() -> None:
    result = report()
    first, second = (words.verdicts(one, problem_of(result)) for one in result["behaviours"])
    assert len(first) == 2 and not any("Could not" in line for line in first)
    assert second == [
        "Could not compare sae-clamp with mean-difference and sae-topk with mean-difference; see "
        "what was not run."
    ]


def test_two_arms_without_an_edit_are_not_as_good_as_each_other() -> None:
    result = report()
    behaviour, problem = result["behaviours"][0], problem_of(result)
    behaviour["comparisons"][0]["verdict"] = "as good as"
    assert "is as good as" in words.verdicts(behaviour, problem)[0]
    arm(behaviour, "sae-clamp")["chosen"]["0.1"] = None
    assert "is as good as" in words.verdicts(behaviour, problem)[0]
    arm(behaviour, "mean-difference")["chosen"]["0.1"] = None
    assert words.verdicts(behaviour, problem)[0] == (
        "Nothing was compared of sae-clamp and mean-difference: no strength of either gained "
        "anything within ΔCE ≤ 0.1 on validation, so both made no edit."
    )
    for one in arm(behaviour, "sae-clamp")["dose"]:
        one["delta_ce"] += 0.1
    assert words.verdicts(behaviour, problem)[0] == (
        "Nothing was compared of sae-clamp and mean-difference: no strength of sae-clamp within "
        "the cost ΔCE ≤ 0.1 was tried and no strength of mean-difference gained anything within "
        "ΔCE ≤ 0.1 on validation, so both made no edit."
    )
    result["behaviours"][1]["comparisons"] = behaviour["comparisons"]
    assert "no edit by either for 1" in words.tallies(result, problem)[0]


def test_nothing_is_claimed_across_few_behaviours() -> None:
    names = [f"b{i}" for i in range(16)]
    claim = comparison("sae-clamp", "mean-difference", -0.4, "worse")
    for n, claimed in ((1, False), (15, False), (16, True)):
        result = report(*names[:n])
        result["across"] = {"comparisons": [claim], "n_behaviours": n, "note": "a note."}
        sentences = words.across(result, problem_of(result))
        assert bool(sentences) == claimed
        assert ("Nothing is claimed across behaviours" in told(result)) != claimed
    assert sentences[0].startswith("Over 16 behaviours: mean-difference beats sae-clamp by 0.400")
    assert "Nothing is claimed" in told(report(across=None))


def test_outcomes_are_counted_over_behaviours() -> None:
    result = report("a", "b", "c")
    result["behaviours"][1]["comparisons"][0]["verdict"] = "better"
    lines = words.tallies(result, problem_of(result))
    assert lines[0] == (
        "sae-clamp against mean-difference, of 2 behaviours: better for 1 and worse for 1."
    )
    assert words.tallies(report("a"), problem_of(report("a"))) == []


def test_limits_come_from_what_was_measured() -> None:
    """Each limit appears with its cause, and only then."""
    plain = report("a")
    behaviour = plain["behaviours"][0]
    behaviour["comparisons"] = behaviour["comparisons"][:1]
    for one in behaviour["arms"]:
        one.update(alpha_max_reached=True, ood=estimate(0.4))
        one["delta_ce"] = {"0.1": 0.09}

    def changed(**fields: Any) -> dict[str, Any]:
        result = deepcopy(plain)
        arm(result["behaviours"][0], "sae-clamp").update(fields)
        return result

    random = deepcopy(plain)
    arm(random["behaviours"][0], "random")["effect"] = {"0.1": estimate(0.3)}
    undecided = deepcopy(plain)
    undecided["behaviours"][0]["comparisons"][0]["verdict"] = "undecided"
    silent = deepcopy(plain)
    for one in silent["behaviours"][0]["arms"]:
        one.update(ood=None, generation=None)
    dear = [{**one, "delta_ce": 0.2} for one in arm(behaviour, "sae-clamp")["dose"]]
    grouped = deepcopy(plain)
    grouped["behaviours"][0]["comparisons"][0]["by_group"] = {
        "groups": 25, "difference": estimate(-0.4), "p": 0.01,
    }  # fmt: skip
    causes = {
        "Intervals are over prompts of 25 templates (groups of pairs), and hold for these; choices "
        "rest on 5 validation templates.": grouped,
        "No strength of sae-clamp within the cost ΔCE ≤ 0.1 was tried; that counts": changed(
            chosen={"0.1": None}, dose=dear
        ),
        "was looked at 3 times": {**plain, "looks_at_test": 3},
        "Undecided is not a finding": undecided,
        "random moved the margin as well": random,
        "No strength of sae-clamp gained": changed(chosen={"0.1": None}),
        "sae-clamp cost more than 0.1": changed(delta_ce={"0.1": 0.11}),
        "sae-clamp never reached": changed(alpha_max_reached=False),
        "were not equal": changed(validation_evaluations=12),
        "fewer than 32 pairs": changed(n=8),
        "Nothing was measured out of": silent,
        "No generated text was scored": silent,
    }
    for line, result in causes.items():
        assert line not in told(plain)
        assert line in told(result)


def test_every_arm_with_fewer_looks_at_validation_is_named() -> None:
    result = report("a")
    for name, count in (("few-shot", 1), ("sft-lora", 8), ("random", 14)):
        arm(result["behaviours"][0], name)["validation_evaluations"] = count
    assert (
        "Validation evaluations were not equal: random 14, few-shot 1 and sft-lora 8, where the "
        "others had 56."
    ) in told(result)


@pytest.mark.parametrize("verdict", ["better", "worse", "as good as", "undecided"])
@pytest.mark.parametrize(("half", "is_told"), [(0.2, True), (0.6, False), (None, False)])
def test_templates_stand_beside_prompts(verdict: str, half: float | None, is_told: bool) -> None:
    sign = -1 if verdict == "worse" else 1
    found = comparison("a", "b", sign * 0.48, verdict)
    assert "templates" not in words.sentence(found, None, 0.1)
    found["by_group"] = {"groups": 5, "difference": estimate(sign * 0.26, half), "p": 0.2}
    over = {0.2: "0.260 [0.060, 0.460]", 0.6: "0.260 [-0.340, 0.860]", None: "0.260"}[half]
    sentence = words.sentence(found, None, 0.1)
    if verdict in ("better", "worse") and not is_told:
        assert f" for these wordings; over the 5 templates it isn't told: {over}." in sentence
    else:
        assert f" and over the 5 templates: {over}." in sentence
        assert "wordings" not in sentence


def test_no_k_star_without_an_edit_or_where_behaviours_differ() -> None:
    result = report()
    for one in result["behaviours"][1:]:  # the last has no arms of features
        one["arms"] = deepcopy(result["behaviours"][0]["arms"])
    first, second = (arm(one, "sae-clamp") for one in result["behaviours"])
    assert words.k_star(result).startswith("K* = 738")
    first["ledger"]["flops"] = second["ledger"]["flops"] = 1.0
    assert words.k_star(result).startswith("K* = 738")
    second["ledger"]["flops"] = 1e12
    assert words.k_star(result) == (
        "No K* can be told of sae-clamp and mean-difference: which of them costs less a concept "
        "differs between behaviours, sae-clamp for happy-sad and mean-difference for day-night."
    )
    second["ledger"]["flops"] = 1.0
    first["chosen"]["0.1"] = None
    assert words.k_star(result) == (
        "No K* can be told of sae-clamp and mean-difference: no edit of sae-clamp (for happy-sad) "
        "was chosen at ΔCE ≤ 0.1."
    )
    assert "K* =" in charts.k_curve(report(), problem_of(report()))
    assert "K* =" not in charts.k_curve(result, problem_of(result))


def test_stars_in_words() -> None:
    result = report()
    one = result["behaviours"][0]
    assert words.n_star(one).startswith(
        "n* = 8: from so many pairs on, at every larger number tried too, mean-difference is no "
    )
    assert "worse than sae-clamp on 128 pairs by more than 0.100" in words.n_star(one)
    one["n_star"]["n"] = 1
    assert words.n_star(one).startswith("n* is at most 1, the smallest tried: from so many")
    assert "n* ≤ 1" in charts.n_curve(one, problem_of(result))
    arm(one, "sae-clamp")["n"] = 0
    assert "no worse than sae-clamp by more" in words.n_star(one)
    one["n_star"]["n"] = None
    assert "n* was not reached: at no number of pairs up to 256" in words.n_star(one)
    assert words.n_star(result["behaviours"][1]) == ""
    assert words.k_star(result) == (
        "K* = 738: at so many concepts sae-clamp and mean-difference cost the same each. "
        "With fewer mean-difference is cheaper, with more sae-clamp."
    )
    result["ledger"]["k_star"]["K"] = None
    result["ledger"]["k_curve"] = result["ledger"]["k_curve"][:2]
    assert words.k_star(result).endswith("Mean-difference is always cheaper.") is False
    assert words.k_star(result).endswith("mean-difference is always cheaper.")
    assert words.k_star(report(ledger={})) == ""


@given(st.floats(-1e15, 1e15))
def test_a_number_is_read_back_within_its_digits(value: float) -> None:
    for text in (number(value), amount(value)):
        assert float(text.replace(",", "")) == pytest.approx(value, rel=6e-3, abs=6e-4)


def test_numbers_that_are_none() -> None:
    for value in (None, float("nan"), float("inf")):
        assert number(value) == amount(value) == shown(value) == "–"
    assert shown({"value": 0.5, "low": None, "high": None, "n": 1, "how": ""}) == "0.500"
    assert at({"0.1": 3, "0.50": 4}, 0.5) == 4 and at({}, 0.5) is None and at(None, 0.1) is None
    assert (listed(["a"]), listed(["a", "b", "c"]), listed([])) == ("a", "a, b and c", "")


def test_captions_say_n_and_what_the_interval_is() -> None:
    found = [estimate(1.0, n=64), None, {**estimate(1.0, n=200), "how": "Wilson"}]
    assert origins(found) == (
        "n = 64 to 200; interval: 95%, bootstrap-t over prompts and draws, 10,000 resamples; Wilson"
    )
    assert origins([estimate(1.0, None, 3)]) == "n = 3; no interval"
    assert origins([None]) == "nothing was measured"
