"""saesteer compare: a problem from flags, a comparison, and what is refused with what to do."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from saesteer.cli.main import main
from saesteer.compare import contenders, problem_file, world
from saesteer.compare.problem import Affordances, Behaviour, Primary, Problem, Splits
from saesteer.compare.problem_file import to_dict
from saesteer.core import tables
from saesteer.run import Run


def run(capsys: Any, line: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    capsys.readouterr()
    code = main(shlex.split(line))
    out = capsys.readouterr()
    return code, out.out, out.err


SMALL = Problem(
    behaviours=(Behaviour("sea", concept="sea"),),
    affordances=Affordances(),
    deployment="completion",
    delta_ce=0.5,
    splits=Splits(most_validation=4, most_test=6, pairs=120),
    primary=Primary(("mean-difference vs random",), 0.1),
    n=(32,),
    headline_n=32,
    strengths=2,
    layers=("layers.1.resid_post",),
    arms=("mean-difference", "random"),
)


@pytest.fixture
def small_run(small_run, tmp_path):
    """A copy, since looks are counted in the run."""
    return Run.open(Path(shutil.copytree(small_run.path, tmp_path / "run")))


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(tables.written(to_dict(SMALL)), encoding="utf-8")
    return path


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Where the comparison goes; few draws, which the protocol's own tests count."""
    monkeypatch.setattr(contenders, "DRAWS", 2)
    monkeypatch.setattr(contenders, "CONTROL_DRAWS", 2)
    monkeypatch.setattr("saesteer.comparing._TEXTS", 4)
    monkeypatch.setattr("saesteer.compare.afterwards.PROMPTS", 2)
    monkeypatch.setattr("saesteer.compare.afterwards.NEW_TOKENS", 8)
    monkeypatch.setattr("saesteer.compare.writing.NEW_TOKENS", 8)
    return tmp_path / "out"


def test_a_comparison_says_its_verdict_and_goes_on_as_json(capsys, small_run, asked, out):
    line = f"compare {small_run.path} {asked} --out {out} --budget 2 --arms mean-difference,random"
    code, told, err = run(capsys, line)
    assert code == 0, err
    assert "The test split was looked at: 1×." in told
    assert "what may not be claimed" in told and f"The report is {out / 'report.html'}" in told
    assert {p.name for p in out.iterdir()} >= {
        "report.html", "report.json", "prompts.csv", "texts.jsonl", "problem.toml",
        "evaluations.jsonl", "config.json",
    }  # fmt: skip
    kept = (out / "evaluations.jsonl").read_bytes()
    code, told, err = run(capsys, f"{line} --resume --json")
    assert code == 0, err
    result = json.loads(told)
    assert result["looks_at_test"] == 1 and result["budget"] == 2
    assert [arm["arm"] for arm in result["behaviours"][0]["arms"]] == ["none", *SMALL.arms]
    assert (out / "evaluations.jsonl").read_bytes() == kept
    code, told, err = run(capsys, f"{line} --seed 3")
    assert code == 2 and not told and "another configuration" in err and "seed" in err
    # The same pairs in another folder are not a new test split.
    code, told, err = run(capsys, line.replace(f"--out {out}", f"--out {out}-other"))
    assert code == 0 and "The test split was looked at: 2×." in told, err


