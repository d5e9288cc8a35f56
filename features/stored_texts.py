"""What a feature can be found by, from its record alone: for a text engine made after the index."""

from saesteer.features.entries import texts
from saesteer.features.neuronpedia_example import words_at
from saesteer.features.records import Example, Feature


def stored_texts(feature: Feature) -> dict[str, str]:
    """`entries.texts` of a full record; words beside the firing one are read off its examples."""
    strongest = [example for example in feature.examples if example.group == "top"]
    return texts(feature, [_around(example) for example in strongest])


def _around(example: Example) -> tuple[str, str, str]:
    """The word before the firing one, that word, and the one after; "" where there is none."""
    at, words = words_at(example.pieces)
    word = at[example.firing]
    if word is None:
        return "", "", ""
    before, after = words[:word][-1:], words[word + 1 :][:1]
    return "".join(before), words[word], "".join(after)
