"""The arms that train: what they learn, and that they leave everything else as it was."""

import gc
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from saesteer.compare import Material
from saesteer.compare.arms import arm
from saesteer.compare.arms.adapters import (
    context_distillation,
    dpo_lora,
    proliferated,
    sft_augmented,
    sft_lora,
)
from saesteer.compare.arms.prompts import opened_with
from saesteer.compare.arms.training import finetuning, prompted_kl
from saesteer.compare.combine import combined
from saesteer.compare.prepared import Prepared, margins_of
from saesteer.core.hooks import activations
from saesteer.core.model import fingerprint
from saesteer.core.points import HookPoint
from saesteer.errors import PairsError, SaesteerError
from saesteer.steering.edits import Add
from tests.some_material import some_pairs
from tests.tiny import WIDTH, random_ids, tiny_model, tiny_tokenizer

POINT = HookPoint(1, "resid_post")
HELD_OUT = some_pairs(12, begin=40)
QUICK = {"steps": 12, "learning_rates": (3e-3,)}


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect():
    """accelerate collects garbage after each training: not through all that is imported."""
    _, trl = finetuning()
    assert trl.SFTTrainer and trl.DPOTrainer  # trl imports them where they are asked for
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def material() -> Material:
    return Material(tiny_model(), tiny_tokenizer(), some_pairs(32), some_pairs(8, begin=32))


@pytest.fixture(scope="module")
def tuned(material) -> Prepared:
    return sft_lora(material, steps=12, learning_rates=(3e-3, 1e-6))


def held_out(prepared: Prepared) -> float:
    return float(margins_of(prepared, tiny_tokenizer(), HELD_OUT).mean())


