"""Sets of tokens by how they are spelled, and which of them a direction in the stream promotes.

The question is Bloom & Lin's ("Understanding SAE features with the logit lens", 2024): do the
logits that a feature adds set the tokens of some set apart from the others? They walk through the
ranked tokens, as gene set enrichment analysis does (Subramanian et al. 2005); here it is the
parametric form of that test (Kim & Volsky 2005), which one matrix product gives for all sets:

    z = (mean logit of the set − mean logit) / standard error of the mean of that many drawn tokens

Tokens of a set share a part of their unembedding, so that any direction gives a large set a large
z. z is therefore divided by its standard deviation over random directions, where that is above 1.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# A set of fewer tokens says little.
_LEAST = 5
_FUNCTION = {
    "pronouns": "i you he she it we they me him her us them myself yourself himself herself itself",
    "possessives": "my your his her its our their mine yours hers ours theirs",
    "articles and demonstratives": "a an the this that these those",
    "prepositions": "of in on at by for with from to into onto over under about after before "
    "between through during against among without within upon across behind beyond near",
    "conjunctions": "and or but nor so yet because although though while if unless until since",
    "forms of be, have and do": "am is are was were be been being have has had do does did",
    "modal verbs": "can could may might must shall should will would",
    "question words": "who whom whose which what when where why how",
    "number words": "one two three four five six seven eight nine ten eleven twelve twenty thirty "
    "forty fifty sixty seventy eighty ninety hundred thousand million billion",
    "days and months": "monday tuesday wednesday thursday friday saturday sunday january february "
    "march april june july august september october november december",
    "negations": "no not never none nothing nobody neither nor cannot",
}
_SCRIPTS = (
    "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "THAI", "HIRAGANA", "KATAKANA",
    "HANGUL", "CJK",
)  # fmt: skip


def _matches(pattern: str) -> Callable[[str], bool]:
    compiled = re.compile(pattern)
    return lambda text: compiled.fullmatch(text) is not None


def _word_of(names: str) -> Callable[[str], bool]:
    words = frozenset(names.split())
    return lambda text: text.strip().casefold() in words


def _script(name: str) -> Callable[[str], bool]:
    def belongs(text: str) -> bool:
        if text.isascii():
            return False
        return any(unicodedata.name(c, "").startswith(name + " ") for c in text.strip())

    return belongs


# Name -> whether a token's text, with its leading space, belongs.
SETS: dict[str, Callable[[str], bool]] = {
    "beginnings of words": _matches(r"\s[^\W_]+"),
    "continuations of words": _matches(r"[^\W_]+"),
    "capitalised words": _matches(r"\s?[A-ZÀ-ÖØ-Þ][a-zß-öø-ÿ]+"),
    "words in capitals": _matches(r"\s?[A-ZÀ-ÖØ-Þ]{2,}"),
    "single letters": _matches(r"\s?[^\W\d_]"),
    "numbers": _matches(r"\s?\d+"),
    "years": _matches(r"\s?(1[5-9]|20)\d\d"),
    "punctuation": _matches(r"\s?[^\w\s]+"),
    "ends of sentences": _matches(r"\s?[.!?…]+[\"'”’)]*"),
    "opening brackets and quotes": _matches(r"\s?[(\[{<«“‘]+"),
    "closing brackets and quotes": _matches(r"\s?[)\]}>»”’]+"),
    "white space": _matches(r"\s+"),
    "accented letters": _matches(r"\s?[^\W\d_]*[À-ÖØ-öø-ſ][^\W\d_]*"),
    **{f"words in -{end}": _matches(rf"\s?[^\W\d_]+{end}") for end in
       ("ing", "ed", "ly", "er", "est", "s", "tion", "ness", "ment", "able", "ous", "ful")},
    **{f"words beginning with {c}": _matches(rf"\s[{c}{c.upper()}][^\W\d_]*")
       for c in "abcdefghijklmnopqrstuvwxyz"},
    **{name: _word_of(words) for name, words in _FUNCTION.items()},
    **{f"{name.capitalize() if name != 'CJK' else name} script": _script(name)
       for name in _SCRIPTS},
}  # fmt: skip


def membership(texts: Sequence[str]) -> tuple[tuple[str, ...], Tensor]:
    """The names [s] of the sets that these tokens fill, and which token is in which [s, n], 1 or 0.

    Sets of fewer than 5 tokens, and of all but 5, are left out.
    """
    names, rows = [], []
    for name, belongs in SETS.items():
        row = torch.tensor([belongs(text) for text in texts], dtype=torch.float32)
        if _LEAST <= row.sum() <= len(texts) - _LEAST:
            names.append(name)
            rows.append(row)
    return tuple(names), torch.stack(rows) if rows else torch.zeros(0, len(texts))


def spread(columns: Tensor, members: Tensor) -> Tensor:
    """The standard deviation of each set's z over random directions, [s].

    For a direction d of random sign and place, E (d·Δ)² = |Δ|²/width with Δ the mean of the set's
    columns less the mean of all, and the variance of the logits is the trace of the columns'
    covariance, over the width.

    Args:
        columns: [width, n], what each token's logit reads of the stream; members: [s, n].
    """
    centred = columns - columns.mean(dim=1, keepdim=True)
    apart = centred @ members.T / members.sum(dim=1)  # [width, s]
    total = centred.square().sum() / columns.shape[1]
    return apart.square().sum(dim=0).div(total).sqrt() / _standard_errors(members)


def scores(logits: Tensor, members: Tensor, spread: Tensor) -> Tensor:
    """How far each set's mean logit lies above that of all tokens: z / max(1, spread), [m, s].

    Args:
        logits: [m, n]; members: [s, n] as `membership` gives it; spread: [s].
    """
    mean = logits.mean(dim=1, keepdim=True)
    deviation = logits.std(dim=1, correction=0, keepdim=True).clamp(min=1e-12)
    apart = (logits - mean) @ members.T / members.sum(dim=1)
    return apart / deviation / _standard_errors(members) / spread.clamp(min=1)


def _standard_errors(members: Tensor) -> Tensor:
    """Of the mean of as many tokens as each set has, drawn from all without putting any back, in
    standard deviations of one."""
    size, n = members.sum(dim=1), members.shape[1]
    return ((n - size) / (n - 1) / size).sqrt()
