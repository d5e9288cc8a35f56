"""What a comparison is about: a problem.toml, every block of which has to be there.

A comparison without a behaviour, without what each arm may use, without the format in which the
model is deployed or without a budget of damage can be won by any arm; so it is refused.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from saesteer.errors import ConfigError, did_you_mean
from saesteer.world import lexicon

DELTAS = (0.05, 0.1, 0.25, 0.5)
"""Nats of ΔCE at which every arm's effect is told."""
DEPLOYMENTS = ("completion", "ab", "chat")
POSITIONS = ("all", "prompt", "generated")
SCORERS = ("lexicon", "relevance", "fluency")
N = (1, 3, 8, 32, 128, 256)
FEWEST_HEADLINE = 32
"""A headline on fewer pairs is about those pairs."""


@dataclass(frozen=True)
class Behaviour:
    """What the model should do more of, and the pairs that show it.

    Attributes:
        name: one word or two.
        describe: one sentence, shown in the report.
        pairs, template, concept: where the pairs come from, exactly one of them: a file or
            `datasets` name, a file of templates, a concept of the planted language.
        query: keywords for the arm that looks its feature up by description.
        words: the words of the behaviour, for the scorer of texts and for reading.
        written: eight or more prompts that ask for it, for the arm "prompt".
        ood: pairs or templates out of the distribution of the others.
        prompts: a file of prompts to continue, one a line; else those of the test pairs.
    """

    name: str
    describe: str = ""
    pairs: str = ""
    template: str = ""
    concept: str = ""
    query: str = ""
    words: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    ood: str = ""
    prompts: str = ""

    def __post_init__(self) -> None:
        sources = [key for key in ("pairs", "template", "concept") if getattr(self, key)]
        if len(sources) != 1:
            raise ConfigError(
                f"behaviour {self.name!r} has {' and '.join(sources) or 'no pairs'}; give exactly "
                "one of pairs (a file), template (a file of templates) and concept (of the planted "
                "language)"
            )
        if self.concept and self.concept not in lexicon.INDEX:
            raise ConfigError(
                f"behaviour {self.name!r}: no concept {self.concept!r} in the planted language"
                f"{did_you_mean(self.concept, lexicon.INDEX)}; it has {', '.join(lexicon.INDEX)}"
            )

    @property
    def lexicon(self) -> tuple[str, ...]:
        """The words of the behaviour: its own, or those of its concept in the planted language."""
        if self.words or not self.concept:
            return self.words
        return lexicon.CONCEPTS[lexicon.INDEX[self.concept]].words


@dataclass(frozen=True)
class Affordances:
    """What an arm may use; one that needs more is not run, and the report says so.

    Attributes:
        labels: which answer is the chosen one.
        weights: may train weights.
        tokens: more tokens that a prompt may have at inference; −1: any number.
        sae: a sparse autoencoder and its index.
        description: a description of the behaviour, to search features by.
    """

    labels: bool = True
    weights: bool = False
    tokens: int = 0
    sae: bool = True
    description: bool = False


@dataclass(frozen=True)
class Splits:
    """Shares of the pairs, by whole groups; `pairs` is how many are made of templates or a concept.

    most_validation, most_test: as many are used, drawn by the seed.
    """

    fit: float = 0.4
    validation: float = 0.1
    test: float = 0.5
    most_validation: int = 64
    most_test: int = 200
    pairs: int = 1280

    def __post_init__(self) -> None:
        shares = (self.fit, self.validation, self.test)
        if not (all(share > 0 for share in shares) and math.isclose(sum(shares), 1)):
            raise ConfigError(f"[splits] are {shares}: three shares above 0 that add up to 1")
        if min(self.most_validation, self.most_test, self.pairs) < 1:
            raise ConfigError("[splits] most_validation, most_test and pairs: 1 or more")


