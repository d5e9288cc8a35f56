"""Which arms take part in a comparison, what each may choose among, and why the others don't."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from saesteer.compare.arms import ARMS, arm
from saesteer.compare.arms.adapters import LEARNING_RATES
from saesteer.compare.arms.candidates import by_auroc, candidates
from saesteer.compare.arms.prompts import FEWEST_PROMPTS, opened_with
from saesteer.compare.prepared import Material, Prepared
from saesteer.compare.problem import Behaviour, Problem
from saesteer.core.blocks import decoder_layers
from saesteer.core.model import HookPoint
from saesteer.core.sae import Sae
from saesteer.directions.methods import ALTERNATIVES, METHODS
from saesteer.errors import FeatureError, SaesteerError, SteeringError
from saesteer.features.search import Index

SEARCH = "sae-search"
"""Clamp a feature that the index gives for the behaviour's query; no pair is used."""
SETTINGS = 4
"""Settings of an arm that has a list of them: layers, candidates, numbers of examples."""
DRAWS, FEW_DRAWS, CONTROL_DRAWS = 10, 3, 20
CURVE = ("mean-difference", "sae-clamp", "sae-topk")
"""Arms that are fitted on every number of pairs; the others on the headline's."""

CONTROLS = ("random", "shuffled-labels")
_PROMPTS = ("prompt", "few-shot", "contrast-prompt")
_TRAINED = ("sft-lora", "dpo-lora", "sft-augmented", "context-distillation")
_SINGLE = ("sae-clamp", "sae-add", "sae-auroc", "sae-ts")  # of one feature, chosen among candidates
_FEATURES = (*_SINGLE, "sae-topk", "sae-output-filtered", SEARCH)
# What trains, or writes texts to be fitted on, or tries every head.
_SLOW = (*_TRAINED, "sae-ts", "bias-only", "melbo", "function-vector")
_LABEL_FREE = (*CONTROLS, "melbo", "pca-activations", "prompt", SEARCH)
_SHOWN = (2, 4, 8, 16)  # examples of few-shot prompts, and features of sae-topk
_SPREAD = (0.2, 0.4, 0.6, 0.8)
_ICL = 4  # examples that context distillation distils


@dataclass(frozen=True)
class Contender:
    """An arm of this comparison.

    Attributes:
        kind: "features", "vector", "prompt", "trained" or "control".
        settings: what it may choose among, as JSON.
        strengths: whether it has a strength; an arm without one is as strong as it is.
        draws: of pairs (of seeds, for the random control) on the test split.
        fits: whether it is made from pairs at all.
    """

    arm: str
    kind: str
    settings: tuple[Mapping[str, Any], ...]
    strengths: bool = True
    draws: int = DRAWS
    fits: bool = True


def names(problem: Problem) -> list[str]:
    """The arms asked for: those of the problem, or all there are."""
    return list(dict.fromkeys(problem.arms or (*ARMS, SEARCH)))


def contender(
    name: str,
    problem: Problem,
    behaviour: Behaviour,
    model: PreTrainedModel,
    sae: Sae | None,
    index: Index | None,
) -> Contender | str:
    """An arm that takes part, or why it doesn't, in words.

    Raises:
        SteeringError: there is no such arm. HookPointError: a layer that the model doesn't have.
    """
    if name != SEARCH:
        arm(name)
    if why := _not_afforded(name, problem, behaviour, sae, index):
        return why
    if name == SEARCH:
        assert index is not None  # `_not_afforded`
        query = behaviour.query or " ".join(behaviour.words)
        try:
            hits = index.search(query, limit=SETTINGS)
        except SaesteerError as error:
            return str(error)
        if not hits:
            return f"the index has no feature for the query {query!r}"
        settings: Sequence[Mapping[str, Any]] = [{"feature": hit.id} for hit in hits]
        return Contender(name, "features", tuple(settings), draws=1, fits=False)
    kind, strengths = "vector", True
    if name in CONTROLS:
        kind, settings = "control", _layers(problem, model, sae)
    elif name in _FEATURES:
        kind = "features"
        settings = [{"candidate": i} for i in range(SETTINGS)]
        if name == "sae-ts":  # each is fitted on hundreds of texts
            settings = settings[:1]
        elif name == "sae-topk":
            settings = [{"k": k} for k in _SHOWN]
        elif name == "sae-output-filtered":
            settings = [{}]
    elif name in _PROMPTS:
        kind, strengths = "prompt", False
        settings = [{"k": k} for k in _SHOWN]
        if name == "prompt":
            settings = [{"written": text} for text in dict.fromkeys(behaviour.written)]
    elif name in _TRAINED:
        kind, strengths = "trained", False
        settings = [{"learning_rate": rate} for rate in LEARNING_RATES]
    elif name == "iti":
        settings = [{"direction": how} for how in ("mass-mean", "probe")]
    elif name == "icv":
        settings = [{}]
    elif name in METHODS:
        settings = _layers(problem, model, sae)
        if name == "act-add":  # it is read and added where a block begins
            layers = dict.fromkeys(HookPoint.parse(one["point"]).layer for one in settings)
            settings = [{"point": f"layers.{layer}.resid_pre"} for layer in layers]
    else:
        settings = [{}]
    draws = CONTROL_DRAWS if name == "random" else FEW_DRAWS if name in _SLOW else DRAWS
    fits = name != "prompt"
    return Contender(name, kind, tuple(settings), strengths, draws if fits else 1, fits)


