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
_BROKEN = "\ufffd"
# Tokens that a character is spread over at most: 4 bytes, and twice that for emoji of two.
_CHARACTER = 8


class Pieces:
    """The text of token ids as they stand in the middle of a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
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
        if not any(_BROKEN in text for text in texts):
            return texts
        start = 0
        while start < len(texts):
            if _BROKEN not in texts[start]:
                start += 1
                continue
            # The fewest tokens from here on that make whole characters; none where a window's
            # edge cuts one.
            stops = range(start + 2, min(start + _CHARACTER, len(texts)) + 1)
            joined = ((stop, self._after(ids[start:stop])) for stop in stops)
            stop, text = next((pair for pair in joined if _BROKEN not in pair[1]), (start + 1, ""))
            if text:
                texts[start:stop] = [text, *[""] * (stop - start - 1)]
            start = stop
        return texts

    def _after(self, ids: Sequence[int]) -> str:
        text = self._decode([*self._anchor, *ids])
        return text[len(self._lead) :] if text.startswith(self._lead) else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def word_at(pieces: Sequence[str], index: int) -> str:
    """The whole word of which `pieces[index]` is a part, as written.

    The first word that the piece touches; a piece without letters or digits is its own word,
    stripped ('.'), or as it is where it is nothing but space.
    """
    piece = pieces[index]
    if not _WORD.search(piece):
        return piece.strip() or piece
    left, right = index, index + 1
    while left > 0 and _glued(pieces[left - 1], pieces[left]):
        left -= 1
    while right < len(pieces) and _glued(pieces[right - 1], pieces[right]):
        right += 1
    begin = sum(map(len, pieces[left:index]))
    for match in _WORD.finditer("".join(pieces[left:right])):
        if match.end() > begin:
            if match.end() - match.start() <= _LONGEST:
                return match.group()
            break
    return piece.strip()


def is_whole(pieces: Sequence[str], index: int) -> bool:
    """Whether the piece stands for itself: no word goes on across its ends."""
    before = index > 0 and _glued(pieces[index - 1], pieces[index])
    return not before and not (index + 1 < len(pieces) and _glued(pieces[index], pieces[index + 1]))


def _glued(one: str, two: str) -> bool:
    """Whether a word may run from the end of one piece into the next."""
    if not one or not two:
        return True
    return _inner(one[-1]) and _inner(two[0])


def _inner(character: str) -> bool:
    return character.isalnum() or character in "'’"
