"""The sentences of the planted language, as an automaton that the visible words drive.

Every state says what may come next: some fixed words with their probabilities, and with the
remaining probability a content slot, whose word the story's concepts decide. The next state
follows from the word that came, so whoever sees the words knows the state; only the concepts are
hidden. A story:

    Story A. [Its colour was red and blue.] Once there was a girl named Lily. It was Monday.
    The sailor rowed the boat near the shore. She baked the bread in the kitchen.
    At the farm, the cook was hungry. Soon it was Tuesday. In a dream, ...
"""

from dataclasses import dataclass, replace
from functools import cache

from saesteer.errors import TextError
from saesteer.world import lexicon

# One token begins and ends a story, as in GPT-2: after the last sentence comes the next BOS.
BOS, PAD, UNKNOWN = "<s>", "<pad>", "<unk>"
# The words that open a sentence, with their probabilities; BOS ends the story instead.
OPENINGS = {BOS: 0.10, "The": 0.36, "name": 0.14, "pronoun": 0.12, "At": 0.14, "Soon": 0.05}
OPENINGS["In"] = 1.0 - sum(OPENINGS.values())
STAYS = 0.5  # how often a sentence stays with the concept of its last content word
COPULA_SHARE = 0.25  # how often "was"/"were" and an adjective follow a subject, not a verb


@dataclass(frozen=True)
class State:
    """Where in a story the next word stands: what was seen that still matters."""

    place: str = "start"
    name: str = ""
    day: int = -1
    dream: bool = False
    plural: bool = False
    opening: str = ""
    theme: str = ""  # the concept whose word came last in this sentence


@dataclass(frozen=True)
class Next:
    """What may come: fixed words with probabilities, and a slot with what is left of 1.

    `theme` is the concept whose word came last in the sentence; the slot may stay with it.
    `heading` marks the one place where the read-only concept, and no other, decides the word.
    """

    fixed: tuple[tuple[str, float], ...] = ()
    slot: str = ""
    dream: bool = False
    theme: str = ""
    heading: bool = False

    @property
    def slot_share(self) -> float:
        """Probability that the slot, and not a fixed word, comes next."""
        return 1.0 - sum(p for _, p in self.fixed) if self.slot else 0.0


def _only(word: str) -> Next:
    return Next(fixed=((word, 1.0),))


def _uniform(words: tuple[str, ...]) -> Next:
    return Next(fixed=tuple((word, 1.0 / len(words)) for word in words))


# Stretches that always run the same way: place -> (word, next place).
_FIXED = {
    "start": ("Story", "letter"),
    "letter end": (".", "heading"),
    "its": ("colour", "colour was"),
    "colour was": ("was", "colour 1"),
    "colour and": ("and", "colour 2"),
    "colour end": (".", "once"),
    "once": ("Once", "there"),
    "there": ("there", "there was"),
    "there was": ("was", "was a"),
    "was a": ("a", "who"),
    "named": ("named", "name"),
    "name end": (".", "it"),
    "it": ("It", "it was"),
    "it was": ("was", "day"),
    "soon it": ("it", "soon was"),
    "soon was": ("was", "tomorrow"),
    "at the": ("the", "at place"),
    "comma": (",", "the subject"),
    "the subject": ("the", "subject"),
    "the object": ("the", "object"),
    "the place": ("the", "place"),
    "a dream": ("a", "dream"),
    "dream": ("dream", "comma"),
    "stop": (".", "sentence"),
}


