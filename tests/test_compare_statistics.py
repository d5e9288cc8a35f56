"""saesteer.compare.statistics: against scipy, closed forms, and data whose truth is planted."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from saesteer.compare import resampling
from saesteer.compare.resampling import differences, grid, resample
from saesteer.compare.statistics import (
    benjamini_hochberg,
    bootstrap,
    claimable,
    holm,
    non_inferior,
    paired,
    tost,
    wilson,
)
from saesteer.errors import ConfigError, SteeringError

RNG = np.random.default_rng(3)
PS = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def planted(
    concepts: int, prompts: int, seed: int, within: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Values [n] of a true mean of 0 and the concept of each: concept, then prompt."""
    rng = np.random.default_rng([seed, concepts])
    values = rng.normal(size=(concepts, 1)) + within * rng.normal(size=(concepts, prompts))
    return values.ravel(), np.repeat(np.arange(concepts), prompts)


def test_the_percentile_interval_is_scipys() -> None:
    values = RNG.gamma(2.0, size=60)
    ours = bootstrap(values, method="percentile", resamples=20_000)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)
    assert ours.n == 60
    assert ours.how == "95% percentile bootstrap interval, 20,000 resamples of 60 prompts"


def test_bootstrap_t_is_students_for_normal_values() -> None:
    values = RNG.normal(1.0, 2.0, size=400)
    ours = bootstrap(values, resamples=20_000)
    low, high = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    assert (ours.low, ours.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    assert paired(values, np.full(400, 0.85)).p == pytest.approx(
        stats.ttest_1samp(values, 0.85).pvalue, abs=0.02
    )


def test_few_units_get_students_interval_exactly() -> None:
    values = [0.2, 0.9, -0.1, 1.4]
    low, high = stats.t.interval(0.9, 3, np.mean(values), stats.sem(values))
    found = bootstrap(values, level=0.9)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.how == "90% Student's t interval of 4 prompts"
    test = stats.ttest_rel(values, [0.0, 0.1, 0.2, 0.3])
    assert paired(values, [0.0, 0.1, 0.2, 0.3]).p == pytest.approx(test.pvalue)


def test_bootstrap_t_of_a_skewed_sample_is_scipys_studentised_by_hand() -> None:
    values = RNG.exponential(size=30)
    drawn = np.random.default_rng(5).choice(values, (40_000, 30))
    scores = (drawn.mean(1) - values.mean()) / stats.sem(drawn, axis=1)
    high, low = values.mean() - np.quantile(scores, [0.025, 0.975]) * stats.sem(values)
    ours = bootstrap(values, resamples=40_000)
    assert (ours.low, ours.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


def test_the_nested_resamples_have_the_variance_of_the_closed_form() -> None:
    """Var(mean*) = [var(group means) + mean(var inside / size)] / groups, population variances."""
    values, concepts = planted(12, 8, seed=1)
    table = values.reshape(12, 8)
    expected = (table.mean(1).var() + (table.var(1) / 8).mean()) / 12
    found = resample(grid(values, concepts), seed=0, resamples=40_000, errors=False)
    assert found.means.var() == pytest.approx(expected, rel=0.05)
    assert found.means.mean() == pytest.approx(values.mean(), abs=0.01)


def test_crossed_resamples_have_the_variance_of_the_closed_form() -> None:
    """Owen 2007: the pigeonhole bootstrap's variance, from the two-way sums of squares."""
    cells = RNG.normal(size=(6, 1)) + RNG.normal(size=(1, 40)) + RNG.normal(size=(6, 40))
    by_draw, by_prompt = cells.mean(1).var() / 6, cells.mean(0).var() / 40
    rest = cells.var() / 240 - by_draw / 40 - by_prompt / 6
    found = resample(grid(cells, None), seed=0, resamples=40_000, errors=True)
    assert found.means.var() == pytest.approx(by_draw + by_prompt + rest, rel=0.05)


@pytest.mark.parametrize("draws", [1, 5])
def test_each_resample_has_the_mean_and_error_of_the_values_it_drew(draws: int) -> None:
    cells = RNG.normal(size=(draws, 7))
    found = resample(grid(cells, None), seed=0, resamples=100, errors=True)
    rng = np.random.default_rng([0, 7])
    prompts, rows = (resampling._counts(rng, 100, n).astype(int) for n in (7, draws))
    for i in range(100):
        drawn = cells[np.repeat(np.arange(draws), rows[i])][:, np.repeat(np.arange(7), prompts[i])]
        assert found.means[i] == pytest.approx(drawn.mean())
        assert found.errors[i] == pytest.approx(grid(drawn, None).error(), abs=1e-9)


@pytest.mark.parametrize("draws", [1, 5])
def test_the_error_is_the_closed_form_and_groups_of_one_prompt_are_prompts(draws: int) -> None:
    cells = RNG.normal(size=(draws, 9)) + RNG.normal(size=(draws, 1))
    plain, grouped = grid(cells, None), grid(cells, np.arange(9))
    variance = cells.mean(0).var(ddof=1) / 9
    if draws > 1:
        rest = cells - cells.mean(0) - cells.mean(1, keepdims=True) + cells.mean()
        interaction = (rest**2).sum() / ((draws - 1) * 8)
        by_draw = cells.mean(1).var(ddof=1) / draws
        variance += max(0.0, by_draw - interaction / (draws * 9))
    assert plain.error() == pytest.approx(np.sqrt(variance))
    assert grouped.error() == pytest.approx(plain.error())
    first, second = (
        resample(one, seed=0, resamples=20_000, errors=True) for one in (plain, grouped)
    )
    for quantile in (0.1, 0.5, 0.9):
        for one, other in ((first.means, second.means), (first.errors, second.errors)):
            a, b = np.quantile(one, quantile), np.quantile(other, quantile)
            assert a == pytest.approx(b, abs=0.05 * one.std() + 1e-9)


def test_values_that_a_few_outliers_carry_get_students_interval() -> None:
    values = [0.0] * 20 + [1e-4, -1e-4, 24.0]
    found = bootstrap(values)
    low, high = stats.t.interval(0.95, 22, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.how == "95% Student's t interval of 23 prompts"


def test_groups_count_alike_whatever_their_size() -> None:
    values = [1.0] * 10 + [3.0] * 2
    found = bootstrap(values, ["a"] * 10 + ["b"] * 2)
    assert found.value == pytest.approx(2.0)
    assert found.how == "95% Student's t interval of 2 groups, of the prompts in each"


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-50, 50, width=32), min_size=6, max_size=30),
    st.floats(-20, 20),
    st.floats(0.1, 10),
)
def test_shifting_and_scaling_the_values_shifts_and_scales_the_interval(
    values: list[float], shift: float, scale: float
) -> None:
    plain = bootstrap(values, resamples=200)
    moved = bootstrap(np.array(values) * scale + shift, resamples=200)
    assert moved.value == pytest.approx(plain.value * scale + shift, abs=1e-6)
    if plain.how == moved.how and np.std(values) > 1e-3:
        assert moved.low == pytest.approx(plain.low * scale + shift, abs=1e-2, rel=1e-3)
        assert moved.high == pytest.approx(plain.high * scale + shift, abs=1e-2, rel=1e-3)


