"""Arms that change the prompt and nothing else: what steering has to be better than."""

import random
from collections.abc import Sequence
from typing import Any

from saesteer.compare.prepared import Material, Prepared, PromptTransform, validation_margin
from saesteer.directions.pairs import Pair
from saesteer.directions.places import text_of
from saesteer.errors import PairsError

FEWEST_PROMPTS = 8
"""The best of fewer written prompts says more of the writer than of prompting."""

_BETWEEN = "\n\n"


def few_shot_prompt(examples: Sequence[Pair]) -> PromptTransform:
    """Each example's prompt with its chosen answer, a blank line apart, before the prompt."""
    before = "".join(f"{text_of(pair.prompt, pair.chosen)}{_BETWEEN}" for pair in examples)
    return lambda prompt: before + prompt


def contrast_prompt_of(examples: Sequence[Pair]) -> PromptTransform:
    """Both answers of each example, called good and bad, then the prompt and "Good response:".

    "query_1 Good response: pos_ex_1, Bad response: neg_ex_1, … actual_query Good response:"
    """
    before = "".join(
        f"{pair.prompt.strip()} Good response: {pair.chosen.strip()}, "
        f"Bad response: {pair.rejected.strip()}, "
        for pair in examples
    )
    return lambda prompt: f"{before}{prompt.strip()} Good response:"


def few_shot(material: Material, *, k: int = 5) -> Prepared:
    """Show k pairs' chosen answers before the prompt (k-shot); which, is drawn by the seed.

    Raises:
        PairsError: there are fewer than k pairs, or k is below 1.
    """
    chosen = shown(material, k)
    return Prepared(
        "few-shot",
        material.model,
        few_shot_prompt([material.pairs[i] for i in chosen]),
        notes={"k": k, "pairs_shown": chosen, "validation_looks": 0},
    )


def contrast_prompt(material: Material, *, k: int = 5) -> Prepared:
    """Show k pairs' good and bad answers before the prompt; which, is drawn by the seed.

    Raises:
        PairsError: there are fewer than k pairs, or k is below 1.
    """
    chosen = shown(material, k)
    return Prepared(
        "contrast-prompt",
        material.model,
        contrast_prompt_of([material.pairs[i] for i in chosen]),
        notes={"k": k, "pairs_shown": chosen, "validation_looks": 0},
    )


def prompt(material: Material, *, written: Sequence[str], between: str = " ") -> Prepared:
    """The best of at least 8 written prompts, put before each pair's own, by validation margin.

    Args:
        written: instructions or openings, in the order in which a small budget tries them.
        between: what stands between such a prompt and the pair's own.

    Raises:
        PairsError: fewer than 8 different prompts, or no validation pairs.
    """
    unique = list(dict.fromkeys(text.strip() for text in written if text.strip()))
    if len(unique) < FEWEST_PROMPTS:
        raise PairsError(
            f"{len(unique)} different written prompts: give {FEWEST_PROMPTS} at least, for the "
            "best of fewer says more of who wrote them than of prompting"
        )
    tried: list[tuple[float, Prepared]] = []
    for text in unique[: material.budget]:
        one = Prepared("prompt", material.model, opened_with(text, between))
        tried.append((validation_margin(one, material), one))
    best = max(range(len(tried)), key=lambda i: tried[i][0])
    notes: dict[str, Any] = {
        "prompt": unique[best],
        "validation_margins": [margin for margin, _ in tried],
        "validation_looks": len(tried),
    }
    return Prepared("prompt", material.model, tried[best][1].prompt_transform, notes=notes)


def opened_with(text: str, between: str = " ") -> PromptTransform:
    """The text before each prompt."""
    return lambda prompt: f"{text}{between}{prompt}"


def shown(material: Material, k: int) -> list[int]:
    """The places of k pairs of the material, by its seed: of a larger k the first are the same.

    Raises:
        PairsError: there are fewer than k pairs, or k is below 1.
    """
    if not 1 <= k <= len(material.pairs):
        raise PairsError(
            f"{k} examples of {len(material.pairs)} pairs: expected 1 to {len(material.pairs)}"
        )
    order = list(range(len(material.pairs)))
    random.Random(material.seed).shuffle(order)
    return order[:k]
