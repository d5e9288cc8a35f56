"""What an index holds of a feature: plain values that everything in `features` passes around.

A figure that was not measured is None, never 0. Nothing here imports torch, transformers or numpy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# Searchable fields, in the order of the columns of the index's table `texts`.
FIELDS = ("label", "words", "near", "promotes", "contexts")
# What a query calls them.
QUERY_FIELDS = {
    "label": ("label",),
    "token": ("words",),
    "promotes": ("promotes",),
    "context": ("near", "contexts"),
}


@dataclass(frozen=True)
class TokenStat:
    """A token on which a feature fires, or one that follows where it fires.

    share: of the feature's activation mass; count: times it fired there; lift: P(token | fires) /
    P(token); base: P(token) among all tokens counted.
    """

    id: int
    text: str
    share: float
    count: int
    lift: float
    base: float


@dataclass(frozen=True)
class WordStat:
    """A whole word on which a feature fires, an occurrence of several tokens counted as one.

    share: of the feature's activation mass; lift: P(fires | word) / density; base: P(word) among
    all words counted.
    """

    text: str
    share: float
    lift: float
    base: float

    def recall(self, density: float) -> float:
        """P(fires | word), from the feature's density."""
        return min(1.0, self.lift * density)


@dataclass(frozen=True)
class Example:
    """A context in which a feature fires: the tokens around, their text, its activations there.

    firing: which of them the example is about; value: the activation there; context, position:
    where in the text it was; document: of which document, None where not known; group: "top" for
    one of the feature's strongest, 0 to 9 for one drawn from that tenth of its activations (0 the
    weakest).
    """

    value: float
    context: int
    position: int
    document: int | None
    firing: int
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    activations: tuple[float, ...]
    group: Literal["top"] | int = "top"


@dataclass(frozen=True)
class Histogram:
    """counts[i] values lie in [edges[i], edges[i + 1])."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Neighbour:
    """Another feature: value is the cosine of their decoder rows, n None; or, of one that fires on
    the same tokens, the lift of firing together, and on how many tokens they did."""

    feature: int
    value: float
    n: int | None = None


@dataclass(frozen=True)
class Note:
    """What a user wrote about a feature."""

    name: str | None = None
    tags: tuple[str, ...] = ()
    starred: bool = False
    text: str = ""


@dataclass(frozen=True)
class Feature:
    """All that is known of a feature.

    confidence: of the label, 0 to 1; density: share of tokens on which it fires; mean_act: where it
    fires; breadth: effective number of its own words; company: how many of them fire within one
    example; label_source: "evidence" or "judge"; label_score: the judge's, 0 to 1; output_score:
    how much adding it raises what it promotes; own_effect: how much it raises what it fires on;
    token_set: the set of tokens that it promotes most, by token_set_score; promotes, suppresses:
    (token text, logit); positions: its density by the place in the context (0; 1; 2 and 3; 4 to 7;
    …) over its density anywhere, 0 where there is no token; note: the user's own, None where there
    is none.
    """

    id: int
    label: str
    confidence: float
    density: float
    mean_act: float
    max_act: float
    n_fired: int
    breadth: float
    company: float
    decoder_norm: float | None = None
    label_source: str = "evidence"
    label_score: float | None = None
    output_score: float | None = None
    own_effect: float | None = None
    token_set: str | None = None
    token_set_score: float | None = None
    tokens: tuple[TokenStat, ...] = ()
    next_tokens: tuple[TokenStat, ...] = ()
    words: tuple[WordStat, ...] = ()
    promotes: tuple[tuple[str, float], ...] = ()
    suppresses: tuple[tuple[str, float], ...] = ()
    examples: tuple[Example, ...] = ()
    activations: Histogram | None = None
    logits: Histogram | None = None
    positions: tuple[float, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    coactive: tuple[Neighbour, ...] = ()
    note: Note | None = None


@dataclass(frozen=True)
class Entry:
    """A feature and its searchable text: field of `FIELDS` -> text."""

    feature: Feature
    texts: Mapping[str, str]
