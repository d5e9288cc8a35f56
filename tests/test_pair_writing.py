"""Pairs written by a model: read, filtered, balanced, resumed, their cost counted."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from saesteer.core.writers import Cost
from saesteer.directions.margin import margins
from saesteer.directions.pair_agreement import agrees
from saesteer.directions.pair_asking import TOPICS, parsed, question, told
from saesteer.directions.pair_checks import check
from saesteer.directions.pair_record import Record, record_path
from saesteer.directions.pair_writing import Filter, Writer, write_new_pairs
from saesteer.directions.pairs import Pair, read_pairs, write_pairs
from saesteer.errors import ModelError, PairsError
from tests.tiny import tiny_model, tiny_tokenizer

KIND = "is kind to strangers"


def number(prompt: str) -> int:
    return int(prompt.split("This is item ")[1].split(":")[0])


def item(i: int) -> str:
    return f"Prompt: What about {i}?\nShows: Kind {i}\nOpposite: Rude {i}"


class Fake:
    """Writes item(i) to question i; every seventh is malformed, every fifth one seen before."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.cost = Cost()
        self.fails_at = fails_at

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        out = []
        for prompt in prompts:
            i = number(prompt)
            if i == self.fails_at:
                raise ModelError("gave no answer")
            self.asked.append(i)
            self.cost.add(10, 5)
            out.append("Sorry, no." if i % 7 == 0 else item(2 if i % 5 == 0 else i))
        return out

    @property
    def writer(self) -> Writer:
        return Writer(self, "fake", self.cost)


def kept(record: Path) -> dict:
    return json.loads(record_path(record).read_text())


def test_what_is_asked_names_the_behaviour_and_is_never_the_same() -> None:
    asked = [question(KIND, i) for i in range(5 * len(TOPICS))]
    assert len(set(asked)) == len(asked) and all(KIND in text for text in asked)
    assert {topic for topic in TOPICS for text in asked if f"about {topic}," in text} == {*TOPICS}


@pytest.mark.parametrize(
    "text",
    [
        "Prompt: Is it?\nShows: Yes so\nOpposite: Not so",
        "\n**Prompt:** Is it?\n**Shows:** Yes so\n**Opposite:** Not so\n\nI hope this helps!",
        'Sure!\n\n- PROMPT : "Is it?"\n- Shows: Yes\n  so\n\n- opposite: “Not so”\nPrompt: again',
    ],
)
def test_an_answer_is_read_whatever_decorates_it(text: str) -> None:
    assert parsed(text) == Pair("Is it?", " Yes so", " Not so")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Prompt: Is it?\nShows: Yes",
        "Prompt: …\nShows: …\nOpposite: …",
        "Prompt: Is it?\nShows: Yes\nOpposite:\n\n",
        "Prompt: Is it?\nShows: Yes\nOpposite: Yes",
    ],
)
def test_what_is_no_pair_is_none(text: str) -> None:
    assert parsed(text) is None


def test_pairs_are_written_distinct_and_counted(tmp_path: Path) -> None:
    fake = Fake()
    pairs, record = write_new_pairs(tmp_path / "p.jsonl", KIND, fake.writer, n=40)
    assert read_pairs(tmp_path / "p.jsonl") == pairs and len(pairs) == 40
    assert check(pairs) == ()
    # Of the first 60 items 8 are malformed (7, 14, …) and of the rest 11 repeat (5, 10, …).
    last = int(pairs[-1].prompt.split()[-1][:-1])
    wrong = [i for i in range(1, last + 1) if i % 7 == 0]
    again = [i for i in range(1, last + 1) if i % 5 == 0 and i % 7]
    assert record.asked == last == 40 + len(wrong) + len(again)
    assert record.dropped == {
        "malformed": len(wrong),
        "repeat": len(again),
        "overlap": 0,
        "margin": 0,
    }
    spent = kept(tmp_path / "p.jsonl")["writing"]
    assert spent["calls"] == len(fake.asked) and spent["tokens_in"] == 10 * len(fake.asked)


def test_letters_are_balanced(tmp_path: Path) -> None:
    pairs, _ = write_new_pairs(tmp_path / "p.jsonl", KIND, Fake().writer, n=40, choices=True)
    assert Counter(pair.chosen for pair in pairs) == {" (A)": 20, " (B)": 20}
    for pair in pairs:
        kind = next(line for line in pair.prompt.split("\n") if "Kind" in line)
        assert kind.startswith(pair.chosen)
    assert check(pairs) == ()


def test_a_stopped_file_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, record = write_new_pairs(
        tmp_path / "whole.jsonl", KIND, Fake().writer, n=40, choices=True
    )
    path = tmp_path / "p.jsonl"
    with pytest.raises(ModelError):
        write_new_pairs(path, KIND, Fake(fails_at=1).writer, n=40, choices=True)
    stopped = Fake(fails_at=35)
    with pytest.raises(ModelError):
        write_new_pairs(path, KIND, stopped.writer, n=40, choices=True)
    assert 0 < len(read(path)) < 40
    # What was paid for in the batch that failed is counted, and its items are asked again.
    assert kept(path)["writing"]["calls"] == 34 and kept(path)["asked"] == 32
    for n in (30, 33, 40):
        again, resumed = write_new_pairs(path, KIND, Fake().writer, n=n, choices=True)
    assert again == whole == read(path)
    assert resumed.asked == record.asked and resumed.dropped == record.dropped
    done = Fake()
    assert write_new_pairs(path, KIND, done.writer, n=40, choices=True)[0] == whole
    assert done.asked == []


