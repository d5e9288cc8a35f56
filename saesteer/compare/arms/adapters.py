"""Arms that train: low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on the same pairs.

Every arm trains adapters in a copy of the model that shares its weights, which stay as they are,
so that a copy costs the memory of its adapters. They need peft and trl: the extra `finetune`.

    sft-lora               maximum likelihood of the chosen answers
    dpo-lora               direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)
    sft-augmented          sft-lora on the pairs and on answers written after them
    context-distillation   what the model does under a prompt, without it (Askell et al. 2021,
                           arXiv 2112.00861)
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from transformers import PreTrainedModel

from saesteer.compare.arms.prompts import few_shot_prompt, shown
from saesteer.compare.arms.training import Training, distil, prompted_kl, train_dpo, train_sft
from saesteer.compare.prepared import (
    Material,
    Prepared,
    PromptTransform,
    check_room,
    validation_margin,
)
from saesteer.core.generate import write
from saesteer.directions.answers import side_tokens
from saesteer.directions.pairs import Pair
from saesteer.errors import PairsError

LEARNING_RATES = (3e-4, 1e-3, 1e-4, 3e-3)
"""Tried in this order, as far as the budget goes."""

Train = Callable[[float], PreTrainedModel]


def sft_lora(
    material: Material,
    *,
    steps: int = 100,
    batch_size: int = 16,
    rank: int = 8,
    learning_rates: Sequence[float] = LEARNING_RATES,
) -> Prepared:
    """LoRA trained on the chosen answers; the loss is of their tokens alone.

    The learning rate is the one with the highest margin on the validation pairs.

    Raises:
        SaesteerError: peft and trl aren't installed.
        PairsError: no validation pairs, or a pair longer than the model's contexts.
    """
    how = Training(steps, batch_size, rank)
    return _tuned_sft("sft-lora", material, material.pairs, how, learning_rates)


def dpo_lora(
    material: Material,
    *,
    steps: int = 100,
    batch_size: int = 16,
    rank: int = 8,
    beta: float = 0.1,
    learning_rates: Sequence[float] = LEARNING_RATES,
) -> Prepared:
    """LoRA trained to prefer the chosen answers, held near the model it began as by `beta`.

    The learning rate is the one with the highest margin on the validation pairs.

    Raises:
        SaesteerError: peft and trl aren't installed.
        PairsError: no validation pairs, or a pair longer than the model's contexts.
    """
    how = Training(steps, batch_size, rank)

    def train(learning_rate: float) -> PreTrainedModel:
        return train_dpo(material, how, learning_rate, beta)

    notes = {**asdict(how), "beta": beta}
    return _tuned("dpo-lora", material, material.pairs, train, learning_rates, notes)


def sft_augmented(
    material: Material,
    *,
    more: Sequence[Pair] | None = None,
    copies: int = 4,
    k: int = 5,
    temperature: float = 1.0,
    steps: int = 100,
    batch_size: int = 16,
    rank: int = 8,
    learning_rates: Sequence[float] = LEARNING_RATES,
) -> Prepared:
    """`sft_lora` on the pairs together with more data made from them alone.

    Args:
        more: further pairs (of templates, or of another writer); None: see `proliferated`.
        copies, k, temperature: as there.

    Raises:
        SaesteerError: peft and trl aren't installed.
        PairsError: no validation pairs, or one of them among `more`.
    """
    if more is None:
        more = proliferated(material, copies=copies, k=k, temperature=temperature)
        written = copies * len(material.pairs)
    else:
        written = 0
    held_out = {(pair.prompt, pair.chosen) for pair in material.validation}
    if leaked := [pair for pair in more if (pair.prompt, pair.chosen) in held_out]:
        raise PairsError(
            f"{len(leaked)} of the further pairs are validation pairs, the first of prompt "
            f"{leaked[0].prompt!r}: take them out"
        )
    how = Training(steps, batch_size, rank)
    pairs = [*material.pairs, *more]
    prepared = _tuned_sft("sft-augmented", material, pairs, how, learning_rates)
    notes = {**prepared.notes, "further_pairs": len(more), "answers_written": written}
    return replace(prepared, notes=notes)


def proliferated(
    material: Material, *, copies: int = 4, k: int = 5, temperature: float = 1.0
) -> list[Pair]:
    """New chosen answers to the pairs' prompts, which the model writes after k of the pairs.

    They end with the line, and are as long as the longest chosen answer at the most. Left out are
    empty ones, repeats, the rejected answer itself, and what is a validation pair.

    Raises:
        PairsError: there are fewer than k pairs. TextError: the examples leave no room.
    """
    transform = few_shot_prompt([material.pairs[i] for i in shown(material, k)])
    lengths = (side_tokens(material.tokenizer, p.prompt, p.chosen) for p in material.pairs)
    longest = max(len(side.ids) - side.start for side in lengths)
    known = {(p.prompt, answer) for p in material.pairs for answer in (p.chosen, p.rejected)}
    known |= {(p.prompt, p.chosen) for p in material.validation}
    found = []
    for copy in range(copies):
        for first in range(0, len(material.pairs), 32):
            some = material.pairs[first : first + 32]
            seed = material.seed + copy * len(material.pairs) + first
            texts = write(
                material.model,
                material.tokenizer,
                [transform(pair.prompt) for pair in some],
                max_new_tokens=longest,
                temperature=temperature,
                seed=[seed + i for i in range(len(some))],
            )
            for pair, text in zip(some, texts, strict=True):
                answer = text.reply.split("\n", 1)[0]
                if answer.strip() and (pair.prompt, answer) not in known:
                    known.add((pair.prompt, answer))
                    found.append(replace(pair, chosen=answer))
    return found


def context_distillation(
    material: Material,
    *,
    transform: PromptTransform,
    steps: int = 100,
    batch_size: int = 16,
    rank: int = 8,
    learning_rates: Sequence[float] = LEARNING_RATES,
) -> Prepared:
    """LoRA that minimises KL(p(· | transform(x)) ‖ p_θ(· | x)) on the answers of the pairs.

    Both answers of a pair are read, token by token, with the prompt transformed for the model as
    it is and left alone for the one that learns. The learning rate is the one with the lowest KL
    on the validation pairs.

    Args:
        transform: what is distilled, as the `prompt_transform` of a prompt's arm.

    Raises:
        SaesteerError: peft isn't installed.
        PairsError: no validation pairs, or a prompt that grows longer than the model's contexts.
    """
    arm = "context-distillation"
    how = Training(steps, batch_size, rank)
    material.need_validation(arm)
    for pairs in (material.pairs, material.validation):
        check_room(Prepared(arm, material.model, transform), material.tokenizer, pairs)
    given = (material.tokenizer, material.validation, transform)
    before = prompted_kl(material.model, material.model, *given)
    tried: list[tuple[float, float, PreTrainedModel]] = []
    for rate in learning_rates[: material.budget]:
        model = distil(material, transform, how, rate)
        tried.append((prompted_kl(material.model, model, *given), rate, model))
    best = min(tried, key=lambda one: one[0])
    notes = {
        **asdict(how),
        "trained": True,
        "learning_rate": best[1],
        "validation_kl_before": before,
        "validation_kl": {str(rate): kl for kl, rate, _ in tried},
        "validation_looks": len(tried),
    }
    return Prepared(arm, best[2], notes=notes)


def _tuned_sft(
    arm: str,
    material: Material,
    pairs: Sequence[Pair],
    how: Training,
    learning_rates: Sequence[float],
) -> Prepared:
    def train(learning_rate: float) -> PreTrainedModel:
        return train_sft(material, pairs, how, learning_rate)

    return _tuned(arm, material, pairs, train, learning_rates, asdict(how))


def _tuned(
    arm: str,
    material: Material,
    pairs: Sequence[Pair],
    train: Train,
    learning_rates: Sequence[float],
    notes: dict[str, Any],
) -> Prepared:
    """Train at each learning rate; the highest validation margin wins, the first of equals."""
    material.need_validation(arm)
    check_room(Prepared(arm, material.model), material.tokenizer, pairs)
    best: Prepared | None = None
    margins: dict[str, float] = {}
    for rate in learning_rates[: material.budget]:
        one = Prepared(arm, train(rate), notes={**notes, "trained": True, "learning_rate": rate})
        margins[str(rate)] = validation_margin(one, material)
        if best is None or margins[str(rate)] > margins[str(best.notes["learning_rate"])]:
            best = one
    if best is None:
        raise PairsError(f"the arm {arm!r} was given no learning rate to train at; give one")
    looks = {"validation_margins": margins, "validation_looks": len(margins)}
    return replace(best, notes={**best.notes, **looks})
