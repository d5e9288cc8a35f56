"""Labels written and scored by a model: with judges that are plain functions."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.errors import IndexingError
from saesteer.features import notes, store
from saesteer.features.judge import Judged, cleaned, example_text, label_features, marked, prompt
from saesteer.features.judge_scores import answer, graded, questions, score_features
from saesteer.features.judge_silence import Silence
from saesteer.features.migrate import reading, writing
from saesteer.features.records import Entry, Example, Feature, TokenStat
from tests.test_features_judge_silence import silence_in

FILLER = ("the", "a", "man", "saw", "old", "road")


def example(word: str, seed: int, before: int = 4, after: int = 3) -> Example:
    """A window with one firing word among others."""
    drawn = np.random.default_rng(seed).choice(FILLER, before + after).tolist()
    words = [*drawn[:before], word, *drawn[before:]]
    activations = [0.0] * before + [2.0] + [0.0] * after
    pieces = tuple(f" {w}" for w in words)
    return Example(
        2.0, seed, before, seed, before, tuple(range(1, 1 + len(words))), pieces, tuple(activations)
    )


def feature(number: int, words: Sequence[str], n: int = 24) -> Feature:
    return Feature(
        number, f"plain label {number}", 0.5, 0.01, 1.0, 2.0, 100, 2.0, 1.0,
        tokens=tuple(TokenStat(i, f" {w}", 0.5, 9, 40.0, 0.001) for i, w in enumerate(words)),
        promotes=((" wave", 1.5), (" net", 1.0)),
        examples=tuple(example(words[i % len(words)], 100 * number + i) for i in range(n)),
    )  # fmt: skip


SEA = feature(0, ["boat", "shore"])
KITCHEN = feature(1, ["soup"])
DEAD = Feature(2, "(never fired)", 0.0, 0.0, 0.0, 0.0, 0, 0.0, 0.0)
FEW = feature(3, ["moon"], n=1)
FEATURES = [SEA, KITCHEN, DEAD, FEW]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "features.sqlite"
    store.write(path, [Entry(one, {}) for one in FEATURES], {"sae_hash": "a"})
    return path


def loaded(path: Path) -> list[Feature]:
    with reading(path) as connection:
        return store.load(connection, range(len(FEATURES)))


class Namer:
    """A writer that names the words marked in the first text it is shown."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        self.asked += prompts
        named = [re.findall(r"«(\w+)»", text)[0] for text in prompts]
        return [f'Phrase: "words like {word}".\nmore' for word in named]


def labelled(path: Path, write, model: str = "namer", **how) -> list[Judged]:
    return list(label_features(path, FEATURES, write, model=model, **how))


def test_labels_are_written_from_the_evidence_and_kept(path):
    write = Namer()
    found = labelled(path, write, batch_size=2)
    assert [(one.feature, one.asked) for one in found] == [(0, True), (1, True), (3, True)]
    sea, kitchen, dead, few = loaded(path)
    assert sea.label == "words like boat" and sea.label_source == "judge"
    assert sea.label_score is None
    assert kitchen.label == "words like soup" and few.label == "words like moon"
    assert dead.label == "(never fired)" and dead.label_source == "evidence"
    assert len(write.asked) == 3


def test_a_second_time_nothing_is_asked_but_what_has_changed(path):
    labelled(path, Namer())
    again = Namer()
    assert [one.asked for one in labelled(path, again)] == [False] * 3 and again.asked == []
    other = replace(KITCHEN, tokens=SEA.tokens)
    (one,) = label_features(path, [other], again, model="namer")
    assert one.asked and len(again.asked) == 1
    labelled(path, again, model="another")
    assert len(again.asked) == 4


def test_what_was_done_before_a_failure_is_kept(path):
    def fails(prompts: Sequence[str]) -> list[str]:
        if any("moon" in text for text in prompts):
            raise IndexingError("gone")
        return Namer()(prompts)

    with pytest.raises(IndexingError, match="gone"):
        labelled(path, fails, batch_size=1)
    write = Namer()
    found = labelled(path, write, batch_size=1)
    assert [one.asked for one in found] == [False, False, True] and len(write.asked) == 1