def test_the_order_of_prompts_within_groups_of_ids_and_the_sign_do_not_matter() -> None:
    values, concepts = planted(8, 5, seed=2)
    names = np.array(list("abcdefgh"))[concepts]
    first, second = bootstrap(values, concepts), bootstrap(values, names)
    assert first == second
    turned = bootstrap(-values, concepts)
    assert turned.low == pytest.approx(-first.high, abs=0.05)


def test_seeds_decide() -> None:
    values, concepts = planted(8, 5, seed=2)
    assert bootstrap(values, concepts, seed=1) == bootstrap(values, concepts, seed=1)
    assert bootstrap(values, concepts, seed=1) != bootstrap(values, concepts, seed=2)


def test_no_spread_and_one_value() -> None:
    same = bootstrap([0.1] * 30)
    assert (same.value, same.low, same.high) == (pytest.approx(0.1), same.value, same.value)
    assert bootstrap([0.4]).low is None
    assert paired([0.4], [0.1]).p == 1.0
    assert paired([1.0] * 9, [1.0] * 9).p == 1.0
    assert paired([2.0] * 9, [1.0] * 9).p == 0.0
    assert bootstrap([[0.1, 0.5]] * 3, ["a", "a"]).low is not None  # one group: its prompts


def test_zero_is_outside_the_interval_where_p_is_below_five_percent() -> None:
    seen = set()
    for method in ("t", "percentile"):
        for shift in np.linspace(0.0, 0.9, 10):
            values, concepts = planted(16, 10, seed=4)
            found = paired(values + shift, np.zeros_like(values), concepts, method=method)
            low, high = found.difference.low, found.difference.high
            assert low is not None and high is not None
            outside = not low <= 0 <= high
            if abs(found.p - 0.05) > 0.001:
                assert outside == (found.p < 0.05)
            seen.add(outside)
    assert seen == {True, False}


