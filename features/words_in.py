"""The words in windows of tokens, many at a time, by number.

A feature has dozens of windows of dozens of tokens, and an index a million features: what a word is
is decided once a token, or once a run of tokens that spell one, and looked up from then on.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saesteer.features.words import BROKEN, Pieces, glued, inner, words_in

# What stands in a window where there is no token, and what has no word.
NONE = -1
# Words, and runs of tokens that make words, remembered between two calls of `forget`.
_REMEMBERED = 2**20
# Words are counted by a hash below this: two of a million have the same once in ten texts.
WORDS = 2**42


@dataclass(frozen=True)
class Windows:
    """ids [n, w]: tokens (NONE: there is none); words [n, w]: the number of each one's whole word
    in the lexicon; pieces [n, w]: each one's text, '' where there is none."""

    ids: NDArray[np.int64]
    words: NDArray[np.int64]
    pieces: NDArray[np.object_]


@dataclass(frozen=True)
class Occurrences:
    """words [n, w]: the hash of the whole word that each token is part of, NONE where there is
    none; begins [n, w]: whether an occurrence of a word begins there."""

    words: NDArray[np.int64]
    begins: NDArray[np.bool_]


class Lexicon:
    """Numbers for words, and the words in windows of tokens as `words_in` finds them."""

    def __init__(self, pieces: Pieces, vocab_size: int):
        self.pieces, self.vocab_size = pieces, vocab_size
        self.words: list[str] = []
        self._numbers: dict[str, int] = {}
        self._keys: list[int] = []
        self._hashes: list[int] = []
        self._runs: dict[bytes, list[int]] = {}
        # By token id: text, its word where it stands alone, whether a word may go on before its
        # first and after its last character, and whether it must be read with its neighbours.
        self._texts = np.full(vocab_size, "", object)
        self._alone = np.full(vocab_size, NONE, np.int64)
        self._first = np.zeros(vocab_size, bool)
        self._last = np.zeros(vocab_size, bool)
        self._odd = np.zeros(vocab_size, bool)

    def number(self, word: str) -> int:
        """The number of a word, a new one for a new word."""
        found = self._numbers.get(word)
        if found is None:
            found = self._numbers[word] = len(self.words)
            self.words.append(word)
            self._keys.append(found)
            self._hashes.append(hashed(word))
            folded = word.casefold()
            if folded != word:
                self._keys[found] = self.number(folded)
        return found

    def keys(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of each word's casefolded spelling, [n]."""
        some, where = np.unique(numbers, return_inverse=True)
        return np.array([self._keys[i] for i in some.tolist()], np.int64)[where]

    def texts(self, ids: NDArray[np.integer]) -> NDArray[np.object_]:
        """The text of each token, any shape; '' for NONE."""
        self._learn(ids)
        return np.where(ids >= 0, self._texts[np.maximum(ids, 0)], "")

    def spelled(self, ids: NDArray[np.integer]) -> NDArray[np.object_]:
        """The text of each token of windows [n, w] of consecutive tokens, '' for NONE.

        A character of several tokens stands with the first of them, as in `Pieces.window`.
        """
        pieces = self.texts(ids)
        for i in self._odd_windows(ids):
            at = np.flatnonzero(ids[i] >= 0)
            pieces[i, at] = self.pieces.window(ids[i, at].tolist())
        return pieces

    def read(self, ids: NDArray[np.integer]) -> Windows:
        """The word of each token of windows [n, w] of consecutive tokens."""
        pieces = self.spelled(ids)
        inside = ids >= 0
        on = self._going_on(ids)
        odd = self._odd_windows(ids)
        on[odd] = False
        words = np.where(inside, self._alone[np.maximum(ids, 0)], NONE)
        self._read_runs(ids, on, words)
        for i in odd:
            at = np.flatnonzero(inside[i])
            words[i, at] = [self.number(word) for word in words_in(pieces[i, at].tolist())]
        return Windows(ids.astype(np.int64), words, pieces)

    def occurrences(
        self,
        ids: NDArray[np.integer],
        documents: NDArray[np.integer],
        spellings: dict[int, str],
    ) -> Occurrences:
        """The occurrences of words in contexts of consecutive tokens, both [n, w].

        A word ends with its document. One that reaches the end of its context may be cut off
        there, and is left out.

        Args:
            ids: NONE where a token isn't text.
            spellings: hash -> word; those that occur are added, in place.
        """
        self._learn(ids)
        inside = ids >= 0
        safe = np.maximum(ids, 0)
        on = self._going_on(ids)
        on[:, :-1] &= documents[:, :-1] == documents[:, 1:]
        odd = self._odd_windows(ids)
        on[odd] = False
        words = np.where(inside, self._alone[safe], NONE)
        self._read_runs(ids, on, words)
        for i in odd:
            on[i] = self._read_odd(ids[i], documents[i], words[i])
        goes_on = np.zeros_like(on)  # the occurrence before goes on here
        goes_on[:, 1:] = on[:, :-1] & (words[:, 1:] == words[:, :-1])
        # From the end of each context back to where its last word begins.
        last = self._last[safe[:, -1]] & inside[:, -1]
        start = ids.shape[1] - 1 - np.argmin(goes_on[:, ::-1], axis=1)
        words[last[:, None] & (np.arange(ids.shape[1]) >= start[:, None])] = NONE
        some, where = np.unique(words, return_inverse=True)
        hashes = [self._hashes[i] if i >= 0 else NONE for i in some.tolist()]
        spellings.update(
            (key, self.words[i]) for key, i in zip(hashes, some.tolist(), strict=True) if i >= 0
        )
        found = np.array(hashes, np.int64)[where].reshape(ids.shape)
        return Occurrences(found, (found != NONE) & ~goes_on)

    def forget(self, keep: int) -> None:
        """Where many words are remembered, forget all but the first `keep`: a bound on memory."""
        if max(len(self.words), len(self._runs)) <= _REMEMBERED:
            return
        # A word's key may have a larger number than the word: it is found again.
        kept = self.words[:keep]
        self.words, self._keys, self._hashes = [], [], []
        self._numbers, self._runs = {}, {}
        self._alone[:] = NONE
        for word in kept:
            self._numbers[word] = len(self.words)
            self.words.append(word)
            self._keys.append(NONE)
            self._hashes.append(hashed(word))
        for i, word in enumerate(kept):
            self._keys[i] = self.number(word.casefold())

    def _going_on(self, ids: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Whether a word may go on from a token into the next, [n, w]."""
        inside, safe = ids >= 0, np.maximum(ids, 0)
        on = np.zeros(ids.shape, bool)
        on[:, :-1] = inside[:, :-1] & inside[:, 1:]
        on[:, :-1] &= self._last[safe[:, :-1]] & self._first[safe[:, 1:]]
        return on

    def _read_odd(
        self, ids: NDArray[np.integer], documents: NDArray[np.integer], words: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Fill in, in place, the words of a context [w] with characters of several tokens; whether
        each goes on into the next token."""
        on = np.zeros(len(ids), bool)
        edges = np.flatnonzero((ids[1:] < 0) | (ids[:-1] < 0) | (documents[1:] != documents[:-1]))
        for part in np.split(np.arange(len(ids)), edges + 1):
            if ids[part[0]] < 0:
                continue
            pieces = self.pieces.window(ids[part].tolist())
            numbers = [self.number(word) for word in words_in(pieces)]
            for i, piece in enumerate(pieces):
                if i and not piece:  # the rest of a character: of the word that has it
                    numbers[i] = numbers[i - 1]
                on[part[i - 1]] |= i > 0 and (not piece or glued(pieces[i - 1], piece))
            words[part] = numbers
        return on

    def _odd_windows(self, ids: NDArray[np.integer]) -> list[int]:
        odd = self._odd[np.maximum(ids, 0)] & (ids >= 0)
        return np.flatnonzero(odd.any(axis=1)).tolist()

    def _read_runs(
        self, ids: NDArray[np.integer], on: NDArray[np.bool_], words: NDArray[np.int64]
    ) -> None:
        """Fill in, in place, the words of runs of tokens that are glued to one another."""
        before = np.zeros_like(on)
        before[:, 1:] = on[:, :-1]
        starts = np.flatnonzero(on & ~before)
        stops = np.flatnonzero(~on & before) + 1
        flat = np.ascontiguousarray(ids, np.int32)
        memory, size = flat.tobytes(), flat.itemsize
        flat = flat.reshape(-1)
        found: list[int] = []
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            run = memory[start * size : stop * size]
            numbers = self._runs.get(run)
            if numbers is None:
                texts = self._texts[flat[start:stop]].tolist()
                numbers = self._runs[run] = [self.number(word) for word in words_in(texts)]
            found += numbers
        words[on | before] = found

    def _learn(self, ids: NDArray[np.integer]) -> None:
        seen = np.unique(ids)
        seen = seen[seen >= 0]
        new = seen[self._alone[seen] < 0].tolist()
        for i, text in zip(new, self.pieces.texts(new), strict=True):
            self._texts[i] = text
            self._alone[i] = self.number(words_in([text])[0])
            self._odd[i] = not text or BROKEN in text
            self._first[i] = inner(text[:1]) if text else False
            self._last[i] = inner(text[-1:]) if text else False


def hashed(word: str) -> int:
    """A word's hash, the same in every process: 0 to WORDS − 1."""
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % WORDS


def beside(
    windows: Windows, column: int, empty: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The words before and after the one at `column` of each window, [n] each.

    Args:
        empty: the number of the word '', given back where there is none.
    """
    words = windows.words
    columns = np.arange(words.shape[1])
    other = (words != NONE) & (words != empty) & (words != words[:, column, None])
    left = np.where(other & (columns < column), columns, -1).max(axis=1)
    right = np.where(other & (columns > column), columns, len(columns)).min(axis=1)
    line = np.arange(len(words))
    before = np.where(left >= 0, words[line, np.maximum(left, 0)], empty)
    after = np.where(right < len(columns), words[line, np.minimum(right, len(columns) - 1)], empty)
    return before, after
