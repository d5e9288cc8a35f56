"""Text from prompts, where every row draws from its own generator.

Sampling adds Gumbel noise to the scaled logits and takes the highest (the Gumbel-max trick), with
one generator a row. So a row's text depends on its seed alone, not on what else is in the batch,
and a baseline and a steered text with one seed differ only where their distributions do.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from saesteer.errors import SteeringError, TextError


class GumbelRows(LogitsProcessor):
    """Turn greedy choice into sampling at a temperature, row by row."""

    def __init__(self, seeds: Sequence[int], temperature: float):
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = temperature

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """scores [rows, vocabulary] → perturbed scores whose highest is a sample."""
        noise = torch.stack(
            [
                torch.rand(scores.shape[1], generator=g, dtype=torch.float64)
                for g in self._generators
            ]
        )
        gumbel = -torch.log(-torch.log(noise.clamp_min(1e-300)))
        return scores.double() / self._temperature + gumbel.to(scores.device)


def _finite(input_ids: LongTensor, scores: Tensor) -> Tensor:
    """Refuse to pick a token from logits that are no numbers: generate would do so silently."""
    if bool(torch.isnan(scores).any()):
        raise SteeringError(
            "the model's logits are NaN: a strength is too large for its number type, or its "
            "weights are damaged; lower the strength or load it with --dtype float32"
        )
    return scores


def prompt_ids(
    tokenizer: Any, prompts: Sequence[str], *, prepend_bos: bool
) -> tuple[list[list[int]], int]:
    """Token ids of each prompt, a BOS before them where the tokenizer has one, and a pad id.

    Raises:
        TextError: a prompt is empty and there is no BOS to stand for it.
    """
    bos = tokenizer.bos_token_id if prepend_bos else None
    rows = []
    for prompt in prompts:
        ids = list(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        if not ids:
            raise TextError("an empty prompt, and no BOS token to stand for it; write some text")
        rows.append(ids)
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return rows, next(i for i in known if i is not None)


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    seed: int | Sequence[int] = 0,
    prepend_bos: bool = True,
) -> list[str]:
    """Continue each prompt; the texts returned begin with their prompts.

    Args:
        temperature: 0 is greedy.
        seed: one for every row, or one a row. A row's text depends on its own seed only.

    Raises:
        TextError: an empty prompt, a prompt that leaves no room, or seeds that do not match.
    """
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise TextError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one seed a prompt")
    if not 0 <= temperature <= 100:
        raise TextError(f"temperature {temperature:g} is not between 0 and 100; 0 is greedy")
    if max_new_tokens < 1:
        raise TextError(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
    rows, pad = prompt_ids(tokenizer, prompts, prepend_bos=prepend_bos)
    longest = max(map(len, rows))
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and longest + max_new_tokens > room:
        raise TextError(
            f"{longest} prompt tokens and {max_new_tokens} new ones do not fit into the model's "
            f"{room} positions; shorten the prompt or ask for fewer new tokens"
        )
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device
    )
    sampling = [_finite, *([GumbelRows(seeds, temperature)] if temperature > 0 else [])]
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList(sampling),
        )
    texts = []
    for row, full in zip(rows, out.tolist(), strict=True):
        new = full[longest:]
        texts.append(tokenizer.decode(row + new, skip_special_tokens=True))
    return texts
