"""Whose tokens a chat's are, under templates that write things of their own."""

from typing import Any

import pytest

from saesteer.errors import SteeringError
from saesteer.steering.roles import of_roles
from tests.tiny import BOS, tiny_tokenizer

USER = {"role": "user", "content": "a boy saw a dog"}
SYSTEM = {"role": "system", "content": "the sea"}
REPLY = {"role": "assistant", "content": "he liked it"}


def speaking(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_positions_of_roles_are_those_of_the_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][:1] }} : {{ m['content'] }} . {% endfor %}"
        "{% if add_generation_prompt %}a :{% endif %}"
    )
    chat = [
        {"role": "system", "content": "the sea"},
        {"role": "user", "content": "a boy saw a dog"},
        {"role": "assistant", "content": "he liked it"},
        {"role": "user", "content": "once"},
    ]
    spans = {role: of_roles(tokenizer, chat, [role]).spans for role in ("system", "user")}
    assert spans == {"system": ((0, 5),), "user": ((5, 13), (19, 23))}
    assert of_roles(tokenizer, chat, ["assistant"]).spans == ((13, 19), (23, 25), (25, None))
    assert of_roles(tokenizer, chat, ["user"]).generated is False
    with pytest.raises(SteeringError, match="no message of tool"):
        of_roles(tokenizer, chat, ["tool"])
    with pytest.raises(SteeringError, match="no chat template"):
        of_roles(tiny_tokenizer(), chat, ["user"])


TURN = "{{ m['role'][:1] }} : {{ m['content'] }} . "


def test_a_default_system_text_is_the_systems() -> None:
    tokenizer = speaking(
        "{% if messages[0]['role'] != 'system' %}s : the big cat . {% endif %}"
        "{% for m in messages %}" + TURN + "{% endfor %}"
    )
    assert of_roles(tokenizer, [USER, REPLY], ["user"]).spans == ((6, 14),)
    assert of_roles(tokenizer, [USER, REPLY], ["system"]).spans == ((0, 6),)
    assert of_roles(tokenizer, [SYSTEM, USER], ["system"]).spans == ((0, 5),)


def test_special_tokens_alone_are_no_system_text() -> None:
    tokenizer = speaking("{{ bos_token }}{% for m in messages %}" + TURN + "{% endfor %}")
    ids = tokenizer.apply_chat_template([USER], tokenize=True, return_dict=False)
    assert ids[0] == BOS
    assert of_roles(tokenizer, [USER], ["user"]).spans == ((1, 9),)
    with pytest.raises(SteeringError, match="no message of system; the chat has user"):
        of_roles(tokenizer, [USER], ["system"])


def test_turns_that_are_written_as_one_are_told_apart_by_nobody() -> None:
    merged = speaking(
        "{% set text = namespace(first='') %}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{% set text.first = m['content'] %}"
        "{% else %}{{ m['role'][:1] }} : {{ text.first }} {{ m['content'] }} . "
        "{% set text.first = '' %}{% endif %}{% endfor %}"
    )
    chat = [SYSTEM, USER, REPLY]
    for role in ("system", "user"):
        with pytest.raises(SteeringError, match="turns of system and user as one"):
            of_roles(merged, chat, [role])
    assert of_roles(merged, chat, ["system", "user"]).spans == ((0, 10),)
    assert of_roles(merged, chat, ["assistant"]).spans == ((10, 16), (16, None))
    with pytest.raises(SteeringError, match="no turn of its own for system"):
        of_roles(merged, [SYSTEM], ["system"])


def test_a_template_that_refuses_is_told_in_our_words() -> None:
    refusing = speaking("{{ raise_exception('no chats on Sunday') }}")
    with pytest.raises(SteeringError, match=r"refuses this chat \(no chats"):
        of_roles(refusing, [USER], ["user"])
    # One that refuses a system turn without a user's can't tell where it ends.
    needs_user = speaking(
        "{% if messages[-1]['role'] == 'system' %}{{ raise_exception('and now?') }}{% endif %}"
        "{% for m in messages %}" + TURN + "{% endfor %}"
    )
    with pytest.raises(SteeringError, match="turns of system and user as one"):
        of_roles(needs_user, [SYSTEM, USER, REPLY], ["user"])
    assert of_roles(needs_user, [SYSTEM, USER, REPLY], ["assistant"]).spans == (
        (13, 19),
        (19, None),
    )