def read(path: Path) -> tuple[Pair, ...]:
    return tuple(Pair(**json.loads(line)) for line in path.read_text().splitlines())


def test_pairs_that_the_record_does_not_know_come_again(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    first, _ = write_new_pairs(path, KIND, Fake().writer, n=32)
    more, _ = write_new_pairs(tmp_path / "more.jsonl", KIND, Fake().writer, n=40)
    write_pairs(path, [*first, Pair("written", " and then", " stopped")])
    assert write_new_pairs(path, KIND, Fake().writer, n=40)[0] == more


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_pairs(path, [Pair("a", "b", "c")])
    with pytest.raises(PairsError, match="doesn't tell how it was written"):
        write_new_pairs(path, KIND, Fake().writer, n=1)
    assert read(path) == (Pair("a", "b", "c"),)
    path = tmp_path / "q.jsonl"
    write_new_pairs(path, KIND, Fake().writer, n=3)
    with pytest.raises(PairsError, match="begun with another behaviour"):
        write_new_pairs(path, "is rude", Fake().writer, n=3)
    with pytest.raises(PairsError, match="another choices and against"):
        write_new_pairs(path, KIND, Fake().writer, n=3, choices=True, against=[Pair("a", "b", "c")])
    record_path(path).write_text("{}")
    with pytest.raises(PairsError, match="doesn't tell how"):
        write_new_pairs(path, KIND, Fake().writer, n=3)


def test_what_the_test_file_asks_is_refused(tmp_path: Path) -> None:
    test = [Pair("what about 3", "x", "y"), Pair("What about 8?\n (A) l\n (B) m", " (A)", " (B)")]
    pairs, record = write_new_pairs(
        tmp_path / "p.jsonl", KIND, Fake().writer, n=32, against=test, choices=True
    )
    assert record.dropped["overlap"] == 2 and check(pairs, other=test) == ()


def test_a_writer_that_can_not_is_given_up(tmp_path: Path) -> None:
    silent = Writer(lambda prompts: ["no"] * len(prompts), "silent", Cost())
    with pytest.raises(PairsError, match="0 of 3 pairs after 24 items \\(24 malformed\\)"):
        write_new_pairs(tmp_path / "p.jsonl", KIND, silent, n=3)
    assert not (tmp_path / "p.jsonl").exists()
    # The same command tries on, with other questions.
    fake = Fake()
    assert (
        len(write_new_pairs(tmp_path / "p.jsonl", KIND, Writer(fake, "silent", Cost()), n=3)[0])
        == 3
    )
    assert min(fake.asked) == 25
    short = Writer(lambda prompts: ["one"], "short", Cost())
    with pytest.raises(PairsError, match="1 texts for 3 prompts"):
        write_new_pairs(tmp_path / "q.jsonl", KIND, short, n=3)
    for behaviour, n in ((" ", 3), (KIND, 0)):
        with pytest.raises(PairsError, match="nothing to write"):
            write_new_pairs(tmp_path / "r.jsonl", behaviour, fake.writer, n=n)


def test_what_the_model_does_not_agree_on_is_dropped(tmp_path: Path) -> None:
    def agreement(pairs: Sequence[Pair]) -> list[float]:
        # Of a NaN nobody can say that it agrees.
        return [[1.0, -1.0, 0.0, float("nan")][int(pair.chosen.split()[1]) % 4] for pair in pairs]

    judge = Filter(agreement, "judge", Cost())
    pairs, record = write_new_pairs(tmp_path / "p.jsonl", KIND, Fake().writer, n=8, filter=judge)
    assert all(int(pair.chosen.split()[1]) % 4 == 0 for pair in pairs)
    assert record.dropped["margin"] > 8 and record.settings["filtered_by"] == "judge"


def test_agreement_is_the_shift_of_the_margin_and_swaps_its_sign() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    words = ["sea", "boat", "storm", "fish", "music"]
    pairs = [Pair(f"the {word} was", f" good {word}", " bad and old") for word in words]
    cost = Cost()
    agreement = agrees(model, tokenizer, "good", cost=cost, batch_size=3)
    found = torch.tensor(agreement(pairs))
    asked, opposite = (
        margins(model, tokenizer, [told("good", pair, opposite=o) for pair in pairs])
        for o in (False, True)
    )
    torch.testing.assert_close(found, asked - opposite)
    swapped = [Pair(pair.prompt, pair.rejected, pair.chosen) for pair in pairs]
    torch.testing.assert_close(torch.tensor(agreement(swapped)), -found)
    assert cost.calls == 2 * 4 * len(pairs) and cost.tokens_in > 4 * cost.calls
    tokenizer.chat_template = "{% for m in messages %}king {{ m.content }} queen{% endfor %}"
    assert not torch.allclose(torch.tensor(agreement(pairs)), found)


def test_a_record_is_json(tmp_path: Path) -> None:
    write_new_pairs(tmp_path / "p.jsonl", KIND, Fake().writer, n=3)
    found = kept(tmp_path / "p.jsonl")
    found.pop("format")
    assert Record(**found).n == 3 and found["settings"]["behaviour"] == KIND
