"""How much likelier a model finds the chosen answer of each pair than the rejected one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.model import device_of, special_token_ids
from saesteer.directions.pairs import Pair
from saesteer.directions.places import side_tokens
from saesteer.directions.rows import check_length, padded
from saesteer.errors import PairsError


class Answer(NamedTuple):
    """One side of a pair as token ids; its answer begins at `start`, and of its tokens those at
    `counted` are scored: neither special nor the very first of the text."""

    ids: list[int]
    start: int
    counted: list[int]


def margins(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 32,
) -> Tensor:
    """m = log p(chosen) − log p(rejected), each the mean over the answer's tokens: [n] float32.

    In nats a token, on the CPU; an answer's special tokens are left out. Edits that are on the
    model when it is called count, and gradients flow where they are on; call it under
    `torch.no_grad()` where none are wanted.

    Raises:
        PairsError: as `answers_of`.
    """
    both = likelihoods(model, tokenizer, pairs, batch_size=batch_size)
    return both[:, 0] - both[:, 1]


def likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 32,
) -> Tensor:
    """Mean log probability of each pair's chosen and rejected answer, in nats a token: [n, 2].

    As `margins`, which is their difference.

    Raises:
        PairsError: as `answers_of`.
    """
    sides = answers_of(model, tokenizer, pairs)
    # Sequences of one length together, so that little is padded.
    order = sorted(range(len(sides)), key=lambda i: len(sides[i].ids))
    found: list[Tensor] = [torch.empty(0)] * len(sides)
    device = device_of(model)
    for first in range(0, len(order), batch_size):
        some = order[first : first + batch_size]
        ids, mask = (t.to(device) for t in padded([sides[i].ids for i in some]))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        scored = predicted([sides[i] for i in some])
        for i, value in zip(some, answer_log_probs(logits, ids, scored), strict=True):
            found[i] = value.float()
    return torch.stack(found).reshape(-1, 2) if found else torch.empty(0, 2)


def answers_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]
) -> list[Answer]:
    """The chosen and the rejected side of each pair in turn: 2n.

    Raises:
        PairsError: an answer without a token that isn't special and that something stands before,
            or a pair longer than the model's contexts.
    """
    special = special_token_ids(model, tokenizer)
    found = []
    for i, pair in enumerate(pairs, 1):
        for text in (pair.chosen, pair.rejected):
            ids, start = side_tokens(tokenizer, pair.prompt, text)
            # Nothing comes before the very first token to predict it from.
            counted = [j for j in range(max(1, start), len(ids)) if ids[j] not in special]
            if not counted:
                raise PairsError(
                    f"pair {i}: {text!r} has no token to predict, special ones left out; give it "
                    "some text, and a prompt where the tokenizer has no BOS"
                )
            check_length(model, ids, f"pair {i}")
            found.append(Answer(ids, start, counted))
    return found


def predicted(answers: Sequence[Answer]) -> Tensor:
    """Where the next token is one that is scored: bool [rows, longest − 1]."""
    here = torch.zeros(len(answers), max(len(one.ids) for one in answers), dtype=torch.bool)
    for row, one in zip(here, answers, strict=True):
        row[one.counted] = True
    return here[:, 1:]


def answer_log_probs(logits: Tensor, ids: Tensor, scored: Tensor) -> Tensor:
    """Mean log probability of each row's scored tokens, in nats: [rows], on the CPU.

    In float32 at least; gradients flow.

    Args:
        logits: [rows, seq, vocabulary], of ids: int64 [rows, seq].
        scored: bool [rows, seq − 1], see `predicted`.
    """
    scored = scored.to(logits.device)
    # Only the answers' rows are made wide: a vocabulary can have 256,000 entries.
    rows = logits[:, :-1][scored]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    targets = ids[:, 1:].to(logits.device)[scored]
    each = -torch.nn.functional.cross_entropy(rows, targets, reduction="none").cpu()
    scored = scored.cpu()
    # Added up on the CPU, where the order is always the same.
    total = each.new_zeros(len(ids)).index_add(0, scored.nonzero()[:, 0], each)
    return total / scored.sum(1)
