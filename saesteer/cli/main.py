"""`saesteer COMMAND …`: find the command, run it, and turn an error into one line."""

import dataclasses
import importlib
import itertools
import keyword
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from saesteer import __version__
from saesteer.errors import ConfigError, SaesteerError, did_you_mean

# Command → (module, what it does). The module has a function of the command's name (with _ after it
# where Python keeps the name), whose parameters are the command's arguments and options.
COMMANDS = {
    "demo": ("saesteer.cli.demo", "the whole job on the embedded model, offline"),
    "cache": ("saesteer.cli.train", "cache the activations a configuration asks for"),
    "train": ("saesteer.cli.train", "cache what is missing, then train an SAE"),
    "sweep": ("saesteer.cli.train", "train many SAEs on one pass, and compare them"),
    "new": ("saesteer.cli.train", "make a run from an SAE that someone else trained"),
    "eval": ("saesteer.cli.evaluate", "measure the SAE on held-out text, and plot it"),
    "push": ("saesteer.cli.evaluate", "publish a measured SAE on the Hub, with a model card"),
    "index": ("saesteer.cli.index", "describe every feature"),
    "search": ("saesteer.cli.search", "find features by keyword, example, contrast or effect"),
    "feature": ("saesteer.cli.feature", "show one feature, in the terminal or as a page"),
    "read": ("saesteer.cli.read", "show which features fire on a text"),
    "notes": ("saesteer.cli.notes", "name, tag and star features"),
    "judge": ("saesteer.cli.index", "have features labelled by a language model"),
    "export": ("saesteer.cli.exchange", "write an index as CSV or for Neuronpedia"),
    "import": ("saesteer.cli.exchange", "look at a Neuronpedia export"),
    "pairs": ("saesteer.cli.pairs", "make contrast pairs, or check a file of them"),
    "vector": ("saesteer.cli.vector", "make any way to steer from contrast pairs"),
    "directions": ("saesteer.cli.directions", "what directions are kept, and do; sums of them"),
    "steer": (
        "saesteer.cli.steer",
        "generate with features clamped, directions added, projected, turned",
    ),
    "attribute": ("saesteer.cli.attribute", "which parts and features matter for a contrast"),
    "compare": ("saesteer.cli.compare", "every way to steer on equal terms, with a report"),
    "dose": ("saesteer.cli.dose", "what each strength does and costs, and where a model breaks"),
}

# These take a Config, whose defaults stand in the file or run folder that is named first.
FROM_FILE = ("cache", "train", "sweep")
ALIASES = {"--document-separator": "--text.document-separator"}
# These take words, which may begin with a dash ("-is:dead dog"); of their options these stand
# without a value.
WITH_WORDS, FLAGS = ("search", "read"), ("--json", "--no-json")


def usage() -> str:
    """What `saesteer --help` prints."""
    lines = [
        "saesteer: train sparse autoencoders, find their features, steer with them.",
        "",
        "usage: saesteer COMMAND [--help] [--debug] …",
        "",
    ]
    lines += [f"  {name:<12}{what}" for name, (_, what) in COMMANDS.items()]
    lines += ["", "Start with: saesteer demo"]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run one command line; return its exit code (0 done, 2 yours to mend, 1 ours)."""
    rest = [a for a in arguments if a != "--debug"]
    debug = len(rest) < len(arguments)
    if not rest or rest[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if rest[0] == "--version":
        print(f"saesteer {__version__}")
        return 0
    name, *rest = rest
    if name not in COMMANDS:
        _say(f"no command {name!r}{did_you_mean(name, COMMANDS)}; saesteer --help lists them")
        return 2
    if debug:
        call(name, rest)
        return 0
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with warnings.catch_warnings():
            # Ours are UserWarnings; those that libraries give their developers are not for users.
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _one_line_warning
            call(name, rest)
    except SaesteerError as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        _say("stopped; what was finished is kept, and the same command goes on from there")
        return 2
    except BrokenPipeError:  # `saesteer … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        _say(
            f"a failure of ours: {type(error).__name__}: {' '.join(str(error).split())}; "
            "run it again with --debug and report what it prints"
        )
        return 1
    return 0


def call(name: str, arguments: Sequence[str]) -> None:
    """Parse one command's arguments and call it; `--help` and bad arguments exit, as tyro does."""
    import tyro

    function = f"{name}_" if keyword.iskeyword(name) else name
    command = getattr(importlib.import_module(COMMANDS[name][0]), function)
    prog = f"saesteer {name}"
    if name in WITH_WORDS:
        arguments = _words_last(arguments)
    if name not in FROM_FILE:
        tyro.cli(command, args=arguments, prog=prog)
        return
    from saesteer import config

    default, prog = config.Config(), f"{prog} FILE"
    if arguments and not arguments[0].startswith("-"):
        path = Path(arguments[0])
        default = config.read(path / "config.toml" if path.is_dir() else path)
        if path.is_dir():  # a run that was moved, or is reached from another folder
            default = dataclasses.replace(default, run=str(path))
        arguments = arguments[1:]
    elif not {"-h", "--help"} & set(arguments):
        raise ConfigError(f"saesteer {name} needs a TOML file or a run folder; see configs/")
    arguments = [ALIASES.get(argument, argument) for argument in arguments]
    command(
        tyro.cli(
            config.Config, default=default, args=arguments, prog=prog, description=command.__doc__
        )
    )


def _words_last(arguments: Sequence[str]) -> Sequence[str]:
    """Words that begin with a dash behind a --, where they aren't taken for options."""
    if "--" in arguments:
        return arguments
    rest: list[str] = []
    words: list[str] = []
    for before, argument in itertools.pairwise(["", *arguments]):
        dashed = argument[:1] == "-" and argument[1:2] not in ("", "-") and argument != "-h"
        value = before.startswith("--") and before not in FLAGS and "=" not in before
        (words if dashed and not value else rest).append(argument)
    return [*rest, "--", *words] if words else arguments


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def _say(message: str) -> None:
    print(f"saesteer: {' '.join(message.split())}", file=sys.stderr)


def _one_line_warning(message: Warning | str, *_: object, **__: object) -> None:
    _say(f"warning: {message}")
