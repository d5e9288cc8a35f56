"""The contrast metric: mean-token log p(chosen) − log p(rejected) after a pair's prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.model import special_token_ids
from saesteer.directions.margin import answer_log_probs, answers_of, predicted
from saesteer.directions.pair_files import records
from saesteer.directions.pairs import Pair, parse_pairs, problems
from saesteer.directions.places import side_tokens
from saesteer.directions.rows import padded
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
    sides = answers_of(model, tokenizer, pairs)
    other: list[list[int]] = []
    for i, prompt in enumerate(corrupt or ()):
        for answer, side in zip((pairs[i].chosen, pairs[i].rejected), sides[2 * i :], strict=False):
            changed, at = side_tokens(tokenizer, prompt, answer)
            if at != side.start or len(changed) != len(side.ids):
                raise PairsError(
                    f"pair {i + 1}: the prompt has {side.start} tokens and the corrupt prompt "
                    f"{at}; give one of the same length, so that tokens stand opposite one another"
                )
            other.append(changed)
    hidden = torch.tensor(sorted(special_token_ids(model, tokenizer)), dtype=torch.long)
    device = model.device
    found = []
    for first in range(0, len(sides), 2 * batch_size):
        some = slice(first, first + 2 * batch_size)
        ids, mask = padded([side.ids for side in sides[some]])
        found.append(
            Batch(
                ids.to(device),
                mask.to(device),
                ((mask == 1) & ~torch.isin(ids, hidden)).to(device),
                predicted(sides[some]).to(device),
                padded(other[some])[0].to(device) if other else None,
            )
        )
    return found


def margins(model: PreTrainedModel, batch: Batch, ids: Tensor | None = None) -> Tensor:
    """The margin of each pair, as `directions.margin` has it, in nats a token: [n] on the CPU.

    In float32 at least. ids: others of the same shape, such as `batch.corrupt`. Gradients flow,
    where they are on.
    """
    ids = batch.ids if ids is None else ids
    logits = model(input_ids=ids, attention_mask=batch.mask, use_cache=False).logits
    each = answer_log_probs(logits, ids, batch.answers)
    return each[0::2] - each[1::2]


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
