"""The activations of both answers of each contrast pair: what every pair method starts from."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.hooks import activations
from saesteer.core.model import HookPoint, special_token_ids
from saesteer.core.progress import progress
from saesteer.directions.pairs import Pair
from saesteer.errors import PairsError, did_you_mean

READS = ("answer-mean", "answer-last")
# No bar for work that is over before anybody could read it.
_PATIENCE_S = 1.0


class Side(NamedTuple):
    """One side of a pair as token ids; the answer's begin at `start`."""

    ids: list[int]
    start: int


def answer_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    point: HookPoint,
    *,
    read: str = "answer-mean",
    batch_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Activations at `point` of the chosen and of the rejected answers, each [n, d_model] float32.

    Args:
        read: "answer-mean", the mean over the answer's tokens, or "answer-last", its last one;
            special tokens in an answer are never read.
        batch_size: sequences a forward pass; they are padded on the right.

    Raises:
        PairsError: no pairs, an unknown `read`, an answer without tokens, a pair longer than the
            model's contexts, or activations that are not finite.
        HookPointError: the model has no such place.
    """
    if read not in READS:
        raise PairsError(f"unknown read {read!r}{did_you_mean(read, READS)}; use one of {READS}")
    if not pairs:
        raise PairsError("no contrast pairs; expected at least one, 128 are a good number")
    if batch_size < 1:
        raise PairsError(f"batch_size {batch_size} is not a whole number from 1 up")
    special = special_token_ids(model, tokenizer)
    texts = [(p, answer) for p in pairs for answer in (p.chosen, p.rejected)]
    sides = [side_tokens(tokenizer, pair.prompt, answer) for pair, answer in texts]
    longest = getattr(model.config, "max_position_embeddings", None)
    for i, side in enumerate(sides):
        where = f"pair {i // 2 + 1}"
        if not any(token not in special for token in side.ids[side.start :]):
            raise PairsError(f"{where}: {texts[i][1]!r} has no tokens to read; give it some text")
        if isinstance(longest, int) and len(side.ids) > longest:
            raise PairsError(
                f"{where}: {len(side.ids)} tokens, but the model's contexts hold {longest}; "
                "shorten it or leave it out"
            )
    # Sequences of one length together, so that little is padded.
    order = sorted(range(len(sides)), key=lambda i: len(sides[i].ids))
    found: list[Tensor] = [torch.empty(0)] * len(sides)
    bar: Any = None
    begin, done = time.monotonic(), 0
    try:
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            rows = _read_batch(model, [sides[i] for i in chosen], point, read, special)
            for i, row in zip(chosen, rows, strict=True):
                found[i] = row
            done += len(chosen)
            if bar is None and time.monotonic() - begin > _PATIENCE_S and done < len(order):
                bar = progress("pairs", len(order), unit="answer")
                bar.update(done)
            elif bar is not None:
                bar.update(len(chosen))
    finally:
        if bar is not None:
            bar.close()
    stacked = torch.stack(found)
    if not stacked.isfinite().all():
        bad = int((~stacked.isfinite()).any(-1).nonzero()[0]) // 2 + 1
        raise PairsError(
            f"pair {bad}: activations at {point} hold NaN or infinity; load the model in float32"
        )
    return stacked[0::2], stacked[1::2]


def side_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> Side:
    """Token ids of BOS (where the tokenizer has one), the prompt, and the answer.

    Prompt and answer are tokenised apart and joined, so that no token straddles the boundary and
    the prompt's tokens are the same on both sides of a pair. Write the space between them at the
    beginning of the answer; a tokenizer that puts a space before every text (SentencePiece) gets
    the answer without it, so that there is one and not two. A chat template that already begins
    with BOS doesn't get another.
    """
    ids = list(tokenizer.encode(prompt, add_special_tokens=False)) if prompt else []
    if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    if answer.startswith(" ") and _puts_a_space_first(tokenizer):
        answer = answer[1:]
    return Side([*ids, *tokenizer.encode(answer, add_special_tokens=False)], len(ids))


def _puts_a_space_first(tokenizer: PreTrainedTokenizerBase) -> bool:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))
    return bool(tokens) and str(tokens[0]).startswith("▁")


def _read_batch(
    model: PreTrainedModel,
    sides: Sequence[Side],
    point: HookPoint,
    read: str,
    special: frozenset[int],
) -> Tensor:
    """[batch, d_model] float32 on the CPU, one row a side."""
    length = max(len(side.ids) for side in sides)
    ids = torch.zeros(len(sides), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    wanted = torch.zeros(len(sides), length)
    for i, side in enumerate(sides):
        n = len(side.ids)
        ids[i, :n] = torch.tensor(side.ids)
        mask[i, :n] = 1
        places = [j for j in range(side.start, n) if side.ids[j] not in special]
        wanted[i, places if read == "answer-mean" else places[-1:]] = 1
    x = activations(model, [point], ids, mask)[point].float().cpu()
    # Where nothing is wanted (padding) the activation may be anything, NaN too: 0 × NaN is NaN.
    x = torch.where(wanted[..., None] > 0, x, 0.0)
    return x.sum(1) / wanted.sum(1, keepdim=True)
