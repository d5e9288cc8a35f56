"""Tokens as text, and whole words around them.

Tokens are pieces of text: '▁bo' + 'at', 'Ġboat', '##ing'. How they read is asked of the
tokenizer's own decoder, never guessed from the spelling, so that SentencePiece, byte-level BPE and
WordPiece go one way.
"""

import re
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

# A word: letters and digits, with apostrophes inside.
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
# Longer "words" are text of a script without spaces; a token is then its own word.
_LONGEST = 24
BROKEN = "\ufffd"
# Tokens that a character is spread over at most: 4 bytes, and twice that for emoji of two.
_CHARACTER = 8
# Texts of several tokens kept: some 20 MB.
_REMEMBERED = 2**17


class Pieces:
    """The text of token ids as they stand in the middle of a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._characters: dict[tuple[int, ...], str] = {}
        # A decoder drops the space that begins a text: tokens are decoded behind another one.
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._lead = self._decode(self._anchor)

    def texts(self, ids: Iterable[int]) -> list[str]:
        """Each token's text, with its leading space. Halves of a character read '\ufffd'."""
        ids = list(ids)
        for i in dict.fromkeys(ids):
            if i not in self._texts:
                self._texts[i] = self._after([i])
        return [self._texts[i] for i in ids]

    def window(self, ids: Sequence[int]) -> list[str]:
        """The texts of consecutive tokens.

        Tokens that make up a character only together give it to the first of them, and '' to the
        others.
        """
        texts = self.texts(ids)
        if not any(BROKEN in text for text in texts):
            return texts
        start = 0
        while start < len(texts):
            if BROKEN not in texts[start]:
                start += 1
                continue
            # The fewest tokens from here on that make whole characters; none where a window's
            # edge cuts one.
            stops = range(start + 2, min(start + _CHARACTER, len(texts)) + 1)
            joined = ((stop, self._character(ids[start:stop])) for stop in stops)
            stop, text = next((pair for pair in joined if BROKEN not in pair[1]), (start + 1, ""))
            if text:
                texts[start:stop] = [text, *[""] * (stop - start - 1)]
            start = stop
        return texts

    def _character(self, ids: Sequence[int]) -> str:
        key = tuple(ids)
        if key not in self._characters:
            if len(self._characters) >= _REMEMBERED:
                self._characters.clear()
            self._characters[key] = self._after(ids)
        return self._characters[key]

    def _after(self, ids: Sequence[int]) -> str:
        text = self._decode([*self._anchor, *ids])
        return text[len(self._lead) :] if text.startswith(self._lead) else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def words_in(pieces: Sequence[str]) -> list[str]:
    """For each piece of a text, the whole word of which it is a part, as written.

    The first word that the piece touches; a piece without letters or digits is its own word,
    stripped ('.'), or as it is where it is nothing but space.
    """
    words: list[str] = []
    start = 0
    for stop in range(1, len(pieces) + 1):
        if stop == len(pieces) or not glued(pieces[stop - 1], pieces[stop]):
            words += _words_of_run(pieces[start:stop])
            start = stop
    return words


def inner(character: str) -> bool:
    """Whether a word may go on with this character."""
    return character.isalnum() or character in "'’"


def _words_of_run(pieces: Sequence[str]) -> list[str]:
    """`words_in` of pieces through which one word might run."""
    matches = [match.span() for match in _WORD.finditer("".join(pieces))]
    words, begin, next_ = [], 0, 0
    for piece in pieces:
        while next_ < len(matches) and matches[next_][1] <= begin:
            next_ += 1
        word = piece.strip() or piece
        if next_ < len(matches) and matches[next_][0] < begin + len(piece):
            first, last = matches[next_]
            if last - first <= _LONGEST:
                word = "".join(pieces)[first:last]
        words.append(word)
        begin += len(piece)
    return words


def glued(one: str, two: str) -> bool:
    """Whether a word may run from the end of one piece into the next."""
    if not one or not two:
        return True
    return inner(one[-1]) and inner(two[0])
