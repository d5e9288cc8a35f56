"""Function vectors: what the heads that carry a task say, on average (Todd et al. 2024).

arXiv 2310.15213.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.blocks import decoder_layers
from saesteer.core.hooks import activations, edit
from saesteer.core.model import HookPoint, device_of, fingerprint
from saesteer.core.tokens import Tokens
from saesteer.directions.direction import Direction
from saesteer.directions.heads import all_heads, output_weight
from saesteer.directions.pairs import Pair
from saesteer.directions.places import Side
from saesteer.directions.rows import both_sides, contexts_hold, padded
from saesteer.errors import HookPointError, PairsError, did_you_mean

Corrupt = Literal["rejected", "shuffled"]


class Trial(NamedTuple):
    """A question with demonstrations before it, right and wrong ones, and its answer's token."""

    clean: list[int]
    corrupted: list[int]
    answer: int
    shots: int


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    points: Sequence[HookPoint],
    *,
    seed: int = 0,
    heads: int = 10,
    shots: int = 10,
    trials: int = 25,
    corrupt: Corrupt = "rejected",
    separator: str = "\n\n",
    batch_size: int = 8,
) -> list[Direction]:
    """Σ W_O · mean output over the heads with the largest mean causal indirect effect.

    A trial asks one pair's prompt after demonstrations, other pairs' prompts with their chosen
    answers. A head's mean output is over those, at the last token. Its indirect effect is how much
    likelier the chosen answer's token gets when that mean takes the place of the head's output
    at the last token after wrong demonstrations. In bfloat16 an effect smaller than the rounding of
    a probability is noise, and other heads are taken: load the model in float32 for this.

    Args:
        points: where the sum [d_model] is to be added; the same vector at each (the paper: a third
            of the way up). Heads of all blocks are tried.
        seed: of the trials.
        heads, shots, trials: how many; fewer shots where the contexts don't hold as many.
        corrupt: wrong demonstrations have the "rejected" answers, or the chosen ones "shuffled"
            among their prompts, as in the paper (which corrupts nothing where a behaviour has one
            answer to everything).
        separator: text between demonstrations.
        batch_size: prompts a forward pass; there are as many rounds as there are heads.

    Raises:
        PairsError: fewer than two pairs, one that can't be read, none whose answers begin to
            differ before one of them ends, contexts too short for one demonstration, or a count
            below 1.
        HookPointError: a head, or a place that the model doesn't have.
    """
    if corrupt not in get_args(Corrupt):
        hint = did_you_mean(corrupt, get_args(Corrupt))
        raise PairsError(f"unknown corrupt {corrupt!r}{hint}; use one of {get_args(Corrupt)}")
    for name, value in (("heads", heads), ("shots", shots), ("trials", trials)):
        if value < 1:
            raise PairsError(f"{name}={value}: expected a whole number from 1 up")
    for point in points:
        if point.head is not None:
            raise HookPointError(
                f"{point}: a function vector is added to the stream; use resid_pre"
            )
    made = _trials(model, tokenizer, pairs, shots, trials, corrupt, separator, seed)
    candidates = all_heads(model, range(len(decoder_layers(model))))
    means = _mean_outputs(model, candidates, made, batch_size)
    effects = indirect_effects(model, means, made, batch_size)
    best = sorted(candidates, key=lambda head: -effects[head])[:heads]
    vector = torch.stack(
        [output_weight(model, head).double().cpu() @ means[head].double() for head in best]
    ).sum(0)
    facts = {
        "heads": [[head.layer, head.head, effects[head]] for head in best],
        "trials": len(made),
        "shots": min(trial.shots for trial in made),
        "corrupt": corrupt,
    }
    name = fingerprint(model)
    return [
        Direction(vector.float(), point, "function-vector", len(pairs), "prompt-last", name, facts)
        for point in points
    ]


@torch.no_grad()
def indirect_effects(
    model: PreTrainedModel,
    means: dict[HookPoint, Tensor],
    trials: Sequence[Trial],
    batch_size: int = 8,
) -> dict[HookPoint, float]:
    """Of each head, the mean over trials of how much its mean output [d_head], put in the place of
    its output at the last token of the corrupted prompt, adds to the answer's probability."""
    sums = dict.fromkeys(means, 0.0)
    for first in range(0, len(trials), batch_size):
        batch = trials[first : first + batch_size]
        rows = [trial.corrupted for trial in batch]
        answers = torch.tensor([trial.answer for trial in batch])
        before = _answer_probability(model, rows, answers)
        for head, mean in means.items():
            with edit(model, {head: _put(mean, rows)}):
                after = _answer_probability(model, rows, answers)
            sums[head] += float((after - before).sum())
    return {head: total / len(trials) for head, total in sums.items()}


