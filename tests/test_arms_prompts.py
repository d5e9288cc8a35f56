"""The arms that change prompts, their templates, and arms combined."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.compare import Material, Prepared
from saesteer.compare.arms.prompts import (
    contrast_prompt,
    contrast_prompt_of,
    few_shot,
    few_shot_prompt,
    opened_with,
    prompt,
)
from saesteer.compare.combine import Interaction, at, combined, interaction
from saesteer.compare.prepared import margins_of, validation_margin
from saesteer.core.points import HookPoint
from saesteer.directions.margin import margins
from saesteer.directions.pairs import Pair
from saesteer.errors import PairsError, SteeringError
from saesteer.steering.edits import Add, Clamp, Project
from tests.some_material import some_pairs
from tests.some_pairs import planted_pairs
from tests.tiny import WIDTH, tiny_model, tiny_sae, tiny_tokenizer

POINT = HookPoint(1, "resid_post")
EXAMPLES = [Pair("Is it?", " Yes.", " No."), Pair("Was it?", " It was.", " Never.")]
WRITTEN = [
    "once upon a time",
    "the sea",
    "a ship and a boat",
    "of salt and soup",
    "the king saw the sea and the harbour",
    "good",
    "bad",
    "sail wave ship",
]


@pytest.fixture(scope="module")
def material() -> Material:
    return Material(tiny_model(), tiny_tokenizer(), some_pairs(), some_pairs(8, begin=24))


def test_the_templates():
    assert few_shot_prompt(EXAMPLES)("Will it?") == "Is it? Yes.\n\nWas it? It was.\n\nWill it?"
    assert contrast_prompt_of(EXAMPLES)("Will it?") == (
        "Is it? Good response: Yes., Bad response: No., "
        "Was it? Good response: It was., Bad response: Never., "
        "Will it? Good response:"
    )
    assert opened_with("Be kind.")("Will it?") == "Be kind. Will it?"


def test_an_answer_without_a_space_is_not_run_into_its_prompt():
    story = Pair("in the road.", "At the sea", "By")
    assert few_shot_prompt([story])("Then") == "in the road. At the sea\n\nThen"
    told = [Pair("", "At", "By"), Pair("to ", "sea", "road"), Pair("Q:\n", "sea", "road")]
    assert few_shot_prompt(told)("Then") == "At\n\nto sea\n\nQ:\nsea\n\nThen"
    (pair,) = planted_pairs("sea", 1)
    assert f"{pair.prompt} {pair.chosen}\n\n" in few_shot_prompt([pair])("Then")


def test_labels_swapped_show_the_other_answers():
    swapped = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in EXAMPLES]
    assert few_shot_prompt(swapped)("Will it?") == "Is it? No.\n\nWas it? Never.\n\nWill it?"
    assert contrast_prompt_of(swapped[:1])("Will it?") == (
        "Is it? Good response: No., Bad response: Yes., Will it? Good response:"
    )


@settings(derandomize=True, max_examples=30)
@given(st.integers(1, 24), st.integers(0, 5))
def test_shots_are_drawn_by_the_seed_and_fewer_are_the_first(k, seed):
    material = Material(MODEL, TOKENIZER, some_pairs(), seed=seed)
    notes = few_shot(material, k=k).notes
    assert len(set(notes["pairs_shown"])) == k
    assert notes["pairs_shown"] == few_shot(material, k=24).notes["pairs_shown"][:k]
    # Both arms show the same pairs.
    assert notes == contrast_prompt(material, k=k).notes


MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()


def test_few_shot_and_contrast_show_what_was_drawn(material):
    prepared = few_shot(material, k=3)
    shown = [material.pairs[i] for i in prepared.notes["pairs_shown"]]
    assert prepared.prompt_transform("the boy") == few_shot_prompt(shown)("the boy")
    assert contrast_prompt(material, k=3).prompt_transform("the boy") == (
        contrast_prompt_of(shown)("the boy")
    )
    assert prepared.edits(2.0) == [] and prepared.model is material.model
    for k in (0, 25):
        with pytest.raises(PairsError, match=f"{k} examples of 24 pairs"):
            few_shot(material, k=k)


def test_margins_are_those_of_pairs_written_that_way(material):
    prepared = few_shot(material, k=2)
    by_hand = [
        replace(pair, prompt=prepared.prompt_transform(pair.prompt)) for pair in material.validation
    ]
    with torch.no_grad():
        expected = margins(material.model, material.tokenizer, by_hand)
    assert torch.equal(margins_of(prepared, material.tokenizer, material.validation), expected)
    assert validation_margin(prepared, material) == float(expected.mean())
    with pytest.raises(PairsError, match=r"tokens under the arm 'few-shot'.*contexts hold 128"):
        margins_of(few_shot(material, k=24), material.tokenizer, material.validation)


def test_the_best_prompt_is_chosen_on_validation(material):
    prepared = prompt(material, written=[*WRITTEN, WRITTEN[0], "  "])
    each = []
    for text in WRITTEN:
        pairs = [replace(p, prompt=f"{text} {p.prompt}") for p in material.validation]
        with torch.no_grad():
            each.append(float(margins(material.model, material.tokenizer, pairs).mean()))
    best = max(range(8), key=lambda i: each[i])
    assert prepared.notes["prompt"] == WRITTEN[best]
    assert prepared.prompt_transform("x") == f"{WRITTEN[best]} x"
    assert prepared.notes["validation_margins"] == pytest.approx(each)
    assert prepared.notes["validation_looks"] == 8
    # Labels swapped, another is best.
    swapped = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in material.validation]
    other = prompt(replace(material, validation=swapped), written=WRITTEN)
    assert other.notes["prompt"] == WRITTEN[min(range(8), key=lambda i: each[i])]


def test_a_budget_tries_the_first_prompts_only(material):
    prepared = prompt(replace(material, budget=2), written=WRITTEN)
    assert prepared.notes["validation_looks"] == 2 and prepared.notes["prompt"] in WRITTEN[:2]


def test_prompts_that_cannot_be_compared(material):
    with pytest.raises(PairsError, match="7 different written prompts: give 8"):
        prompt(material, written=[*WRITTEN[:7], WRITTEN[0]])
    with pytest.raises(PairsError, match="'prompt' chooses among settings on validation pairs"):
        prompt(replace(material, validation=()), written=WRITTEN)


def adding(name: str, seed: int, **changes) -> Prepared:
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return Prepared(name, MODEL, edits=lambda s: [Add(vector, s, POINT)], **changes)


def test_a_combination_has_the_edits_and_prompts_of_all_in_order():
    one = adding("one", 0, prompt_transform=opened_with("a"), notes={"validation_looks": 3})
    two = adding("two", 1, prompt_transform=opened_with("b"))
    both = combined(one, two)
    assert both.arm == "one + two" and both.prompt_transform("x") == "b a x"
    first, second = both.edits(0.5)
    assert torch.equal(first.vector, one.edits(1.0)[0].vector)
    assert torch.equal(second.vector, two.edits(1.0)[0].vector)
    assert (first.strength, second.strength) == (0.5, 0.5)
    assert [e.strength for e in combined(at(one, 2.0), two).edits(0.5)] == [2.0, 0.5]
    assert both.notes["validation_looks"] == 3


def test_models_of_their_own_cannot_be_combined():
    trained = Prepared("sft-lora", tiny_model(seed=1), notes={"trained": True})
    assert combined(adding("one", 0), trained).model is trained.model
    assert combined(trained, adding("one", 0)).model is trained.model
    other = Prepared("dpo-lora", tiny_model(seed=2), notes={"trained": True})
    with pytest.raises(SteeringError, match="sft-lora and dpo-lora each bring a model"):
        combined(trained, adding("one", 0), other)
    # A combination that brings one does so too.
    with pytest.raises(SteeringError, match="each bring a model"):
        combined(combined(trained, adding("one", 0)), other)
    with pytest.raises(SteeringError, match="no arms"):
        combined()


def test_the_interaction_by_hand():
    found = Interaction(first=1.0, second=0.5, together=2.0, reversed=1.75)
    assert found.interaction == 0.5 and found.order == 0.25


def test_order_matters_for_edits_that_do_not_commute_and_for_no_others(material):
    """Of a projection and an addition along it, the later one has the last word."""
    plain = margins_of(Prepared("none", MODEL), TOKENIZER, material.validation).mean()

    def effect(prepared: Prepared) -> float:
        return float((margins_of(prepared, TOKENIZER, material.validation) - plain).mean())

    both = interaction(effect, adding("one", 0), adding("two", 1))
    assert both.order == pytest.approx(0, abs=1e-5)
    assert both.first == pytest.approx(effect(adding("one", 0)))
    assert both.interaction == pytest.approx(
        effect(combined(adding("one", 0), adding("two", 1))) - both.first - both.second, abs=1e-5
    )
    vector = adding("one", 0).edits(1.0)[0].vector
    out = Prepared("out", MODEL, edits=lambda _: [Project(vector, POINT)])
    removed = interaction(effect, adding("one", 0), out)
    # Added, then projected out: the projection alone.
    assert removed.together == pytest.approx(removed.second, abs=1e-5)
    assert abs(removed.order) > 1e-3
    sae = tiny_sae()
    held = Prepared("held", MODEL, edits=lambda s: [Clamp(sae, 5, 5.0 * s)])
    assert abs(interaction(effect, adding("one", 0), held).order) > 1e-4
