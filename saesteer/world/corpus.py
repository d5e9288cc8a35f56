"""Stories, contrast pairs, prompts and planted failures of the planted language, by seed."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from saesteer.errors import TextError
from saesteer.world import exact, grammar, lexicon
from saesteer.world.grammar import BOS, State

DOCUMENT_SEPARATOR = "<|endoftext|>"
TWIN_SENTENCES = 3
TWIN_WORDS = 3  # how many of the concept's words make a twin a context in which it is plainly on
MOST_TWIN_SENTENCES = 7


@dataclass(frozen=True)
class Story:
    """The words of a story, without BOS, and the concepts that made it."""

    words: tuple[str, ...]
    concepts: frozenset[str]


@dataclass(frozen=True)
class Prompt:
    """A story cut just before a content slot, with a concept off, and the same with it on.

    `twin` is a real context in which the concept is on: the same story with three or more
    sentences told with the concept before the sentence that is cut.
    """

    concept: str
    words: tuple[str, ...]
    twin: tuple[str, ...]


class Teller:
    """Tells stories with a given hidden set, word by word."""

    def __init__(self, rng: np.random.Generator, concepts: Collection[str]):
        self.rng = rng
        self.state = State()
        self.words: list[str] = []
        self.set_concepts(concepts)

    def set_concepts(self, concepts: Collection[str]) -> None:
        """Change the hidden set from the next word on."""
        self.concepts = frozenset(concepts)
        self._sources = [c for c in exact.HIDDEN if c.name in self.concepts]

    def say(self) -> str:
        """Draw the next word and go on."""
        here = grammar.coming(self.state)
        if here.heading:
            word = "Its" if lexicon.READ_ONLY.name in self.concepts else "Once"
        else:
            dice = self.rng.random()
            word = ""
            for fixed, p in here.fixed:
                word = fixed
                dice -= p
                if dice < 0:
                    break
            else:
                if here.slot:
                    word = self._content(here)
        self.words.append(word)
        self.state = grammar.step(self.state, word)
        return word

    def sentence(self) -> list[str]:
        """Say words up to the next place where a sentence may begin; [BOS] ends the story."""
        begin = len(self.words)
        while self.say() != BOS and self.state.place != "sentence":
            pass
        return self.words[begin:]

    def introduction(self) -> None:
        """Say everything before the first sentence that the concepts can decide."""
        while self.state.place != "sentence":
            self.say()

    def another_sentence(self, avoid: Collection[str] = ()) -> list[str]:
        """A sentence that neither ends the story nor opens with a word in `avoid`."""
        words, state = len(self.words), self.state
        while (sentence := self.sentence())[0] in (BOS, *avoid):
            self.rewind(words, state)
        return sentence

    def rewind(self, n_words: int, state: State) -> None:
        """Take back every word after the first `n_words`."""
        del self.words[n_words:]
        self.state = state

    def _content(self, here: grammar.Next) -> str:
        at = lexicon.SLOTS.index(here.slot)
        pick = self.rng.random() * (exact.NEUTRAL_WEIGHT + len(self._sources))
        source = lexicon.NEUTRAL
        if here.theme and self.rng.random() < grammar.STAYS:
            source = lexicon.CONCEPTS[lexicon.INDEX[here.theme]]
        elif pick >= exact.NEUTRAL_WEIGHT:
            source = self._sources[int(pick - exact.NEUTRAL_WEIGHT)]
            if here.dream and source.name in lexicon.FLIPS:
                source = lexicon.CONCEPTS[lexicon.INDEX[lexicon.FLIPS[source.name]]]
        words = source.slots[at]
        return words[int(self.rng.random() * len(words))]


def draw_concepts(rng: np.random.Generator) -> frozenset[str]:
    """A hidden set from the prior, and the read-only concept by its own coin."""
    members, prior = exact.sets()
    row = members[rng.choice(len(prior), p=prior)]
    names = {concept.name for concept, on in zip(exact.HIDDEN, row, strict=True) if on}
    return frozenset(
        names | ({lexicon.READ_ONLY.name} if rng.random() < exact.READ_ONLY_SHARE else set())
    )


def tell(rng: np.random.Generator, concepts: Collection[str]) -> Story:
    """One whole story."""
    teller = Teller(rng, concepts)
    while teller.sentence() != [BOS]:
        pass
    return Story(tuple(teller.words[:-1]), teller.concepts)


def stories(n: int, seed: int) -> Iterator[Story]:
    """`n` stories with hidden sets from the prior."""
    rng = np.random.default_rng([seed, 0])
    for _ in range(n):
        yield tell(rng, draw_concepts(rng))


def text(words: Collection[str]) -> str:
    """Words as readable text: no space before punctuation, special tokens left out."""
    out = ""
    for word in words:
        if word == BOS:
            continue
        out += word if word in (".", ",") or not out else f" {word}"
    return out


def pairs(concept: str, n: int, seed: int, *, spurious: bool = False) -> list[dict[str, str]]:
    """`n` contrast pairs for a concept: the next sentence with it on, and with it off.

    With `spurious`, every chosen side belongs to a "Story A" and every rejected one to a "Story B":
    the planted failure of a token that goes with the label and not with the concept. Both sides
    then carry the whole story, and the prompt is empty.

    Raises:
        TextError: there is no such concept.
    """
    rng = np.random.default_rng([seed, 1, _number(concept)])
    found: list[dict[str, str]] = []
    while len(found) < n:
        off = _without(rng, concept)
        teller = Teller(rng, off)
        teller.introduction()
        for _ in range(int(rng.integers(0, 3))):
            teller.another_sentence()
        prompt, state = list(teller.words), teller.state
        rejected = teller.another_sentence()
        teller.rewind(len(prompt), state)
        teller.set_concepts(off | {concept})
        chosen = teller.another_sentence()
        own = set(lexicon.CONCEPTS[lexicon.INDEX[concept]].words)
        if concept != lexicon.READ_ONLY.name and not own & set(chosen):
            continue
        if spurious:
            lead = [word if word not in ("A", "B") else "" for word in prompt]
            found.append(
                {
                    "prompt": "",
                    "chosen": text([w or "A" for w in lead] + chosen),
                    "rejected": text([w or "B" for w in lead] + rejected),
                }
            )
        else:
            found.append(
                {"prompt": text(prompt), "chosen": text(chosen), "rejected": text(rejected)}
            )
    return found


def prompts(concept: str, n: int, seed: int, *, dream: bool = False) -> list[Prompt]:
    """`n` prompts in which a concept is off, each cut before a content slot, with their twins.

    Both begin with BOS. With `dream`, the cut sentence is a dream: the context in which joy speaks
    with anger's words and anger with joy's.

    Raises:
        TextError: there is no such concept, or it is read-only: turned on, it is never heard of.
    """
    rng = np.random.default_rng([seed, 2, _number(concept)])
    if concept == lexicon.READ_ONLY.name:
        raise TextError(
            f"{concept!r} is read-only: a story says its words in its heading alone, so that there "
            "is no context that turns it on; take a causal concept"
        )
    found: list[Prompt] = []
    while len(found) < n:
        off = _without(rng, concept)
        if len(off & set(exact.COLUMN)) > 2:  # with the concept it would have four
            continue
        teller = Teller(rng, off)
        teller.introduction()
        for _ in range(int(rng.integers(2, 5))):
            teller.another_sentence()
        before, state = list(teller.words), teller.state
        sentence = teller.another_sentence()
        cut = _content_places(state, sentence, dream)
        if not cut:
            continue
        opened = sentence[: int(rng.choice(cut))]
        teller.rewind(len(before), state)
        teller.set_concepts(off | {concept})
        own = set(lexicon.CONCEPTS[lexicon.INDEX[concept]].words)
        for told in range(1, MOST_TWIN_SENTENCES + 1):
            teller.another_sentence(avoid=["Soon"])  # the day must be the same in both
            shown = sum(word in own for word in teller.words[len(before) :])
            if told >= TWIN_SENTENCES and shown >= TWIN_WORDS:
                break
        else:
            continue  # the concept hardly spoke: draw another story
        found.append(Prompt(concept, (BOS, *before, *opened), (BOS, *teller.words, *opened)))
    return found


def days(n: int, seed: int) -> list[tuple[tuple[str, ...], str]]:
    """The concept on a circle: `n` prompts cut before the next day's name, and that name."""
    rng = np.random.default_rng([seed, 3])
    found: list[tuple[tuple[str, ...], str]] = []
    while len(found) < n:
        teller = Teller(rng, draw_concepts(rng))
        teller.introduction()
        while (sentence := teller.another_sentence())[0] != "Soon":
            pass
        found.append(((BOS, *teller.words[:-2]), sentence[-2]))
    return found


def _number(concept: str) -> int:
    if concept not in lexicon.INDEX:
        raise TextError(
            f"no concept {concept!r} in the planted language; it has {', '.join(lexicon.INDEX)}"
        )
    return lexicon.INDEX[concept]


def _without(rng: np.random.Generator, concept: str) -> frozenset[str]:
    """A hidden set from the prior in which `concept` is off, and its parent, if any, on."""
    children = {child for child, parent in lexicon.PARENT_OF.items() if parent == concept}
    while True:
        names = draw_concepts(rng)
        parent = lexicon.PARENT_OF.get(concept)
        if concept not in names and not children & names and (parent is None or parent in names):
            return names


def _content_places(state: State, sentence: list[str], dream: bool) -> list[int]:
    """Where in a sentence a content word stands (only in dreams, or only outside them)."""
    places = []
    for i, word in enumerate(sentence):
        here = grammar.coming(state)
        if here.slot and word in grammar.slot_words(here.slot) and here.dream == dream:
            places.append(i)
        state = grammar.step(state, word)
    return places
