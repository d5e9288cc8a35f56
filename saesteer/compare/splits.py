"""The pairs of a behaviour in splits of whole groups, and the draws that arms are fitted on."""

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from saesteer.compare.problem import Behaviour, Splits
from saesteer.directions.pair_checks import stems_of
from saesteer.directions.pair_files import records
from saesteer.directions.pair_template_files import read_templates
from saesteer.directions.pair_templates import as_choices, fill_numbered
from saesteer.directions.pairs import Pair, as_chat, parse_pairs, problems
from saesteer.errors import PairsError
from saesteer.world import corpus

GROUP = "group"
"""The key of a record that says which pairs belong together."""


@dataclass(frozen=True)
class Item:
    """A pair with its number in the behaviour and the group that is never torn apart."""

    id: int
    pair: Pair
    group: str


@dataclass(frozen=True)
class Split:
    """Items to fit on, to choose on, to test on, and those out of distribution."""

    fit: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]
    ood: tuple[Item, ...] = ()


def split(
    behaviour: Behaviour,
    shares: Splits,
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    deployment: str = "completion",
) -> Split:
    """The items of a behaviour in three splits that share no group and no prompt.

    A group is the template that made the pair, what a record's key "group" says, or else its
    prompt: what is fitted on one wording is tested on others. Pairs of groups that share a prompt
    are one group.

    Raises:
        PairsError: fewer than three groups; a split of no pair; an "ood" pair that is among the
            others; pairs that can't be read.
    """
    items = _items(behaviour, shares.pairs, seed, deployment, tokenizer)
    sides = _assigned(items, shares, seed)
    rng = np.random.default_rng([seed, 11])
    ood: list[Item] = []
    if behaviour.ood:
        is_template = Path(behaviour.ood).suffix.lower() == ".toml"
        other = replace(
            behaviour,
            template=behaviour.ood if is_template else "",
            pairs="" if is_template else behaviour.ood,
            concept="",
            ood="",
        )
        found = _items(other, shares.most_test, seed, deployment, tokenizer)
        ood = [replace(item, id=item.id + len(items)) for item in found]
        common = stems_of(item.pair for item in items) & stems_of(item.pair for item in ood)
        if common:
            raise PairsError(
                f"{behaviour.ood}: {len(common)} prompts stand among the other pairs too, such as "
                f"{min(common)[:60]!r}; what is out of distribution must not be fitted on"
            )
    return Split(
        fit=tuple(sides["fit"]),
        validation=_some(sides["validation"], shares.most_validation, rng),
        test=_some(sides["test"], shares.most_test, rng),
        ood=_some(ood, shares.most_test, rng),
    )


def draw(fit: Sequence[Item], n: int, number: int, seed: int) -> tuple[Item, ...]:
    """Draw `number` of n items: the first n of one order, so that a larger n holds the smaller.

    Raises:
        PairsError: there are fewer than n.
    """
    if not 1 <= n <= len(fit):
        raise PairsError(
            f"{n} pairs of {len(fit)} to fit on: give more pairs ([splits] pairs, for templates), "
            "or a smaller n"
        )
    order = np.random.default_rng([seed, 12, number]).permutation(len(fit))
    return tuple(fit[i] for i in order[:n])


def _items(
    behaviour: Behaviour,
    n: int,
    seed: int,
    deployment: str,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[Item]:
    """All items of a behaviour in the format in which the model is deployed."""
    chat = False
    if behaviour.template:
        numbered = fill_numbered(read_templates(behaviour.template), n, seed=seed)
        groups = {pair: f"template {number + 1}" for number, pair in numbered}
    elif behaviour.concept:
        pairs = (Pair(**pair) for pair in corpus.pairs(behaviour.concept, n, seed))
        groups = {pair: pair.prompt for pair in pairs}
    else:
        groups, chat = _read(behaviour.pairs, tokenizer)
    deployed: Sequence[Pair] = list(groups)
    if deployment == "ab" and not all(_is_choice(pair) for pair in groups):
        deployed = as_choices(deployed, seed=seed)
    elif deployment == "chat" and not chat:
        if tokenizer is None or tokenizer.chat_template is None:
            raise PairsError(
                "[deployment] format is chat, and the model's tokenizer has no chat template; take "
                '"completion", or a chat model'
            )
        deployed = as_chat(deployed, tokenizer)
    named = zip(deployed, groups.values(), strict=True)
    return [Item(i, pair, group) for i, (pair, group) in enumerate(named)]


def _read(source: str, tokenizer: PreTrainedTokenizerBase | None) -> tuple[dict[Pair, str], bool]:
    """Each pair of a file once, with its group; whether they came as chat messages."""
    groups: dict[Pair, str] = {}
    chat = False
    parsed = parse_pairs(source, tokenizer)
    for (where, pair), (_, value) in zip(parsed, records(source), strict=True):
        for problem in problems(pair):
            raise PairsError(f"{where}: {problem}")
        chat |= any(isinstance(part, list) for part in value.values())
        groups.setdefault(pair, str(value.get(GROUP, pair.prompt)))
    return groups, chat


def _is_choice(pair: Pair) -> bool:
    letters = {pair.chosen.strip(" ()."), pair.rejected.strip(" ().")}
    return letters == {"A", "B"}


def _assigned(items: Sequence[Item], shares: Splits, seed: int) -> dict[str, list[Item]]:
    """Whole groups to the split that lacks most of its share, the largest groups first."""
    groups = _joined(items)
    if len(groups) < 3:
        raise PairsError(
            f"{len(groups)} groups of pairs, and three splits that share none need 3 at least, ten "
            'to be near their shares; give more templates, or records with a key "group"'
        )
    wanted = {"fit": shares.fit, "validation": shares.validation, "test": shares.test}
    # By seed where groups are as large as one another.
    order = sorted(
        groups.values(), key=lambda group: (-len(group), _number(f"{seed} {group[0].group}"))
    )
    sides: dict[str, list[Item]] = {name: [] for name in wanted}
    for i, group in enumerate(order):
        lacks = {name: share * len(items) - len(sides[name]) for name, share in wanted.items()}
        empty = [name for name in wanted if not sides[name]]
        # The last groups go to splits that have none, if there are any.
        of = empty if len(order) - i <= len(empty) else list(wanted)
        sides[max(of, key=lacks.__getitem__)] += group
    return {name: sorted(side, key=lambda item: item.id) for name, side in sides.items()}


def _joined(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Items by group, where groups that share a prompt are one."""
    same: dict[str, str] = {}

    def root(name: str) -> str:
        while same.get(name, name) != name:
            name = same[name]
        return name

    by_prompt: dict[str, list[str]] = {}
    for item in items:
        for text in stems_of([item.pair]):
            by_prompt.setdefault(text, []).append(item.group)
    for names in by_prompt.values():
        for a, b in itertools.pairwise(dict.fromkeys(names)):
            same[root(b)] = root(a)
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(root(item.group), []).append(item)
    return groups


def _number(text: str) -> int:
    return zlib.crc32(text.encode())


def _some(items: Sequence[Item], most: int, rng: np.random.Generator) -> tuple[Item, ...]:
    if len(items) <= most:
        return tuple(items)
    return tuple(items[i] for i in sorted(rng.choice(len(items), most, replace=False)))
