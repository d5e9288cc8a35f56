"""One evaluation: the margins of items under an arm, and what the arm costs on clean text."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.compare.prepared import Prepared
from saesteer.compare.splits import Item
from saesteer.core.model import device_of, special_token_ids
from saesteer.directions.answers import side_tokens
from saesteer.directions.margin import answers_of, likelihoods
from saesteer.directions.pairs import Pair
from saesteer.effects.damage import (
    Cost,
    Reference,
    cross_entropy,
    entropy,
    kl,
    logits_of,
    padded,
)
from saesteer.errors import SteeringError, TextError
from saesteer.steering.edits import Edit
from saesteer.steering.engine import steer

TEXT_TOKENS = 1500
"""Tokens of clean text, of each split: so many give ΔCE of a tenth of a nat to about ± .02."""
_LONGEST = 128  # tokens of one clean text
_BATCH = 8


@dataclass(frozen=True)
class Evaluation:
    """An arm at a strength.

    Attributes:
        margins: of each item, in nats a token; see `directions.margin`.
        cost: on the clean text; None where it wasn't asked for.
        tokens: that went through the model for it.
    """

    margins: list[float]
    cost: Cost | None
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class CleanText:
    """Text on which every arm's damage is measured, whatever the arm changes.

    An arm that edits is measured on the same tokens. What an arm puts before a prompt is put before
    each text, and its own tokens aren't counted; a model of its own reads the texts beside the
    base model. ΔCE and KL are against the base model, without the prompt.

    Raises:
        TextError: no text, or none with two tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        *,
        positions: str = "all",
        most_tokens: int = TEXT_TOKENS,
    ) -> None:
        self.model, self.tokenizer, self.positions = model, tokenizer, positions
        # "generated" counts every column after BOS as generated: the edits act on all of the text.
        self._prompt_length = 1 if positions == "generated" else None
        self._rows: list[list[int]] = []
        self.n_tokens = 0
        special = special_token_ids(model, tokenizer)
        for text in texts:
            ids = side_tokens(tokenizer, "", text).ids[:_LONGEST]
            if self.n_tokens < most_tokens and sum(i not in special for i in ids) > 1:
                self._rows.append(ids)
                self.n_tokens += len(ids)
        if not self._rows:
            raise TextError("no clean text to measure damage on; give some, a line a text")
        self._special = torch.tensor(sorted(special), dtype=torch.long)
        self._reference = Reference(
            model,
            tokenizer,
            self._rows,
            prompt_length=self._prompt_length,
            batch_size=_BATCH,
        )

    def cost(self, prepared: Prepared, edits: Sequence[Edit]) -> Cost:
        """What the arm costs with these edits.

        Raises:
            SteeringError: the edits can't be made, or the logits are no numbers.
        """
        if prepared.model is self.model and not prepared.prompt_transform(""):
            return self._reference.cost(edits)
        before = side_tokens(self.tokenizer, prepared.prompt_transform(""), "").ids
        sums, n, sizes = torch.zeros(4, dtype=torch.float64), 0, [0.0]
        for first in range(0, len(self._rows), _BATCH):
            rows = self._rows[first : first + _BATCH]
            clean, targets = self._predictions(self.model, rows, [], ())[:2]
            moved, _, size = self._predictions(prepared.model, rows, before, edits)
            each = [
                cross_entropy(clean, targets),
                cross_entropy(moved, targets),
                kl(clean, moved),
                entropy(moved),
            ]
            sums += torch.stack(each).cpu().double().sum(1)
            n += len(targets)
            sizes.append(size)
        if not bool(sums.isfinite().all()):
            raise SteeringError(
                f"the logits under the arm {prepared.arm!r} are not finite numbers; lower its "
                "strength, or load the model in float32"
            )
        ce_0, ce, divergence, spread = (sums / n).tolist()
        return Cost(n, ce, ce - ce_0, max(0.0, divergence), spread, max(sizes))

    def _predictions(
        self,
        model: PreTrainedModel,
        rows: Sequence[list[int]],
        before: list[int],
        edits: Sequence[Edit],
    ) -> tuple[Tensor, Tensor, float]:
        """Logits of the texts' plain tokens after the first, [n, vocabulary]; these; ‖Δ‖/‖x‖."""
        # Texts begin with BOS where there is one, as does what stands before them.
        skip = 1 if before and rows[0][0] == before[0] == self.tokenizer.bos_token_id else 0
        room = getattr(model.config, "max_position_embeddings", None) or 2**30
        longest = max(len(before) - skip + len(row) for row in rows)
        if longest > room:
            raise SteeringError(
                f"{len(before)} tokens before a text, and the model's contexts hold {room}: give "
                "fewer examples or a shorter prompt"
            )
        ids, mask = padded([[*before, *row[skip:]] for row in rows])
        counted = (mask == 1) & ~torch.isin(ids, self._special)
        counted[:, : len(before) + 1 - skip] = False
        ids, mask, counted = (t.to(device_of(model)) for t in (ids, mask, counted))
        size = 0.0
        if edits:
            length = len(before) + 1 - skip if self._prompt_length else None
            with steer(model, edits, tokenizer=self.tokenizer, prompt_length=length) as receipt:
                logits = logits_of(model, ids, mask)
            size = max(one.relative_size or 0.0 for one in receipt.edits)
        else:
            logits = logits_of(model, ids, mask)
        wanted = counted[:, 1:]
        return logits[:, :-1][wanted.to(logits.device)], ids[:, 1:][wanted], size


