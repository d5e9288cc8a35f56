"""saesteer.compare.presets: golden values, worked out by hand from each paper's formula."""

from math import log

import numpy as np
import pytest

from saesteer.compare.metrics import pres as pres_of
from saesteer.compare.presets import PRESETS, axbench, caa, pres, preset, sae_ts, tan
from saesteer.errors import ConfigError, SteeringError


def test_caa_is_the_matching_letters_share_of_the_two() -> None:
    """p(A) .3 and p(B) .1 of the vocabulary: .3 / .4; equal letters: a half."""
    found = caa([log(0.3), log(0.2), log(1e-9)], [log(0.1), log(0.2), log(3e-9)])
    assert found == pytest.approx([0.75, 0.5, 0.25])
    assert caa([-2000.0], [-1.0]) == pytest.approx([0.0])  # no overflow


def test_tan_is_the_slope_over_seven_strengths() -> None:
    """Prompts with slopes 2 and −1, and one that jumps from 0 to 7 at 1.5: Σ x m / Σ x² =
    1.5 · 7 / 7 = 1.5."""
    x = np.array([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5])
    found = tan(np.stack([1 + 2 * x, -x, 7 * (x == 1.5)], axis=1))
    assert found.mean == pytest.approx((2 - 1 + 1.5) / 3)
    assert found.anti_steerable.value == pytest.approx(1 / 3)
    with pytest.raises(SteeringError):
        tan([[1.0], [2.0]])


def test_pres_tells_all_three() -> None:
    """One pair. Raw: −1.5 − (−2) = .5 and −1 − (−4) = 3. By its own max each: steered / 1.5 and
    control / 1, so −1 + 2 = 1 and −1 + 4 / 1.5. By the control's max (−1): as raw."""
    control, steered = ([-2.0], [-1.0]), ([-1.5], [-4.0])
    found = pres(*control, *steered)
    assert set(found) == {"raw", "own", "control"}
    assert all(len(rooms) == 3 for rooms in found.values())
    assert (found["raw"][0].positive, found["raw"][0].negative) == (0.5, 3.0)
    assert found["own"][0].positive == pytest.approx(1.0)
    assert found["own"][0].negative == pytest.approx(-1 + 4 / 1.5)
    assert found["control"] == pres_of(*control, *steered)


def test_axbench_chooses_on_one_half_and_scores_the_other() -> None:
    """Harmonic means: factor .5: 2, 0 | 0, 0; factor 1: 1.2, 1 | 1.2, 2 (n = 4, the first two
    choose): 1 wins 1.1 to 1, and is scored 1.6."""
    concept = [[2, 0, 0, 0], [2, 1, 1, 2]]
    relevance = [[2, 2, 2, 2], [1, 1, 1, 2]]
    fluency = [[2, 2, 2, 2], [1, 1, 2, 2]]
    found = axbench([0.5, 1.0], concept, relevance, fluency)
    assert (found.factor, found.chosen_on, found.score.n) == (1.0, 2, 2)
    assert found.score.value == pytest.approx(1.6)
    # What the second half holds has no say in the choice.
    swapped = axbench([0.5, 1.0], np.flip(concept, 1), np.flip(relevance, 1), np.flip(fluency, 1))
    assert (swapped.factor, swapped.score.value) == (1.0, pytest.approx(1.1))
    with pytest.raises(SteeringError, match="two prompts or more"):
        axbench([1.0], [[1]], [[1]], [[1]])


def test_sae_ts_is_the_peak_product_of_the_means() -> None:
    """Strength 20: behaviour (1 + 10) / 2 → .5, coherence (10 + 10) / 2 → 1, product .5. Strength
    40: 1 and (1 + 5.5) / 2 → .25. The mean of products would be .5 and .25 too, but at 0: 0."""
    found = sae_ts([0, 20, 40], [[1, 1], [1, 10], [10, 10]], [[10, 10], [10, 10], [1, 5.5]])
    assert (found.product, found.strength) == (pytest.approx(0.5), 20.0)
    assert (found.behaviour, found.coherence) == (pytest.approx(0.5), pytest.approx(1.0))
    # The product of means, not the mean of products (which is 0 here).
    assert sae_ts([20], [[1, 10]], [[10, 1]]).product == pytest.approx(0.25)
    scored = sae_ts([20], [[0, 2]], [[2, 1]], lowest=0, highest=2)
    assert scored.product == pytest.approx(0.5 * 0.75)
    with pytest.raises(SteeringError, match="outside 1 … 10"):
        sae_ts([20], [[0]], [[5]])


def test_presets_are_found_by_name() -> None:
    assert list(PRESETS) == ["caa", "tan", "pres", "axbench", "sae-ts"]
    assert all(name == one.name for name, one in PRESETS.items())
    assert preset("sae-ts").figure is sae_ts
    assert preset("tan").strengths == (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
    assert preset("caa").suffix == "("
    assert len(preset("axbench").strengths) == 14
    assert preset("sae-ts").strengths[-1] == 300
    with pytest.raises(ConfigError, match=r"did you mean 'axbench'.*caa, tan, pres"):
        preset("axbenhc")
