"""Silent windows: nothing tells them from a feature's examples but what it fires on."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from saesteer import run_text
from saesteer.core.sae_codes import Codes
from saesteer.core.shards import ContextBatch
from saesteer.errors import IndexingError
from saesteer.features.judge_scores import questions
from saesteer.features.judge_silence import Silence
from saesteer.features.records import Example
from saesteer.features.words import Pieces

BOS = "<s>"
BEFORE, AFTER = 12, 8


class Words:
    """A tokenizer whose tokens are words; number 0 is the special one."""

    def __init__(self) -> None:
        self.words = [BOS]

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        found = []
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
            found.append(self.words.index(word))
        return found

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return "".join(f" {self.words[i]}" for i in ids)


class OnWords:
    """An SAE whose features fire on words; activations are token ids."""

    d_sae = 8

    def __init__(self, tokenizer: Words, fires: Callable[[str], Sequence[int]]) -> None:
        self._tokenizer, self._fires = tokenizer, fires

    def encode(self, x: torch.Tensor) -> Codes:
        words = [self._tokenizer.words[int(i)] for i in x.flatten()]
        pairs = [(row, i) for row, word in enumerate(words) for i in sorted(self._fires(word))]
        rows, latents = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
        return Codes(rows, latents, torch.ones(len(rows)), len(words))


def silence_in(
    contexts: Sequence[Sequence[Sequence[str]]], fires: Callable[[str], Sequence[int]]
) -> Silence:
    """Of contexts, each some documents, each some words; all contexts of one length."""
    tokenizer, number, batches = Words(), 0, []
    for context in contexts:
        tokens, documents = [], []
        for words in context:
            tokens += tokenizer.encode(" ".join(words))
            documents += [number] * len(words)
            number += 1
        batches.append(
            ContextBatch(
                np.array([tokens], np.int32),
                np.array([documents], np.int32),
                torch.tensor([tokens]).unsqueeze(-1),
                len(batches),
            )
        )
    return Silence(batches, OnWords(tokenizer, fires), Pieces(tokenizer), {0})  # type: ignore[arg-type]


def example(n: int, firing: int) -> Example:
    """An example of so many words, none of them special."""
    values = tuple(float(i == firing) for i in range(n))
    return Example(1.0, 0, 0, None, firing, tuple(range(1, n + 1)), (" x",) * n, values)


# Contexts of 80 tokens: the end of one document, a whole one of 20 words, the start of a third.
CONTEXTS = [
    [
        [f"end{c}.{i}" for i in range(29)],
        [BOS, *(f"whole{c}.{i}" for i in range(20))],
        [BOS, *(f"start{c}.{i}" for i in range(29))],
    ]
    for c in range(30)
]
STRETCHES = [[word for word in words if word != BOS] for context in CONTEXTS for words in context]


def fires(word: str) -> list[int]:
    """Feature 1 on every tenth word, 2 on all words, special ones included."""
    return [*([1] if word.endswith("5") else []), 2]


def test_silent_windows_are_cut_as_the_examples_are() -> None:
    silence = silence_in(CONTEXTS, fires)
    rng = np.random.default_rng(0)
    shapes = [(21, 12), (9, 0), (12, 3), (20, 11), (13, 12), (16, 12), (21, 12), (5, 2)] * 2
    examples = [example(*shape) for shape in shapes]
    texts = silence.like(0, examples, rng)
    assert [len(text.split()) for text in texts] == [n for n, _ in shapes]
    seen: set[str] = set()
    for text, (n, firing) in zip(texts, shapes, strict=True):
        words = text.split()
        (own,) = [s for s in STRETCHES if words[0] in s]  # of one document, no special token
        at = own.index(words[0])
        assert own[at : at + n] == words
        if firing < BEFORE:
            assert at == 0
        elif n - 1 - firing < AFTER:
            assert at + n == len(own)
        assert seen.isdisjoint(words)
        seen |= set(words)


def test_they_hold_no_firing_and_fewer_come_where_there_are_no_more() -> None:
    silence = silence_in(CONTEXTS, fires)
    rng = np.random.default_rng(0)
    found = silence.like(1, [example(5, 2)] * 40, rng)
    assert len(found) == 40 and not any(w.endswith("5") for text in found for w in text.split())
    assert silence.like(1, [example(21, 12)], rng) == []  # it fires once in ten words
    assert silence.like(2, [example(1, 0)], rng) == []
    assert len(silence.like(0, [example(21, 12)] * 1000, rng)) < 80
    assert silence.like(0, [example(500, 12)], rng) == []


def test_special_tokens_are_taken_from_examples() -> None:
    silence = silence_in(CONTEXTS, fires)
    one = Example(2.0, 0, 0, None, 2, (0, 7, 8), (BOS, " a", " b"), (0.5, 0.0, 2.0))
    bare = silence.bare(one)
    assert (bare.tokens, bare.pieces, bare.activations) == ((7, 8), (" a", " b"), (0.0, 2.0))
    assert bare.firing == 1 and silence.bare(bare) == bare


def test_without_a_word_there_is_nothing_to_look_in() -> None:
    for contexts in ([], [[[BOS, BOS]]]):
        with pytest.raises(IndexingError, match="no text to take silent contexts from"):
            silence_in(contexts, fires)


def test_questions_of_a_real_index_differ_in_nothing_but_the_firing(small_run) -> None:
    """The words in either kind of context, their number, and how many begin a story."""
    batches = run_text.batches(small_run, None, 256 * 64, held_out=True)
    silence = Silence(batches, small_run.sae, Pieces(small_run.tokenizer), small_run.special_ids)
    lengths: dict[bool, list[int]] = {True: [], False: []}
    begin = {True: 0, False: 0}
    for i in range(128):
        record = small_run.index.feature(i)
        asked = questions(record, "x", silence)
        texts = {
            right: [
                q.prompt.split("\n\n")[1]
                for q in asked
                if (q.kind, q.right) == ("detection", right)
            ]
            for right in (True, False)
        }
        assert not any(BOS in q.prompt for q in asked)
        if len(texts[True]) == len(texts[False]):
            for right, own in texts.items():
                lengths[right] += sorted(len(small_run.tokenizer.tokenize(text)) for text in own)
                begin[right] += sum(text.startswith("Story") for text in own)
    assert len(lengths[True]) > 200
    differ = [abs(a - b) for a, b in zip(lengths[True], lengths[False], strict=True)]
    assert np.mean(differ) < 1
    # Features that fire on a story's first words are not silent there.
    assert begin[False] > begin[True] / 4 > 0