def test_labels_stand_in_an_index_made_again_where_their_evidence_is_the_same(path):
    keys = {one.feature: one.key for one in labelled(path, Namer())}
    with writing(path) as connection:
        connection.execute(
            "UPDATE judged SET detection = 0.5, fuzzing = 1, n = 9 WHERE feature = 0"
        )
    store.write(path, [Entry(one, {}) for one in FEATURES], {"sae_hash": "a"})
    sea, kitchen, dead, _ = loaded(path)
    assert (sea.label, sea.label_source, sea.label_score) == ("words like boat", "judge", 0.75)
    assert (kitchen.label_score, dead.label_source) == (None, "evidence")
    with reading(path) as connection:
        names = dict(connection.execute("SELECT rowid, name FROM noted").fetchall())
    assert names == {0: "words like boat", 1: "words like soup", 3: "words like moon"}
    write = Namer()
    assert {one.feature: one.key for one in labelled(path, write)} == keys and write.asked == []


def test_labels_that_are_out_of_date_are_counted_and_left_out_until_asked_for(path):
    labelled(path, Namer())
    changed = [replace(one, promotes=(("fish", 1.0),)) if one.id else one for one in FEATURES]
    entries = [Entry(one, {}) for one in changed]
    said = rf"^2 of a judge's labels are out of date.* saesteer judge {path.parent} --features 1,3$"
    with pytest.warns(UserWarning, match=said):
        store.write(path, entries, {"sae_hash": "a"})
    assert [one.label_source for one in loaded(path)] == ["judge", *["evidence"] * 3]
    store.write(path, entries, {"sae_hash": "a"})  # said once
    write = Namer()
    list(label_features(path, changed, write, model="namer"))
    assert len(write.asked) == 2 and loaded(path)[1].label_source == "judge"
    # The evidence of before is known still: its labels come back by themselves.
    store.write(path, [Entry(one, {}) for one in FEATURES], {"sae_hash": "a"})
    assert [one.label_source for one in loaded(path)].count("judge") == 3
    meta = {"sae_hash": "a", "model_fingerprint": "another"}
    with pytest.warns(UserWarning, match=r"3 of a judge's .*--features 0,1,3$"):
        store.write(path, entries, meta)


def test_a_label_is_found_by_search_and_a_user_s_name_stands_before_it(path):
    notes.rename(path, 1, "cooking")
    labelled(path, Namer())
    with reading(path) as connection:
        names = dict(connection.execute("SELECT rowid, name FROM noted").fetchall())
    assert names == {0: "words like boat", 1: "cooking", 3: "words like moon"}


def test_the_writer_sees_every_other_example_and_what_is_promoted():
    text = prompt(SEA)
    for i, one in enumerate(SEA.examples[:16]):
        assert (example_text(one) in text) == (i % 2 == 0)
    assert "' boat'" in text and "' wave'" in text
    assert text.count("«") == 9  # eight examples, and the words that say what the mark is


def test_marks_stand_close_to_the_words_and_neighbours_share_them():
    pieces = (" the", " row", "boat", " on", " sea", "\n")
    assert marked(pieces, {1, 2, 4}) == "the «rowboat» on «sea»"
    assert marked(pieces, {5}) == "the rowboat on sea «»"
    assert marked(("a",), {0}) == "«a»" and marked((), ()) == ""


@settings(derandomize=True, max_examples=100)
@given(st.lists(st.text(" abé\n", max_size=4)), st.sets(st.integers(0, 8)))
def test_marking_changes_nothing_but_marks_and_spaces(pieces, where):
    text = marked(pieces, where)
    bare = "".join(text.replace("«", "").replace("»", "").split())
    assert bare == "".join("".join(pieces).split())
    assert text.count("«") == text.count("»")


def test_an_empty_answer_is_no_label_and_is_asked_again(path):
    found = labelled(path, lambda prompts: [" \n"] * len(prompts))
    assert found == [] and loaded(path)[0].label == "plain label 0"
    write = Namer()
    labelled(path, write)
    assert len(write.asked) == 3


def test_a_writer_that_loses_prompts_is_told(path):
    with pytest.raises(IndexingError, match="1 texts for 3 prompts"):
        labelled(path, lambda _: ["one"])


# Scores


@pytest.fixture(scope="module")
def silence() -> Silence:
    """Forty contexts: feature 0 fires in every other one, feature 5 in all, the others nowhere."""
    contexts = []
    for i in range(40):
        words = np.random.default_rng(i).choice(FILLER, 10).tolist()
        if i % 2 == 0:
            words[3] = "boat"
        contexts.append([words])
    return silence_in(contexts, lambda word: [0, 5] if word == "boat" else [5])


