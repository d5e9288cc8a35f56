"""What adding a feature does to the next token: its output score, and its effect on its own words.

A feature that fires on a concept need not cause it, so two figures are measured by adding c to the
feature's activation on every plain token of neutral prompts, in one forward pass each:

    output score  S = P_steered − P_base,  P = (1 − rank(ℓ*)/V) · p(ℓ*)
    own effect        Σ p_steered(t) − Σ p_base(t)  over the tokens t on which it fires

ℓ are the 20 tokens that its decoder direction promotes by the logit lens, ℓ* the one of them that
ranks best in the pass, rank counts from 0 among V tokens, and c = amplification × max_act. The
output score says whether what a feature promotes by its weights comes true (Arad et al. 2025,
arXiv 2505.20063, which adds 10 times the token's highest activation, at the last token alone); the
own effect says whether it brings about what it fires on. Both are means over the prompts. Small
amplifications tell more of causing: on the planted language those of ¼ to ½ did best.
"""

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saesteer.core.generate import Prompt, prompt_ids
from saesteer.core.hooks import activations
from saesteer.core.model import special_token_ids
from saesteer.core.sae import Sae
from saesteer.errors import SteeringError, TextError
from saesteer.features.records import Feature
from saesteer.features.weights import logit_lens
from saesteer.steering.edits import Add
from saesteer.steering.engine import steer

NEUTRAL = ("From my experience,",)
AMPLIFICATION = 0.5
TOP = 20
# A feature with this output score or more is one to steer with (Arad et al. 2025).
STEERS = 0.1

# A token is a feature's own where it occurs this many times more often where the feature fires.
_OWN_LIFT = 2.0
# Elements of one pass's logits, 64 MB in float32, and rows at the most.
_CHUNK, _ROWS = 2**24, 256


@dataclass(frozen=True)
class Output:
    """What adding a feature does; None where it can't be told.

    Attributes:
        score: the output score, −1 to 1; None for a feature that never fired.
        own: the own effect, −1 to 1; None for one whose own tokens aren't known either.
    """

    feature: int
    score: float | None
    own: float | None


def settings(
    prompts: Sequence[str] = NEUTRAL, amplification: float = AMPLIFICATION
) -> dict[str, Any]:
    """What the figures were measured with, to be stated beside them; JSON."""
    return {"prompts": list(prompts), "amplification": amplification, "top": TOP}


def own_tokens(feature: Feature) -> list[int]:
    """The ids of the tokens that a feature fires on, by what is indexed of it: `TOP` at the most.

    Those that tell most of it (share · log lift) and are more than twice as frequent where it
    fires as elsewhere; none of a feature that fires on anything.
    """
    telling = [token for token in feature.tokens if token.lift >= _OWN_LIFT]
    telling.sort(key=lambda token: -token.share * math.log(token.lift))
    return [token.id for token in telling[:TOP]]


