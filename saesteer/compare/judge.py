"""An LLM as judge of generated texts: concept, relevance and fluency, 0 to 2 each (AxBench).

A judge is never alone: its scores stand beside those of `scorers`, with their `agreement`. Each
score is a question of its own, so that none leans on another. Every prompt and every raw answer is
kept in a file of JSON lines, and nothing is asked twice: the work goes on where it stopped.

The writer is any of `core.writers`, such as `address_writer(address, name, key=...)` for an
OpenAI-compatible address.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from saesteer.compare import metrics
from saesteer.compare.problem import Behaviour
from saesteer.compare.texts import Text
from saesteer.core.progress import progress
from saesteer.core.writers import Write
from saesteer.errors import ModelError, RunError

_ANSWER = """
Answer with one line and nothing else: "Rating: 0", "Rating: 1" or "Rating: 2".
"""
PROMPTS = {
    "concept": """\
You rate a text that a language model wrote. Rate only how much of this is in it, however well or \
badly it is written: {behaviour}

Text:
<<<
{text}
>>>

0: nothing of it. 1: somewhat, or in passing. 2: clearly, all through.
"""
    + _ANSWER,
    "relevance": """\
You rate how a language model went on from a prompt. Rate only whether the text belongs to the \
prompt, however well or badly it is written.

Prompt:
<<<
{prompt}
>>>

Text after it:
<<<
{text}
>>>

0: it has nothing to do with the prompt. 1: it does in part. 2: it goes on from the prompt.
"""
    + _ANSWER,
    "fluency": """\
You rate a text that a language model wrote. Rate only the language, whatever the text is about; \
that it ends in the middle of a sentence is no fault.

Text:
<<<
{text}
>>>

0: it can't be read, or repeats itself over and over. 1: it can be read, with mistakes or \
repetitions. 2: it is fluent.
"""
    + _ANSWER,
}
"""What a judge is asked, by score."""
AGAIN = """
Your last answer could not be read. The answer is one line of two words, such as "Rating: 1".
"""
"""Stands after a prompt that is asked a second time."""

_RATING = re.compile(r"""[\s*_"'`]*rating:[\s*_]*([012])[\s*_"'`.]*""", re.IGNORECASE)


@dataclass(frozen=True)
class Ratings:
    """A judge's scores of a text, 0, 1 or 2; None where its answer couldn't be read twice."""

    concept: int | None
    relevance: int | None
    fluency: int | None

    @property
    def unread(self) -> int:
        """How many of the three couldn't be read."""
        return sum(one is None for one in (self.concept, self.relevance, self.fluency))

    @property
    def harmonic(self) -> float | None:
        """The harmonic mean of the three, 0 where one is 0; None where one is missing."""
        if self.concept is None or self.relevance is None or self.fluency is None:
            return None
        return float(metrics.harmonic([self.concept], [self.relevance], [self.fluency])[0])


def judged(
    texts: Sequence[Text],
    behaviour: Behaviour,
    write: Write,
    *,
    name: str,
    path: Path,
    batch_size: int = 48,
) -> list[Ratings]:
    """Have texts rated, and keep prompts and raw answers in the file at `path`.

    An answer is read by its last line, which has to be "Rating: 0", 1 or 2 and no more; where it
    isn't, the question is asked once more, and then given up.

    Args:
        write: asked for `batch_size` answers at a time, which are then kept.
        name: the judge's; what another one said is asked anew.

    Raises:
        ModelError: the writer gave no answer, or another number of texts; what it gave before is
            kept. RunError: the file is damaged, or can't be read or written.
    """
    about = behaviour.describe or behaviour.name
    # In one pass: braces in a text are the text's own.
    asked = [
        {
            score: form.format(behaviour=about, prompt=one.prompt, text=one.text)
            for score, form in PROMPTS.items()
        }
        for one in texts
    ]
    prompts = [prompt for each in asked for prompt in each.values()]
    first = _answers(prompts, write, name, path, batch_size)
    unread = [prompt for prompt in prompts if rating(first[prompt]) is None]
    second = _answers([prompt + AGAIN for prompt in unread], write, name, path, batch_size)

    def read(prompt: str) -> int | None:
        found = rating(first[prompt])
        return rating(second[prompt + AGAIN]) if found is None else found

    return [Ratings(**{score: read(prompt) for score, prompt in each.items()}) for each in asked]


def rating(answer: str) -> int | None:
    """0, 1 or 2 from an answer whose last line is "Rating: …" and no more; else None."""
    lines = [line for line in answer.splitlines() if line.strip()]
    found = _RATING.fullmatch(lines[-1]) if lines else None
    return int(found[1]) if found else None


def _answers(
    prompts: Sequence[str], write: Write, name: str, path: Path, batch_size: int
) -> Mapping[str, str]:
    """What the judge says to each prompt: as it is kept, or else asked now, and kept."""
    known = _read(path)
    keys = {prompt: _key(name, prompt) for prompt in prompts}
    missing = [prompt for prompt, key in keys.items() if key not in known]
    if missing:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file, progress(
                "judge", len(missing), unit="question"
            ) as bar:  # fmt: skip
                for start in range(0, len(missing), batch_size):
                    some = missing[start : start + batch_size]
                    known |= _ask(some, write, name, file)
                    bar.update(len(some))
        except OSError as error:
            raise RunError(
                f"cannot write {path}: {error.strerror or error}; what was kept is whole: make "
                "room or choose another folder, and go on"
            ) from error
    return {prompt: known[key] for prompt, key in keys.items()}


def _ask(prompts: Sequence[str], write: Write, name: str, file: IO[str]) -> dict[str, str]:
    """Answers by key, each kept as a line."""
    texts = list(write(prompts))
    if len(texts) != len(prompts):
        raise ModelError(
            f"the judge {name!r} gave {len(texts)} answers to {len(prompts)} questions; expected "
            "one each"
        )
    found = {}
    for prompt, text in zip(prompts, texts, strict=True):
        found[_key(name, prompt)] = text
        line = {"key": _key(name, prompt), "judge": name, "prompt": prompt, "answer": text}
        file.write(json.dumps(line) + "\n")
    file.flush()
    return found


def _key(name: str, prompt: str) -> str:
    """32 hex digits of who is asked what."""
    return hashlib.sha256(f"{name}\0{prompt}".encode("utf-8", "replace")).hexdigest()[:32]


def _read(path: Path) -> dict[str, str]:
    """The answers of a file by key; what a killed process left half written is cut off."""
    try:
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with path.open("rb+") as file:
                file.truncate(whole)
    except OSError as error:
        raise RunError(f"{path} can't be read ({error.strerror})") from error
    found = {}
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            record = json.loads(line)
            found[str(record["key"])] = str(record["answer"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path}, line {number} is damaged ({error}); take the line out, and it is asked "
                "again"
            ) from error
    return found