@pytest.mark.parametrize("name", ["sft-lora", "dpo-lora", "sft-augmented"])
def test_the_margin_on_held_out_pairs_rises_and_the_model_stays(material, name):
    model = tiny_model().requires_grad_(True)  # as transformers loads it
    material = replace(material, model=model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    before = held_out(Prepared("none", model))

    prepared = arm(name)(material, **QUICK)

    assert held_out(prepared) > before + 0.3
    assert held_out(Prepared("none", model)) == before
    assert model.state_dict().keys() == weights.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training and not prepared.model.training
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert not any(p.requires_grad for n, p in prepared.model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3_moe"])
def test_other_architectures_train_without_a_warning(material, arch):
    material = replace(material, model=tiny_model(arch))
    before = held_out(Prepared("none", material.model))
    assert held_out(sft_lora(material, **QUICK)) > before + 0.05


def test_a_copy_costs_its_adapters_only(material, tuned):
    own = {id(p) for p in material.model.parameters()}
    added = [n for n, p in tuned.model.named_parameters() if id(p) not in own]
    assert added and all("lora_" in name for name in added)
    assert len(list(tuned.model.parameters())) == len(own) + len(added)
    assert fingerprint(tuned.model) != fingerprint(material.model)


def test_the_learning_rate_is_chosen_on_validation(material, tuned):
    looks = tuned.notes["validation_margins"]
    assert list(looks) == ["0.003", "1e-06"] and tuned.notes["validation_looks"] == 2
    assert tuned.notes["learning_rate"] == 3e-3 and looks["0.003"] > looks["1e-06"]
    mean = float(margins_of(tuned, material.tokenizer, material.validation).mean())
    assert mean == pytest.approx(looks["0.003"])
    one = sft_lora(replace(material, budget=1), steps=1)
    assert one.notes["validation_looks"] == 1


def test_the_seed_decides(material, tuned):
    again = sft_lora(material, **QUICK)
    other = sft_lora(replace(material, seed=1), **QUICK)
    ids = random_ids(2, 6)
    with torch.no_grad():
        one, two, three = (p.model(ids).logits for p in (tuned, again, other))
    assert torch.equal(one, two) and not torch.allclose(one, three, atol=1e-4)


def test_a_trained_model_can_be_read_and_steered(tuned):
    """Finetuning and steering together."""
    ids = random_ids(2, 6)
    x = activations(tuned.model, [POINT], ids)[POINT]
    assert x.shape == (2, 6, WIDTH)
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    steered = Prepared("add", tiny_model(), edits=lambda s: [Add(vector, s, POINT)])
    both = combined(tuned, steered)
    assert both.model is tuned.model
    at_rest, moved = (margins_of(both, tiny_tokenizer(), HELD_OUT, s) for s in (0.0, 3.0))
    assert torch.equal(at_rest, margins_of(tuned, tiny_tokenizer(), HELD_OUT))
    assert not torch.allclose(at_rest, moved, atol=1e-3)


def test_swapped_sides_lower_the_margin(material):
    swapped = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in material.pairs]
    before = held_out(Prepared("none", material.model))
    prepared = dpo_lora(replace(material, pairs=swapped), **QUICK)
    assert held_out(prepared) < before - 0.5


def test_distillation_does_without_the_prompt_what_is_done_with_it(material):
    transform = opened_with("the ship and the boat of the king")
    given = tiny_tokenizer(), HELD_OUT, transform
    before = prompted_kl(material.model, material.model, *given)
    rates = (3e-3, 1e-6)
    prepared = context_distillation(material, transform=transform, steps=20, learning_rates=rates)
    after = prompted_kl(material.model, prepared.model, *given)
    assert after < 0.7 * before
    assert prepared.prompt_transform("x") == "x"
    looks = prepared.notes["validation_kl"]
    assert prepared.notes["learning_rate"] == 3e-3 and looks["0.003"] < looks["1e-06"]
    assert looks["1e-06"] == pytest.approx(prepared.notes["validation_kl_before"], rel=0.05)


def test_the_prompted_kl_by_hand(material):
    """Of one answer, row by row; and nothing to learn where the prompt stays as it is."""
    tokenizer, model = material.tokenizer, material.model
    (pair,) = some_pairs(1)
    transform = opened_with("the king")
    total = n = 0
    with torch.no_grad():
        for answer in (pair.chosen, pair.rejected):
            new = tokenizer.encode(answer, add_special_tokens=False)
            rows = []
            for prompt in (f"the king {pair.prompt}", pair.prompt):
                ids = [1, *tokenizer.encode(prompt, add_special_tokens=False), *new]
                logits = model(torch.tensor([ids])).logits[0, -len(new) - 1 : -1]
                rows.append(logits.double().log_softmax(-1))
            total += float((rows[0].exp() * (rows[0] - rows[1])).sum())
            n += len(new)
    found = prompted_kl(model, model, tokenizer, [pair], transform)
    assert found == pytest.approx(total / n, rel=1e-4)
    same = prompted_kl(model, model, tokenizer, HELD_OUT, lambda prompt: prompt)
    assert same == pytest.approx(0, abs=1e-6)
    bare = replace(pair, prompt="")
    with pytest.raises(PairsError, match="nothing stands before it"):
        prompted_kl(model, model, tiny_tokenizer(bos=False), [bare], lambda prompt: prompt)


def test_proliferated_answers_are_new_and_none_is_held_out(material):
    found = proliferated(material, copies=3, k=2)
    assert 32 < len(found) <= 96
    keys = [(p.prompt, p.chosen) for p in found]
    given = {(p.prompt, a) for p in material.pairs for a in (p.chosen, p.rejected)}
    assert len(set(keys)) == len(keys) and not given & set(keys)
    assert {p.prompt for p in found} <= {p.prompt for p in material.pairs}
    assert all(p.chosen.strip() and len(p.chosen.split()) <= 3 for p in found)
    # What it writes first becomes a validation pair: it isn't trained on.
    known = replace(material, validation=[*material.validation, found[0]])
    assert keys[0] not in [(p.prompt, p.chosen) for p in proliferated(known, copies=3, k=2)]
    assert proliferated(material, copies=3, k=2) == found


def test_augmented_with_other_pairs(material):
    more = some_pairs(8, begin=60)
    prepared = sft_augmented(material, more=more, steps=1, learning_rates=(1e-3,))
    assert prepared.notes["further_pairs"] == 8 and prepared.notes["answers_written"] == 0
    with pytest.raises(PairsError, match="1 of the further pairs are validation pairs"):
        sft_augmented(material, more=[*more, material.validation[0]])


@pytest.mark.parametrize("name", ["context-distillation", "sft-lora", "dpo-lora", "sft-augmented"])
def test_what_is_missing_is_said_before_anything_is_trained(material, monkeypatch, name):
    options = {"transform": str.upper} if name == "context-distillation" else {}
    with pytest.raises(PairsError, match=f"'{name}' chooses among settings on validation pairs"):
        arm(name)(replace(material, validation=()), **options)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SaesteerError, match=r"pip install 'saesteer\[finetune\]'"):
        arm(name)(material, **options)


def test_a_pair_that_is_too_long_is_refused(material):
    long = replace(material.pairs[0], prompt="the sea " * 100)
    with pytest.raises(PairsError, match=r"pair 33: .* contexts hold 128"):
        sft_lora(replace(material, pairs=[*material.pairs, long]))
