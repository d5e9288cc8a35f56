"""Pairs that ask the same are held out together, by everything that holds pairs out."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.compare.held_out import hold_out
from saesteer.core.model import HookPoint
from saesteer.directions import iti, logistic_probe
from saesteer.directions.answers import answer_activations
from saesteer.directions.fitting import fit_direction, fit_reader
from saesteer.directions.groups import folds, groups_of, numbered, split
from saesteer.directions.pairs import Pair
from saesteer.effects.diagnose_pairs import pair_figures
from saesteer.errors import PairsError
from tests.tiny import tiny_model, tiny_tokenizer

POINT = HookPoint(1, "resid_post")


def near_identical(seed: int) -> list[Pair]:
    """16 prompts, 4 near-identical pairs of each, and a label drawn for the prompt: nothing that
    is learnt of some prompts tells anything of the others."""
    rng = random.Random(seed)
    words = sorted(word for word in tiny_tokenizer().get_vocab() if word.isalpha())
    found = []
    for _ in range(16):
        prompt = "the " + " ".join(rng.sample(words, 3))
        answers = [" " + " ".join(rng.sample(words, 3)) for _ in range(2)]
        end = rng.sample(words, 4)
        found += [Pair(prompt, *(f"{answer} {word}" for answer in answers)) for word in end]
    return found


def test_labels_of_nothing_are_not_told_where_near_identical_pairs_stay_together() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    grouped, apart, halves = [], [], []
    for seed in range(6):
        pairs = near_identical(seed)
        fitted = fit_direction("logistic-probe", model, tokenizer, pairs, POINT, C=100.0)
        grouped.append(fitted.provenance["held_out_auroc"])
        # The same activations where no two pairs are known to ask the same.
        a, b = answer_activations(model, tokenizer, pairs, POINT)
        whole = pair_figures(fitted.vector, a, b, logistic_probe.fit, splits=4)
        apart.append(whole.halves.auroc.mean)
        own = groups_of(pairs)
        assert sorted(own) == sorted([*range(16)] * 4)
        figures = pair_figures(fitted.vector, a, b, logistic_probe.fit, groups=own, splits=4)
        halves.append(figures.halves.auroc.mean)
    assert np.mean(apart) > 0.75
    assert abs(np.mean(grouped) - 0.5) < 0.15
    assert abs(np.mean(halves) - 0.5) < 0.15


def test_a_reader_is_judged_on_other_prompts() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    found = []
    for seed in range(6):
        ((_, auroc),) = fit_reader(
            "ccs", model, tokenizer, near_identical(seed), [POINT], starts=1
        ).values()
        found.append(auroc)
    assert abs(np.mean(found) - 0.5) < 0.15


def test_the_probe_of_a_head_is_judged_on_other_prompts() -> None:
    apart, together = [], []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        # What is read of a prompt's pairs is nearly the same, and its label says nothing.
        prompts = torch.randn(2, 16, 1, 64, generator=generator)
        x = prompts + 0.1 * torch.randn(2, 16, 4, 64, generator=generator)
        chosen, rejected = x.flatten(1, 2)
        groups = [i // 4 for i in range(64)]
        apart.append(iti.head_probe(chosen, rejected, seed=seed).accuracy)
        together.append(iti.head_probe(chosen, rejected, groups, seed=seed).accuracy)
    assert np.mean(apart) > 0.9
    assert abs(np.mean(together) - 0.5) < 0.15


@pytest.mark.parametrize(("prompts", "told"), [(1, False), (3, False), (4, True), (16, True)])
def test_under_four_prompts_nothing_can_be_held_out(prompts: int, told: bool) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    pairs = [Pair(p.prompt, p.chosen, p.rejected) for p in near_identical(0)[: 4 * prompts]]
    pairs = pairs * (1 + 31 // len(pairs))
    fitted = fit_direction("mean-difference", model, tokenizer, pairs, POINT)
    assert ("held_out_auroc" in fitted.provenance) is told
    a, b = answer_activations(model, tokenizer, pairs, POINT)
    figures = pair_figures(fitted.vector, a, b, logistic_probe.fit, groups=groups_of(pairs))
    assert (figures.halves is not None) is told
    with pytest.raises(PairsError, match="groups of 2 pairs"):
        pair_figures(fitted.vector, a, b, logistic_probe.fit, groups=[0, 1])


def test_what_is_one_group() -> None:
    pairs = [
        Pair("Is it?\n (A) Yes\n (B) No", " A", " B"),
        Pair("", " sea", " sun"),
        Pair("is it", " yes", " no"),
        Pair("", " moon", " sun"),
        Pair("", " Sun.", " sea"),
    ]
    assert groups_of(pairs) == [0, 1, 0, 2, 1]
    assert numbered("abca") == [0, 1, 2, 0]


@settings(derandomize=True, max_examples=100)
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=40),
    st.floats(0.05, 0.9),
    st.integers(0, 99),
)
def test_splits_and_folds_keep_groups_whole(keys: list[int], share: float, seed: int) -> None:
    groups = numbered(keys)
    wanted = max(1, round(share * len(groups)))
    taken, left = split(groups, wanted, np.random.default_rng(seed))
    assert sorted([*taken, *left]) == list(range(len(groups))) and taken
    assert not {groups[i] for i in taken} & {groups[i] for i in left}
    smallest = min(groups.count(group) for group in groups)
    assert len(taken) <= max(wanted, smallest)
    count, own = folds(groups, 5, np.random.default_rng(seed))
    assert count == min(5, len(set(groups)) // 2)
    if count > 1:
        held = [{groups[i] for i in np.flatnonzero(own == k)} for k in range(count)]
        assert all(len(one) >= 2 for one in held)
        assert sum(map(len, held)) == len(set(groups))


def test_an_arm_is_measured_on_other_prompts() -> None:
    pairs = near_identical(0)
    fitted, held = hold_out(pairs, 3)
    assert len(held) == 16 and len(fitted) == 48
    assert not {pair.prompt for pair in fitted} & {pair.prompt for pair in held}
    assert list(fitted) == [pair for pair in pairs if pair not in held]
    assert hold_out(pairs, 4)[1] != held
