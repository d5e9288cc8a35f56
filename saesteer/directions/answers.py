"""The activations of both answers of each contrast pair: what every pair method starts from."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.hooks import reading
from saesteer.core.model import HookPoint, special_token_ids
from saesteer.core.progress import progress
from saesteer.directions import answer_cache
from saesteer.directions.pairs import Pair
from saesteer.directions.places import READS, Side, check_read, places, side_tokens
from saesteer.errors import PairsError

__all__ = ["READS", "Side", "answer_activations", "side_tokens"]

# No bar for work that is over before anybody could read it.
_PATIENCE_S = 1.0

# Token ids, no further than they are read, and the columns that are.
_Text = tuple[tuple[int, ...], tuple[int, ...]]


@overload
def answer_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    points: HookPoint,
    *,
    read: str = ...,
    batch_size: int = ...,
    cache: Path | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def answer_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    points: Sequence[HookPoint],
    *,
    read: str = ...,
    batch_size: int = ...,
    cache: Path | None = ...,
) -> dict[HookPoint, tuple[Tensor, Tensor]]: ...


def answer_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    points: HookPoint | Sequence[HookPoint],
    *,
    read: str = "answer-mean",
    batch_size: int = 32,
    cache: Path | None = None,
) -> tuple[Tensor, Tensor] | dict[HookPoint, tuple[Tensor, Tensor]]:
    """Activations of the chosen and of the rejected answers, each [n, d] float32 on the CPU.

    Of one point the two, of several a dictionary of them, read in one pass over the pairs. d is
    d_model, or d_head at a single head.

    Args:
        read: "answer-mean", the mean over the answer's tokens; "answer-last", its last one;
            "answer-token", the first at which the two answers part (of "(A)" and "(B)", the
            letter); "prompt-last", the last of the prompt, which is the same on both sides and so
            is for methods without a contrast; or "after:TEXT", the token that follows the
            last TEXT in prompt and answer. Special tokens of an answer are read after a text alone.
        batch_size: sequences a forward pass; they are padded on the right.
        cache: a folder in which they are kept and found again, by model, tokens, read and point.
            Not used while anything edits the model's activations.

    Raises:
        PairsError: no pairs, an unknown `read`, an answer without tokens, a pair longer than the
            model's contexts, or activations that are not finite.
        HookPointError: the model has no such place.
        RunError: the cache's folder can't be written.
    """
    several = [points] if isinstance(points, HookPoint) else list(dict.fromkeys(points))
    check_read(read)
    if not pairs:
        raise PairsError("no contrast pairs; expected at least one, 128 are a good number")
    if not several:
        raise PairsError("no hook point to read the pairs at; name one at least")
    if batch_size < 1:
        raise PairsError(f"batch_size {batch_size} is not a whole number from 1 up")
    texts = _texts(model, tokenizer, pairs, read)
    key = answer_cache.key(model, texts) if cache else None
    found = {}
    if cache and key:
        found = {p: answer_cache.load(cache, key, p, len(pairs)) for p in several}
    missing = [point for point in several if found.get(point) is None]
    both = {point: sides for point, sides in found.items() if sides is not None}
    for point, rows in _read(model, texts, missing, batch_size).items():
        if not rows.isfinite().all():
            bad = int((~rows.isfinite()).any(-1).nonzero()[0]) // 2 + 1
            raise PairsError(
                f"pair {bad}: activations at {point} hold NaN or infinity; load the model in "
                "float32"
            )
        both[point] = rows[0::2], rows[1::2]
        if cache and key:
            answer_cache.keep(cache, key, point, *both[point])
    return both[points] if isinstance(points, HookPoint) else {p: both[p] for p in several}


def _texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], read: str
) -> list[_Text]:
    """The chosen and the rejected side of each pair in turn."""
    special = special_token_ids(model, tokenizer)
    longest = getattr(model.config, "max_position_embeddings", None)
    found: list[_Text] = []
    for i, pair in enumerate(pairs, 1):
        both = (
            side_tokens(tokenizer, pair.prompt, pair.chosen),
            side_tokens(tokenizer, pair.prompt, pair.rejected),
        )
        columns = places(tokenizer, pair, both, read, special, f"pair {i}")
        for side, wanted in zip(both, columns, strict=True):
            # What comes after changes nothing in a decoder.
            ids = side.ids[: wanted[-1] + 1]
            if isinstance(longest, int) and len(ids) > longest:
                raise PairsError(
                    f"pair {i}: {len(ids)} tokens, but the model's contexts hold {longest}; "
                    "shorten it or leave it out"
                )
            found.append((tuple(ids), tuple(wanted)))
    return found


def _read(
    model: PreTrainedModel, texts: Sequence[_Text], points: Sequence[HookPoint], batch_size: int
) -> dict[HookPoint, Tensor]:
    """[texts, d] float32 on the CPU, for each point; equal texts are read once."""
    if not points:
        return {}
    # Sequences of one length together, so that little is padded.
    order = sorted(dict.fromkeys(texts), key=lambda text: len(text[0]))
    parts: dict[HookPoint, list[Tensor]] = {point: [] for point in points}
    bar: Any = None
    begin, done = time.monotonic(), 0
    try:
        with reading(model, points) as read:
            for first in range(0, len(order), batch_size):
                batch = order[first : first + batch_size]
                for point, rows in _read_batch(read, batch).items():
                    parts[point].append(rows)
                done += len(batch)
                if bar is None and time.monotonic() - begin > _PATIENCE_S and done < len(order):
                    bar = progress("pairs", len(order), unit="answer")
                    bar.update(done)
                elif bar is not None:
                    bar.update(len(batch))
    finally:
        if bar is not None:
            bar.close()
    row = {text: i for i, text in enumerate(order)}
    wanted = torch.tensor([row[text] for text in texts])
    return {point: torch.cat(rows)[wanted] for point, rows in parts.items()}


def _read_batch(
    read: Callable[..., Mapping[HookPoint, Tensor]], texts: Sequence[_Text]
) -> dict[HookPoint, Tensor]:
    """[batch, d] float32 on the CPU, one row a text."""
    length = max(len(ids) for ids, _ in texts)
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    wanted = torch.zeros(len(texts), length)
    for i, (own, columns) in enumerate(texts):
        ids[i, : len(own)] = torch.tensor(own)
        mask[i, : len(own)] = 1
        wanted[i, list(columns)] = 1
    means = {}
    for point, x in read(ids, mask).items():
        weights = wanted.to(x.device)[..., None]
        # Where nothing is wanted (padding) the activation may be anything, NaN too: 0 × NaN is NaN.
        summed = torch.where(weights > 0, x.float(), 0.0).sum(1)
        means[point] = (summed / weights.sum(1)).cpu()
    return means
