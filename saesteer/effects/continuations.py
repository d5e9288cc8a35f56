"""Texts that a steered model writes, and what the unsteered model reads in them."""

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from saesteer.core.generate import GumbelRows
from saesteer.core.hooks import activations
from saesteer.core.model import HookPoint, special_token_ids
from saesteer.core.sae import Sae
from saesteer.effects.damage import cross_entropy, logits_of, padded
from saesteer.errors import SteeringError, TextError
from saesteer.steering.edits import Edit
from saesteer.steering.engine import steer


@dataclass(frozen=True)
class Continuation:
    """A prompt's tokens, BOS included; the plain tokens written after it; these as text."""

    prompt: tuple[int, ...]
    new: tuple[int, ...]
    text: str


def continuations(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    edits: Sequence[Sequence[Edit]],
    *,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    seeds: Sequence[int],
) -> list[Continuation]:
    """Continue rows of token ids in one `generate`, each under its own list of edits.

    Rows of one seed draw the same noise. temperature: 0 is greedy.

    Raises:
        TextError: a prompt leaves no room for the new tokens.
        SteeringError: an edit can't be made, or the logits are NaN.
    """
    longest = max(map(len, prompts))
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and longest + max_new_tokens > room:
        raise TextError(
            f"{longest} prompt tokens and {max_new_tokens} new ones do not fit into the model's "
            f"{room} positions; shorten the prompts or ask for fewer new tokens"
        )
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(i for i in known if i is not None)
    # Padded on the left, where `generate` wants it: the rows reversed, padded and turned back.
    ids, mask = (t.flip(1).to(model.device) for t in padded([row[::-1] for row in prompts], pad))
    sampling: list[LogitsProcessor] = [_RefuseNaN()]
    if temperature > 0:
        sampling.append(GumbelRows(seeds, temperature))
    steered = steer(model, [list(row) for row in edits], tokenizer=tokenizer)
    with torch.no_grad(), steered if any(edits) else nullcontext():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList(sampling),
        )
    special = special_token_ids(model, tokenizer)
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    found = []
    for prompt, full in zip(prompts, out[:, longest:].tolist(), strict=True):
        stop = next((i for i, token in enumerate(full) if token in ends), len(full))
        new = tuple(token for token in full[:stop] if token not in special)
        found.append(Continuation(tuple(prompt), new, _text(tokenizer, list(prompt), list(new))))
    return found


def _text(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """What `new` reads as behind the prompt: decoders drop the space that begins a text."""
    head = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *new], skip_special_tokens=True)
    return whole[len(head) :] if whole.startswith(head) else tokenizer.decode(new)


class _RefuseNaN(LogitsProcessor):
    """Stop where logits are NaN, from which `generate` would pick a token without a word."""

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        broken = scores.isnan().any(-1)
        if bool(broken.any()):
            raise SteeringError(
                f"the model's logits are NaN in row {int(broken.nonzero()[0])}: a strength is too "
                "large for its number type; lower it, or load the model in float32"
            )
        return scores


def text_ce(
    model: PreTrainedModel, texts: Sequence[Continuation], *, batch_size: int = 16
) -> float | None:
    """CE of the generated tokens under the model as it is, after their prompts: nats a token.

    Call it outside of `steer`. None where no text has a token.
    """
    total, n = 0.0, 0
    for start in range(0, len(texts), batch_size):
        ids, mask, written = _whole(texts[start : start + batch_size], model.device)
        logits = logits_of(model, ids, mask)[:, :-1][written[:, 1:]]
        losses = cross_entropy(logits, ids[:, 1:][written[:, 1:]])
        total += float(losses.cpu().double().sum())
        n += len(losses)
    return total / n if n else None


# What a dose has an effect on: one number for each text.
Effect = Callable[[Sequence[Continuation]], list[float]]


def feature_activation(model: PreTrainedModel, sae: Sae, feature: int) -> Effect:
    """The feature's activation on the text, mean over generated tokens, the model unsteered.

    What is read is the text alone: under the edit itself a clamped feature would read as its
    value, whatever was written. A text without a token counts as 0.
    """

    def read(x: Tensor) -> Tensor:
        return sae.activation(x.to(sae.W_enc.device, torch.float32), [feature])[..., 0]

    return _mean_reading(model, sae.hook_point, read)


def projection(model: PreTrainedModel, vector: Tensor, point: HookPoint) -> Effect:
    """x · v / ‖v‖, mean over generated tokens, the model unsteered; 0 for a text without one."""
    unit = vector.detach().float() / vector.detach().float().norm()
    return _mean_reading(model, point, lambda x: x.float() @ unit.to(x.device))


def word_share(words: Sequence[str]) -> Effect:
    """1 for each text that holds one of the words as a whole word, in any case; else 0.

    Raises:
        TextError: no words.
    """
    kept = [re.escape(word.strip()) for word in words if word.strip()]
    if not kept:
        raise TextError("no words to look for; give one at least")
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(kept)})(?!\w)", re.IGNORECASE)
    return lambda texts: [float(pattern.search(one.text) is not None) for one in texts]


def _mean_reading(
    model: PreTrainedModel,
    point: HookPoint,
    read: Callable[[Tensor], Tensor],
    batch_size: int = 16,
) -> Effect:
    """Mean over each text's generated tokens of a reading [batch, seq] of x [batch, seq, d]."""

    def effect(texts: Sequence[Continuation]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(texts), batch_size):
            ids, mask, written = _whole(texts[start : start + batch_size], model.device)
            value = read(activations(model, [point], ids, mask)[point]).to(ids.device)
            total = torch.where(written, value, 0.0).sum(1)
            found += (total / written.sum(1).clamp(min=1)).tolist()
        return found

    return effect


def _whole(texts: Sequence[Continuation], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with what was written, padded on the right; their mask; which were written."""
    ids, mask = (t.to(device) for t in padded([(*one.prompt, *one.new) for one in texts]))
    begins = torch.tensor([[len(one.prompt)] for one in texts], device=device)
    return ids, mask, (torch.arange(ids.shape[1], device=device) >= begins) & (mask == 1)