def test_a_problem_is_written_from_flags_and_read_back(capsys, tmp_path):
    path = tmp_path / "p.toml"
    code, told, err = run(
        capsys,
        f"compare --new {path} --behaviour sea --source concept:sea --words 'sea, ship' "
        "--query ocean --format ab --delta-ce 0.1 --margin 0.05",
    )
    assert code == 0, err
    assert f"saesteer compare RUN {path}" in told
    made = problem_file.read(path)
    (one,) = made.behaviours
    assert (one.concept, one.words, one.query) == ("sea", ("sea", "ship"), "ocean")
    assert (made.deployment, made.delta_ce, made.primary.margin) == ("ab", 0.1, 0.05)
    code, told, err = run(capsys, f"compare --new {path} --behaviour sea --source concept:sea")
    assert code == 2 and "there already" in err and problem_file.read(path) == made


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("compare", "name a run folder"),
        ("compare {run}", "--new problem.toml writes one"),
        ("compare {run} nothing.toml", "no configuration file nothing.toml"),
        ("compare {run} {asked} --n 8,x", "'x' is no whole number"),
        ("compare {run} {asked} --n 32,8", "ascending"),
        ("compare {run} {asked} --budget 0 --out {out}", "1 or more"),
        ("compare {run} {asked} --out {out} --arms mean-diference", "mean-difference"),
        ("compare {run} {asked} --out {out} --preset cas", "did you mean 'caa'"),
        ("compare {run} {asked} --out {out} --resume", "leave out --resume"),
        ("compare {run} {asked} --out {out} --judge-address http://x", "needs --judge-name"),
        ("compare --new {out}/p.toml --behaviour sea", "--source"),
        ("compare --new {out}/p.toml --behaviour sea --source no.jsonl", "no.jsonl: there is no"),
        ("compare --new {out}/p.toml --behaviour sea --source no.toml", "no.toml: there is no"),
        ("compare {run} {asked} --world", "takes no a problem"),
        ("compare {run} --world --out {out} --resume", "takes no --out, --resume"),
        ("compare {run} --world --preset caa --budget 4", "takes no --preset, --budget"),
    ],
)
def test_what_is_refused_says_what_to_do(capsys, small_run, asked, out, line, message):
    code, told, err = run(capsys, line.format(run=small_run.path, asked=asked, out=out))
    assert code == 2 and not told
    assert message in err and not out.exists()


def test_an_arm_that_there_is_not_leaves_no_folder_behind(capsys, small_run, asked, out):
    line = f"compare {small_run.path} {asked} --out {out} --budget 2 --arms"
    code, _, err = run(capsys, f"{line} mean-difference,sae-serch")
    assert code == 2 and "did you mean 'sae-search'" in err and ", sae-search" in err
    assert not out.exists()


def test_a_judge_without_an_address_is_asked_for(capsys, small_run, asked, out):
    values = to_dict(SMALL)
    values["scoring"]["scorers"].append("judge")
    asked.write_text(tables.written(values), encoding="utf-8")
    code, _, err = run(capsys, f"compare {small_run.path} {asked} --out {out}")
    assert code == 2 and "--judge-address" in err and not out.exists()


@pytest.mark.parametrize("block", ["behaviour", "affordances", "cost", "primary", "splits", "grid"])
def test_a_missing_block_is_refused_with_one_to_copy(capsys, small_run, asked, block):
    values = to_dict(SMALL)
    del values[block]
    asked.write_text(tables.written(values), encoding="utf-8")
    code, told, err = run(capsys, f"compare {small_run.path} {asked}")
    assert code == 2 and not told
    assert f"no block [{block}]" in err and f"{problem_file.EXAMPLES[block]}\n\n" in err
    # What is printed, copied to the file as it stands, is taken.
    with asked.open("a", encoding="utf-8") as file:
        file.write(err.partition("\n\n")[0])
    assert problem_file.read(asked)


def test_the_planted_language_is_scored_as_json(capsys, small_run, monkeypatch):
    found = {"arms": {}, "n_curve": [], "n_star": None, "flags": {}, "seconds": 1.0}
    given = {}

    def measure(*parts: Any, **how: Any) -> dict[str, Any]:
        given.update(parts=parts, how=how)
        return found

    monkeypatch.setattr(world, "measure", measure)
    code, told, err = run(
        capsys, f"compare {small_run.path} --world --json --arms sae-add,leace --n 1,8 --seed 3"
    )
    assert code == 0, err
    assert json.loads(told) == found
    assert given["how"] == {"seed": 3, "arms": ("sae-add", "leace"), "n": (1, 8)}
    opened = Run.open(small_run.path)
    assert given["parts"][2].hash == opened.sae.hash
    assert given["parts"][3].path == opened.index.path
