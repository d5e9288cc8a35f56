"""Which tokens of a chat are whose: the turns of a role as the chat template writes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from saesteer.errors import SteeringError
from saesteer.steering.positions import Positions, Span

Message = Mapping[str, str]


def of_roles(
    tokenizer: Any,
    messages: Sequence[Message],
    roles: Sequence[str],
    *,
    add_generation_prompt: bool = True,
    special: bool = False,
) -> Positions:
    """The tokens of some roles' turns in a chat, as `tokenizer.apply_chat_template` writes it.

    A turn is everything the template writes for a message, its markers included. What it writes of
    its own before the first turn, such as a default system text, is the system's. What is generated
    belongs to the assistant, and so does the generation prompt.

    Args:
        messages: {"role", "content"} each; the positions are for this chat alone.
        roles: such as ("user",) or ("system", "assistant").

    Raises:
        SteeringError: the tokenizer has no chat template, or the template refuses the chat; nobody
            in it has one of the roles; a turn of theirs can't be told from another role's, as where
            the template puts the system's text into the user's turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise SteeringError("the tokenizer has no chat template, so a text has no roles")
    whole = _ids(tokenizer, messages, add_generation_prompt)
    if isinstance(whole, str):
        raise SteeringError(f"the chat template refuses this chat ({whole}); mend its turns")
    ends = [_end(tokenizer, messages[:n], whole) for n in range(1, len(messages) + 1)]
    start = 0
    spans: list[Span] = []
    if messages[0]["role"] != "system":
        start = _preamble(tokenizer, messages[0], whole[: ends[0] or 0])
        if "system" in roles and set(whole[:start]) - set(tokenizer.all_special_ids):
            spans.append((0, start))
    together: list[str] = []  # roles whose turns can't be told apart
    for message, end in zip(messages, ends, strict=True):
        together.append(message["role"])
        if end is None or end == start:
            continue
        wanted = [role in roles for role in together]
        if any(wanted) and not all(wanted):
            raise SteeringError(
                f"the chat template writes the turns of {' and '.join(together)} as one, so their "
                "tokens can't be told apart: name both roles, or give Positions(spans=…)"
            )
        if all(wanted):
            spans.append((start, end))
        start, together = end, []
    if any(role in roles for role in together):
        raise SteeringError(
            f"the chat template writes no turn of its own for {' and '.join(together)}, or another "
            "once more follow: give Positions(spans=…)"
        )
    assistant = "assistant" in roles
    if assistant and len(whole) > start and not together:
        spans.append((start, len(whole)))
    if assistant:
        spans.append((len(whole), None))
    if not spans:
        known = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise SteeringError(f"no message of {', '.join(roles)}; the chat has {known}")
    return Positions(spans=tuple(spans), special=special, generated=assistant)


def _ids(tokenizer: Any, messages: Sequence[Message], prompt: bool = False) -> list[int] | str:
    """The chat's ids, or why the template refuses it."""
    from jinja2 import TemplateError

    try:
        found = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=prompt, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        return str(error)
    return list(found)


def _end(tokenizer: Any, messages: Sequence[Message], whole: list[int]) -> int | None:
    """Where these messages end in the whole chat; None where they are written otherwise alone."""
    part = _ids(tokenizer, messages)
    return len(part) if isinstance(part, list) and whole[: len(part)] == part else None


def _preamble(tokenizer: Any, message: Message, first: list[int]) -> int:
    """How many of the first turn's ids the template writes of its own before it.

    The same message is written once more later in a chat, where nothing comes before it.
    """
    reply = {"role": "user" if message["role"] == "assistant" else "assistant", "content": "x"}
    before = _ids(tokenizer, [message, reply])
    after = _ids(tokenizer, [message, reply, message])
    if isinstance(before, str) or isinstance(after, str) or after[: len(before)] != before:
        return 0
    again = after[len(before) :]
    same = 0
    while same < min(len(again), len(first)) and again[-1 - same] == first[-1 - same]:
        same += 1
    # Between turns there may be a line break that isn't there before the first.
    blank = not tokenizer.decode(again[: len(again) - same]).strip()
    return len(first) - same if blank and same else 0
