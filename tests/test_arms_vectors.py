"""Directions as arms: fitted on the material's pairs, applied by what each is meant for."""

from dataclasses import replace

import pytest
import torch

from saesteer.compare import Material
from saesteer.compare.arms import ARMS, gated
from saesteer.compare.prepared import margins_of
from saesteer.core.model import load_model
from saesteer.core.points import HookPoint
from saesteer.directions.fitting import fit_direction
from saesteer.directions.methods import METHODS
from saesteer.directions.pairs import Pair
from saesteer.errors import ConfigError, PairsError
from saesteer.steering.conditions import Projection, When
from saesteer.steering.edits import Add
from saesteer.world import corpus
from tests.some_material import some_pairs
from tests.tiny import tiny_model, tiny_tokenizer

POINT = HookPoint(1, "resid_post")


@pytest.fixture(scope="module")
def material() -> Material:
    return Material(tiny_model(), tiny_tokenizer(), some_pairs(40), some_pairs(8, begin=40))


def test_every_method_that_steers_is_an_arm():
    steers = {name for name, method in METHODS.items() if method.kind != "reader"}
    assert steers <= set(ARMS) and "ccs" not in ARMS


def test_mean_difference_is_added(material):
    prepared = ARMS["mean-difference"](material, points=[POINT])
    expected = fit_direction(
        "mean-difference", material.model, material.tokenizer, material.pairs, POINT
    )
    (edit,) = prepared.edits(1.5)
    assert isinstance(edit, Add) and edit.strength == 1.5
    assert torch.equal(edit.vector, expected.vector)
    assert prepared.notes["validation_looks"] == 0


def test_mean_difference_moves_the_margin_of_held_out_pairs_of_the_planted_language():
    model, tokenizer = load_model("planted")
    pairs, held_out = (
        [Pair(p["prompt"], p["chosen"], p["rejected"]) for p in corpus.pairs("sea", 48, seed)]
        for seed in (0, 1)
    )
    prepared = ARMS["mean-difference"](Material(model, tokenizer, pairs), points=[POINT])
    less, plain, more = (
        float(margins_of(prepared, tokenizer, held_out, s).mean()) for s in (-2.0, 0.0, 2.0)
    )
    assert less + 0.1 < plain < more - 0.1


def test_several_points_act_together(material):
    points = [HookPoint(0, "resid_post"), POINT]
    edits = ARMS["mean-difference"](material, points=points).edits(1.0)
    assert [edit.point for edit in edits] == points


def test_without_labels_the_best_on_validation_is_taken(material):
    prepared = ARMS["pca-activations"](material, points=[POINT])
    margins = prepared.notes["validation_margins"]
    assert len(margins) == prepared.notes["validation_looks"] > 1
    found = float(margins_of(prepared, material.tokenizer, material.validation).mean())
    assert found == pytest.approx(max(margins)) and max(margins) > min(margins)
    few = ARMS["pca-activations"](replace(material, budget=1), points=[POINT])
    assert few.notes["validation_looks"] == 1
    with pytest.raises(PairsError, match="chooses among settings on validation pairs"):
        ARMS["pca-activations"](replace(material, validation=()), points=[POINT])


def test_a_vector_can_be_gated(material):
    when = When(Projection(torch.ones(32), POINT), 0.0)
    (edit,) = gated(material, of="mean-difference", when=when, points=[POINT]).edits(1.0)
    assert edit.when is when
    with pytest.raises(ConfigError, match="no option 'sed'"):
        ARMS["mean-difference"](material, points=[POINT], sed=1)
