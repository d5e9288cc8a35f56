"""Texts through the model and the SAE: what fires on which token.

`encode` is the common ground of `saesteer read` (a table of tokens and features) and of search by
example (`like`). Special tokens are read by the model and left out of the codes, as they are when
an index is made.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from saesteer.core.hooks import activations
from saesteer.core.model import special_token_ids
from saesteer.core.sae import Sae
from saesteer.core.sae_codes import Codes
from saesteer.errors import TextError
from saesteer.features.like import share_of, smoothed
from saesteer.features.words import Pieces


@dataclass(frozen=True, eq=False)
class Encoded:
    """A text's tokens and their sparse code.

    Attributes:
        ids, pieces: [n], of the text as it was given: a BOS put before it is not among them.
        plain: [n], False for special tokens.
        codes: of n rows; special tokens have no firings.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    plain: NDArray[np.bool_]
    codes: Codes

    def plain_codes(self) -> Codes:
        """The same codes of the plain tokens alone, which are numbered anew."""
        number = torch.from_numpy(np.cumsum(self.plain) - 1).to(self.codes.rows.device)
        n = int(self.plain.sum())
        return Codes(number[self.codes.rows], self.codes.latents, self.codes.values, n)


@dataclass(frozen=True)
class Fired:
    """A feature on a token; times: its activation in units of max_act, None where that is 0."""

    feature: int
    activation: float
    times: float | None


@dataclass(frozen=True)
class TokenReading:
    """A token of a text, and the features that fire on it, the most telling first.

    special: whether it is a special token, which nothing is read on; n_fired: how many features
    fire on it, those that are not listed included.
    """

    position: int
    id: int
    text: str
    special: bool
    fired: tuple[Fired, ...]
    n_fired: int


@torch.no_grad()
def encode(
    model: PreTrainedModel,
    tokenizer: Any,
    sae: Sae,
    texts: Iterable[str],
    *,
    batch_size: int = 16,
) -> Iterator[Encoded]:
    """Each text's code, in order.

    A text longer than the SAE's training contexts, or than the model has positions for, is read in
    windows of that length, each behind a BOS where the SAE was trained so.

    Raises:
        TextError: a text without a token.
    """
    special = np.array(sorted(special_token_ids(model, tokenizer)))
    lead = (
        [tokenizer.bos_token_id] if sae.prepend_bos and tokenizer.bos_token_id is not None else []
    )
    room = min(
        sae.context_size or 2**31, getattr(model.config, "max_position_embeddings", None) or 2**31
    )
    spelled = Pieces(tokenizer)
    waiting = iter(texts)
    while some := list(islice(waiting, batch_size)):
        rows = [_ids(tokenizer, text) for text in some]
        step = max(1, room - len(lead))
        windows = [row[i : i + step] for row in rows for i in range(0, len(row), step)]
        x = torch.cat(
            [
                _read(model, sae, [lead + window for window in batch], len(lead))
                for batch in _batches(windows, batch_size)
            ]
        )
        codes, start = sae.encode(x), 0
        for row in rows:
            plain = ~np.isin(row, special)
            part = _between(codes, start, start + len(row), torch.from_numpy(plain))
            yield Encoded(tuple(row), tuple(spelled.window(row)), plain, part)
            start += len(row)


def read(
    encoded: Encoded,
    *,
    density: NDArray[Any],
    max_act: NDArray[Any],
    n_tokens: int,
    top: int = 5,
) -> list[TokenReading]:
    """The features that fire on each token of a text.

    They are ordered by how much a firing tells: its share of the feature's max_act times the nats
    of surprise that it fires at all, so that what fires on every other token comes last.

    Args:
        density, max_act: [d_sae], of the index; n_tokens: on how many tokens they were measured.
        top: features listed a token.
    """
    rows, features, values = (
        part.detach().cpu().numpy()
        for part in (encoded.codes.rows, encoded.codes.latents, encoded.codes.values.double())
    )
    highest = np.asarray(max_act, np.float64)[features]
    tells = share_of(values, highest) * -np.log(smoothed(density[features], n_tokens))
    order = np.lexsort((features, -tells, rows))
    counts = np.bincount(rows, minlength=len(encoded.ids))
    ends = np.cumsum(counts)
    found = []
    for position, (token, text) in enumerate(zip(encoded.ids, encoded.pieces, strict=True)):
        own = order[ends[position] - counts[position] : ends[position]][:top]
        fired = tuple(
            Fired(
                int(features[i]),
                float(values[i]),
                float(values[i] / highest[i]) if highest[i] > 0 else None,
            )
            for i in own
        )
        special = not bool(encoded.plain[position])
        found.append(TokenReading(position, token, text, special, fired, int(counts[position])))
    return found


def grid(encoded: Encoded, features: Sequence[int]) -> NDArray[np.float32]:
    """Activations of some features on every token: [n_tokens, len(features)]."""
    column: Mapping[int, int] = {feature: i for i, feature in enumerate(features)}
    out = np.zeros((len(encoded.ids), len(features)), np.float32)
    codes = encoded.codes
    for row, feature, value in zip(
        codes.rows.tolist(), codes.latents.tolist(), codes.values.tolist(), strict=True
    ):
        if feature in column:
            out[row, column[feature]] = value
    return out


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if not ids:
        raise TextError(f"a text without a token ({text[:20]!r}); give some words")
    return ids


def _batches(windows: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    for start in range(0, len(windows), size):
        yield windows[start : start + size]


def _read(model: PreTrainedModel, sae: Sae, windows: Sequence[Sequence[int]], lead: int) -> Tensor:
    """What the SAE reads on the tokens of some windows, one after the other, without the leads."""
    width = max(map(len, windows))
    ids = torch.tensor([[*window, *[0] * (width - len(window))] for window in windows])
    mask = torch.tensor([[1] * len(window) + [0] * (width - len(window)) for window in windows])
    x = activations(model, [sae.hook_point], ids, mask)[sae.hook_point]
    real = mask.bool()
    real[:, :lead] = False
    return x[real.to(x.device)].to(sae.W_enc.device, torch.float32)


def _between(codes: Codes, start: int, stop: int, keep: Tensor) -> Codes:
    """Rows start … stop − 1, numbered from 0; firings only where `keep` [stop − start] holds."""
    ends = torch.tensor([start, stop], device=codes.rows.device)
    low, high = torch.searchsorted(codes.rows, ends).tolist()
    rows = codes.rows[low:high] - start
    stays = keep.to(rows.device)[rows]
    return Codes(
        rows[stays], codes.latents[low:high][stays], codes.values[low:high][stays], stop - start
    )
