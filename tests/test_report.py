"""The report's page and its terminal view: whole, escaped, offline, every number from the JSON."""

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from html.parser import HTMLParser
from typing import Any

import pytest
from some_report import ARMS, DELTAS, N, comparison, estimate, report

from saesteer.compare import report_plots as plots
from saesteer.compare import report_view
from saesteer.compare.problem_file import parse
from saesteer.compare.report import render
from saesteer.compare.report_numbers import amount, leads, number
from saesteer.errors import ConfigError
from saesteer.features.view_parts import columns

VOID = {"meta"}
EVIL = "</script></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
# What stands in a page without being measured: the range of slopes, of scores, of small numbers.
CONSTANTS = {0.0, 0.001, 0.5, 1.5, 2.0, 7.0, 16.0, 32.0}
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?%?(?!\w)")


class Parsed(HTMLParser):
    """A page's elements and texts; an element that isn't closed in order fails."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        self.text = " ".join(" ".join(text for _, text in self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][0] != "style":
            around = tuple(part for tag, kind in self.open for part in (tag, *kind.split()))
            self.texts.append((around, data))


def parsed(result: dict[str, Any]) -> Parsed:
    return Parsed(render(json.loads(json.dumps(result))))


def numbers(value: Any) -> Iterator[float]:
    """Every number in a JSON value, and those within its texts and keys."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from numbers(key)
            yield from numbers(one)
    elif isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, str):
        yield from (float(found) for found in re.findall(r"\d+(?:\.\d+)?", value))
    elif isinstance(value, int | float):
        yield float(value)


def test_every_number_shown_is_in_the_json() -> None:
    result = report()
    given = {*numbers(result), *CONSTANTS}
    allowed = {form(x) for x in given for form in (number, amount, "{:.1%}".format)}
    allowed |= {f"{x:.0%}" for x in given} | {f"{x:g}" for x in given}
    told = [
        # a comparison that was lost is told from the winner's side, with its sign turned
        found.lstrip("-")
        for around, text in parsed(result).texts
        if not {"tick", "pre"} & set(around)  # axes; the configuration, tested by itself
        for found in NUMBER.findall(text.replace(result["made"], ""))
    ]
    assert len(told) > 1000
    assert {one for one in told if one not in allowed and f"-{one}" not in allowed} == set()


def test_everything_measured_is_on_the_page() -> None:
    result = report()
    page = parsed(result)
    for arm in ARMS:
        assert arm in page.text
    for expected in (
        "The vector mean-difference beats the feature arm sae-clamp by 0.480",
        "What may not be claimed", "Undecided", "n* = 8", "K* = 738", "0.820 [0.750, 0.890]",
        "mean-difference, 10% label noise", "sae-output-filtered", "Reading beside control",
        "about to be said", "0.930 [0.900, 0.960]", "Failure gallery", "laughed and laughed",
        "context-distillation", "it trains weights, which are not afforded", "interaction",
        "steered for", "Test split looked at: 1×", "explained variance 0.914", "caa: matching",
        "harmonic", "1.370 [1.270, 1.470]", "layers.3.resid_post", "3.00e13", "failed draws",
        "95%, bootstrap-t over prompts and draws, 10,000 resamples", "n = 200", "draws of pairs",
    ):  # fmt: skip
        assert expected.replace(" ", "") in page.text.replace(" ", ""), expected
    for delta in DELTAS:
        assert f"ΔCE ≤ {delta:g}" in page.text


def test_the_exact_configuration_is_on_the_page() -> None:
    import tomllib

    result = report()
    page = parsed(result)
    toml = "".join(text for around, text in page.texts if "pre" in around)
    assert tomllib.loads(toml) == result["problem"]


def test_what_comes_first_is_for_two_minutes() -> None:
    html = render(report())
    order = [
        '<section class="verdict">', "What a dose gains", "How many pairs it takes",
        "What a concept costs", "What may not be claimed", "Everything:", 'id="behaviour-1"',
        'id="behaviour-2"', 'id="together"', 'id="how"',
    ]  # fmt: skip
    places = [html.index(part) for part in order]
    assert places == sorted(places)


def test_nothing_is_fetched_and_nothing_runs() -> None:
    page = parsed(report())
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "base", "object", "script", "use"}
        assert not any(n.startswith("on") or n in {"src", "style"} for n in attributes)
        if "href" in attributes:
            assert (attributes["href"] or "").removeprefix("#") in ids
    policy = next(a for _, a in page.elements if a.get("http-equiv"))["content"]
    assert policy and policy.startswith("default-src 'none'")
    html = render(report())
    assert "http" not in html.replace("http-equiv", "") and "url(" not in html
    for part in ("prefers-color-scheme: dark", "@media print", "width=device-width"):
        assert part in html


def evil(value: Any, key: str = "") -> Any:
    """The same value with markup in every text that a model, a file or a user gives."""
    if isinstance(value, dict):
        return {k: evil(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [evil(one, key) for one in value]
    free = {
        "describe", "prompt", "chosen", "rejected", "before", "after", "why", "what", "note", "how",
        "model", "sae", "hook_point", "made", "layer", "labels",
    }  # fmt: skip
    return EVIL + value if isinstance(value, str) and key in free else value


def test_everything_from_models_and_users_is_escaped() -> None:
    result = evil(report(EVIL + "a", EVIL + "b"))
    html = render(result)
    page = Parsed(html)
    assert not any(tag in ("script", "img") for tag, _ in page.elements)
    assert page.text.count("alert(1)") > 20 and "<script" not in html
    assert "\033" not in report_view.shown(evil(report("\033[31mred\nname")))


def without(value: Any, kept: tuple[str, ...] = ()) -> Any:
    """The same value with every figure that may be missing as null."""
    gone = {
        "effect", "delta_ce", "kl", "relative_size", "chosen", "slope", "ood", "relative_ood",
        "choices", "generation", "alpha_max", "alpha_break", "u", "p", "p_holm", "tost_p", "low",
        "tost_p_holm", "by_group",
        "high", "explained_variance", "d_sae", "sae", "anti_steerable", "seconds", "flops",
        "n_star", "k_star", "matrix", "across", "world", "entropy", "sae_training", "indexing",
    } - set(kept)  # fmt: skip
    if isinstance(value, dict):
        nothing: dict[str, Any] = {"effect": {}, "chosen": {}}
        return {k: nothing.get(k) if k in gone else without(v, kept) for k, v in value.items()}
    return [without(one, kept) for one in value] if isinstance(value, list) else value


def test_what_was_not_measured_is_a_dash() -> None:
    result = report()
    bare = {**without(result, ("effect", "delta_ce")), "problem": result["problem"]}
    for one in bare["behaviours"]:
        one["n_curve"] = []
        for arm in one["arms"]:
            arm.update(effect={}, delta_ce={}, slopes=[], dose=[], worst=[], published={})
        assert report_view.shown(bare)
    page = parsed(bare)
    assert "–" in page.text and "None" not in page.text and "nan" not in page.text
    for said in ("No n-curve was measured.", "No matrix was measured.", "No prompt was kept."):
        assert said in page.text
    empty = report(interactions=[], not_run=[], ledger={})
    for one in empty["behaviours"]:
        one.update(arms=[], n_curve=[], comparisons=[], reading=[], n_star=None)
    page = parsed(empty)
    for said in ("Everything was run.", "None were combined.", "Nothing was read."):
        assert said in page.text
    assert "Could not compare" in report_view.shown(empty)


def test_infinite_figures_are_dashes() -> None:
    result = report()
    arm = result["behaviours"][0]["arms"][1]
    arm["effect"] = {f"{d:g}": estimate(float("nan")) for d in DELTAS}
    arm["dose"][0]["gain"] = estimate(float("inf"))
    html = render(result)
    assert "nan" not in html.lower() and "inf" not in re.findall(r"[a-z]+", html)


def test_few_behaviours_show_no_figures_across() -> None:
    claim = comparison("sae-clamp", "mean-difference", -0.777, "worse")
    few = report(across={"comparisons": [claim], "n_behaviours": 2, "note": "too few"})
    assert "0.777" not in parsed(few).text and "too few" in parsed(few).text
    names = [f"b{i}" for i in range(16)]
    many = report(*names, across={"comparisons": [claim], "n_behaviours": 16, "note": ""})
    assert "Over 16 behaviours: mean-difference beats sae-clamp by 0.777" in parsed(many).text


def test_what_is_found_over_templates_is_on_the_page() -> None:
    result = report("a")
    claim = result["behaviours"][0]["comparisons"][0]
    assert "over templates" not in parsed(result).text
    over = {**estimate(-0.26, 0.69), "how": "5 groups resampled"}
    claim["by_group"] = {"groups": 5, "difference": over, "p": 0.321}
    text = parsed(result).text
    for said in (
        "over templates", "-0.260 [-0.950, 0.430]", "0.321", "5 groups resampled", "TOST, Holm",
        "for these wordings; over the 5 templates it isn't told: 0.260 [-0.430, 0.950].",
    ):  # fmt: skip
        assert said in text
    assert "over the 5 templates" in " ".join(report_view.shown(result).split())


def test_a_world_is_on_the_page() -> None:
    flag = {
        "failure": "read-only", "statistic": "effect", "value": 0.013, "low": -0.02, "high": 0.04,
        "threshold": 0.25, "flagged": True, "n": 40, "why": "it steers nothing",
    }  # fmt: skip
    row = {"score": 0.812, "low": 0.77, "high": 0.85, "anti_steerable": 0.02, "delta_ce": 0.1}
    world = {
        "arms": {"mean-difference": row}, "n_curve": [{"n": 8, **row}], "n_star": None,
        "flags": {"read-only": True}, "flag_statistics": [flag], "controls": [], "seconds": 100.0,
    }  # fmt: skip
    text = parsed(report(world=world)).text
    for said in ("0.812 [0.770, 0.850]", "0.013 [-0.020, 0.040]", "flagged", "it steers nothing"):
        assert said in text
    assert "The planted language" not in parsed(report()).text


def test_a_foreign_problem_is_refused() -> None:
    with pytest.raises(ConfigError, match="the report's problem"):
        render(report(problem={}))


def test_an_arm_looks_the_same_everywhere() -> None:
    result = report()
    problem = parse(result["problem"], "here")
    first, second = (leads(one, problem) for one in result["behaviours"])
    family = ("sae-clamp", "mean-difference", "sae-topk")
    assert [first[name] for name in family] == [0, 1, 2]
    assert second["mean-difference"] == 1 and "sae-clamp" not in second
    assert len(first) <= plots.STYLES and "random" in first


def test_the_terminal_view_is_80_columns() -> None:
    result = report("a" * 90, "day-night")
    text = report_view.shown(result)
    assert max(columns(line) for line in text.splitlines()) <= 80
    for said in ("mean-difference beats", "0.820 [0.750, 0.890]", "what may not be claimed", "256"):
        assert said in text
    assert "\033[1m" in report_view.shown(result, colour=True) and "\033" not in text


def test_the_page_is_the_same_each_time() -> None:
    result = report()
    before = deepcopy(result)
    assert render(result) == render(report()) and result == before
    assert {one["n"] for one in result["behaviours"][0]["n_curve"]} == set(N)
