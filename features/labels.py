"""A feature's words, and a label made of them.

The label names the words that carry the feature's activation and are not simply frequent. Its
confidence is the share of the feature's activation mass that falls on the words of the label,
less what they would have at random: mass share × (1 − 1/lift), summed over the label's words.
1 means that the label says all there is; a concept spread over many words stays low by that
count, and is better judged by its breadth (`Evidence.breadth`).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from saesteer.features.store import Example, TokenStat, WordStat
from saesteer.features.words import word_at

NEVER = "(never fired)"
# Words in a label at most; a word enters with at least this part of the first word's weight.
_LABEL_WORDS, _WEIGHT_OF_FIRST = 5, 0.15
# A feature that spends this share of its activation on one word is about that word.
_ONE_WORD = 0.8
# A neighbour is worth naming when it stands in this share of the examples.
_NEIGHBOUR = 0.6
# Words that belong to a feature: they occur this many times more often where it fires.
_OWN_LIFT = 2.0
# Function words: in a label only where nothing else carries the feature.
_FUNCTION_WORDS = """
a an the and or but of to in on at by for with from up out as is was were be been are am it
its he she they them his her their him you your i me my we us our that this these those so
then there had has have do did not no if when one said s t
"""
_STOP_WORDS = frozenset(_FUNCTION_WORDS.split())


@dataclass(frozen=True)
class Completions:
    """What whole words a token was seen as part of, over many windows: token -> word -> times."""

    words: Mapping[int, Counter[str]]

    @classmethod
    def of(cls, windows: Sequence[tuple[Sequence[int], Sequence[str]]]) -> "Completions":
        """From windows of (token ids, pieces). The last piece of each may be cut off: left out."""
        found: dict[int, Counter[str]] = defaultdict(Counter)
        for ids, pieces in windows:
            for i, token in enumerate(ids[:-1]):
                found[token][word_at(pieces, i)] += 1
        return cls(found)


def words_of(
    tokens: Sequence[TokenStat], examples: Sequence[Example], completions: Completions
) -> list[WordStat]:
    """The whole words a feature fires on, heaviest first; case and leading spaces are merged.

    A token that is a part of words is shared out among the words it was part of in the feature's
    own examples, else in all windows seen. A word's lift and recall are those of its tokens,
    weighted alike.
    """
    seen: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for example in examples:
        pieces = example.pieces
        for i, activation in enumerate(example.activations):
            if activation > 0:
                seen[example.tokens[i]][word_at(pieces, i)] += activation
    spelled: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    share: dict[str, float] = defaultdict(float)
    fires: dict[str, float] = defaultdict(float)
    base: dict[str, float] = defaultdict(float)
    for token in tokens:
        parts: Mapping[str, float] = (
            seen.get(token.id)
            or completions.words.get(token.id)
            or {token.text.strip() or token.text: 1.0}
        )
        total = sum(parts.values())
        for word, weight in parts.items():
            part = weight / total
            key = word.casefold()
            spelled[key][word] += part * token.share
            share[key] += part * token.share
            # Shares of the firings and of all tokens: their ratio is the lift.
            fires[key] += part * token.lift * token.base
            base[key] += part * token.base
    words = []
    for key, mass in sorted(share.items(), key=lambda item: -item[1]):
        lift = fires[key] / base[key] if base[key] else 0.0
        name = max(spelled[key], key=spelled[key].__getitem__)
        words.append(WordStat(name, mass, lift, base[key]))
    return words


def weight(word: WordStat) -> float:
    """How much a word tells of a feature: its term of the divergence from the base rate, nats."""
    return word.share * math.log(word.lift) if word.lift > 1 else 0.0


def breadth(words: Sequence[WordStat]) -> float:
    """Effective number of a feature's own words: exp of the entropy of their mass, 0 for none."""
    own = [word.share for word in words if word.lift >= _OWN_LIFT]
    total = sum(own)
    if total <= 0:
        return 0.0
    return math.exp(-sum(s / total * math.log(s / total) for s in own if s > 0))


def company(words: Sequence[WordStat], examples: Sequence[Example]) -> float:
    """How many different own words a feature fires on within one example, on average.

    About 1 for a feature of one word, and for one whose words have nothing to do with each other;
    more where they belong to one topic and so turn up together.
    """
    own = {word.text.casefold() for word in words if word.lift >= _OWN_LIFT}
    found = [
        {word_at(x.pieces, i).casefold() for i, a in enumerate(x.activations) if a > 0} & own
        for x in examples
    ]
    return sum(map(len, found)) / max(1, len(found))


def label(words: Sequence[WordStat], examples: Sequence[Example]) -> tuple[str, float]:
    """A short label of a feature, and its confidence from 0 to 1."""
    if not words:
        return NEVER, 0.0
    ranked = sorted(words, key=weight, reverse=True)
    telling = [w for w in ranked if w.text.casefold() not in _STOP_WORDS and _readable(w.text)]
    # Where function words carry the feature, they are the label.
    if not telling or weight(telling[0]) < _WEIGHT_OF_FIRST * weight(ranked[0]):
        telling = ranked
    if words[0].share >= _ONE_WORD:
        where = _where(words[0].text, examples)
        return f"'{_shown(words[0].text)}'{where}", _confidence(words[:1])
    least = _WEIGHT_OF_FIRST * weight(telling[0])
    chosen = [word for word in telling[:_LABEL_WORDS] if weight(word) >= least]
    return ", ".join(_shown(word.text) for word in chosen), _confidence(chosen)


def _confidence(words: Sequence[WordStat]) -> float:
    explained = sum(word.share * (1 - 1 / word.lift) for word in words if word.lift > 1)
    return min(1.0, max(0.0, explained))


def _where(word: str, examples: Sequence[Example]) -> str:
    """ " after 'the'" or " before 'of'" where most examples share that neighbour."""
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    n = 0
    for example in examples:
        i, pieces = example.firing, example.pieces
        if word_at(pieces, i).casefold() != word.casefold():
            continue
        n += 1
        left, right = neighbours(pieces, i)
        before[left.casefold()] += 1
        after[right.casefold()] += 1
    for name, counter in (("after", before), ("before", after)):
        counter.pop("", None)
        if n >= 3 and counter and counter.most_common(1)[0][1] >= _NEIGHBOUR * n:
            return f" {name} '{_shown(counter.most_common(1)[0][0])}'"
    return ""


def neighbours(pieces: Sequence[str], index: int) -> tuple[str, str]:
    """The word before and the word after the one at `index`; '' at the window's ends."""
    own = word_at(pieces, index)
    left = right = index
    while left >= 0 and (left == index or not pieces[left] or word_at(pieces, left) == own):
        left -= 1
    while right < len(pieces) and (
        right == index or not pieces[right] or word_at(pieces, right) == own
    ):
        right += 1
    return (
        word_at(pieces, left) if left >= 0 else "",
        word_at(pieces, right) if right < len(pieces) else "",
    )


def _readable(word: str) -> bool:
    return any(character.isalnum() for character in word)


def _shown(word: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in word)