def _put(mean: Tensor, rows: Sequence[Sequence[int]]) -> Callable[[Tensor, Tokens], Tensor]:
    last = torch.tensor([len(row) - 1 for row in rows])

    def change(x: Tensor, tokens: Tokens) -> Tensor:
        new = x.clone()
        new[torch.arange(len(rows)), last] = mean.to(x.device, x.dtype)
        return new

    return change


def _answer_probability(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], answers: Tensor
) -> Tensor:
    """p(answer | row) of each: [rows], float64, on the CPU."""
    ids, mask = (each.to(device_of(model)) for each in padded(rows))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    last = torch.tensor([len(row) - 1 for row in rows], device=logits.device)
    told: Tensor = (
        logits[torch.arange(len(rows), device=logits.device), last].double().softmax(-1).cpu()
    )
    return told.gather(1, answers[:, None])[:, 0]


def _mean_outputs(
    model: PreTrainedModel, heads: Sequence[HookPoint], trials: Sequence[Trial], batch_size: int
) -> dict[HookPoint, Tensor]:
    """Each head's output at the last token of the clean prompts, on average: [d_head]."""
    sums: dict[HookPoint, Tensor] = {}
    for first in range(0, len(trials), batch_size):
        rows = [trial.clean for trial in trials[first : first + batch_size]]
        found = activations(model, heads, *padded(rows))
        last = torch.tensor([len(row) - 1 for row in rows])
        for head, x in found.items():
            part = x.double().cpu()[torch.arange(len(rows)), last].sum(0)
            sums[head] = sums[head] + part if head in sums else part
    return {head: total / len(trials) for head, total in sums.items()}


def _trials(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    shots: int,
    wanted: int,
    corrupt: Corrupt,
    separator: str,
    seed: int,
) -> list[Trial]:
    sides = both_sides(model, tokenizer, pairs)
    if len(sides) < 2:
        raise PairsError("one contrast pair; a function vector needs another to show beforehand")
    asked = [i for i, both in enumerate(sides) if _split(*both) is not None]
    if not asked:
        raise PairsError(
            "no pair's answers begin to differ before one of them ends; give answers of which "
            "neither is the other's beginning"
        )
    rng = np.random.default_rng(seed)
    between = [
        token
        for token in tokenizer.encode(separator, add_special_tokens=False)
        if token not in tokenizer.all_special_ids  # a tokenizer of words alone
    ]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    order = [asked[i] for i in rng.permutation(len(asked))]
    room = contexts_hold(model)
    trials = []
    for n in range(wanted):
        at = order[n % len(order)]
        split = _split(*sides[at])
        assert split is not None
        question, answer = split
        others = [i for i in range(len(sides)) if i != at]
        shown = [others[i] for i in rng.permutation(len(others))[:shots]]
        while shown:
            clean, corrupted = _shown([sides[i] for i in shown], corrupt, between, len(bos))
            longest = max(len(clean), len(corrupted)) + len(question)
            if room is None or longest <= room:
                break
            shown.pop()
        else:
            raise PairsError(
                f"the model's contexts hold {room} tokens, too few for pair {at + 1} after one "
                "demonstration; give shorter pairs"
            )
        rest = question[len(bos) :]
        trials.append(Trial([*bos, *clean, *rest], [*bos, *corrupted, *rest], answer, len(shown)))
    return trials


def _split(chosen: Side, rejected: Side) -> tuple[list[int], int] | None:
    """The text up to where the two sides differ, and the chosen side's token there."""
    for i, (a, b) in enumerate(zip(chosen.ids, rejected.ids, strict=False)):
        if a != b:
            return chosen.ids[:i], a
    return None


def _shown(
    sides: Sequence[tuple[Side, Side]], corrupt: Corrupt, between: list[int], bos: int
) -> tuple[list[int], list[int]]:
    """Ids of the demonstrations, right and wrong, without BOS."""
    clean: list[int] = []
    corrupted: list[int] = []
    for i, (chosen, rejected) in enumerate(sides):
        prompt = chosen.ids[bos : chosen.start]
        right = chosen.ids[chosen.start :]
        if corrupt == "rejected":
            wrong = rejected.ids[rejected.start :]
        else:  # every prompt gets its neighbour's answer
            other = sides[(i + 1) % len(sides)][0]
            wrong = other.ids[other.start :]
        clean += [*prompt, *right, *between]
        corrupted += [*prompt, *wrong, *between]
    return clean, corrupted