def truthful(prompts: Sequence[str]) -> list[str]:
    """Knows that 'the sea' is boats and shores, and looks at the marks where there are any."""
    said = []
    for text in prompts:
        body = text.split("\n\n")[1]
        marks = re.findall("«(.*?)»", body)
        looked_at = " ".join(marks) if marks else body
        said.append("Yes." if re.search("boat|shore", looked_at) else "no")
    return said


def test_questions_are_balanced_and_of_examples_the_writer_did_not_see(silence):
    asked = questions(SEA, "the sea", silence, n=8)
    assert asked == questions(SEA, "the sea", silence, n=8)
    shown = prompt(SEA)
    for kind in ("detection", "fuzzing"):
        own = [q for q in asked if q.kind == kind]
        assert sum(q.right for q in own) * 2 == len(own) == (16 if kind == "detection" else 8)
        assert all("the sea" in q.prompt for q in own)
        for q in own:
            text = q.prompt.split("\n\n")[1]
            assert ("«" in text) == (kind == "fuzzing")
            assert text.replace("«", "").replace("»", "") not in shown.replace("«", "").replace(
                "»", ""
            ) or (kind == "detection" and not q.right)


def test_a_good_label_scores_1_a_useless_judge_one_half(silence):
    asked = questions(SEA, "the sea", silence)
    right = graded(0, asked, truthful([q.prompt for q in asked]))
    assert right.detection == right.fuzzing == right.score == 1 and right.n == len(asked)
    for say in ("yes", "no"):
        same = graded(0, asked, [say] * len(asked))
        assert same.detection == same.fuzzing == 0.5
    turned = ["no" if q.right else "yes" for q in asked]
    assert graded(0, asked, turned).score == 0


@settings(derandomize=True, max_examples=40)
@given(st.lists(st.sampled_from(["yes", "no", "perhaps"]), min_size=30, max_size=30))
def test_scores_are_balanced_accuracies(silence, said):
    asked = questions(SEA, "the sea", silence)[: len(said)]
    score = graded(0, asked, said[: len(asked)])
    for kind, found in (("detection", score.detection), ("fuzzing", score.fuzzing)):
        halves = []
        for right in (True, False):
            own = [
                (s == "yes") == right
                for q, s in zip(asked, said, strict=False)
                if q.kind == kind and q.right == right and s != "perhaps"
            ]
            halves.append(np.mean(own) if own else None)
        expected = None if None in halves else np.mean(halves)
        assert found == (None if expected is None else pytest.approx(expected))
    assert score.n == sum(s != "perhaps" for s in said[: len(asked)])


def test_too_little_to_ask_about_is_no_score(silence):
    assert questions(FEW, "moon", silence) == []  # its one example went to the writer
    score = graded(3, [], [])
    assert score.score is None and score.n == 0
    always = replace(SEA, id=5)  # silent nowhere
    asked = questions(always, "x", silence)
    assert graded(5, asked, ["yes"] * len(asked)).detection is None


@pytest.mark.parametrize(
    ("text", "said"),
    [("Yes.", True), ("no", False), ("**No**, yes", False), ("know nothing", None), ("", None)],
)
def test_yes_and_no(text, said):
    assert answer(text) is said


def test_scores_are_kept_and_shown(path, silence):
    keys = {one.feature: one.key for one in labelled(path, Namer())}
    records = loaded(path)
    pairs = [(records[i], keys[i]) for i in (0, 1)]
    scores = list(score_features(path, pairs, silence, truthful, batch_size=1))
    assert scores[0].score == 1 and scores[1].score < 1
    sea, kitchen, *_ = loaded(path)
    assert (sea.label_score, kitchen.label_score) == (scores[0].score, scores[1].score)
    with reading(path) as connection:
        rows = connection.execute("SELECT detection, fuzzing, n FROM judged WHERE feature = 0")
        assert rows.fetchall() == [(1.0, 1.0, scores[0].n)]
    # Labelled again from what is known, the score stays.
    labelled(path, Namer())
    assert loaded(path)[0].label_score == 1
    with pytest.raises(IndexingError, match="no judged label"):
        list(score_features(path, [(records[0], "another key")], silence, truthful))


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        ("words of the sea", "words of the sea"),
        ('  \n"Words of the sea."\n\nBecause …', "Words of the sea"),
        ("**Label:** boats", "boats"),
        ("- Phrase: boats «and» ships\n", "boats «and» ships"),
        ("", ""),
        ("...\n!!!", ""),
        ("x" * 30 + " " + "y" * 90, "x" * 30 + "…"),
    ],
)
def test_answers_are_cleaned(raw, label):
    assert cleaned(raw) == label
