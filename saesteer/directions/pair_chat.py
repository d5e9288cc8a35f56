"""A prompt and two answers of a chat, as a tokenizer's chat template writes them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from saesteer.errors import PairsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]


def answers_in_chat(
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
    tokenizer: "PreTrainedTokenizerBase | None",
    where: str,
) -> tuple[str, str, str]:
    """The texts of prompt, chosen and rejected.

    The prompt's text ends where the assistant begins to speak. An answer's ends with what its last
    message says: what the template puts behind that (an end of turn) is the same on both sides and
    would otherwise be the token that is read last.

    Raises:
        PairsError: no tokenizer or no chat template, or one that refuses the messages or writes
            another prompt once an answer follows.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        lacks = "a tokenizer" if tokenizer is None else "a tokenizer with a chat template"
        raise PairsError(
            f"{where}: chat messages need {lacks}; name an instruction-tuned model, or write the "
            "pair as texts"
        )
    head = _write(tokenizer, prompt, where, begins_answer=True)
    answers = []
    for answer in (chosen, rejected):
        whole = _write(tokenizer, [*prompt, *answer], where, begins_answer=False)
        last = answer[-1]["content"].strip()
        end = whole.rfind(last) + len(last)
        if not whole.startswith(head) or end < len(head) or last not in whole:
            raise PairsError(
                f"{where}: the chat template writes the prompt otherwise once an answer follows it "
                "(a reasoning template does that), so the answer can't be told apart; write the "
                "pair as texts"
            )
        # Of an answer that is empty nothing is left, whatever the template writes around it.
        answers.append(whole[len(head) : end] if last else "")
    return head, answers[0], answers[1]


def _write(
    tokenizer: "PreTrainedTokenizerBase", messages: Messages, where: str, *, begins_answer: bool
) -> str:
    # A template is a program of the model's author: what it can raise is open-ended.
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=begins_answer,
        )
    except Exception as error:
        raise PairsError(
            f"{where}: the chat template refuses these messages ({error}); check their roles"
        ) from error
    return str(text)
