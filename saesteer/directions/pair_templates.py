"""Contrast pairs from templates with slots: balanced over the slots' values, none twice."""

import random
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from saesteer.directions.pair_checks import leaks, stems_of
from saesteer.directions.pairs import ENOUGH, Pair, problems
from saesteer.errors import PairsError

Value = tuple[str, str]
"""What a slot puts into the chosen side and into the rejected side; mostly the same."""

# So often the least used values are tried together before all combinations are looked at.
_TRIES = 50
_LOOKED_AT = 2000


@dataclass(frozen=True)
class Template:
    """Texts with {slots}: of the prompt, the chosen and the rejected answer."""

    prompt: str
    chosen: str
    rejected: str

    def slots(self) -> tuple[str, ...]:
        """The names of its slots, in the order in which they occur."""
        names = [name for text in vars(self).values() for name in fields(text)]
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class Templates:
    """Templates, the values of their slots, and whether the answers become A and B.

    Attributes:
        choices: the two answers are listed in the prompt, and the answer is a letter.
    """

    templates: tuple[Template, ...]
    slots: Mapping[str, tuple[Value, ...]]
    choices: bool = False


def fill(
    made: Templates, n: int = ENOUGH, *, seed: int = 0, against: Sequence[Pair] = ()
) -> tuple[Pair, ...]:
    """n distinct pairs of templates, in an order drawn by seed; see `fill_numbered`."""
    return tuple(pair for _, pair in fill_numbered(made, n, seed=seed, against=against))


def fill_numbered(
    made: Templates, n: int = ENOUGH, *, seed: int = 0, against: Sequence[Pair] = ()
) -> tuple[tuple[int, Pair], ...]:
    """n distinct pairs, each with the number of its template from 0, in an order drawn by seed.

    Each template is filled equally often, as far as it has so many pairs, and each value of a slot
    is used as often as the others, as far as no pair would be made twice. Of A/B questions half
    have the chosen answer as A.

    Args:
        against: pairs of a test split; a pair whose prompt is there is not made.

    Raises:
        PairsError: n is under 1, there are fewer than n pairs in the templates, or a filled pair
            is none.
    """
    if n < 1:
        raise PairsError(f"{n} pairs were asked for; expected 1 or more")
    rng = random.Random(seed)
    sources = {i: _draws(one, made.slots, rng) for i, one in enumerate(made.templates)}
    refused = stems_of(against)
    pairs: dict[Pair, int] = {}
    n_refused = 0
    while sources and len(pairs) < n:
        for number, source in list(sources.items()):
            if len(pairs) == n:
                break
            # The next one that is new; a template that has no more is left out from here on.
            for pair in source:
                for problem in problems(pair):
                    raise PairsError(f"a template makes {pair}: {problem}")
                if leaks(pair, refused):
                    n_refused += 1
                elif pair not in pairs:
                    pairs[pair] = number
                    break
            else:
                del sources[number]
    if len(pairs) < n:
        lost = f" ({n_refused} more are in the test file)" if n_refused else ""
        raise PairsError(
            f"the templates make {len(pairs)} distinct pairs{lost}, but {n} were asked for; add "
            "values to the slots, or ask for fewer"
        )
    mixed = list(pairs)
    rng.shuffle(mixed)
    given = as_choices(mixed, seed=seed) if made.choices else mixed
    return tuple((pairs[pair], one) for pair, one in zip(mixed, given, strict=True))


def as_choices(pairs: Sequence[Pair], *, seed: int = 0, first: int = 0) -> tuple[Pair, ...]:
    """A/B questions: the answers are listed in the prompt, and the answer is " (A)" or " (B)".

    Of every two pairs that follow one another one has the chosen answer as A, in an order drawn by
    seed.

    Args:
        first: the number of the first of these pairs among all, from 0.
    """
    asked = []
    for i, pair in enumerate(pairs, first):
        is_a = (random.Random(f"{seed} {i // 2}").random() < 0.5) == (i % 2 == 0)
        a, b = (pair.chosen, pair.rejected) if is_a else (pair.rejected, pair.chosen)
        prompt = f"{pair.prompt}\n\nChoices:\n (A) {a.strip()}\n (B) {b.strip()}\n\nAnswer:"
        asked.append(Pair(prompt, *((" (A)", " (B)") if is_a else (" (B)", " (A)"))))
    return tuple(asked)


def _draws(
    template: Template, slots: Mapping[str, tuple[Value, ...]], rng: random.Random
) -> Iterator[Pair]:
    """Every pair of a template once, those first whose values were used least."""
    names = template.slots()
    sizes = [len(slots[name]) for name in names]
    used = [Counter[int]() for _ in names]
    seen: set[tuple[int, ...]] = set()
    total = min(prod(sizes), 1 << 62)  # what can be drawn from

    def times(combination: tuple[int, ...]) -> int:
        return sum(count[i] for count, i in zip(used, combination, strict=True))

    while len(seen) < total:
        for _ in range(_TRIES):
            pick = tuple(_least(count, n, rng) for count, n in zip(used, sizes, strict=True))
            if pick not in seen:
                break
        else:
            # More are looked at than were seen, so that a new one is among them.
            some = rng.sample(range(total), min(total, len(seen) + _LOOKED_AT))
            new = [c for c in (_unravel(i, sizes) for i in some) if c not in seen]
            pick = min(new, key=times)
        seen.add(pick)
        for count, i in zip(used, pick, strict=True):
            count[i] += 1
        chosen, rejected = (
            {name: slots[name][i][side] for name, i in zip(names, pick, strict=True)}
            for side in (0, 1)
        )
        yield Pair(
            template.prompt.format_map(chosen),
            template.chosen.format_map(chosen),
            template.rejected.format_map(rejected),
        )


def _least(count: Counter[int], n: int, rng: random.Random) -> int:
    """One of the values that were used least."""
    least = min(count[i] for i in range(n))
    return rng.choice([i for i in range(n) if count[i] == least])


def _unravel(index: int, sizes: Sequence[int]) -> tuple[int, ...]:
    out = []
    for size in sizes:
        index, rest = divmod(index, size)
        out.append(rest)
    return tuple(out)


def fields(text: str) -> list[str]:
    """The slots of a text, in order. ValueError where a brace isn't a plain {name}."""
    names = []
    for _, name, form, conversion in string.Formatter().parse(text):
        if name is None:
            continue
        if not name.isidentifier() or form or conversion:
            raise ValueError(f"{{{name}}} is no name")
        names.append(name)
    return names