@torch.no_grad()
def output_scores(
    model: PreTrainedModel,
    tokenizer: Any,
    sae: Sae,
    features: Iterable[int],
    *,
    max_act: Callable[[int], float],
    own_tokens: Callable[[int], Sequence[int]],
    prompts: Sequence[Prompt] = NEUTRAL,
    amplification: float = AMPLIFICATION,
) -> Iterator[Output]:
    """Measure features one after the other, many in one batch.

    Args:
        features: in any order, and possibly very many: they are taken as they are needed.
        max_act: of a feature, in raw units.
        own_tokens: the ids of the tokens that a feature fires on (see `own_tokens`), in no order.
        prompts: neutral text, in which what the features stand for could well come next; or token
            ids.
        amplification: in units of max_act.

    Yields:
        An `Output` for each feature, in order.

    Raises:
        TextError: no prompt, or one that is empty or too long for the model.
        SteeringError: an amplification that is not positive, or one that makes the logits NaN.
        FeatureError: a feature that the SAE doesn't have.
        ModelError: what the SAE writes to isn't what the unembedding reads.
    """
    if not prompts:
        raise TextError("no prompt to measure output scores on; give one at least")
    if not 0 < amplification < float("inf"):
        raise SteeringError(f"an amplification of {amplification}: give a number above 0, as 0.5")
    rows, _ = prompt_ids(tokenizer, prompts, prepend_bos=sae.prepend_bos)
    _check_room(model, rows)
    special = special_token_ids(model, tokenizer)
    neutral = [_Prompt(model, tokenizer, sae, row, special) for row in rows]
    vocabulary = neutral[0].logits.shape[-1]
    # Ids past the tokenizer's are padding of the embedding matrix: they are no tokens.
    hidden = {*special, *range(len(tokenizer), vocabulary)}
    width = 1 if neutral[0].last_only else max(map(len, rows))
    at_once = max(1, min(_ROWS, _CHUNK // (width * vocabulary)))
    waiting = iter(features)
    while some := list(islice(waiting, at_once)):
        alive = [feature for feature in some if max_act(feature) > 0]
        found: dict[int, tuple[float, float | None]] = {}
        if alive:
            directions = torch.stack([sae.direction(feature) for feature in alive])
            lens = logit_lens(model, directions, top=TOP, exclude=hidden)
            promoted = torch.from_numpy(lens.promoted)
            own = [sorted(set(own_tokens(feature))) for feature in alive]
            amounts = [amplification * max_act(feature) for feature in alive]
            score, effect = torch.zeros(2, len(alive), dtype=torch.float64)
            for prompt in neutral:
                steered, base = prompt.steered(alive, amounts).cpu(), prompt.logits.cpu()
                score += power(steered, promoted) - power(base.expand_as(steered), promoted)
                effect += _mass(steered, own) - _mass(base.expand_as(steered), own)
            for i, feature in enumerate(alive):
                mean = float(effect[i]) / len(neutral) if own[i] else None
                found[feature] = float(score[i]) / len(neutral), mean
        for feature in some:
            yield Output(feature, *found.get(feature, (None, None)))


def power(logits: Tensor, tokens: Tensor) -> Tensor:
    """P = (1 − rank(ℓ*)/V) · p(ℓ*) of each row, ℓ* the likeliest of the row's tokens.

    Of equally likely tokens none ranks before another.

    Args:
        logits: [n, V]; tokens: [n, k] ids.

    Returns:
        [n] float64.
    """
    p = logits.double().softmax(-1)
    best = p.gather(-1, tokens).amax(-1, keepdim=True)
    rank = (p > best).sum(-1)
    return (1 - rank / p.shape[-1]) * best[:, 0]


def _mass(logits: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
    """Probability that each row gives to its own tokens together: [n] float64."""
    p = logits.double().softmax(-1)
    return torch.stack([p[i, list(some)].sum() for i, some in enumerate(tokens)])


class _Prompt:
    """A neutral prompt, what the unedited model makes of it, and what it makes of it steered.

    logits: [1, V] of the next token. Every row of a batch is the same prompt, so nothing is padded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        sae: Sae,
        row: Sequence[int],
        special: Collection[int],
    ) -> None:
        self._model, self._tokenizer, self._sae = model, tokenizer, sae
        self._ids = torch.tensor([list(row)], device=model.device)
        plain = torch.tensor([token not in special for token in row], device=model.device)
        if not bool(plain.any()):
            raise TextError("a neutral prompt of special tokens alone; give one with words")
        # Where the model can, it makes the last token's logits alone.
        self.last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.logits = self._next(1)
        self._x = activations(model, [sae.hook_point], self._ids)[sae.hook_point][0, plain]

    def steered(self, features: Sequence[int], amounts: Sequence[float]) -> Tensor:
        """Logits [n, V] where row i adds amounts[i] to the activation of features[i].

        Where the SAE normalises its input, that is worth another vector on each token, and the
        mean of them is added to all.
        """
        x = self._x.to(self._sae.W_dec)
        edits = []
        for feature, amount in zip(features, amounts, strict=True):
            added = self._sae.write(x.new_full((len(x), 1), amount), [feature], x).mean(dim=0)
            edits.append([Add(added, 1.0, self._sae.write_point)])
        with steer(self._model, edits, tokenizer=self._tokenizer):
            logits = self._next(len(edits))
        if not bool(logits.isfinite().all()):
            raise SteeringError(
                "the model's logits are NaN or infinite under the edit; lower the amplification, "
                "or load the model with --dtype float32"
            )
        return logits

    def _next(self, n: int) -> Tensor:
        keep = {"logits_to_keep": 1} if self.last_only else {}
        ids = self._ids.expand(n, -1)
        return self._model(input_ids=ids, use_cache=False, **keep).logits[:, -1].float()


def _check_room(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> None:
    room = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, rows))
    if room is not None and longest > room:
        raise TextError(
            f"a neutral prompt of {longest} tokens does not fit into the model's {room} "
            "positions; give a shorter one"
        )
