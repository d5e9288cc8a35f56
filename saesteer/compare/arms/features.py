"""Arms that steer with features of an SAE, chosen from the pairs.

Features are ranked by how much more they are active on the chosen answers than on the rejected
ones; those that fire on more than 1% of all tokens, and those most active on BOS, are left out
(Soo et al. 2025, FGAA, arXiv 2501.09929). Strengths count in units of max_act, the highest
activation in the index.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.compare.prepared import Material, Prepared
from saesteer.core.hooks import reading
from saesteer.core.model import EMBEDDED, special_token_ids
from saesteer.core.sae import Sae
from saesteer.directions.answers import side_tokens
from saesteer.directions.pairs import Pair
from saesteer.effects import output_score
from saesteer.effects.damage import padded
from saesteer.effects.planted_causes import neutral_prompts
from saesteer.errors import FeatureError, PairsError, SteeringError
from saesteer.features.search import Index
from saesteer.steering.conditions import When
from saesteer.steering.edits import Add, Clamp, Edit

DENSEST = 0.01
"""Features that fire on a larger share of all tokens are about nothing in particular."""


def activation_differences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: Sae,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 32,
) -> Tensor:
    """Mean over pairs of a_f(chosen) − a_f(rejected), each the mean over the answer: [d_sae].

    Features are read token by token, and means taken of activations: an encoder is not linear.
    Special tokens in an answer are left out. float64 on the CPU.

    Raises:
        PairsError: an answer without tokens.
    """
    special = special_token_ids(model, tokenizer)
    sides, weights = [], []
    for number, pair in enumerate(pairs, 1):
        for answer, sign in ((pair.chosen, 1.0), (pair.rejected, -1.0)):
            side = side_tokens(tokenizer, pair.prompt, answer)
            plain = [i for i in range(side.start, len(side.ids)) if side.ids[i] not in special]
            if not plain:
                raise PairsError(f"pair {number}: {answer!r} has no tokens to read; give it text")
            row = torch.zeros(len(side.ids), dtype=torch.float64)
            row[plain] = sign / len(plain) / len(pairs)
            sides.append(side.ids)
            weights.append(row)
    order = sorted(range(len(sides)), key=lambda i: len(sides[i]))
    total = torch.zeros(sae.d_sae, dtype=torch.float64)
    with reading(model, [sae.hook_point]) as read, torch.no_grad():
        for first in range(0, len(order), batch_size):
            some = order[first : first + batch_size]
            ids, mask = padded([sides[i] for i in some])
            x = read(ids, mask)[sae.hook_point]
            weight = torch.nn.utils.rnn.pad_sequence([weights[i] for i in some], batch_first=True)
            wanted = weight != 0  # padding may hold anything, NaN too
            codes = sae.encode(x[wanted.to(x.device)])
            values = codes.values.double().cpu() * weight[wanted][codes.rows.cpu()]
            total.index_add_(0, codes.latents.cpu(), values)
    return total


def candidates(material: Material, *, densest: float = DENSEST) -> tuple[list[int], Tensor]:
    """Features that are more active on the chosen answers, the most so first; and differences.

    Left out are those that the index never saw fire, those denser than `densest`, and those that
    are more active on BOS than on any text. The differences are of all features, [d_sae].

    Raises:
        FeatureError: none is left. SaeError, IndexingError: see `Material.features`.
    """
    sae, index = material.features()
    differences = activation_differences(material.model, material.tokenizer, sae, material.pairs)
    density, max_act = (
        torch.from_numpy(index.column(name).copy()) for name in ("density", "max_act")
    )
    kept = (differences > 0) & (max_act > 0) & (density <= densest)
    kept &= _on_bos(material.model, material.tokenizer, sae) <= max_act
    order = differences.argsort(descending=True, stable=True)
    found = [int(feature) for feature in order if kept[feature]]
    if not found:
        raise FeatureError(
            f"no feature is more active on the chosen answers and fires on at most {densest:g} of "
            "all tokens; give more pairs, a larger `densest`, or an SAE of another layer"
        )
    return found, differences


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


def _on_bos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sae: Sae) -> Tensor:
    """Each feature's activation on BOS, [d_sae]; zeros where the tokenizer has none."""
    found = torch.zeros(sae.d_sae)
    if tokenizer.bos_token_id is None:
        return found
    with reading(model, [sae.hook_point]) as read, torch.no_grad():
        codes = sae.encode(read(torch.tensor([[tokenizer.bos_token_id]]))[sae.hook_point])
    found[codes.latents.cpu()] = codes.values.float().cpu()
    return found
