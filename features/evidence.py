"""A feature's evidence as one blob: what it fires on, writes towards, and where.

The blob's first byte names its form: 3 is packed here; 2 is the same, but for places that were
shares; 0x78 (zlib's own first byte) is the JSON of version 1. Both are read still. Texts are
numbers into the index's `vocab`, since the same few thousand stand in every feature: a token's
usual text has the token's id, any other text a number below 0.

Figures keep six significant digits (float32). The activations of an example are 255 levels of its
highest one, but for the one that it is about, which is kept like any figure. Words and the
strongest example come first, since a list of hits needs no more.
"""

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from saesteer.features.records import Example, Feature, Histogram, Neighbour, TokenStat, WordStat

PACKED = 3
_WITH_SHARES = 2
# A feature is packed and unpacked thousands of times, and size is won mostly by the numbers.
_LEVEL = 1
# Words of a feature that a list of hits shows.
_BRIEF = 8
# Of an example: value, highest activation, context, document, position, which token fires, how many
# tokens, of how many the text isn't the usual one, group, whether ids take four bytes.
_HEAD = struct.Struct("<ffqqiHHHb?")


class Vocab:
    """Numbers for texts, while an index is written: see this module's head."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self._numbers: dict[str, int] = {}

    def token(self, id: int, text: str) -> int:
        """The number of a token's text: its id, where that is its usual text."""
        usual = self.texts.get(id)
        if usual is None:
            self.texts[id] = text
            self._numbers.setdefault(text, id)
            return id
        return id if usual == text else self.text(text)

    def text(self, text: str) -> int:
        """The number of any text."""
        number = self._numbers.get(text)
        if number is None:
            number = self._numbers[text] = -1 - len(self.texts)
            self.texts[number] = text
        return number


def pack(feature: Feature, vocab: Vocab) -> bytes:
    """The evidence of a feature."""
    f, parts = feature, []

    def put(code: str, values: Sequence[Any]) -> None:
        parts.append(struct.pack(f"<{len(values)}{code}", *values))

    def put_tokens(stats: Sequence[TokenStat]) -> None:
        put("i", [x for t in stats for x in (t.id, vocab.token(t.id, t.text))])
        put("f", [x for t in stats for x in (t.share, t.lift, t.base)])
        put("q", [t.count for t in stats])

    put("H", [len(f.words), len(f.examples)])
    put("i", [vocab.text(word.text) for word in f.words])
    put("f", [x for word in f.words for x in (word.share, word.lift, word.base)])
    parts += [_packed(example, vocab) for example in f.examples]
    histograms = [h or Histogram((), ()) for h in (f.activations, f.logits)]
    counted = [len(x) for x in (f.tokens, f.next_tokens, f.promotes, f.suppresses)]
    counted += [len(f.positions), len(f.neighbours), len(f.coactive)]
    put("H", [*counted, *(len(x) for h in histograms for x in (h.edges, h.counts))])
    put_tokens(f.tokens)
    put_tokens(f.next_tokens)
    for pairs in (f.promotes, f.suppresses):
        put("i", [vocab.text(text) for text, _ in pairs])
        put("f", [logit for _, logit in pairs])
    put("f", f.positions)
    for others in (f.neighbours, f.coactive):
        put("i", [other.feature for other in others])
        put("f", [other.value for other in others])
        put("q", [-1 if other.n is None else other.n for other in others])
    for histogram in histograms:
        put("f", histogram.edges)
        put("q", histogram.counts)
    return bytes([PACKED]) + zlib.compress(b"".join(parts), _LEVEL)


def _packed(example: Example, vocab: Vocab) -> bytes:
    x, n = example, len(example.tokens)
    odd: list[tuple[int, int]] = []
    if tuple(map(vocab.texts.get, x.tokens)) != x.pieces:
        pairs = enumerate(zip(x.tokens, x.pieces, strict=True))
        odd = [(i, number) for i, (t, text) in pairs if (number := vocab.token(t, text)) != t]
    wide = n > 0 and max(x.tokens) > 0xFFFF
    highest = max(x.value, max(x.activations, default=0))
    head = _HEAD.pack(
        x.value,
        highest,
        x.context,
        -1 if x.document is None else x.document,
        x.position,
        x.firing,
        n,
        len(odd),
        -1 if x.group == "top" else x.group,
        wide,
    )
    levels = [max(1, round(255 * a / highest)) if a > 0 else 0 for a in x.activations]
    flat = [number for pair in odd for number in pair]
    return (
        head
        + struct.pack(f"<{n}{'I' if wide else 'H'}", *x.tokens)
        + bytes(levels)
        + struct.pack(f"<{len(flat)}i", *flat)
    )