def prepare(
    contender: Contender,
    setting: Mapping[str, Any],
    material: Material,
    *,
    model_points: Sequence[HookPoint],
    **how: Any,
) -> tuple[Prepared, dict[str, Any]]:
    """An arm made ready at a setting, and the setting with what it came to (its feature).

    Args:
        model_points: the stream after every block, for methods of all blocks.
        how: what every method of `directions` is handed, such as `cache`.

    Raises:
        SaesteerError: the arm can't be made so from these pairs.
    """
    name, options = contender.arm, dict(setting)
    if name == SEARCH:
        made = arm("sae-clamp")(material, feature=options["feature"])
        return replace(made, arm=SEARCH), options
    if name in _SINGLE:
        feature = _candidate(name, material, options)
        return arm(name)(material, feature=feature), {**options, "feature": feature}
    if name == "prompt":
        transform = opened_with(options["written"])
        return Prepared(name, material.model, transform), options
    if name in _TRAINED:
        given: dict[str, Any] = {"learning_rates": [options["learning_rate"]]}
        if name == "context-distillation":
            given["transform"] = arm("few-shot")(material, k=_ICL).prompt_transform
        return arm(name)(material, **given), options
    if name in METHODS:
        points = model_points
        if "point" in options:
            points = [HookPoint.parse(options.pop("point"))]
        if name == "act-add":  # it is of one pair
            material = replace(material, pairs=material.pairs[:1])
        return arm(name)(material, points=points, **options, **how), dict(setting)
    return arm(name)(material, **options), options


def layers(problem: Problem, model: PreTrainedModel, sae: Sae | None) -> list[HookPoint]:
    """Where directions may be fitted: the problem's, or four spread over the model, the SAE's own
    place among them in place of the nearest.

    Raises:
        HookPointError: no such place is written so.
    """
    if problem.layers:
        return [HookPoint.parse(text) for text in problem.layers]
    n = len(decoder_layers(model))
    # Of more than five blocks neither the first, where little is known yet, nor the last.
    spread = range(min(n, 4)) if n < 6 else [round((n - 1) * share) for share in _SPREAD]
    found = [HookPoint(layer, "resid_post") for layer in spread]
    if sae is not None and sae.write_point not in found:
        own = sae.write_point
        nearest = min(found, key=lambda point: abs(point.layer - own.layer))
        found[found.index(nearest)] = own
    return found


def _layers(problem: Problem, model: PreTrainedModel, sae: Sae | None) -> list[dict[str, Any]]:
    return [{"point": str(point)} for point in layers(problem, model, sae)]


def _candidate(name: str, material: Material, setting: Mapping[str, Any]) -> int:
    """The feature that validation chose, where these pairs bring it forth too; else the candidate
    of its rank."""
    ranked = by_auroc(material) if name == "sae-auroc" else candidates(material)[0]
    found = ranked[:SETTINGS]
    rank = int(setting["candidate"])
    if setting.get("feature") in found:
        return int(setting["feature"])
    if rank >= len(found):
        raise FeatureError(
            f"these pairs give {len(found)} candidate features, and number {rank + 1} is asked for"
        )
    return found[rank]


def _not_afforded(
    name: str, problem: Problem, behaviour: Behaviour, sae: Sae | None, index: Index | None
) -> str:
    """Why the problem doesn't let an arm take part; "" where it does."""
    may = problem.affordances
    if name == "gated":
        return "it needs an arm to gate and a condition, which a problem doesn't give"
    if name not in _LABEL_FREE and not may.labels:
        return "it needs to know which answer is the chosen one, and [affordances] labels is false"
    if name in _FEATURES:
        if not may.sae:
            return "it needs an SAE, and [affordances] sae is false"
        if sae is None or index is None:
            missing = "SAE" if sae is None else "index"
            return f"it needs an SAE and its index, and the run has no {missing}"
    if name == SEARCH:
        if not may.description:
            return "it searches features by a description, and [affordances] description is false"
        if not (behaviour.query or behaviour.words):
            return "the behaviour has neither a query nor words to search features by"
    if name in _TRAINED and not may.weights:
        return "it trains weights, and [affordances] weights is false"
    if name in _PROMPTS:
        if may.tokens == 0:
            return "it makes prompts longer, and [affordances] tokens is 0"
        if problem.deployment == "chat":
            return "it puts text before a prompt, which a chat's own markers begin"
    if name == "prompt" and len(set(behaviour.written)) < FEWEST_PROMPTS:
        return f"the behaviour has fewer than {FEWEST_PROMPTS} different written prompts"
    return ""


def inner_budget(contender: Contender, share: int) -> int:
    """How many looks an arm may take for itself of a setting's share of the budget: half, where a
    method gives alternatives."""
    return max(1, share // 2) if contender.arm in ALTERNATIVES else 1


def check_tokens(problem: Problem, more: float) -> None:
    """SteeringError where an arm's prompts are longer than the problem affords.

    more: tokens that it adds to a prompt.
    """
    allowed = problem.affordances.tokens
    if allowed >= 0 and more > allowed:
        raise SteeringError(
            f"its prompts are {more:.0f} tokens longer, and [affordances] tokens is {allowed}"
        )
