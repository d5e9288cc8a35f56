"""What a comparison is about: a problem.toml, every block of which has to be there.

A comparison without a behaviour, without what each arm may use, without the format in which the
model is deployed or without a budget of damage can be won by any arm; so it is refused.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saesteer.core import tables
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
    """A whole problem; in the file its fields stand in blocks, see `BLOCKS`.

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
        _one_of("[deployment] format", self.deployment, DEPLOYMENTS)
        _one_of("[deployment] positions", self.positions, POSITIONS)
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
        for scorer in self.scorers:
            _one_of("[scoring] scorers", scorer, (*SCORERS, "classifier", "judge"))


# Block of the file → its keys, and the fields they fill. Behaviours, affordances, splits and
# primary are blocks of their own classes.
BLOCKS: dict[str, dict[str, str]] = {
    "deployment": {"format": "deployment", "positions": "positions"},
    "cost": {"delta_ce": "delta_ce", "text": "text", "choices": "choices"},
    "grid": {key: key for key in ("n", "headline_n", "strengths", "layers", "noise")},
    "scoring": {"scorers": "scorers"},
}
_CLASSES = {"behaviour": "behaviours", "affordances": "", "splits": "", "primary": ""}
_TOP = ("arms", "preset")

EXAMPLES = {
    "behaviour": '[[behaviour]]\nname = "happy"\ntemplate = "happy-sad.templates.toml"\n'
    'query = "happy"\nwords = ["happy", "glad", "cheerful"]',
    "affordances": "[affordances]\nlabels = true\nweights = false\ntokens = 0\nsae = true\n"
    "description = false",
    "deployment": '[deployment]\nformat = "completion"\npositions = "all"',
    "cost": "[cost]\ndelta_ce = 0.25",
    "splits": "[splits]\nfit = 0.4\nvalidation = 0.1\ntest = 0.5",
    "grid": "[grid]\nn = [1, 3, 8, 32, 128, 256]\nheadline_n = 128\nstrengths = 14",
    "scoring": '[scoring]\nscorers = ["lexicon", "relevance", "fluency"]',
    "primary": '[primary]\nfamily = ["sae-clamp vs mean-difference"]\nmargin = 0.1',
}
"""For each block what it looks like, to copy."""


def read(path: str | Path) -> Problem:
    """Read a problem.toml; files it names are looked for beside it.

    Raises:
        ConfigError: it is missing or no TOML; a block is missing (with one to copy); a key or a
            value is wrong.
    """
    path = Path(path)
    problem = parse(tables.read(path), str(path))
    behaviours = tuple(
        dataclasses.replace(
            one,
            pairs=_beside(path, one.pairs),
            template=_beside(path, one.template),
            ood=_beside(path, one.ood),
            prompts=_beside(path, one.prompts),
        )
        for one in problem.behaviours
    )
    return dataclasses.replace(
        problem,
        behaviours=behaviours,
        text=_beside(path, problem.text),
        choices=_beside(path, problem.choices),
    )


def parse(values: Mapping[str, Any], where: str) -> Problem:
    """A problem from the tables of its file. Raises as `read`."""
    blocks = (*_CLASSES, *BLOCKS)
    for block in values:
        if block not in (*blocks, *_TOP):
            raise ConfigError(
                f"{where}: unknown block {block!r}{did_you_mean(block, blocks)}; expected "
                f"{', '.join((*blocks, *_TOP))}"
            )
    for block in blocks:
        if block not in values:
            raise ConfigError(
                f"{where} has no block [{block}], and a comparison without one says nothing; "
                f"copy this and change it:\n{EXAMPLES[block]}"
            )
    flat: dict[str, Any] = {key: values[key] for key in _TOP if key in values}
    for block, fields in BLOCKS.items():
        for key, value in _table(values[block], block, where).items():
            if key not in fields:
                raise ConfigError(
                    f"{where} [{block}]: unknown key {key!r}{did_you_mean(key, fields)}; expected "
                    f"one of {', '.join(fields)}"
                )
            flat[fields[key]] = value
    for key in ("affordances", "splits", "primary"):
        flat[key] = _table(values[key], key, where)
    given = values["behaviour"]
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise ConfigError(f"{where}: write [[behaviour]] with two brackets, once for each")
    missing = [
        key for key, block in (("deployment", "deployment"), ("delta_ce", "cost"))
        if key not in flat
    ]  # fmt: skip
    for key in missing:
        block = "cost" if key == "delta_ce" else key
        raise ConfigError(f"{where}: [{block}] has no {key}; copy this:\n{EXAMPLES[block]}")
    for key in ("family", "margin"):
        if key not in flat["primary"]:
            raise ConfigError(f"{where}: [primary] has no {key}; copy this:\n{EXAMPLES['primary']}")
    behaviours = []
    for i, one in enumerate(given, 1):
        if not one.get("name"):
            raise ConfigError(f"{where}: behaviour {i} has no name; give it one")
        behaviours.append(tables.build(Behaviour, one, f"{where} [[behaviour]] {i}"))
    rest = tables.build(_Flat, flat, where)
    return Problem(behaviours=tuple(behaviours), **vars(rest))


def to_dict(problem: Problem) -> dict[str, Any]:
    """The blocks as they stand in a file; `parse` gives the problem back."""
    values: dict[str, Any] = {"arms": list(problem.arms), "preset": problem.preset}
    values["behaviour"] = [
        {key: value for key, value in _plain(one).items() if value or key == "name"}
        for one in problem.behaviours
    ]
    for key in ("affordances", "splits", "primary"):
        values[key] = _plain(getattr(problem, key))
    for block, fields in BLOCKS.items():
        values[block] = {key: _listed(getattr(problem, name)) for key, name in fields.items()}
    return values


# The fields of a problem that its file gives in blocks, for the checks of their types.
_Flat = dataclasses.make_dataclass(
    "_Flat",
    [
        (f.name, f.type, field(default=None if f.default is dataclasses.MISSING else f.default))
        for f in dataclasses.fields(Problem)
        if f.name != "behaviours"
    ],
    frozen=True,
)


def _plain(value: Any) -> dict[str, Any]:
    return {key: _listed(one) for key, one in dataclasses.asdict(value).items()}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _table(value: Any, block: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {block!r} is a table; copy this:\n{EXAMPLES[block]}")
    return value


def _beside(path: Path, name: str) -> str:
    """A file that stands beside the problem by its whole path; other names as they are."""
    beside = path.parent / name
    return str(beside) if name and beside.is_file() else name


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(
            f"{what} is {value!r}{did_you_mean(value, known)}; one of {', '.join(known)}"
        )