@dataclass(frozen=True)
class Primary:
    """What is claimed, declared before anything is measured.

    Attributes:
        family: pairs of arms, each "a vs b"; Holm's correction is over all of them.
        margin: how much worse still counts as "as good as", in nats a token of margin.
    """

    family: tuple[str, ...]
    margin: float

    def __post_init__(self) -> None:
        if not self.family:
            raise ConfigError('[primary] family is empty; such as ["sae-clamp vs mean-difference"]')
        _ = self.pairs
        if not 0 < self.margin < math.inf:
            raise ConfigError(f"[primary] margin is {self.margin:g}; a number above 0, such as 0.1")

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The family as pairs of names."""
        found = []
        for text in self.family:
            a, versus, b = (part.strip() for part in text.partition(" vs "))
            if not versus or not a or not b or a == b:
                raise ConfigError(f"[primary] {text!r} in family: write two arms, as 'a vs b'")
            found.append((a, b))
        return tuple(found)


@dataclass(frozen=True)
class Problem:
    """A whole problem; in its file the fields stand in blocks, see `problem_file`.

    Attributes:
        deployment: how the pairs are given to the model: "completion", "ab" (letters) or "chat".
        positions: which tokens are steered: "all" plain ones, "prompt" or "generated".
        delta_ce: nats of ΔCE on clean text that the claims may cost, one of `DELTAS`.
        text: clean text; "" takes the run's held-out text.
        choices: a file of pairs whose chosen answer is the right one: small multiple choice.
        n: numbers of pairs of the curve. headline_n: of all else, 32 at least.
        strengths: how many are tried for each setting, of four settings an arm.
        layers: hook points, four at most; () spreads them over the model.
        noise: shares of labels to swap, for the arms of the primary family.
        arms: () is every arm that applies.
        preset: a published protocol whose figures are told as well, see `presets`.
    """

    behaviours: tuple[Behaviour, ...]
    affordances: Affordances
    deployment: str
    delta_ce: float
    splits: Splits
    primary: Primary
    positions: str = "all"
    text: str = ""
    choices: str = ""
    n: tuple[int, ...] = N
    headline_n: int = 128
    strengths: int = 14
    layers: tuple[str, ...] = ()
    noise: tuple[float, ...] = ()
    scorers: tuple[str, ...] = SCORERS
    arms: tuple[str, ...] = ()
    preset: str = ""

    def __post_init__(self) -> None:
        names = [behaviour.name for behaviour in self.behaviours]
        if not names or len(set(names)) < len(names) or not all(names):
            raise ConfigError(f"behaviours are called {names}; at least one, each by its own name")
        one_of("[deployment] format", self.deployment, DEPLOYMENTS)
        one_of("[deployment] positions", self.positions, POSITIONS)
        if self.delta_ce not in DELTAS:
            raise ConfigError(f"[cost] delta_ce is {self.delta_ce:g}; one of {DELTAS}")
        if not self.n or min(self.n) < 1 or list(self.n) != sorted(set(self.n)):
            raise ConfigError(f"[grid] n is {list(self.n)}; ascending numbers of pairs from 1 up")
        if self.headline_n < FEWEST_HEADLINE:
            raise ConfigError(
                f"[grid] headline_n is {self.headline_n}; {FEWEST_HEADLINE} at least: what fewer "
                "pairs give belongs on the curve alone"
            )
        if self.strengths < 2:
            raise ConfigError(f"[grid] strengths is {self.strengths}; 2 or more, 14 are usual")
        if len(self.layers) > 4:
            raise ConfigError(f"[grid] layers: {len(self.layers)} of them; four at most")
        if not all(0 <= share <= 1 for share in self.noise):
            raise ConfigError(f"[grid] noise is {list(self.noise)}; shares from 0 to 1")


def one_of(what: str, value: str, known: Collection[str]) -> None:
    """Refuse a value that isn't among those known: ConfigError."""
    if value not in known:
        raise ConfigError(
            f"{what} is {value!r}{did_you_mean(value, known)}; one of {', '.join(known)}"
        )
