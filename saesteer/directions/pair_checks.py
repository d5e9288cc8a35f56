"""What is wrong with contrast pairs before anything is fitted on them."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from saesteer.directions.pairs import ENOUGH, FEWEST, Pair, problems
from saesteer.directions.places import side_tokens

# One label is chosen so much oftener than it is rejected, as a share of the pairs that have it.
_UNBALANCED = 0.2
_WORDS = {"yes", "no", "true", "false", "agree", "disagree"}
_LETTER = re.compile(r"\s*(?:\(([A-Z0-9])\)|([A-Z0-9])(?:[).:]\s|[).:]?\s*$))")
# Where an A/B question ends and its choices begin.
_CHOICES = re.compile(r"\s*(?:Choices:|Options:)?\s*\(A\)", re.IGNORECASE)
# Tokenizers that know no limit say 10^30.
_NO_LIMIT = 10**6


@dataclass(frozen=True)
class Finding:
    """Something that a check found.

    Attributes:
        kind: "few", "empty", "identical", "contradiction", "repeat", "labels", "same tokens",
            "truncated", "unknown words", "leaked pair" or "leaked prompt".
        pairs: which, counted from 1; empty where it is about all of them.
        message: what it is, why it matters and what to do.
        fatal: no direction should be fitted on the pairs, or compared with the other file, until
            it is mended.
    """

    kind: str
    pairs: tuple[int, ...]
    message: str
    fatal: bool

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.pairs[:5])) + ", …" * (len(self.pairs) > 5)
        where = f" (pair{'s' * (len(self.pairs) != 1)} {shown})" if self.pairs else ""
        return f"{self.kind}: {self.message}{where}"


def check(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase | None = None,
    other: Sequence[Pair] | None = None,
    *,
    context: int | None = None,
) -> tuple[Finding, ...]:
    """Look at pairs for all that spoils a direction; an empty tuple where nothing was found.

    Args:
        tokenizer: looks at the tokens as well: sides that become the same, that are too long, or
            that have words it doesn't know.
        other: pairs of another split, such as the test's, of which none may be here.
        context: tokens that a context of the model holds (`rows.contexts_hold`); by default what
            the tokenizer says.
    """
    found = [*_texts(pairs), *_labels(pairs)]
    if tokenizer is not None:
        found += _tokens(pairs, tokenizer, context)
    if other is not None:
        found += _leaks(pairs, other)
    return tuple(sorted(found, key=lambda finding: not finding.fatal))


def stem(prompt: str) -> str:
    """A prompt as it is compared between files: without the choices of an A/B question, whose
    order may differ, and without case, spacing and closing punctuation."""
    return _plain(_CHOICES.split(prompt)[0])


def leaks(pair: Pair, stems: frozenset[str]) -> bool:
    """Whether the pair's prompt, or an answer where it has none, is among `stems_of` others."""
    return not stems.isdisjoint(stems_of([pair]))


def stems_of(pairs: Iterable[Pair]) -> frozenset[str]:
    """What must not occur in another split: every prompt's `stem`; where a prompt is empty, both
    answers'."""
    return frozenset(
        text
        for pair in pairs
        for text in ([stem(pair.prompt)] if stem(pair.prompt) else _answers(pair))
    )


def _answers(pair: Pair) -> list[str]:
    return [_plain(pair.chosen), _plain(pair.rejected)]


def _plain(text: str) -> str:
    bare = " ".join(text.casefold().split())
    return bare.strip(" .,;:!?…\"'") or bare


