"""The arms of a comparison by name: each a function of a `Material` and options of its own.

vectors              directions and maps, by the names of `directions.methods`
features, targeted   features of an SAE, and vectors made for one
prompts              what is put before a prompt
adapters             what is trained; needs the extra `finetune`
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from saesteer.compare.arms import adapters, features, prompts, targeted, vectors
from saesteer.compare.prepared import Material, Prepared
from saesteer.directions.methods import METHODS
from saesteer.errors import SteeringError, did_you_mean
from saesteer.steering.conditions import When

Arm = Callable[..., Prepared]


def gated(material: Material, *, of: str, when: When, **options: Any) -> Prepared:
    """Another arm, `of`, with its options, whose edits act only where a condition holds.

    Raises:
        SteeringError: no such arm, or one that makes no edits.
    """
    return features.gate(arm(of)(material, **options), when)


ARMS: dict[str, Arm] = {
    **{
        name: partial(vectors.vector, method=name)
        for name, method in METHODS.items()
        if method.kind != "reader"  # it never becomes an edit
    },
    "sae-clamp": features.sae_clamp,
    "sae-add": features.sae_add,
    "sae-topk": features.sae_topk,
    "sae-output-filtered": features.sae_output_filtered,
    "sae-ts": targeted.sae_ts,
    "gated": gated,
    "few-shot": prompts.few_shot,
    "contrast-prompt": prompts.contrast_prompt,
    "prompt": prompts.prompt,
    "context-distillation": adapters.context_distillation,
    "sft-lora": adapters.sft_lora,
    "dpo-lora": adapters.dpo_lora,
    "sft-augmented": adapters.sft_augmented,
}
"""Name → function."""


def arm(name: str) -> Arm:
    """The arm of that name. SteeringError where there is none."""
    if name not in ARMS:
        raise SteeringError(
            f"no arm {name!r}{did_you_mean(name, ARMS)}: there are {', '.join(ARMS)}"
        )
    return ARMS[name]
