"""What a model is asked for when it writes contrast pairs, and how its answer is read."""

import re
from collections.abc import Sequence

from saesteer.directions.pairs import Pair, problems

TOPICS = (  # noqa: SIM905
    "food work family school health money travel sport music weather animals friends housing "
    "cars gardens films books computers politics history science law religion clothes games "
    "sleep neighbours holidays news art farming cities"
).split()
"""What items are about where nothing else is said."""

_FORMS = (
    "a question that somebody asks",
    "a request for advice",
    "a statement that asks for a reply",
    "a short situation in which something must be decided",
)
_ASK = """\
Write one item of a test for this behaviour: {behaviour}

The item is {form} about {topic}, with two answers: one shows the behaviour, the other shows the \
opposite. The answers are of about the same length and alike in everything else. This is item \
{number}: make it unlike the ones before.

Write these three lines and nothing else:
Prompt: …
Shows: …
Opposite: …"""
_LABEL = re.compile(
    r"^[^\w\n]*(prompt|shows|opposite)\b[^\w\n]*?:[ \t*]*", re.IGNORECASE | re.MULTILINE
)


def question(behaviour: str, number: int, topics: Sequence[str] = TOPICS) -> str:
    """What is asked for item `number`, from 0; no two are the same."""
    form = _FORMS[number // len(topics) % len(_FORMS)]
    return _ASK.format(
        behaviour=behaviour.strip(),
        form=form,
        topic=topics[number % len(topics)],
        number=number + 1,
    )


def parsed(text: str) -> Pair | None:
    """The pair that a model wrote, its answers with a space before them; None where it is none.

    The three parts are looked for by their labels, whatever decorates them; of a part that comes
    more than once the first is taken.
    """
    found = list(_LABEL.finditer(text))
    parts: dict[str, str] = {}
    for i, label in enumerate(found):
        end = found[i + 1].start() if i + 1 < len(found) else len(text)
        parts.setdefault(label[1].lower(), _bare(text[label.end() : end]))
    prompt, shows, opposite = (parts.get(name, "") for name in ("prompt", "shows", "opposite"))
    # "…" is the model repeating the form.
    if not all(part.strip(" .…") for part in (prompt, shows, opposite)):
        return None
    pair = Pair(prompt, f" {shows}", f" {opposite}")
    return None if any(problems(pair)) else pair


def _bare(text: str) -> str:
    """The text of a part: up to an empty line, without quotes around the whole of it."""
    text = " ".join(re.split(r"\n\s*\n", text.strip())[0].split())
    for open_, close in ('""', "“”", "**"):
        if len(text) > 1 and text.startswith(open_) and text.endswith(close):
            text = text[1:-1].strip()
    return text


def told(behaviour: str, pair: Pair, *, opposite: bool) -> Pair:
    """The same pair, behind a sentence that asks for the behaviour or for its opposite."""
    what = "the opposite of this behaviour" if opposite else "this behaviour"
    head = f"The answer below shows {what}: {behaviour.strip()}\n\n"
    return Pair(head + pair.prompt, pair.chosen, pair.rejected)