def _texts(pairs: Sequence[Pair]) -> Iterator[Finding]:
    if len(pairs) < FEWEST:
        yield Finding(
            "few",
            (),
            f"{len(pairs)} pairs; under {FEWEST} a direction is mostly what these pairs happen to "
            f"say, {ENOUGH} are a good number",
            False,
        )
    bad: defaultdict[str, list[int]] = defaultdict(list)
    places: defaultdict[Pair, list[int]] = defaultdict(list)
    for n, pair in enumerate(pairs, 1):
        for problem in problems(pair):
            bad["empty" if "empty" in problem else "identical"].append(n)
        if pair.chosen != pair.rejected and pair.chosen.split() == pair.rejected.split():
            bad["identical"].append(n)
        places[pair].append(n)
    for n, pair in enumerate(pairs, 1):
        swapped = Pair(pair.prompt, pair.rejected, pair.chosen)
        if pair.chosen != pair.rejected and swapped in places:
            bad["contradiction"].append(n)
    bad["repeat"] = [n for where in places.values() for n in where[1:]]
    told = {
        "empty": "a side has no text; write an answer or leave the pair out",
        "identical": "both answers are the same but for spaces; they must differ",
        "contradiction": "the same pair occurs with its sides swapped, so that both cancel out; "
        "decide which answer is to be chosen",
        "repeat": "said before in this file; a repeat counts double and adds nothing",
    }
    for kind, message in told.items():
        if bad[kind]:
            yield Finding(kind, tuple(dict.fromkeys(bad[kind])), message, kind != "repeat")


def label(answer: str) -> str | None:
    """The letter or the word of choice that an answer is or begins with: "A" of " (A) Yes"; None
    of a text."""
    if found := _LETTER.match(answer):
        return str(found[1] or found[2])
    return _plain(answer) if _plain(answer) in _WORDS else None


def _labels(pairs: Sequence[Pair]) -> Iterator[Finding]:
    chosen = Counter(filter(None, (label(pair.chosen) for pair in pairs)))
    rejected = Counter(filter(None, (label(pair.rejected) for pair in pairs)))
    uneven = []
    for name in sorted(chosen | rejected):
        more = abs(chosen[name] - rejected[name])
        if more > 1 and more > _UNBALANCED * (chosen[name] + rejected[name]):
            uneven.append(f"{name!r} is chosen {chosen[name]} times, rejected {rejected[name]}")
    if uneven:
        yield Finding(
            "labels",
            (),
            f"{'; '.join(uneven)}: a direction would say these as much as it shows the behaviour; "
            "swap the choices of some questions, or leave some out",
            False,
        )


def _tokens(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, context: int | None
) -> Iterator[Finding]:
    limit = tokenizer.model_max_length if context is None else context
    bad: defaultdict[str, list[int]] = defaultdict(list)
    longest = 0
    for n, pair in enumerate(pairs, 1):
        sides = [side_tokens(tokenizer, pair.prompt, text) for text in (pair.chosen, pair.rejected)]
        if sides[0].ids == sides[1].ids or any(len(side.ids) == side.start for side in sides):
            bad["same tokens"].append(n)
        if (length := max(len(side.ids) for side in sides)) > limit:
            bad["truncated"].append(n)
        longest = max(longest, length)
        if tokenizer.unk_token_id is not None and any(
            tokenizer.unk_token_id in side.ids for side in sides
        ):
            bad["unknown words"].append(n)
    told = {
        "same tokens": "the tokenizer makes the same tokens, or none, of the answers; the model "
        "can't tell them apart",
        "truncated": f"too long for the model's contexts of {limit} tokens (the longest has "
        f"{longest}); shorten the prompts, their ends would be cut off",
        "unknown words": "the tokenizer doesn't know a word and reads it as unknown; use words it "
        "knows",
    }
    for kind, message in told.items():
        if bad[kind] and (kind != "truncated" or limit < _NO_LIMIT):
            yield Finding(kind, tuple(bad[kind]), message, kind != "unknown words")


def _leaks(pairs: Sequence[Pair], other: Sequence[Pair]) -> Iterator[Finding]:
    stems = stems_of(other)
    whole = {(_plain(pair.prompt), *sorted(_answers(pair))) for pair in other}
    leaked = [n for n, pair in enumerate(pairs, 1) if leaks(pair, stems)]
    same = [
        n for n in leaked if (_plain(pairs[n - 1].prompt), *sorted(_answers(pairs[n - 1]))) in whole
    ]
    end = "; a result on the other would be of what was fitted on: leave them out of one of the two"
    if same:
        yield Finding("leaked pair", tuple(same), f"in the other file as well{end}", True)
    if alike := [n for n in leaked if n not in set(same)]:
        yield Finding(
            "leaked prompt",
            tuple(alike),
            f"the other file asks the same, answered otherwise{end}",
            True,
        )
