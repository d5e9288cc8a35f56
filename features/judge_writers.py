"""Who writes labels: a model that is loaded here, or one behind an OpenAI-compatible address."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedModel

from saesteer.core.generate import write as generate
from saesteer.errors import IndexingError
from saesteer.features.judge import Write

# Answers that come again when asked later: too many questions, or the server is not well.
_LATER = {408, 429, 500, 502, 503, 504}


def local_writer(
    model: PreTrainedModel, tokenizer: Any, *, max_new_tokens: int = 24, batch_size: int = 8
) -> Write:
    """A writer that generates greedily; in the tokenizer's chat format where it has one."""

    def chat(prompt: str) -> str | list[int]:
        if not getattr(tokenizer, "chat_template", None):
            return prompt
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def write(prompts: Sequence[str]) -> list[str]:
        texts = []
        for start in range(0, len(prompts), batch_size):
            some = [chat(prompt) for prompt in prompts[start : start + batch_size]]
            written = generate(
                model, tokenizer, some, max_new_tokens=max_new_tokens, temperature=0.0
            )
            texts += [one.reply for one in written]
        return texts

    return write


def address_writer(
    address: str,
    model: str,
    *,
    key: str | None = None,
    max_tokens: int = 64,
    timeout: float = 60.0,
    tries: int = 5,
    at_once: int = 4,
    wait: Callable[[float], None] = time.sleep,
) -> Write:
    """A writer behind an OpenAI-compatible address, such as http://localhost:8000/v1.

    Args:
        model: the name that the server knows it by.
        key: sent as a bearer token where there is one.
        timeout: seconds that an answer may take; tries: how often a question is asked where the
            server is busy or not there, twice as long apart each time; wait: how time passes.
        at_once: questions on their way at the same time.

    Raises:
        IndexingError: no http address; and, when asked, no answer after all tries, or none that
            holds a text.
    """
    if not address.startswith(("http://", "https://")):
        raise IndexingError(
            f"{address!r} is no address of a model; give one such as http://localhost:8000/v1"
        )
    url = address.rstrip("/")
    url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"

    def ask(prompt: str) -> str:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        for left in range(tries - 1, -1, -1):
            try:
                with urllib.request.urlopen(request, timeout=timeout) as answer:
                    return _text(answer.read(), url)
            except urllib.error.HTTPError as error:
                with error:
                    why = f"status {error.code} {error.reason}"
                    again = error.code in _LATER
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                why, again = str(getattr(error, "reason", error) or type(error).__name__), True
            if not (again and left):
                break
            wait(2.0 ** (tries - 1 - left))
        raise IndexingError(
            f"{url} gave no answer ({why}); check the address, the model's name and the key. What "
            "was labelled is kept: the same command goes on from there"
        )

    def write(prompts: Sequence[str]) -> list[str]:
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(ask, prompts))

    return write


def _text(body: bytes, url: str) -> str:
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise IndexingError(
            f"{url} answered with something else than a chat completion ({body[:80]!r}); is it "
            "OpenAI-compatible?"
        )
    return text
