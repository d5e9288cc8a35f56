"""problem.toml: a problem as a file, in blocks that all have to be there."""

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from saesteer.compare.problem import Behaviour, Problem, one_of
from saesteer.core import tables
from saesteer.errors import ConfigError, did_you_mean

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
    from saesteer.compare.scorers import SCORERS  # scorers are of behaviours

    for scorer in rest.scorers or ():
        one_of("[scoring] scorers", scorer, (*SCORERS, "judge"))
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
    return str(beside.resolve()) if name and beside.is_file() else name
