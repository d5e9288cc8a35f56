"""The arms of a comparison by name: each a function of a `Material` and options of its own.

vectors              directions and maps, by the names of `directions.methods`
candidates, features, targeted
                     features of an SAE chosen from the pairs, and vectors made for one
prompts              what is put before a prompt
adapters             what is trained; needs the extra `finetune`
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from saesteer.compare.arms import adapters, features, prompts, targeted, vectors
from saesteer.compare.prepared import Material, Prepared
from saesteer.directions.methods import METHODS
from saesteer.errors import SteeringError, did_you_mean
from saesteer.steering.conditions import When

Makes = Literal["edits", "prompt", "model"]


@dataclass(frozen=True)
class Arm:
    """An arm; called, it is its function.

    function: of a material and options. line: what it does, in one line. paper: where it comes
    from. makes: edits of the model as it is, another prompt, or another model.
    """

    function: Callable[..., Prepared]
    line: str
    paper: str
    makes: Makes

    def __call__(self, material: Material, **options: Any) -> Prepared:
        return self.function(material, **options)


def gated(material: Material, *, of: str, when: When, **options: Any) -> Prepared:
    """Another arm, `of`, with its options, whose edits act only where a condition holds.

    Raises:
        SteeringError: no such arm, or one that makes no edits.
    """
    return features.gate(arm(of)(material, **options), when)


ARMS: dict[str, Arm] = {
    **{
        name: Arm(partial(vectors.vector, method=name), method.line, method.paper, "edits")
        for name, method in METHODS.items()
        if method.kind != "reader"  # it never becomes an edit
    },
    "sae-clamp": Arm(
        features.sae_clamp,
        "hold the feature that differs most between the sides at strength · max_act",
        "Templeton et al. 2024, Scaling monosemanticity",
        "edits",
    ),
    "sae-add": Arm(
        features.sae_add,
        "add the direction of the feature that differs most, times strength · max_act",
        "Wu et al. 2025, arXiv 2501.17148",
        "edits",
    ),
    "sae-auroc": Arm(
        features.sae_auroc,
        "hold the feature that best tells the answers apart (AUROC) at strength · max_act",
        "as sae-clamp; chosen as Wu et al. 2025, arXiv 2501.17148, choose for detection",
        "edits",
    ),
    "sae-topk": Arm(
        features.sae_topk,
        "add several features, each as much as the pairs' sides differ in it",
        "Soo et al. 2025, arXiv 2501.09929",
        "edits",
    ),
    "sae-output-filtered": Arm(
        features.sae_output_filtered,
        "add the first feature that raises its own tokens (output score)",
        "Arad et al. 2025, arXiv 2505.20063",
        "edits",
    ),
    "sae-ts": Arm(
        targeted.sae_ts,
        "add the vector that raises one feature of the text written and little else",
        "Chalnev et al. 2024, arXiv 2411.02193",
        "edits",
    ),
    "gated": Arm(
        gated,
        "what another method makes, only on tokens where a feature is active",
        "Lee et al. 2024, arXiv 2409.05907",
        "edits",
    ),
    "few-shot": Arm(
        prompts.few_shot,
        "show k pairs' chosen answers before the prompt",
        "Brown et al. 2020, arXiv 2005.14165",
        "prompt",
    ),
    "contrast-prompt": Arm(
        prompts.contrast_prompt,
        "show k pairs' answers, called good and bad, before the prompt",
        "Gao & Das 2024, arXiv 2401.17390",
        "prompt",
    ),
    "prompt": Arm(
        prompts.prompt,
        "put before the prompt the best of 8 or more that you wrote",
        "Wu et al. 2025, arXiv 2501.17148",
        "prompt",
    ),
    "context-distillation": Arm(
        adapters.context_distillation,
        "train adapters to do without a prompt what the model does with it",
        "Askell et al. 2021, arXiv 2112.00861",
        "model",
    ),
    "sft-lora": Arm(
        adapters.sft_lora,
        "train adapters on the chosen answers",
        "Hu et al. 2021, arXiv 2106.09685",
        "model",
    ),
    "dpo-lora": Arm(
        adapters.dpo_lora,
        "train adapters to prefer the chosen answers (DPO)",
        "Rafailov et al. 2023, arXiv 2305.18290",
        "model",
    ),
    "sft-augmented": Arm(
        adapters.sft_augmented,
        "sft-lora on the pairs and on answers that the model writes after them",
        "Wang et al. 2022, arXiv 2212.10560",
        "model",
    ),
}
"""Name → arm."""


def arm(name: str) -> Arm:
    """The arm of that name. SteeringError where there is none."""
    if name not in ARMS:
        raise SteeringError(
            f"no arm {name!r}{did_you_mean(name, ARMS)}: there are {', '.join(ARMS)}"
        )
    return ARMS[name]
