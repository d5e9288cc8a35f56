"""The contrast metric: mean-token log p(chosen) − log p(rejected) after a pair's prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.model import special_token_ids
from saesteer.directions.answers import side_tokens
from saesteer.directions.pair_files import records
from saesteer.directions.pairs import Pair, parse_pairs, problems
from saesteer.effects.damage import padded
from saesteer.errors import PairsError


@dataclass(frozen=True)
class Batch:
    """Some pairs as token ids, padded on the right: row 2i is pair i's chosen side, 2i + 1 its
    rejected one.

    ids, mask: int64 [2n, seq]; plain: bool [2n, seq], neither padding nor special; answers: bool
    [2n, seq − 1], where the next token is one of the answer's; corrupt: ids [2n, seq] of the same
    answers after the corrupt prompts, None without these.
    """

    ids: Tensor
    mask: Tensor
    plain: Tensor
    answers: Tensor
    corrupt: Tensor | None

    @property
    def n_pairs(self) -> int:
        return len(self.ids) // 2


def read_contrasts(
    source: str | Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Pair], list[str] | None]:
    """Pairs, and where each record also has a text under "corrupt", those prompts.

    A corrupt prompt asks for the other answer: {"prompt": "Paris is in", "corrupt": "Rome is in",
    "chosen": " France", "rejected": " Italy"}. A pair that occurs more than once is taken once.

    Raises:
        PairsError: as `directions.pairs.read_pairs`; some records have a corrupt prompt and others
            not, or it is no text.
    """
    found: dict[Pair, str | None] = {}
    both = zip(parse_pairs(source, tokenizer), records(source), strict=True)
    for (where, pair), (_, record) in both:
        for problem in problems(pair):
            raise PairsError(f"{where}: {problem}")
        corrupt = record.get("corrupt")
        if corrupt is not None and not isinstance(corrupt, str):
            raise PairsError(f"{where}: 'corrupt' is no text; give another prompt in its place")
        found.setdefault(pair, corrupt)
    given = [text for text in found.values() if text is not None]
    if given and len(given) < len(found):
        raise PairsError(
            f"{source}: {len(given)} of {len(found)} pairs have a 'corrupt' prompt; give one to "
            "all, or to none"
        )
    return list(found), given or None


def contrast_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    corrupt: Sequence[str] | None = None,
    batch_size: int = 8,
) -> list[Batch]:
    """Pairs as batches of so many pairs, in their order.

    Args:
        corrupt: for each pair a prompt that asks for the other answer, of as many tokens.

    Raises:
        PairsError: no pairs, an answer without a token to predict, a pair longer than the model's
            contexts, or a corrupt prompt of another length than its prompt.
    """
    if not pairs:
        raise PairsError("no contrast pairs; expected at least one, 128 are a good number")
    if batch_size < 1:
        raise PairsError(f"batch_size {batch_size} is not a whole number from 1 up")
    if corrupt is not None and len(corrupt) != len(pairs):
        raise PairsError(f"{len(corrupt)} corrupt prompts for {len(pairs)} pairs; give one each")
    special = special_token_ids(model, tokenizer)
    room = getattr(model.config, "max_position_embeddings", None)
    rows: list[list[int]] = []
    other: list[list[int]] = []
    starts: list[int] = []
    for i, pair in enumerate(pairs):
        for answer in (pair.chosen, pair.rejected):
            row, start = side_tokens(tokenizer, pair.prompt, answer)
            # Nothing comes before the very first token to predict it from.
            if not any(token not in special for token in row[max(start, 1) :]):
                raise PairsError(
                    f"pair {i + 1}: {answer!r} has no token to predict; give it some text"
                )
            if isinstance(room, int) and len(row) > room:
                raise PairsError(
                    f"pair {i + 1}: {len(row)} tokens, but the model's contexts hold {room}; "
                    "shorten it or leave it out"
                )
            rows.append(row)
            starts.append(start)
            if corrupt is not None:
                changed, at = side_tokens(tokenizer, corrupt[i], answer)
                if at != start or len(changed) != len(row):
                    raise PairsError(
                        f"pair {i + 1}: the prompt has {start} tokens and the corrupt prompt {at}; "
                        "give one of the same length, so that tokens stand opposite one another"
                    )
                other.append(changed)
    hidden = torch.tensor(sorted(special), dtype=torch.long)
    found = []
    for first in range(0, len(rows), 2 * batch_size):
        some = slice(first, first + 2 * batch_size)
        ids, mask = padded(rows[some])
        plain = (mask == 1) & ~torch.isin(ids, hidden)
        places = torch.arange(ids.shape[1])
        answers = plain & (places >= torch.tensor(starts[some])[:, None])
        device = model.device
        found.append(
            Batch(
                ids.to(device),
                mask.to(device),
                plain.to(device),
                answers[:, 1:].to(device),
                padded(other[some])[0].to(device) if other else None,
            )
        )
    return found


def margins(model: PreTrainedModel, batch: Batch, ids: Tensor | None = None) -> Tensor:
    """Mean-token log p(chosen) − log p(rejected) of each pair, in nats: [n].

    ids: others of the same shape, such as `batch.corrupt`. Gradients flow, where they are on.
    """
    ids = batch.ids if ids is None else ids
    logits = model(input_ids=ids, attention_mask=batch.mask, use_cache=False).logits
    at = batch.answers
    log_p = wide(logits[:, :-1][at]).log_softmax(-1)
    own = log_p.gather(-1, ids[:, 1:][at][:, None])[:, 0]
    rows = at.nonzero()[:, 0]
    means = own.new_zeros(len(ids)).index_add(0, rows, own) / at.sum(1)
    return means[0::2] - means[1::2]


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