def test_draws_are_paired_by_number_and_one_draw_holds_for_all() -> None:
    a, b = RNG.normal(size=(10, 5)), RNG.normal(size=(3, 5))
    assert np.array_equal(differences(a, b), a[:3] - b)
    assert np.array_equal(differences(a, b[0]), a - b[0])
    with pytest.raises(SteeringError, match="same prompts"):
        differences(a, b[:, :4])


def test_chance_in_the_draws_widens_the_interval() -> None:
    prompts = RNG.normal(size=200)
    apart = RNG.normal(size=10)
    by_draw = prompts + (apart - apart.mean())[:, None]
    calm, shaken = bootstrap([prompts] * 10), bootstrap(by_draw)
    assert calm.value == pytest.approx(shaken.value)
    assert shaken.high - shaken.low > 3 * (calm.high - calm.low)  # type: ignore[operator]
    expected = 2 * stats.t.ppf(0.975, 9) * np.hypot(stats.sem(apart), stats.sem(prompts))
    assert shaken.high - shaken.low == pytest.approx(expected, rel=0.25)  # type: ignore[operator]


def test_one_sided_tests_are_students() -> None:
    apart = RNG.normal(0.03, 0.3, size=300)

    def student(null: float, side: str) -> float:
        return float(stats.ttest_1samp(apart, null, alternative=side).pvalue)

    assert non_inferior(apart, 0.05) == pytest.approx(student(-0.05, "greater"), abs=0.01)
    larger = max(student(-0.05, "greater"), student(0.05, "less"))
    assert tost(apart, 0.05) == pytest.approx(larger, abs=0.02)
    assert tost(apart[:5], 0.5) == pytest.approx(
        max(
            stats.ttest_1samp(apart[:5], -0.5, alternative="greater").pvalue,
            stats.ttest_1samp(apart[:5], 0.5, alternative="less").pvalue,
        )
    )
    assert tost([0.0] * 6, 0.1) == 0.0
    assert tost([0.2] * 6, 0.1) == 1.0
    assert non_inferior([0.2] * 6, 0.1) == 0.0


@given(PS)
def test_holm_is_its_definition(ps: list[float]) -> None:
    """p̃ of the i-th smallest is max over j ≤ i of (k − j) p_(j), at most 1."""
    ranks = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted = holm(ps)
    for i, index in enumerate(ranks):
        expected = max((len(ps) - j) * ps[ranks[j]] for j in range(i + 1))
        assert adjusted[index] == pytest.approx(min(1.0, expected))


