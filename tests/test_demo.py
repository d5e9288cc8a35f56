"""The demo, once, whole: the figures that the project promises on the planted language."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from saesteer.cli.demo import side_by_side
from saesteer.world import grammar

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The run folder and what `saesteer demo --json` printed."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-m", "saesteer", "demo", "--json", "--run", str(folder / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run", json.loads(done.stdout)


def test_the_json_has_the_promised_shape(demo):
    _, figures = demo
    assert figures.keys() == {"sae", "search", "steer", "seconds"}
    assert figures["sae"].keys() == {"explained_variance", "l0", "ce_recovered", "dead_fraction"}
    assert figures["search"].keys() == {"precision_at_1", "mrr"}
    arms = {"none", "random", "ceiling", "clamp", "add", "mean_difference_128"}
    assert figures["steer"].keys() == arms


def test_search_finds_the_planted_concepts(demo):
    assert demo[1]["search"]["precision_at_1"] >= 0.9


def test_steering_closes_half_the_distance_and_random_directions_none_of_it(demo):
    steer = demo[1]["steer"]
    distance = steer["none"] - steer["ceiling"]
    assert distance > 0.3
    for arm in ("clamp", "add", "mean_difference_128"):
        assert (steer["none"] - steer[arm]) / distance >= 0.5, arm
    assert abs(steer["none"] - steer["random"]) <= 0.2 * distance


def test_the_sae_is_sound(demo):
    sae = demo[1]["sae"]
    assert sae["explained_variance"] > 0.9
    assert sae["ce_recovered"] > 0.95
    assert sae["dead_fraction"] < 0.1


def test_the_run_is_left_and_the_next_commands_work(demo):
    folder, _ = demo
    for line in (["search", str(folder), "wizard"], ["feature", str(folder), "3"]):
        done = subprocess.run(
            [sys.executable, "-m", "saesteer", *line], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout, done.stderr


def test_columns_stay_within_80():
    text = " ".join(w for w in grammar.vocabulary() if w.isalpha())
    lines = side_by_side("baseline", text, "clamp feature 4217 at 16x" * 3, text[:100]).split("\n")
    assert max(map(len, lines)) <= 80
    assert len(lines) > 20
