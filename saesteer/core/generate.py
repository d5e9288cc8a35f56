"""Text from prompts, where every row draws from its own generator.

Sampling adds Gumbel noise to the scaled logits and takes the highest (the Gumbel-max trick), with
one generator a row. So a row's text depends on its seed alone, not on what else is in the batch,
and a baseline and a steered text with one seed differ only where their distributions do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, TextStreamer
from transformers.generation.streamers import BaseStreamer

from saesteer.errors import SteeringError, TextError

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Written:
    """A prompt and what was written after it.

    Attributes:
        prompt: its token ids, BOS included; new: those written, the end token included where the
            model wrote one, and nothing behind it.
        text: both together as text; reply: what was written alone. Without special tokens.
    """

    prompt: tuple[int, ...]
    new: tuple[int, ...]
    text: str
    reply: str


class Stream(TextStreamer):
    """Hands on one row's text while it is generated, a word at a time.

    write: gets each piece of text. skip_prompt: whether only what is new is handed on.
    """

    def __init__(
        self, tokenizer: Any, write: Callable[[str], None], *, skip_prompt: bool = False
    ) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """What transformers calls with each piece."""
        if text:
            self._write(text)


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
    tokenizer: Any, prompts: Sequence[Prompt], *, prepend_bos: bool
) -> tuple[list[list[int]], int]:
    """Token ids of each prompt, a BOS before them where the tokenizer has one, and a pad id.

    Prompts that are token ids already (a chat, as its template writes it) stay as they are.

    Raises:
        TextError: a prompt is empty and there is no BOS to stand for it.
    """
    bos = tokenizer.bos_token_id if prepend_bos else None
    rows = []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = list(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
            if bos is not None and ids[:1] != [bos]:
                ids = [bos, *ids]
        else:
            ids = [int(i) for i in prompt]
        if not ids:
            raise TextError("an empty prompt, and no BOS token to stand for it; write some text")
        rows.append(ids)
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return rows, next(i for i in known if i is not None)


def write(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    seed: int | Sequence[int] = 0,
    prepend_bos: bool = True,
    streamer: BaseStreamer | None = None,
) -> list[Written]:
    """Continue each prompt, and tell token ids and text.

    Args:
        prompts: texts, or rows of token ids, which are taken as they are.
        temperature: 0 is greedy.
        seed: one for every row, or one a row. A row's text depends on its own seed only.
        streamer: told of the tokens as they come, such as a `Stream`; for one prompt.

    Raises:
        TextError: no prompt or an empty one, a prompt that leaves no room, seeds that do not match,
            or a streamer for several prompts.
    """
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if not prompts:
        raise TextError("no prompt to continue; give one at least")
    if len(seeds) != len(prompts):
        raise TextError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one seed a prompt")
    if streamer is not None and len(prompts) != 1:
        raise TextError(f"{len(prompts)} prompts can't be streamed; give one, or no streamer")
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
            streamer=streamer,
        )
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    return [
        _written(tokenizer, row, _ended(full[longest:], ends))
        for row, full in zip(rows, out.tolist(), strict=True)
    ]


def _ended(new: list[int], ends: set[int]) -> list[int]:
    """Up to and with the first end token: rows that have ended are padded while others go on."""
    stop = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
    return new[:stop]


def _written(tokenizer: Any, prompt: list[int], new: list[int]) -> Written:
    whole = tokenizer.decode([*prompt, *new], skip_special_tokens=True)
    head = tokenizer.decode(prompt, skip_special_tokens=True)
    # Decoders drop the space that begins a text, so the reply is what the whole has behind the
    # prompt; where the two don't join so, it is decoded alone.
    if whole.startswith(head):
        reply = whole[len(head) :]
    else:
        reply = tokenizer.decode(new, skip_special_tokens=True)
    return Written(tuple(prompt), tuple(new), whole, reply)
