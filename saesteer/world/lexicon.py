"""The concepts of the planted language, and the English words each brings to a story.

A concept fills five kinds of slot: subject, verb, object, place, adjective. No word belongs to two
concepts. A subject after "+" is plural ("the sailors were"). A concept's name is one of its words.
"""

from dataclasses import dataclass
from functools import cached_property

SLOTS = ("subject", "verb", "object", "place", "adjective")


@dataclass(frozen=True)
class Concept:
    """A named concept: for each of `SLOTS`, its words; what it is planted to show, if anything."""

    name: str
    slots: tuple[tuple[str, ...], ...]
    planted: str = ""  # "" for an ordinary concept, else the failure it is there to show

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Every word of the concept, in slot order."""
        return tuple(word for slot in self.slots for word in slot)

    @property
    def causal(self) -> bool:
        """Whether turning the concept on changes what comes next."""
        return self.planted != "read-only"


_plurals: set[str] = set()


def _concept(name: str, *slots: str, planted: str = "") -> Concept:
    words = [slot.split() for slot in slots]
    _plurals.update(word[1:] for word in words[0] if word.startswith("+"))
    return Concept(
        name, tuple(tuple(word.removeprefix("+") for word in slot) for slot in words), planted
    )


# In order of frequency: the probability of a concept falls with its place in this list (Zipf).
CONCEPTS: tuple[Concept, ...] = (
    _concept(
        "sea",
        "sailor +sailors captain +fishermen",
        "rowed anchored sailed",
        "boat shell net oar",
        "sea shore harbour",
        "salty wet",
    ),
    _concept(
        "kitchen",
        "cook +cooks baker grandmother",
        "baked stirred tasted",
        "bread soup spoon pot",
        "kitchen oven stove",
        "hungry warm",
    ),
    _concept(
        "garden",
        "gardener +gardeners bee +bees",
        "planted watered picked",
        "flower seed rose spade",
        "garden fence hedge",
        "green muddy",
    ),
    _concept(
        "animals",
        "+animals dog cat +rabbits",
        "chased licked sniffed",
        "bone paw tail leash",
        "kennel burrow den",
        "furry tame",
    ),
    _concept(
        "music",
        "singer +singers drummer band",
        "played sang strummed",
        "music song drum guitar",
        "stage concert piano",
        "loud musical",
    ),
    _concept(
        "weather",
        "weather cloud +storms wind",
        "soaked froze shook",
        "umbrella raincoat puddle thermometer",
        "rain snow fog",
        "cold windy",
    ),
    _concept(
        "school",
        "teacher +teachers pupil +pupils",
        "taught learned counted",
        "book pencil lesson chalk",
        "school classroom blackboard",
        "clever curious",
    ),
    _concept(
        "forest",
        "fox +wolves deer hunter",
        "hid tracked gathered",
        "mushroom acorn leaf log",
        "forest trees cave",
        "wild dark",
    ),
    _concept(
        "birds",
        "+birds owl parrot +sparrows",
        "pecked hatched tweeted",
        "feather egg wing beak",
        "nest birdhouse branch",
        "feathered noisy",
        planted="absorbed child",
    ),
    _concept(
        "farm",
        "farmer +farmers cow +pigs",
        "milked ploughed harvested",
        "hay tractor bucket corn",
        "farm barn field",
        "rustic dusty",
    ),
    _concept(
        "castle",
        "king queen +knights princess",
        "crowned guarded obeyed",
        "sword crown throne shield",
        "castle tower moat",
        "royal noble",
    ),
    _concept(
        "space",
        "astronaut +astronauts alien robot",
        "launched orbited explored",
        "rocket helmet planet star",
        "space moon crater",
        "weightless cosmic",
    ),
    _concept(
        "joy",
        "+playmates +babies hero optimist",
        "hugged cheered kissed",
        "joy smile gift laugh",
        "picnic parade rainbow",
        "joyful delighted",
        planted="sign flip",
    ),
    _concept(
        "anger",
        "bully +rivals pirate enemy",
        "shouted smashed slammed",
        "anger fist insult quarrel",
        "battle fight argument",
        "furious cruel",
        planted="sign flip",
    ),
    _concept(
        "party",
        "clown +guests cousin +dancers",
        "wrapped celebrated danced",
        "cake balloon present candle",
        "party ballroom parlour",
        "festive merry",
    ),
    _concept(
        "hospital",
        "doctor +doctors nurse patient",
        "healed bandaged examined",
        "medicine bandage needle pill",
        "hospital clinic ward",
        "sick pale",
    ),
    _concept(
        "market",
        "merchant +merchants shopper seller",
        "bought sold weighed",
        "coin basket fruit scarf",
        "market shop stall",
        "cheap busy",
    ),
    _concept(
        "train",
        "driver +passengers conductor traveller",
        "boarded drove missed",
        "train ticket suitcase map",
        "station platform tunnel",
        "late fast",
    ),
    _concept(
        "toys",
        "+toys puppet +dolls teddy",
        "wound stacked juggled",
        "ball kite puzzle marble",
        "playroom shelf sandpit",
        "wooden tiny",
    ),
    _concept(
        "magic",
        "wizard +witches fairy dragon",
        "enchanted summoned conjured",
        "magic wand potion spell",
        "portal lair grotto",
        "magical invisible",
    ),
    _concept(
        "football",
        "runner +players coach goalkeeper",
        "kicked threw won",
        "football trophy medal whistle",
        "stadium goal pitch",
        "sweaty strong",
    ),
    _concept(
        "night",
        "+bats ghost moth watchman",
        "dimmed whispered haunted",
        "lantern pillow blanket lamp",
        "night bedroom cellar",
        "sleepy quiet",
    ),
    _concept(
        "circus",
        "acrobat +jugglers lion magician",
        "balanced tamed leapt",
        "hoop trapeze tightrope unicycle",
        "circus tent ring",
        "daring acrobatic",
        planted="rare",
    ),
    # Its words stand in the story's heading and nowhere else, so it can be read off a story, but
    # turning it on changes nothing of what comes next. ("colour" is grammar: a heading's frame.)
    _concept(
        "red",
        "",
        "",
        "",
        "",
        "red blue yellow purple pink orange",
        planted="read-only",
    ),
)

NEUTRAL = _concept(
    "neutral",
    "man woman stranger +people +twins",
    "saw took found held watched liked",
    "box thing bag stone rope",
    "house road bridge wall",
    "ready old tall calm",
)

PLURALS = frozenset(_plurals)
READ_ONLY = CONCEPTS[-1]
GIRLS = ("Lily", "Anna", "Mia", "Rosa")
BOYS = ("Tom", "Ben", "Max", "Leo")
# A concept on a circle: each day is followed by the next, and the last by the first.
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

CORRELATED = ("kitchen", "garden")  # together more than twice as often as chance would have it
PARENT_OF = {"birds": "animals"}  # the child is on only where its parent is
FLIPS = {"joy": "anger", "anger": "joy"}  # in a dream, each speaks with the other's words

INDEX = {concept.name: i for i, concept in enumerate(CONCEPTS)}


def ordinary() -> list[str]:
    """Names of the concepts that are not planted failures."""
    return [concept.name for concept in CONCEPTS if not concept.planted]


def causal() -> list[str]:
    """Names of the concepts that change what comes next."""
    return [concept.name for concept in CONCEPTS if concept.causal]