class Bench:
    """What all evaluations of one behaviour share.

    Args:
        texts: clean texts; every other one is for validation, those between for test.
        positions: which tokens are steered: "all", "prompt" or "generated".
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        *,
        positions: str = "all",
    ) -> None:
        self.model, self.tokenizer, self.positions = model, tokenizer, positions
        self._lengths: dict[Pair, int] = {}
        if len(texts) < 2:
            raise TextError(
                f"{len(texts)} clean texts to measure damage on: give two at least, one to choose "
                "by and one to test on, a line a text"
            )
        self.validation_text = CleanText(model, tokenizer, texts[0::2], positions=positions)
        self.test_text = CleanText(model, tokenizer, texts[1::2], positions=positions)

    def edits(self, prepared: Prepared, strength: float) -> list[Edit]:
        """The edits at a strength, on the tokens that the problem steers.

        Raises:
            SteeringError: an edit that is for other tokens alone.
        """
        found = list(prepared.edits(strength))
        if self.positions == "prompt":
            return [replace(e, where=replace(e.where, generated=False)) for e in found]
        if self.positions == "generated":
            return [replace(e, where=replace(e.where, prompt=False)) for e in found]
        return found

    @torch.no_grad()
    def evaluate(
        self,
        prepared: Prepared,
        strength: float,
        items: Sequence[Item],
        *,
        text: CleanText | None = None,
    ) -> Evaluation:
        """The margins of the items under an arm at a strength, and its cost on the text.

        Raises:
            SteeringError: edits that can't be made, or margins that are no numbers.
            PairsError: an answer without a token, or a pair longer than the model's contexts.
        """
        edits = self.edits(prepared, strength)
        pairs = [
            replace(item.pair, prompt=prepared.prompt_transform(item.pair.prompt)) for item in items
        ]
        both = self._likelihoods(prepared.model, pairs, edits)
        found = both[:, 0] - both[:, 1]
        if not bool(found.isfinite().all()):
            raise SteeringError(
                f"margins under the arm {prepared.arm!r} at strength {strength:g} are no finite "
                "numbers; lower its strength, or load the model in float32"
            )
        cost = text.cost(prepared, edits) if text else None
        tokens = text.n_tokens if text else 0
        return Evaluation(found.tolist(), cost, tokens + self.tokens(pairs))

    def tokens(self, pairs: Sequence[Pair]) -> int:
        """Tokens of both sides of the pairs."""
        total = 0
        for pair in pairs:
            if pair not in self._lengths:
                self._lengths[pair] = sum(
                    len(side_tokens(self.tokenizer, pair.prompt, answer).ids)
                    for answer in (pair.chosen, pair.rejected)
                )
            total += self._lengths[pair]
        return total

    @torch.no_grad()
    def likelihoods(
        self, prepared: Prepared, strength: float, items: Sequence[Item], *, total: bool = False
    ) -> Tensor:
        """Log-likelihoods of the items' chosen and rejected answers under an arm, [n, 2]: nats a
        token, or of the whole answer where `total`.

        Raises:
            SteeringError, PairsError: as `evaluate`.
        """
        pairs = [
            replace(item.pair, prompt=prepared.prompt_transform(item.pair.prompt)) for item in items
        ]
        both = self._likelihoods(prepared.model, pairs, self.edits(prepared, strength))
        if not total:
            return both
        answers = answers_of(prepared.model, self.tokenizer, pairs)
        return both * torch.tensor([len(one.counted) for one in answers]).reshape(-1, 2)

    def _likelihoods(
        self, model: PreTrainedModel, pairs: Sequence[Pair], edits: Sequence[Edit]
    ) -> Tensor:
        if not edits or all(e.where.prompt and e.where.generated for e in edits):
            with steer(model, edits, tokenizer=self.tokenizer) if edits else nullcontext():
                return likelihoods(model, self.tokenizer, pairs)
        # The answer counts as generated. A pass knows one length of prompts, so that pairs go
        # through the model by the length of theirs.
        by_length: dict[int, list[int]] = {}
        for i, pair in enumerate(pairs):
            start = side_tokens(self.tokenizer, pair.prompt, pair.chosen).start
            by_length.setdefault(start, []).append(i)
        found = torch.empty(len(pairs), 2)
        for start, some in by_length.items():
            with steer(model, edits, tokenizer=self.tokenizer, prompt_length=start):
                found[some] = likelihoods(model, self.tokenizer, [pairs[i] for i in some])
        return found
