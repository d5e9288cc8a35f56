"""A feature's words, and a label made of them.

The label names the words that carry the feature's activation and are not simply frequent. Its
confidence is the share of the feature's activation mass that falls on the words of the label,
less what they would have at random: mass share × (1 − 1/lift), summed over the label's words.
1 means that the label says all there is; a concept spread over many words stays low by that
count, and is better judged by its breadth (`breadth`).
"""

import math
from collections import Counter
from collections.abc import Sequence

from saesteer.features.firing_words import OWN_LIFT
from saesteer.features.records import WordStat

NEVER = "(never fired)"
# Words in a label at most; a word enters with at least this part of the first word's weight.
_LABEL_WORDS, _WEIGHT_OF_FIRST = 5, 0.15
# A feature that spends this share of its activation on one word is about that word.
_ONE_WORD = 0.8
# A neighbour is worth naming when it stands in this share of the examples.
_NEIGHBOUR = 0.6
# A label that explains less than this says what the feature promotes as well.
_UNSURE = 0.3
# Function words: in a label only where nothing else carries the feature.
_FUNCTION_WORDS = """
a an the and or but of to in on at by for with from up out as is was were be been are am it
its he she they them his her their him you your i me my we us our that this these those so
then there had has have do did not no if when one said s t
"""
_STOP_WORDS = frozenset(_FUNCTION_WORDS.split())


def weight(word: WordStat) -> float:
    """How much a word tells of a feature: its term of the divergence from the base rate, nats."""
    return word.share * math.log(word.lift) if word.lift > 1 else 0.0


def breadth(words: Sequence[WordStat]) -> float:
    """Effective number of a feature's own words: exp of the entropy of their mass, 0 for none."""
    own = [word.share for word in words if word.lift >= OWN_LIFT]
    total = sum(own)
    if total <= 0:
        return 0.0
    return math.exp(-sum(s / total * math.log(s / total) for s in own if s > 0))


def label(
    words: Sequence[WordStat],
    around: Sequence[tuple[str, str, str]] = (),
    *,
    promotes: str | None = None,
    early: bool = False,
) -> tuple[str, float]:
    """A short label of a feature, and its confidence from 0 to 1.

    Args:
        words: that it fires on, heaviest first; none: it never fired.
        around: of each of its strongest examples the word before, the word it fires on, and the
            word after; '' where there is none.
        promotes: the set of tokens that it promotes, where one stands out: said where the words
            explain little.
        early: it fires hardly anywhere but at the start of a context.
    """
    if not words:
        return NEVER, 0.0
    ranked = sorted(words, key=weight, reverse=True)
    telling = [w for w in ranked if w.text.casefold() not in _STOP_WORDS and _readable(w.text)]
    # Where function words carry the feature, they are the label.
    if not telling or weight(telling[0]) < _WEIGHT_OF_FIRST * weight(ranked[0]):
        telling = ranked
    if words[0].share >= _ONE_WORD:
        own = words[0].text.casefold()
        where = _where([x for x in around if x[1].casefold() == own])
        found, confidence = f"'{_shown(words[0].text)}'{where}", _confidence(words[:1])
    else:
        least = _WEIGHT_OF_FIRST * weight(telling[0])
        chosen = [word for word in telling[:_LABEL_WORDS] if weight(word) >= least]
        found, confidence = ", ".join(_shown(w.text) for w in chosen), _confidence(chosen)
    if early:
        found += " at the start"
    if promotes and confidence < _UNSURE:
        found += f"; promotes {promotes}"
    return found, confidence


def _confidence(words: Sequence[WordStat]) -> float:
    explained = sum(word.share * (1 - 1 / word.lift) for word in words if word.lift > 1)
    return min(1.0, max(0.0, explained))


def _where(around: Sequence[tuple[str, str, str]]) -> str:
    """ " after 'the'" or " before 'of'" where most examples share that neighbour."""
    for name, side in (("after", 0), ("before", 2)):
        counter = Counter(example[side].casefold() for example in around)
        counter.pop("", None)
        if len(around) >= 3 and counter:
            word, times = counter.most_common(1)[0]
            if times >= _NEIGHBOUR * len(around):
                return f" {name} '{_shown(word)}'"
    return ""


def _readable(word: str) -> bool:
    return any(character.isalnum() for character in word)


def _shown(word: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in word)
