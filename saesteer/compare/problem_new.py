"""A first problem.toml from a few answers."""

from collections.abc import Callable, Mapping
from pathlib import Path

from saesteer.compare.problem import DELTAS, Affordances, Behaviour, Primary, Problem, Splits
from saesteer.compare.problem_file import to_dict
from saesteer.core import tables
from saesteer.core.files import written_aside
from saesteer.errors import ConfigError

QUESTIONS = {
    "behaviour": "What should the model do more of? A word or two, such as happy",
    "source": "Where are its pairs? A file of pairs, a .toml of templates, or concept:NAME",
    "words": "Words of the behaviour, with commas between (for the scorer of texts)",
    "query": "Keywords to search its feature by",
    "format": "How is the model deployed? completion, ab or chat",
    "delta_ce": f"How much ΔCE may it cost, in nats? One of {', '.join(map(str, DELTAS))}",
    "margin": "How much worse, in nats a token, is still as good?",
}
"""What has to be known, and how it is asked."""
DEFAULTS = {"words": "", "format": "completion", "delta_ce": "0.25", "margin": "0.1"}


def answered(given: Mapping[str, str | None], ask: Callable[[str], str] | None) -> dict[str, str]:
    """An answer to each question: what was given, else what is asked for, else the default.

    ask: puts a question and returns the answer, "" for the default; None where nobody can be asked.

    Raises:
        ConfigError: the behaviour or its pairs are named by nobody.
    """
    found: dict[str, str] = {}
    for key, question in QUESTIONS.items():
        default = found["behaviour"] if key == "query" else DEFAULTS.get(key, "")
        value = given.get(key)
        if value is None and ask is not None:
            value = ask(f"{question}{f' [{default}]' if default else ''}: ").strip()
        found[key] = value or default
        if not found[key] and key in ("behaviour", "source"):
            raise ConfigError(f"a problem needs --{key}: {question[0].lower()}{question[1:]}")
    return found


def new(answers: Mapping[str, str]) -> Problem:
    """The problem that the answers describe, everything else as it usually is.

    Raises:
        ConfigError: an answer that makes no sense.
    """
    source, words = answers["source"], answers["words"].split(",")
    concept = template = pairs = ""
    if source.startswith("concept:"):
        concept = source.removeprefix("concept:").strip()
    elif Path(source).suffix.lower() == ".toml":
        template = source
    else:
        pairs = source
    behaviour = Behaviour(
        answers["behaviour"],
        query=answers["query"],
        words=tuple(word.strip() for word in words if word.strip()),
        pairs=pairs,
        template=template,
        concept=concept,
    )
    return Problem(
        behaviours=(behaviour,),
        affordances=Affordances(description=True),
        deployment=answers["format"],
        delta_ce=_number(answers, "delta_ce"),
        splits=Splits(),
        primary=Primary(
            ("sae-clamp vs mean-difference", "mean-difference vs random"),
            _number(answers, "margin"),
        ),
    )


def write(path: Path, problem: Problem) -> None:
    """Write a problem as TOML that `problem_file.read` reads.

    Raises:
        ConfigError: the file is there already.
    """
    if path.exists():
        raise ConfigError(f"{path} is there already; name a new file, or take that one away")
    with written_aside(path) as aside:
        aside.write_text(
            f"# What saesteer compare asks; [grid], [splits] and more can be changed here.\n"
            f"{tables.written(to_dict(problem))}",
            encoding="utf-8",
        )


def _number(answers: Mapping[str, str], key: str) -> float:
    try:
        return float(answers[key])
    except ValueError:
        raise ConfigError(f"--{key.replace('_', '-')} {answers[key]!r} is no number") from None
