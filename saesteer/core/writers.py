"""Who writes a text when asked: a model that is loaded here, or one behind an OpenAI-compatible
address."""

import hashlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from saesteer.errors import ModelError

if TYPE_CHECKING:  # a model behind an address needs no torch
    from transformers import PreTrainedModel

Write = Callable[[Sequence[str]], Sequence[str]]
"""Prompts → as many texts."""

# Answers that come again when asked later: too many questions, or the server is not well.
_LATER = {408, 429, 500, 502, 503, 504}


@dataclass
class Cost:
    """What writing has cost so far; a writer that is given one adds to it.

    Attributes:
        calls: prompts that were answered.
        tokens_in, tokens_out: tokens of the prompts, and written.
        uncounted: calls whose server didn't tell its tokens, which are missing above.
        seconds: of wall time.
    """

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    uncounted: int = 0
    seconds: float = 0.0
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, tokens_in: int | None, tokens_out: int | None) -> None:
        """Count one answered call; None where its tokens aren't known."""
        with self._lock:
            self.calls += 1
            if tokens_in is None or tokens_out is None:
                self.uncounted += 1
            else:
                self.tokens_in += tokens_in
                self.tokens_out += tokens_out

    def as_json(self, before: Mapping[str, float] | None = None) -> dict[str, float]:
        """Its figures by name, added to those of `before`."""
        names = ("calls", "tokens_in", "tokens_out", "uncounted", "seconds")
        return {name: getattr(self, name) + (before or {}).get(name, 0) for name in names}


def local_writer(
    model: "PreTrainedModel",
    tokenizer: Any,
    *,
    max_new_tokens: int = 24,
    batch_size: int = 8,
    temperature: float = 0.0,
    seed: int = 0,
    cost: Cost | None = None,
) -> Write:
    """A writer that runs a model here; in the tokenizer's chat format where it has one.

    Args:
        temperature: 0 is greedy. Above it, what is written to a prompt depends on `seed` and on
            the prompt alone, whatever else is asked with it.
    """
    from saesteer.core.generate import write as generate

    cost = cost or Cost()

    def chat(prompt: str) -> str | list[int]:
        if not getattr(tokenizer, "chat_template", None):
            return prompt
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def write(prompts: Sequence[str]) -> list[str]:
        texts = []
        begin = time.monotonic()
        for start in range(0, len(prompts), batch_size):
            some = prompts[start : start + batch_size]
            written = generate(
                model,
                tokenizer,
                [chat(prompt) for prompt in some],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=[_seed(seed, prompt) for prompt in some],
            )
            texts += [one.reply for one in written]
            for one in written:
                cost.add(len(one.prompt), len(one.new))
        cost.seconds += time.monotonic() - begin
        return texts

    return write


def address_writer(
    address: str,
    model: str,
    *,
    key: str | None = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    timeout: float = 60.0,
    tries: int = 5,
    at_once: int = 4,
    wait: Callable[[float], None] = time.sleep,
    cost: Cost | None = None,
) -> Write:
    """A writer behind an OpenAI-compatible address, such as http://localhost:8000/v1.

    Args:
        model: the name that the server knows it by.
        key: sent as a bearer token where there is one.
        timeout: seconds that an answer may take; tries: how often a question is asked where the
            server is busy or not there, twice as long apart each time; wait: how time passes.
        at_once: questions on their way at the same time.

    Raises:
        ModelError: no http address; and, when asked, no answer after all tries, or none that
            holds a text.
    """
    if not address.startswith(("http://", "https://")):
        raise ModelError(
            f"{address!r} is no address of a model; give one such as http://localhost:8000/v1"
        )
    cost = cost or Cost()
    url = address.rstrip("/")
    url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"

    def ask(prompt: str) -> str:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        for left in range(tries - 1, -1, -1):
            try:
                with urllib.request.urlopen(request, timeout=timeout) as answer:
                    text, *used = _read(answer.read(), url)
                cost.add(*used)
                return text
            except urllib.error.HTTPError as error:
                with error:
                    why = f"status {error.code} {error.reason}"
                    again = error.code in _LATER
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                why, again = str(getattr(error, "reason", error) or type(error).__name__), True
            if not (again and left):
                break
            wait(2.0 ** (tries - 1 - left))
        raise ModelError(
            f"{url} gave no answer ({why}); check the address, the model's name and the key. What "
            "was written before is kept: the same command goes on from there"
        )

    def write(prompts: Sequence[str]) -> list[str]:
        begin = time.monotonic()
        try:
            with ThreadPoolExecutor(at_once) as pool:
                return list(pool.map(ask, prompts))
        finally:
            cost.seconds += time.monotonic() - begin

    return write


def _seed(seed: int, prompt: str) -> int:
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:7], "big")


def _read(body: bytes, url: str) -> tuple[str, int | None, int | None]:
    """The text of an answer, and the tokens of the prompt and of the text where it tells them."""
    try:
        answer = json.loads(body)
        text = answer["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ModelError(
            f"{url} answered with something else than a chat completion ({body[:80]!r}); is it "
            "OpenAI-compatible?"
        )
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    asked, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not (isinstance(asked, int) and isinstance(written, int)):
        asked = written = None
    return text, asked, written