@cache
def coming(state: State) -> Next:
    """What may come next in `state`."""
    place = state.place
    if place in _FIXED:
        return _only(_FIXED[place][0])
    if place == "letter":
        return _uniform(("A", "B"))
    if place == "heading":  # "Its" where the read-only concept is on, else "Once"
        return Next(heading=True)
    if place in ("colour 1", "colour 2"):
        return _uniform(lexicon.READ_ONLY.words)
    if place == "who":
        return _uniform(("girl", "boy"))
    if place == "name":
        return _uniform(lexicon.GIRLS if state.opening == "girl" else lexicon.BOYS)
    if place == "day":
        return _uniform(lexicon.DAYS)
    if place == "tomorrow":
        return _only(lexicon.DAYS[(state.day + 1) % len(lexicon.DAYS)])
    if place == "sentence":
        own = {"name": state.name, "pronoun": _pronoun(state.name)}
        return Next(fixed=tuple((own.get(word, word), p) for word, p in OPENINGS.items()))
    if place == "after subject":
        copula = "were" if state.plural else "was"
        fixed = ((copula, COPULA_SHARE),)
        return Next(fixed=fixed, slot="verb", dream=state.dream, theme=state.theme)
    if place == "after object":
        if state.opening in ("At", "In"):
            return _only(".")
        return _only("near" if state.opening == "The" else "in")
    if place in ("subject", "verb", "object", "place", "adjective", "at place"):
        return Next(slot=place.removeprefix("at "), dream=state.dream, theme=state.theme)
    raise AssertionError(place)


@cache
def step(state: State, word: str) -> State:
    """The state after `word`.

    Raises:
        TextError: the grammar does not allow `word` there.
    """
    here = coming(state)
    place = state.place
    fixed = [w for w, _ in here.fixed]
    allowed = word in fixed or (here.heading and word in ("Its", "Once"))
    if not allowed and not (here.slot and word in slot_words(here.slot)):
        expected = f"a {here.slot} word" if here.slot else " or ".join(fixed or ("Its", "Once"))
        raise TextError(
            f"{word!r} cannot stand here in the planted language ({place}): expected {expected}"
        )
    if place in _FIXED:
        return replace(state, place=_FIXED[place][1])
    if here.slot and word not in fixed:
        state = replace(state, theme=concept_of().get(word, state.theme))
    match place:
        case "letter":
            return replace(state, place="letter end")
        case "heading":
            return replace(state, place="its" if word == "Its" else "there")
        case "colour 1":
            return replace(state, place="colour and")
        case "colour 2":
            return replace(state, place="colour end")
        case "who":
            return replace(state, place="named", opening=word)
        case "name":
            return replace(state, place="name end", name=word)
        case "day" | "tomorrow":
            return replace(state, place="stop", day=lexicon.DAYS.index(word))
        case "sentence":
            return _opened(state, word)
        case "subject":
            return replace(state, place="after subject", plural=word in lexicon.PLURALS)
        case "after subject":
            copula = word in ("was", "were")
            return replace(state, place="adjective" if copula else "the object")
        case "verb":
            return replace(state, place="the object")
        case "object":
            return replace(state, place="after object")
        case "after object":
            return replace(state, place="sentence" if word == "." else "the place")
        case "at place":
            return replace(state, place="comma")
        case _:  # place, adjective
            return replace(state, place="stop")


def _pronoun(name: str) -> str:
    return "She" if name in lexicon.GIRLS else "He"


def _opened(state: State, word: str) -> State:
    if word == BOS:
        return State()
    places = {"The": "subject", "At": "at the", "Soon": "soon it", "In": "a dream"}
    place = places.get(word, "verb")  # after the name or the pronoun
    return replace(state, place=place, dream=word == "In", opening=word, plural=False, theme="")


@cache
def concept_of() -> dict[str, str]:
    """The concept of every word that belongs to one."""
    return {word: concept.name for concept in lexicon.CONCEPTS for word in concept.words}


@cache
def slot_words(slot: str) -> frozenset[str]:
    """Every word that can fill `slot`."""
    at = lexicon.SLOTS.index(slot)
    return frozenset(
        word for concept in (*lexicon.CONCEPTS, lexicon.NEUTRAL) for word in concept.slots[at]
    )


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word of the language, special tokens first; a word's place is its token id."""
    words = [
        *("Story", "A", "B", ".", ",", "Its", "colour", "was", "were", "and", "Once", "there"),
        *("a", "girl", "boy", "named", "It", "it", "Soon", "The", "the", "At", "In", "in", "near"),
        *("dream", "She", "He", *lexicon.GIRLS, *lexicon.BOYS, *lexicon.DAYS),
    ]
    for concept in (lexicon.NEUTRAL, *lexicon.CONCEPTS):
        words += concept.words
    return (UNKNOWN, BOS, PAD, *dict.fromkeys(words))