def unpack(
    feature: Feature, data: bytes, vocab: Mapping[int, str], *, brief: bool = False
) -> Feature:
    """`feature` with the evidence in `data`; brief: only its first words and example.

    Raises:
        ValueError, KeyError, TypeError, struct.error, zlib.error: the blob is damaged.
    """
    if data[0] not in (PACKED, _WITH_SHARES):
        return _unpacked_json(feature, data)
    reader = _Reader(zlib.decompress(data[1:]), vocab)
    n_words, n_examples = reader.take("H", 2)
    numbers, figures = reader.take("i", n_words), reader.columns(n_words)
    if brief:
        numbers, n_examples = numbers[:_BRIEF], min(1, n_examples)
    words = tuple(map(WordStat, map(vocab.__getitem__, numbers), *figures))
    examples = tuple(reader.example() for _ in range(n_examples))
    if brief:
        return replace(feature, words=words, examples=examples)
    sizes = reader.take("H", 11)
    tokens, next_tokens = reader.tokens(sizes[0]), reader.tokens(sizes[1])
    promotes, suppresses = reader.pairs(sizes[2]), reader.pairs(sizes[3])
    positions = reader.figures(sizes[4])
    neighbours, coactive = reader.others(sizes[5]), reader.others(sizes[6])
    histograms = [reader.histogram(*sizes[i : i + 2]) for i in (7, 9)]
    return replace(
        feature,
        words=words,
        examples=examples,
        tokens=tokens,
        next_tokens=next_tokens,
        promotes=promotes,
        suppresses=suppresses,
        positions=positions if data[0] == PACKED else (),
        neighbours=neighbours,
        coactive=coactive,
        activations=histograms[0],
        logits=histograms[1],
    )


class _Reader:
    """Takes one array after the other."""

    def __init__(self, data: bytes, vocab: Mapping[int, str]):
        self._data, self._at, self._vocab = data, 0, vocab

    def take(self, code: str, n: int) -> tuple[Any, ...]:
        form = f"<{n}{code}"
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return values

    def figures(self, n: int) -> tuple[float, ...]:
        return tuple(float(f"{x:.6g}") for x in self.take("f", n))

    def columns(self, n: int) -> list[tuple[float, ...]]:
        """Three figures a row, as columns."""
        flat = self.figures(3 * n)
        return [flat[i::3] for i in range(3)]

    def texts(self, n: int) -> list[str]:
        return [self._vocab[number] for number in self.take("i", n)]

    def tokens(self, n: int) -> tuple[TokenStat, ...]:
        numbers = self.take("i", 2 * n)
        shares, lifts, bases = self.columns(n)
        texts = [self._vocab[number] for number in numbers[1::2]]
        counts = self.take("q", n)
        return tuple(map(TokenStat, numbers[::2], texts, shares, counts, lifts, bases))

    def pairs(self, n: int) -> tuple[tuple[str, float], ...]:
        return tuple(zip(self.texts(n), self.figures(n), strict=True))

    def others(self, n: int) -> tuple[Neighbour, ...]:
        features, values = self.take("i", n), self.figures(n)
        counts = (None if count < 0 else count for count in self.take("q", n))
        return tuple(map(Neighbour, features, values, counts))

    def histogram(self, n_edges: int, n_counts: int) -> Histogram | None:
        edges, counts = self.take("f", n_edges), self.take("q", n_counts)
        return Histogram(edges, counts) if n_edges else None

    def example(self) -> Example:
        head = _HEAD.unpack_from(self._data, self._at)
        self._at += _HEAD.size
        value, highest, context, document, position, firing, n, n_odd, group, wide = head
        value, highest = float(f"{value:.6g}"), float(f"{highest:.6g}")
        tokens = self.take("I" if wide else "H", n)
        levels = self.take("B", n)
        # 8 bits are no more than four digits.
        found = {level: float(f"{highest * level / 255:.4g}") for level in set(levels)}
        activations = list(map(found.__getitem__, levels))
        activations[firing] = value
        numbers = list(tokens)
        odd = self.take("i", 2 * n_odd)
        for i, number in zip(odd[::2], odd[1::2], strict=True):
            numbers[i] = number
        return Example(
            value,
            context,
            position,
            None if document < 0 else document,
            firing,
            tokens,
            tuple(map(self._vocab.__getitem__, numbers)),
            tuple(activations),
            "top" if group < 0 else group,
        )


def _unpacked_json(feature: Feature, data: bytes) -> Feature:
    """Version 1's evidence: what it lacked stays empty."""
    parts = json.loads(zlib.decompress(data))
    return replace(
        feature,
        tokens=tuple(TokenStat(*token) for token in parts["tokens"]),
        words=tuple(WordStat(*word) for word in parts["words"]),
        promotes=tuple((text, logit) for text, logit in parts["promotes"]),
        suppresses=tuple((text, logit) for text, logit in parts["suppresses"]),
        examples=tuple(
            Example(value, context, position, document, firing, tuple(t), tuple(p), tuple(a))
            for value, context, position, document, firing, t, p, a in parts["examples"]
        ),
    )