@given(PS)
def test_benjamini_hochberg_is_its_definition_and_never_above_holm(ps: list[float]) -> None:
    adjusted, k = benjamini_hochberg(ps), len(ps)
    ranks = sorted(range(k), key=lambda i: ps[i])
    for i, index in enumerate(ranks):
        expected = min(k / (j + 1) * ps[ranks[j]] for j in range(i, k))
        assert adjusted[index] == pytest.approx(min(1.0, expected))
    assert np.all(adjusted <= holm(ps) + 1e-12)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_the_closed_form(counts: tuple[int, int]) -> None:
    k, n = counts
    z, p = stats.norm.ppf(0.975), k / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    found = wilson(k, n)
    assert (found.value, found.n) == (p, n)
    assert found.low == pytest.approx(max(0.0, middle - half), abs=1e-9)
    assert found.high == pytest.approx(min(1.0, middle + half), abs=1e-9)


def test_claims_across_concepts_need_sixteen() -> None:
    assert claimable(16).across and claimable(30).across
    assert not claimable(15).across
    assert claimable(1).note.startswith("1 concept: a claim across concepts needs 16 or more.")


@pytest.mark.parametrize("concepts", [16, 30])
def test_coverage_of_the_default_interval(concepts: int) -> None:
    """Between 93 and 97%: 1,200 planted data sets, so that the share's own error is .6 points."""
    hits = 0
    for seed in range(1200):
        values, which = planted(concepts, 10, seed)
        found = bootstrap(values, which, seed=seed, resamples=400)
        hits += found.low <= 0 <= found.high  # type: ignore[operator]
    assert 0.93 <= hits / 1200 <= 0.97


def test_the_family_is_kept_to_five_percent_under_the_null() -> None:
    """Four arms against one, no true difference, Holm: some claim in ≤ 5% + 2 SE of 500 families.

    Concepts take to arms differently (their effect scatters around 0), and all share one baseline.
    """
    families, wrong = 500, 0
    for seed in range(families):
        rng = np.random.default_rng([seed, 9])
        concepts = np.repeat(np.arange(16), 10)
        arms = rng.normal(size=(5, 16)).repeat(10, axis=1) + rng.normal(size=(5, 160))
        ps = [paired(arm, arms[0], concepts, seed=seed, resamples=400).p for arm in arms[1:]]
        wrong += bool((holm(ps) <= 0.05).any())
    assert wrong / families <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / families)
    assert wrong > 0  # it is a test that can fail


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(SteeringError, match="not finite"):
        bootstrap([0.1, float("nan")])
    with pytest.raises(SteeringError, match="can't be averaged"):
        bootstrap([])
    with pytest.raises(SteeringError, match="2 groups were given for 3 prompts"):
        bootstrap([1, 2, 3], ["a", "b"])
    with pytest.raises(SteeringError, match="no share"):
        wilson(3, 2)
    with pytest.raises(SteeringError, match="from 0 to 1"):
        holm([0.2, 1.3])
    with pytest.raises(ConfigError, match="margin 0"):
        tost([0.1, 0.2], 0.0)
    with pytest.raises(ConfigError, match="level 95"):
        bootstrap([0.1, 0.2], level=95)
    with pytest.raises(ConfigError, match="5 resamples"):
        bootstrap([0.1, 0.2], resamples=5)
    with pytest.raises(ConfigError, match="'bca'"):
        bootstrap([0.1, 0.2], method="bca")  # type: ignore[arg-type]


def test_the_benchmark_measures_what_it_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    benchmark = importlib.import_module("coverage_of_intervals")
    found = benchmark.measure(20, 100)
    assert [row["concepts"] for row in found["coverage"]] == [
        n for n in (3, 8, 10, 16, 30) for _ in range(3)
    ]
    shares = [row[method] for row in found["coverage"] for method in ("percentile", "t")]
    assert all(0.3 < share <= 1 for share in shares)
    assert min(shares) < 1
    assert set(found["family_wise"]) == {"percentile", "t"}
    assert "| 16 | skewed |" in benchmark.report(found)
