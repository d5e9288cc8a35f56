"""What the checks of contrast pairs find, and what they leave alone."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.directions.pair_checks import check, label, stem
from saesteer.directions.pairs import Pair
from tests.tiny import tiny_tokenizer

GOOD = [Pair(f"Prompt {i}", f" yes it is {i}", f" no it is not {i}") for i in range(40)]


def kinds(pairs: Sequence[Pair], *rest: object, **options: object) -> dict[str, tuple[int, ...]]:
    return {finding.kind: finding.pairs for finding in check(pairs, *rest, **options)}


def ab(question: str, chosen: str = "A") -> Pair:
    other = "B" if chosen == "A" else "A"
    return Pair(f"{question}\n (A) one\n (B) two", f" ({chosen})", f" ({other})")


def test_good_pairs_pass() -> None:
    assert check(GOOD) == ()
    assert check(GOOD, other=[Pair("another", "a", "b")]) == ()


def test_few_are_told() -> None:
    assert kinds(GOOD[:31]) == {"few": ()} and kinds(GOOD[:32]) == {}


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (Pair("p", " ", "b"), "empty"),
        (Pair("p", "a", "\n"), "empty"),
        (Pair("p", "a", "a"), "identical"),
        (Pair("p", "a b", " a  b\n"), "identical"),
        (Pair("Prompt 3", " no it is not 3", " yes it is 3"), "contradiction"),
        (GOOD[7], "repeat"),
    ],
)
def test_a_bad_pair_is_found_and_named(bad: Pair, kind: str) -> None:
    found = kinds([*GOOD, bad])
    assert set(found) == {kind} and 41 in found[kind]
    (finding,) = check([*GOOD, bad])
    assert finding.fatal is (kind != "repeat") and "41" in str(finding)


def test_letters_must_be_balanced() -> None:
    even = [ab(f"question {i}", "AB"[i % 2]) for i in range(40)]
    assert check(even) == ()
    # 25 against 15 is one quarter; 22 against 18 is a tenth, and left alone.
    assert kinds([ab(f"q {i}", "A" if i < 22 else "B") for i in range(40)]) == {}
    (finding,) = check([ab(f"q {i}", "A" if i < 25 else "B") for i in range(40)])
    assert finding.kind == "labels" and not finding.fatal
    assert "'A' is chosen 25 times, rejected 15" in finding.message
    words = [Pair(f"q {i}", " Yes", " No") for i in range(40)]
    assert "'yes' is chosen 40 times, rejected 0" in check(words)[0].message


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (" (A)", "A"),
        ("B", "B"),
        ("C) because", "C"),
        ("(1) that", "1"),
        (" Yes.", "yes"),
        ("A boy ran", None),
        ("Yes, it is", None),
        ("Ab", None),
        ("", None),
    ],
)
def test_labels(answer: str, found: str | None) -> None:
    assert label(answer) == found


def test_tokens_are_looked_at() -> None:
    tokenizer = tiny_tokenizer()
    known = [Pair("the boy", f" saw {'a ' * i}cat", " ran") for i in range(32)]
    assert kinds(known, tokenizer) == {}
    # "zebra" and "quark" are both unknown: the same token.
    found = kinds([*known, Pair("the boy", " zebra", " quark")], tokenizer)
    assert found == {"same tokens": (33,), "unknown words": (33,)}
    # BOS, two words of the prompt, 31 and 2 more of the longest answer.
    assert kinds(known, tokenizer, context=36) == {}
    assert kinds(known, tokenizer, context=35) == {"truncated": (32,)}
    tokenizer.model_max_length = 34
    assert kinds(known, tokenizer) == {"truncated": (31, 32)}


def test_leaks_of_pairs_and_of_prompts() -> None:
    other = [Pair("prompt  3.", "YES it is 3", " no it is not 3"), Pair("Prompt 5", "a", "b")]
    assert kinds(GOOD, None, other) == {"leaked pair": (4,), "leaked prompt": (6,)}
    assert all(finding.fatal for finding in check(GOOD, other=other))
    # The same question with its choices the other way round, or under another heading.
    asked = [ab("Is it so?"), *GOOD]
    for form in ("Is it so?\n\nChoices:\n (A) two\n (B) one", "is it so\n(A) x\n(B) y"):
        assert kinds(asked, None, [Pair(form, " (B)", " (A)")]) == {"leaked prompt": (1,)}


def test_without_prompts_the_answers_are_compared() -> None:
    bare = [Pair("", pair.chosen, pair.rejected) for pair in GOOD]
    assert kinds(bare, None, [Pair("", "other", "texts")]) == {}
    assert kinds(bare, None, [Pair("", " yes it is 2", "else")]) == {"leaked prompt": (3,)}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(GOOD), unique=True), st.lists(st.sampled_from(GOOD), unique=True))
def test_exactly_the_shared_pairs_leak(mine: list[Pair], theirs: list[Pair]) -> None:
    shared = tuple(i for i, pair in enumerate(mine, 1) if pair in theirs)
    assert kinds(mine, None, theirs).get("leaked pair", ()) == shared


def test_a_stem_keeps_what_tells_questions_apart() -> None:
    assert stem("Is 3 > 2?") != stem("Is 2 > 3?")
    assert stem("...") == stem(" ... ") != ""
