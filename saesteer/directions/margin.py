"""How much likelier a model finds the chosen answer of each pair than the rejected one."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.model import device_of
from saesteer.directions.pairs import Pair
from saesteer.directions.places import Side, side_tokens
from saesteer.directions.rows import check_length, padded
from saesteer.errors import PairsError


def margins(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 32,
) -> Tensor:
    """m = log p(chosen) − log p(rejected), each the mean over the answer's tokens: [n] float32.

    In nats a token. Edits that are on the model when it is called count, and gradients flow where
    they are on; call it under `torch.no_grad()` where none are wanted.

    Raises:
        PairsError: an answer without a token that something stands before, or a pair longer than
            the model's contexts.
    """
    sides = [
        side_tokens(tokenizer, pair.prompt, answer)
        for pair in pairs
        for answer in (pair.chosen, pair.rejected)
    ]
    for i, side in enumerate(sides):
        if len(side.ids) <= max(1, side.start):
            raise PairsError(
                f"pair {i // 2 + 1}: an answer has no token whose probability could be told; give "
                "it some text, and a prompt where the tokenizer has no BOS"
            )
        check_length(model, side.ids, f"pair {i // 2 + 1}")
    # Sequences of one length together, so that little is padded.
    order = sorted(range(len(sides)), key=lambda i: len(sides[i].ids))
    found: list[Tensor] = [torch.empty(0)] * len(sides)
    for first in range(0, len(order), batch_size):
        some = order[first : first + batch_size]
        for i, value in zip(some, _log_probs(model, [sides[i] for i in some]), strict=True):
            found[i] = value
    if not found:
        return torch.empty(0)
    each = torch.stack(found)
    return each[0::2] - each[1::2]


def _log_probs(model: PreTrainedModel, sides: Sequence[Side]) -> Tensor:
    """Mean log probability of each side's answer tokens: [batch] float32 on the CPU."""
    ids, mask = padded([side.ids for side in sides])
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    for i, side in enumerate(sides):
        wanted[i, max(1, side.start) : len(side.ids)] = True
    device = device_of(model)
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    # Only the answers' rows are made float32: a vocabulary can have 256,000 entries.
    rows = logits[:, :-1][wanted[:, 1:].to(logits.device)].float()
    targets = ids[wanted].to(rows.device)
    each = -torch.nn.functional.cross_entropy(rows, targets, reduction="none").cpu()
    owner = wanted.nonzero()[:, 0]
    total = torch.zeros(len(sides)).index_add(0, owner, each)
    return total / wanted.sum(1)
