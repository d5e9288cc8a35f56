"""Activation addition: the difference of two prompts, token by token (Turner et al. 2023).

arXiv 2308.10248.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.hooks import activations
from saesteer.core.model import HookPoint, fingerprint
from saesteer.directions.direction import Direction, Use
from saesteer.directions.pairs import Pair
from saesteer.directions.places import side_tokens
from saesteer.directions.rows import check_length
from saesteer.errors import HookPointError, PairsError


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    points: Sequence[HookPoint],
    *,
    seed: int = 0,
) -> list[Direction]:
    """v_t = act(p⁺)_t − act(p⁻)_t of ONE pair, for every place t of the prompts.

    The two prompts begin together, and the shorter one is filled up with spaces. Each v_t [d_model]
    is added to the token at its own place of a prompt, in the prompt alone: tokens generated from a
    cache are not edited. Where both prompts still read the same the difference is zero, and there
    is no direction. Places beyond the end of a prompt are left out. The paper multiplies by 3 to
    15.

    Args:
        pairs: one; a side is its prompt followed by its answer.
        points: `resid_pre` of any blocks.
        seed: not used: nothing is drawn.

    Returns:
        of each point, a direction for each place, in order.

    Raises:
        PairsError: not one pair, sides with the same tokens, or of different lengths where the
            tokenizer has no one token for a space.
        HookPointError: another site, or a place that the model doesn't have.
    """
    if len(pairs) != 1:
        raise PairsError(
            f"act-add takes one pair and was given {len(pairs)}; choose one, or use mean-difference"
        )
    for point in points:
        if point.site != "resid_pre":
            near = point.layer + (point.site == "resid_post")
            raise HookPointError(
                f"{point}: act-add is for the stream as it enters a block; "
                f"use layers.{near}.resid_pre"
            )
    plus, minus = _aligned(tokenizer, pairs[0])
    for ids in (plus, minus):
        check_length(model, ids, "the pair")
    first = next((i for i, (a, b) in enumerate(zip(plus, minus, strict=True)) if a != b), None)
    if first is None:
        raise PairsError("both sides of the pair have the same tokens; give two that differ")
    found = activations(model, points, torch.tensor([plus, minus]))
    bos = int(tokenizer.bos_token_id is not None)
    name = fingerprint(model)
    directions = []
    for point in points:
        x = found[point].float().cpu()
        for t in range(first, len(plus)):
            directions.append(
                Direction(
                    x[0, t] - x[1, t],
                    point,
                    "act-add",
                    1,
                    "prompt",
                    name,
                    {"chosen": pairs[0].chosen, "rejected": pairs[0].rejected, "bos": bos},
                    Use(where="prompt", position=t - bos),
                )
            )
    return directions


def _aligned(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> tuple[list[int], list[int]]:
    """Ids of both sides, as many: BOS where there is one, the text, and spaces."""
    plus, minus = (
        side_tokens(tokenizer, pair.prompt, answer).ids for answer in (pair.chosen, pair.rejected)
    )
    longest = max(len(plus), len(minus))
    if len(plus) == len(minus):
        return plus, minus
    space = _space(tokenizer)
    if space is None:
        raise PairsError(
            f"the sides of the pair have {len(plus)} and {len(minus)} tokens, and this tokenizer "
            "has no token for a space to fill up the shorter one; give sides of one length"
        )
    a, b = (ids + [space] * (longest - len(ids)) for ids in (plus, minus))
    return a, b


def _space(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The one token that a space is, None where there is none.

    A tokenizer like Llama's puts a marker before every text, which a lone space then follows: as
    the same token, or as another.
    """
    ids = list(tokenizer.encode(" ", add_special_tokens=False))
    if len(ids) == 2 and tokenizer.convert_ids_to_tokens(ids[0]) == "▁":
        ids = ids[1:]
    if len(set(ids)) != 1 or ids[0] in tokenizer.all_special_ids:
        return None
    return ids[0]
