"""Arms that steer with features of an SAE, chosen from the pairs.

Which features, `arms.candidates` says. Strengths count in units of max_act, the highest activation
in the index.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saesteer.compare.arms.candidates import DENSEST, by_auroc, candidates
from saesteer.compare.prepared import Material, Prepared
from saesteer.core.model import EMBEDDED
from saesteer.core.sae import Sae
from saesteer.effects import output_score
from saesteer.effects.planted_causes import neutral_prompts
from saesteer.errors import FeatureError, SteeringError
from saesteer.features.search import Index
from saesteer.steering.conditions import When
from saesteer.steering.edits import Add, Clamp, Edit


def sae_clamp(
    material: Material, *, feature: int | None = None, densest: float = DENSEST
) -> Prepared:
    """h + (c − a_f(h)) d_f with c = strength · max_act, error term untouched (Templeton 2024).

    feature: None takes the first candidate.
    """
    sae, index = material.features()
    chosen = candidates(material, densest=densest)[0][0] if feature is None else feature
    unit = _max_act(index, chosen)
    return Prepared(
        "sae-clamp",
        material.model,
        edits=lambda strength: [Clamp(sae, chosen, strength * unit)],
        notes=_notes(sae, [chosen]),
    )


def sae_add(
    material: Material, *, feature: int | None = None, densest: float = DENSEST
) -> Prepared:
    """h + c d_f at every plain token, with c = strength · max_act.

    feature: None takes the first candidate.
    """
    sae, index = material.features()
    chosen = candidates(material, densest=densest)[0][0] if feature is None else feature
    vector = _max_act(index, chosen) * sae.direction(chosen)
    return _adding("sae-add", material, vector, _notes(sae, [chosen]))


def sae_auroc(
    material: Material, *, feature: int | None = None, densest: float = DENSEST
) -> Prepared:
    """`sae_clamp` of the feature that best tells chosen from rejected answers, by its AUROC.

    feature: None takes the first of `by_auroc`.
    """
    chosen = by_auroc(material, densest=densest)[0] if feature is None else feature
    return replace(sae_clamp(material, feature=chosen), arm="sae-auroc")


def sae_topk(material: Material, *, k: int = 8, densest: float = DENSEST) -> Prepared:
    """Add the k first candidates together, each as much as its activation differs (FGAA).

    The first is added with strength · max_act as by `sae_add`, which this is with k = 1.

    Raises:
        SteeringError: k is below 1. FeatureError: there is no candidate; fewer than k are noted.
    """
    if k < 1:
        raise SteeringError(f"k={k} features: expected a whole number from 1 up")
    sae, index = material.features()
    found, differences = candidates(material, densest=densest)
    chosen = found[:k]
    shares = (differences[chosen] / differences[chosen[0]]).to(sae.W_dec)
    directions = torch.stack([sae.direction(feature) for feature in chosen])
    vector = _max_act(index, chosen[0]) * (shares[:, None] * directions).sum(0)
    notes = _notes(sae, chosen) | {"shares": shares.tolist()}
    return _adding("sae-topk", material, vector, notes)


def sae_output_filtered(
    material: Material,
    *,
    most: int = 32,
    at_least: float = output_score.STEERS,
    prompts: Sequence[str] | None = None,
    amplification: float = output_score.AMPLIFICATION,
    densest: float = DENSEST,
) -> Prepared:
    """Add the first candidate whose output score is `at_least` (Arad et al. 2025, 2505.20063).

    Args:
        most: candidates scored.
        prompts, amplification: what the score is measured with; noted. None takes a neutral
            opening, and for an index of the embedded model, which knows no English, stories of its
            own language.

    Raises:
        FeatureError: none of them has such a score.
    """
    sae, index = material.features()
    if prompts is None:
        planted = index.meta.get("model_id") == EMBEDDED
        prompts = neutral_prompts() if planted else output_score.NEUTRAL
    found = candidates(material, densest=densest)[0][:most]
    scored = output_score.output_scores(
        material.model,
        material.tokenizer,
        sae,
        found,
        max_act=index.max_act,
        own_tokens=lambda feature: (),
        prompts=prompts,
        amplification=amplification,
    )
    scores = {one.feature: one.score for one in scored if one.score is not None}
    kept = [feature for feature in found if scores.get(feature, -1.0) >= at_least]
    if not kept:
        best = max(scores, key=lambda feature: scores[feature])
        raise FeatureError(
            f"of {len(found)} candidates none has an output score of {at_least:g}: the highest is "
            f"{scores[best]:.3g}, of feature {best}; give prompts that its words could follow, a "
            "larger amplification, or a lower `at_least`"
        )
    vector = _max_act(index, kept[0]) * sae.direction(kept[0])
    notes = _notes(sae, kept[:1]) | {
        "output_score": scores[kept[0]],
        "scored": len(found),
        "kept": len(kept),
        **output_score.settings(prompts, amplification),
    }
    return _adding("sae-output-filtered", material, vector, notes)


def gate(prepared: Prepared, when: When) -> Prepared:
    """An arm whose edits act only where a condition holds, row by row and token by token.

    Raises:
        SteeringError: the arm has no edits, or edits under a condition already.
    """
    edits = prepared.edits(1.0)
    if not edits:
        raise SteeringError(f"the arm {prepared.arm!r} makes no edits, so there is nothing to gate")
    if any(edit.when is not None for edit in edits):
        raise SteeringError(f"the edits of {prepared.arm!r} have a condition already; take it out")

    def under(strength: float) -> list[Edit]:
        return [replace(edit, when=when) for edit in prepared.edits(strength)]

    notes = {**prepared.notes, "when": str(when)}
    return replace(prepared, arm=f"gated {prepared.arm}", edits=under, notes=notes)


def _adding(arm: str, material: Material, vector: Tensor, notes: dict[str, Any]) -> Prepared:
    sae, _ = material.features()
    vector = vector.detach()
    return Prepared(
        arm,
        material.model,
        edits=lambda strength: [Add(vector, strength, sae.write_point, name=arm)],
        notes=notes,
    )


def _notes(sae: Sae, features: Sequence[int]) -> dict[str, Any]:
    return {"features": list(features), "sae": sae.hash, "validation_looks": 0}


def _max_act(index: Index, feature: int) -> float:
    found = index.max_act(feature)
    if not found > 0:
        raise FeatureError(
            f"feature {feature} never fired in the indexed text, so its max_act is no unit; "
            "choose another"
        )
    return found
