"""A feature as a search shows it."""

from dataclasses import dataclass
from math import sqrt

from saesteer.features.records import Example, Feature

_TOKENS = 8


@dataclass(frozen=True)
class Hit:
    """A feature that a search found.

    label: the user's name for it, else its label; score: higher is better, comparable within one
    search (but for `near`, where it is the cosine or the lift that `why` names); top_tokens: what
    it fires on most; example: its strongest context as text, the firing token between « and »; why:
    what of the query was found where; output_score: how much adding it raises what it promotes;
    own_effect: what it fires on; None where not measured; source: who wrote the label, "evidence",
    "judge" or "user".
    """

    id: int
    label: str
    score: float
    density: float
    max_act: float
    top_tokens: tuple[str, ...]
    example: str
    why: str
    output_score: float | None = None
    own_effect: float | None = None
    tags: tuple[str, ...] = ()
    starred: bool = False
    source: str = "evidence"


def hit(feature: Feature, score: float, why: str) -> Hit:
    """A feature as a hit."""
    tokens = dict.fromkeys(word.text for word in feature.words)
    note = feature.note
    named = note.name if note else None
    return Hit(
        id=feature.id,
        label=named or feature.label,
        score=score,
        density=feature.density,
        max_act=feature.max_act,
        top_tokens=tuple(tokens)[:_TOKENS],
        example=marked(feature.examples[0]) if feature.examples else "",
        why=why,
        output_score=feature.output_score,
        own_effect=feature.own_effect,
        tags=note.tags if note else (),
        starred=bool(note and note.starred),
        source="user" if named else feature.label_source,
    )


def marked(example: Example, opening: str = "«", closing: str = "»") -> str:
    """An example as text, the firing token between two marks (its leading space outside)."""
    text = ""
    for i, piece in enumerate(example.pieces):
        if i == example.firing:
            bare = piece.lstrip()
            piece = f"{piece[: len(piece) - len(bare)]}{opening}{bare}{closing}"
        text += piece
    return text.strip()


def by_effect(score: float, own_effect: float | None) -> float:
    """What orders features by effect: score · √max(0, own effect); 0 where that is unknown or NaN.

    Checked on the planted language: by the effect alone the best match is lost, by its sign alone
    the order hangs on the prompts that it was measured on.
    """
    return score * sqrt(own_effect) if own_effect is not None and own_effect > 0 else 0.0
