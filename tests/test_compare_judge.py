"""A judge's scores: read strictly, kept whole, never asked for twice; and how far they agree."""

import json
import re
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import somersd, spearmanr

from saesteer.compare.agreement import agreement
from saesteer.compare.judge import AGAIN, Ratings, judged, rating
from saesteer.compare.problem import Behaviour
from saesteer.compare.texts import Text
from saesteer.core.writers import address_writer
from saesteer.errors import ModelError, RunError, SteeringError
from tests.test_writers import Server

SEA = Behaviour("sea", describe="The story is about the sea.", pairs="x")
TEXTS = [Text(f"prompt {i}", f"a text {i} with {{braces}} and {{text}}", (5,)) for i in range(5)]


class Judge:
    """Rates the concept 2, the relevance 1, the fluency 0, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompts):
        self.asked += prompts
        return [self.answer(prompt) for prompt in prompts]

    def answer(self, prompt: str) -> str:
        about = 2 if SEA.describe in prompt else 1 if "went on from a prompt" in prompt else 0
        return f"Let me see.\n**Rating: {about}**\n"


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Rating: 2", 2), ("rating:0", 0), ('"Rating: 1".', 1), ("**Rating:** 2\n", 2),
        ("It is about the sea.\nRating: 1", 1), ("Rating: 3", None), ("Rating: 1.5", None),
        ("Rating: 12", None), ("Rating: -1", None), ("2", None), ("", None), ("\n \n", None),
        ("Rating: 1\nor Rating: 2", None), ("Rating: 2/2", None), ("Rating: one", None),
        ("Rating: 2\nbecause it is", None), ("Rating: 0, Rating: 1", None),
    ],
)  # fmt: skip
def test_an_answer_is_read_strictly(answer, score):
    assert rating(answer) == score


def test_three_scores_a_text_and_every_word_kept(tmp_path):
    judge, path = Judge(), tmp_path / "deep" / "judge.jsonl"
    found = judged(TEXTS, SEA, judge, name="j", path=path, batch_size=4)
    assert found == [Ratings(2, 1, 0)] * 5
    assert found[0].harmonic == 0 and found[0].unread == 0
    assert Ratings(1, 2, 2).harmonic == pytest.approx(1.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == judge.asked and len(judge.asked) == 15
    assert {line["answer"].splitlines()[1] for line in lines} == {
        "**Rating: 2**", "**Rating: 1**", "**Rating: 0**",
    }  # fmt: skip
    assert all(line["judge"] == "j" for line in lines)
    # What was written stands in the questions as it is, and the prompt in one of the three.
    assert sum(TEXTS[3].text in prompt for prompt in judge.asked) == 3
    assert sum("<<<\nprompt 3\n>>>" in prompt for prompt in judge.asked) == 1


def test_nothing_is_asked_twice(tmp_path):
    judge, path = Judge(), tmp_path / "judge.jsonl"
    first = judged(TEXTS[:3], SEA, judge, name="j", path=path)
    again = judged([*TEXTS, TEXTS[0]], SEA, judge, name="j", path=path)
    assert again[:3] == first and again[5] == first[0]
    assert len(judge.asked) == len(set(judge.asked)) == 15
    judged(TEXTS[:1], SEA, judge, name="another", path=path)
    assert len(judge.asked) == 18


def test_it_goes_on_where_it_was_killed(tmp_path):
    class Failing(Judge):
        def __call__(self, prompts):
            # What was answered before stands in the file already: a kill would lose none of it.
            assert len(path.read_text().splitlines()) == len(self.asked)
            if len(self.asked) >= 8:
                raise ModelError("gone")
            return super().__call__(prompts)

    path, failing, judge = tmp_path / "judge.jsonl", Failing(), Judge()
    with pytest.raises(ModelError, match="gone"):
        judged(TEXTS, SEA, failing, name="j", path=path, batch_size=4)
    with path.open("a") as file:
        file.write('{"key": "half a li')
    assert judged(TEXTS, SEA, judge, name="j", path=path, batch_size=4) == [Ratings(2, 1, 0)] * 5
    assert len(failing.asked) == 8 and len(judge.asked) == 7
    assert len(path.read_text().splitlines()) == 15
    path.write_text("not JSON\n" + path.read_text())
    with pytest.raises(RunError, match="line 1 is damaged"):
        judged(TEXTS, SEA, judge, name="j", path=path)
    with pytest.raises(ModelError, match="gave 0 answers"):
        judged(TEXTS, SEA, lambda prompts: [], name="j", path=tmp_path / "other.jsonl")


def test_what_cannot_be_read_is_asked_once_more_and_then_counted(tmp_path):
    class Mumbling(Judge):
        def answer(self, prompt):
            number = re.search(r"a text (\d)", prompt)
            if SEA.describe in prompt and number[1] == "1":
                return "I would say 2."
            if SEA.describe in prompt and number[1] == "2" and AGAIN not in prompt:
                return "Rating: high"
            return super().answer(prompt)

    judge, path = Mumbling(), tmp_path / "judge.jsonl"
    found = judged(TEXTS, SEA, judge, name="j", path=path)
    assert [one.concept for one in found] == [2, None, 2, 2, 2]
    assert [one.unread for one in found] == [0, 1, 0, 0, 0] and found[1].harmonic is None
    assert [AGAIN in prompt for prompt in judge.asked] == [False] * 15 + [True] * 2
    assert judged(TEXTS, SEA, judge, name="j", path=path) == found and len(judge.asked) == 17


def test_a_judge_behind_an_address(tmp_path):
    server = Server()
    server.body = json.dumps({"choices": [{"message": {"content": "Rating: 1"}}]}).encode()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        write = address_writer(server.address, "m", key="secret")
        found = judged(TEXTS[:2], SEA, write, name="m", path=tmp_path / "judge.jsonl")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert found == [Ratings(1, 1, 1)] * 2 and found[0].harmonic == 1
    assert len(server.seen) == 6 and "secret" not in (tmp_path / "judge.jsonl").read_text()


scores = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([0.0, 0.3, 1.1, 1.9, 2.0])),
    min_size=3, max_size=30,
)  # fmt: skip


@given(scores)
def test_agreement_is_that_of_scipy(both):
    a, b = (np.array(side) for side in zip(*both, strict=True))
    found = agreement(a, b, resamples=3)
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert found.spearman.value == pytest.approx(spearmanr(a, b).statistic)
    else:
        assert found.spearman is None
    apart = [(x - y, v - w) for x, v in both for y, w in both if x > y]
    if apart:
        assert found.ordered.value == pytest.approx(np.mean([up > 0 for _, up in apart]))
    else:
        assert found.ordered is None
    if len(set(a)) > 1 and len(set(b)) == len(b):  # without ties in the second
        assert 2 * found.ordered.value - 1 == pytest.approx(somersd(a, b).statistic)


def test_agreement_with_its_intervals():
    rng = np.random.default_rng(0)
    judge = rng.integers(0, 3, 120).astype(float)
    near, far = judge + rng.normal(0, 0.8, 120), rng.normal(0, 1, 120)
    found = agreement([*judge, None, 1.0], [*near, 1.0, None])
    assert (found.n, found.left_out) == (120, 2)
    assert 0 < found.spearman.low < found.spearman.value < found.spearman.high < 1
    assert 0.5 < found.ordered.low < found.ordered.value < found.ordered.high < 1
    assert "120 texts" in found.spearman.how
    assert found == agreement([*judge, None, 1.0], [*near, 1.0, None])
    nothing = agreement(judge, far)
    assert nothing.spearman.low < 0 < nothing.spearman.high
    whole = agreement(judge, judge, resamples=100)
    assert whole.spearman.value == whole.ordered.value == whole.ordered.low == 1
    assert agreement(judge, -judge, resamples=100).spearman.value == -1
    # Ten arms that write to the same twelve prompts are twelve prompts, not 120.
    level = np.repeat(rng.normal(0, 1, 12), 10)
    prompts = np.repeat(np.arange(12), 10)
    alone, together = agreement(level, level + far), agreement(level, level + far, prompts.tolist())
    assert alone.spearman.value == together.spearman.value
    assert "12 clusters" in together.spearman.how


def test_agreement_of_too_little():
    one = agreement([1.0], [2.0])
    assert (one.spearman, one.ordered, one.n) == (None, None, 1)
    assert agreement([None], [2.0]).n == 0
    same = agreement([1.0, 2.0], [0.0, 1.0], ["a", "a"])
    assert same.spearman.low is None and same.spearman.value == 1
    with pytest.raises(SteeringError, match="expected one of each"):
        agreement([1.0, 2.0], [1.0])
