"""What an edit costs: on text that is given, and in the text that the steered model writes.

On given text the unsteered and the steered model read the same tokens, and every figure is a mean
in nats over predictions of plain tokens (neither special nor padding), of one pass each. In
generated text n-grams of token ids are counted, which never run from one text into the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from saesteer.core.generate import prompt_ids
from saesteer.core.model import special_token_ids
from saesteer.errors import SteeringError, TextError
from saesteer.steering.edits import Edit
from saesteer.steering.engine import steer

Text = str | Sequence[int]

# Elements of one chunk of logits: 64 MB in float32. Of the logits of an unsteered model so many
# are kept between strengths; those of longer texts are computed again.
_CHUNK, _KEPT = 2**24, 2**26


@dataclass(frozen=True)
class Cost:
    """Means over the predictions of `n_tokens` plain tokens, in nats a token.

    Attributes:
        ce: cross-entropy of the next token under the steered model, CE_α.
        delta_ce: CE_α − CE_0.
        kl: KL(p_0 ‖ p_α).
        entropy: of p_α.
        relative_size: mean ‖Δ‖ / ‖x‖ over the edited tokens, from the receipt; of several edits
            the largest; 0 where none was edited.
    """

    n_tokens: int
    ce: float
    delta_ce: float
    kl: float
    entropy: float
    relative_size: float


def kl(clean: Tensor, steered: Tensor) -> Tensor:
    """KL(softmax(clean) ‖ softmax(steered)) of each row, in nats: [n, vocabulary] twice → [n]."""
    log_p, log_q = clean.float().log_softmax(-1), steered.float().log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) of each row, in nats: [n, vocabulary] → [n]."""
    return torch.special.entr(logits.float().softmax(-1)).sum(-1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−log softmax(logits)[target] of each row, in nats: [n, vocabulary], [n] → [n]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def distinct_n(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """Distinct n-grams of all texts together / n-grams (Li et al. 2016, arXiv 1510.03055).

    It falls as text is added, so that it compares only sets of as many texts, as long. None where
    no text has n tokens.
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(texts: Sequence[Sequence[int]], n: int = 4) -> float | None:
    """Share of n-grams that stood before in the same text, mean over texts with one at least.

    None where no text has n tokens.
    """
    shares = [1 - found for text in texts if (found := distinct_n([text], n)) is not None]
    return sum(shares) / len(shares) if shares else None


def padded(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right, and their mask: int64 [n, longest] each."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def token_rows(
    tokenizer: Any, texts: Sequence[Text], *, prepend_bos: bool, most: int | None = None
) -> list[list[int]]:
    """Token ids of texts, BOS first where wanted; rows of ids stay as they are.

    Raises:
        TextError: no text, or an empty one.
    """
    if not texts:
        raise TextError("no text to measure on; give one at least")
    rows = []
    for text in texts:
        if isinstance(text, str):
            row = prompt_ids(tokenizer, [text], prepend_bos=prepend_bos)[0][0]
        else:
            row = [int(i) for i in text]
        if not row:
            raise TextError("a text without a token; leave it out")
        rows.append(row[:most])
    return rows


class Reference:
    """Text on which costs are measured, and what the unsteered model makes of it.

    Args:
        texts: strings, or rows of token ids; each is cut at the model's last position.
        prepend_bos: whether strings begin with BOS.
        prompt_length: columns from this one on count as generated, for edits that are for
            generated tokens; None: all of it is prompt.
        batch_size: texts a pass.

    Raises:
        TextError: no text, or no plain token to predict in any.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        texts: Sequence[Text],
        *,
        prepend_bos: bool = True,
        prompt_length: int | None = None,
        batch_size: int = 8,
    ) -> None:
        self._model, self._tokenizer, self._prompt_length = model, tokenizer, prompt_length
        room = getattr(model.config, "max_position_embeddings", None)
        rows = token_rows(tokenizer, texts, prepend_bos=prepend_bos, most=room)
        special = torch.tensor(sorted(special_token_ids(model, tokenizer)), dtype=torch.long)
        self._batches = []
        for start in range(0, len(rows), batch_size):
            ids, mask = padded(rows[start : start + batch_size])
            counts = (mask[:, 1:] == 1) & ~torch.isin(ids[:, 1:], special)
            self._batches.append(tuple(t.to(model.device) for t in (ids, mask, counts)))
        self.n_tokens = sum(int(counts.sum()) for _, _, counts in self._batches)
        if self.n_tokens == 0:
            raise TextError("no plain token to predict in the neutral texts; give longer ones")
        self._kept: dict[int, Tensor] = {}

    def cost(self, edits: Sequence[Edit] = ()) -> Cost:
        """What the edits cost on these texts; of none at all, the unsteered model's own figures.

        Raises:
            SteeringError: the edits can't be made, or the steered model's logits are no numbers.
            NothingSteeredError: an edit was for no token in some text.
        """
        sums, edited, size = torch.zeros(4, dtype=torch.float64), 0, 0.0
        for number, (ids, mask, counts) in enumerate(self._batches):
            targets = ids[:, 1:][counts]
            clean = self._clean(number)
            steered = clean
            if edits:
                with steer(
                    self._model,
                    edits,
                    tokenizer=self._tokenizer,
                    prompt_length=self._prompt_length,
                ) as receipt:
                    steered = logits_of(self._model, ids, mask)[:, :-1][counts]
                one = max(receipt.edits, key=lambda each: each.relative_size or 0.0)
                size += (one.relative_size or 0.0) * one.n_edited
                edited += one.n_edited
            sums += _sums(clean, steered, targets)
        if not bool(sums.isfinite().all()):
            raise SteeringError(
                f"the model's logits are not finite numbers with {_named(edits)}: the strength is "
                "too large for its number type; lower it, or load the model in float32"
            )
        ce_0, ce, divergence, spread = (sums / self.n_tokens).tolist()
        return Cost(
            n_tokens=self.n_tokens,
            ce=ce,
            delta_ce=ce - ce_0,
            kl=max(0.0, divergence),
            entropy=spread,
            relative_size=size / edited if edited else 0.0,
        )

    def _clean(self, number: int) -> Tensor:
        """The unsteered model's logits at the counted predictions of a batch, [n, vocabulary]."""
        if number in self._kept:
            return self._kept[number]
        ids, mask, counts = self._batches[number]
        found = logits_of(self._model, ids, mask)[:, :-1][counts]
        if self.n_tokens * found.shape[1] <= _KEPT:
            self._kept[number] = found
        return found


def _sums(clean: Tensor, steered: Tensor, targets: Tensor) -> Tensor:
    """Over rows [n, vocabulary]: the sums of CE_0, CE_α, KL(p_0 ‖ p_α), entropy of p_α; float64."""
    out = torch.zeros(4, dtype=torch.float64)
    rows = max(1, _CHUNK // clean.shape[1])
    for c, s, t in zip(clean.split(rows), steered.split(rows), targets.split(rows), strict=True):
        each = torch.stack([cross_entropy(c, t), cross_entropy(s, t), kl(c, s), entropy(s)])
        out += each.cpu().double().sum(1)
    return out


def _named(edits: Sequence[Edit]) -> str:
    return "; ".join(map(str, edits)) or "no edit at all"


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [batch, seq, vocabulary] of ids [batch, seq] with padding on the right."""
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits
