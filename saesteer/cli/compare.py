"""compare: does the feature beat the vector, at what cost, and how sure are we?"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from saesteer.errors import ConfigError
from saesteer.run import Run

if TYPE_CHECKING:
    from saesteer.compare.afterwards import Judge
    from saesteer.compare.problem import Problem


def compare(
    run: Annotated[Path | None, tyro.conf.Positional] = None,
    problem: Annotated[Path | None, tyro.conf.Positional] = None,
    *,
    out: Path | None = None,
    arms: str | None = None,
    n: str | None = None,
    budget: int | None = None,
    seed: int = 0,
    preset: str | None = None,
    resume: bool = False,
    world: bool = False,
    new: Path | None = None,
    behaviour: str | None = None,
    source: str | None = None,
    words: str | None = None,
    query: str | None = None,
    format: str | None = None,
    delta_ce: str | None = None,
    margin: str | None = None,
    judge_address: str | None = None,
    judge_name: str | None = None,
    key_variable: str = "SAESTEER_JUDGE_KEY",
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Compare every way to steer on a problem, on equal terms, and write a report.

    A first problem.toml: saesteer compare --new problem.toml --behaviour happy --source pairs.jsonl
    (what isn't given is asked). A comparison: saesteer compare RUN problem.toml; given again, it
    goes on where it stopped. The planted language, where the right answer is known: saesteer
    compare --world (on the run that saesteer demo leaves).

    Args:
        run: The run folder, with an SAE and an index where features are to take part.
        problem: A problem.toml; configs/problems/ holds some.
        out: The folder of the comparison; by default RUN/compare/NAME-OF-THE-PROBLEM. In another
            folder the same pairs are another look at the test split.
        arms: Only these, with commas between.
        n: Numbers of pairs of the curve, with commas between.
        budget: Validation evaluations of each arm, the same for all; by default 4 x strengths.
        seed: Of splits, draws, arms and intervals.
        preset: Tell a published protocol's figures too: caa, tan, pres, axbench or sae-ts.
        resume: Refuse to begin: only go on with what is in the folder.
        world: Score arms on the planted language, whose exact answer is known.
        new: Write a problem.toml, from the options below and from questions.
        behaviour: With --new, what the model should do more of, in a word.
        source: With --new, where its pairs are: a file, a .toml of templates, or concept:NAME.
        words: With --new, words of the behaviour, with commas between.
        query: With --new, keywords to search its feature by.
        format: With --new, how the model is deployed: completion, ab or chat.
        delta_ce: With --new, how many nats of cross-entropy on clean text it may cost.
        margin: With --new, how many nats a token worse is still as good.
        judge_address: An OpenAI-compatible address that scores texts as well.
        judge_name: What the model is called there.
        key_variable: Environment variable that holds the address's key, if it wants one.
        json_: Print JSON.
        device: Where the model runs.
        dtype: float32, bfloat16 or float16.
    """
    if new is not None:
        _new(
            new,
            {
                "behaviour": behaviour,
                "source": source,
                "words": words,
                "query": query,
                "format": format,
                "delta_ce": delta_ce,
                "margin": margin,
            },
        )
        return
    if world:
        _check_world(
            {
                "a problem": problem,
                "--out": out,
                "--resume": resume or None,
                "--preset": preset,
                "--budget": budget,
            }
        )
        planted = _demo(seed) if run is None else Run.open(run, device=device, dtype=dtype)
        _world(planted, _names(arms), _numbers(n), seed, json_)
        return
    if run is None:
        raise ConfigError(
            "name a run folder, and a problem.toml or --world; --new FILE writes a problem.toml"
        )
    opened = Run.open(run, device=device, dtype=dtype)
    from saesteer import comparing
    from saesteer.compare import problem_file as problems
    from saesteer.compare import report_view

    if problem is None:
        raise ConfigError(
            f"name a problem.toml: saesteer compare {run} problem.toml; --new problem.toml writes "
            "one, and configs/problems/ holds some"
        )
    try:
        asked = problems.read(problem)
    except ConfigError as error:
        # An error is told in one line, and an example to copy has several.
        said, _, example = str(error).partition("\n")
        if example:
            print(f"{example}\n", file=sys.stderr)
            said = f"{said.rstrip(':')} (it stands above)"
        raise ConfigError(said) from error
    changes: dict[str, Any] = {}
    if arms is not None:
        changes["arms"] = _names(arms)
    if n is not None:
        changes["n"] = _numbers(n)
    if preset is not None:
        changes["preset"] = preset
    asked = dataclasses.replace(asked, **changes)
    folder = out or run / "compare" / problem.stem
    if resume and not (folder / "evaluations.jsonl").exists():
        raise ConfigError(f"{folder} holds no comparison to go on with; leave out --resume")
    result = comparing.compare(
        opened,
        asked,
        folder,
        seed=seed,
        budget=budget,
        judge=_judge(asked, folder, judge_address, judge_name, key_variable),
    )
    if json_:
        print(json.dumps(result))
        return
    print(report_view.shown(result, colour=sys.stdout.isatty()))
    print(f"\nThe test split was looked at: {result['looks_at_test']}×.")
    print(f"The report is {folder / 'report.html'}; all figures are beside it.")


def _new(path: Path, given: dict[str, str | None]) -> None:
    from saesteer.compare import problem_new

    ask: Callable[[str], str] | None = input if sys.stdin.isatty() else None
    made = problem_new.new(problem_new.answered(given, ask))
    for one in made.behaviours:
        source = one.pairs or one.template
        # As the problem will be read: beside it, or from here.
        if source and not (path.parent / source).exists() and not Path(source).exists():
            raise ConfigError(
                f"--source {source}: there is no such file; name a file of pairs, a .toml of "
                "templates, or concept:NAME of the planted language"
            )
    problem_new.write(path, made)
    print(f"{path} is written; look it over, then: saesteer compare RUN {path}")


def _check_world(given: dict[str, object]) -> None:
    """Refuse what the planted language's scores don't take: ConfigError."""
    told = [what for what, value in given.items() if value is not None]
    if told:
        raise ConfigError(
            f"--world takes no {', '.join(told)}: its problem is the planted language, and it "
            "writes no folder; leave out --world to compare on a problem"
        )


def _demo(seed: int) -> Run:
    """The demo's run, made where it isn't there yet."""
    from saesteer.cli.demo import make

    folder = Path("runs/demo")
    if (folder / "features.sqlite").exists():
        return Run.open(folder)
    return make(folder, seed)[0]


def _world(run: Run, arms: tuple[str, ...], n: tuple[int, ...], seed: int, as_json: bool) -> None:
    from saesteer.compare import world, world_view

    chosen: dict[str, Any] = {"seed": seed}
    if arms:
        chosen["arms"] = arms
    if n:
        chosen["n"] = n
    found = world.measure(run.model, run.tokenizer, run.sae, run.index, **chosen)
    print(json.dumps(found) if as_json else world_view.shown(found))


def _judge(
    problem: "Problem",
    folder: Path,
    address: str | None,
    name: str | None,
    key_variable: str,
) -> "Judge | None":
    if address is None:
        if "judge" in problem.scorers:
            raise ConfigError(
                "[scoring] scorers holds a judge; say which with --judge-address and --judge-name"
            )
        return None
    if name is None:
        raise ConfigError("--judge-address needs --judge-name, the model's name there")
    from saesteer.compare.afterwards import Judge
    from saesteer.core.writers import address_writer

    write = address_writer(address, name, key=os.environ.get(key_variable), temperature=0.0)
    return Judge(write, name, folder / "judge.jsonl")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _numbers(text: str | None) -> tuple[int, ...]:
    found = []
    for part in _names(text):
        if not part.isdecimal():
            raise ConfigError(f"--n {text}: {part!r} is no whole number; write 32,128,256")
        found.append(int(part))
    return tuple(found)
