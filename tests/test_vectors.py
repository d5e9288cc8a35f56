"""Every method on a run's own model: fitted, kept under a name, and used to steer."""

import json
import shutil

import pytest
import torch

from saesteer import vectors
from saesteer.cli.main import main
from saesteer.core.blocks import decoder_layers
from saesteer.core.generate import write
from saesteer.directions.methods import METHODS
from saesteer.directions.pairs import Pair, write_pairs
from saesteer.errors import ConfigError, RunError, SteeringError
from saesteer.run import Run
from saesteer.steering.engine import steer
from saesteer.world import corpus

PAIRS = tuple(Pair(**pair) for pair in corpus.pairs("sea", 32, seed=0))
# What makes the slow ones fast: the same work, less of it.
OPTIONS = {
    "melbo": {"n": 1, "steps": 3, "most_prompts": 2},
    "bias-only": {"steps": 3},
    "function-vector": {"heads": 2, "shots": 2, "trials": 2},
}
STEERING = [name for name, method in METHODS.items() if method.kind != "reader"]


@pytest.fixture(scope="module")
def run(small_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "run"
    shutil.copytree(small_run.path, path)
    return Run(path, Run.open(path).config, model_of=small_run)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_pairs(path, PAIRS)
    return path


def fitted(run, method, **changes):
    # Of one length: this tokenizer has no token for the space that fills up the shorter side.
    pairs = (Pair("", "The sailor", "The cook"),) if method == "act-add" else PAIRS
    how = {"name": method, "method": method, "options": OPTIONS.get(method)} | changes
    return vectors.fit(run, pairs, **how)


@pytest.mark.filterwarnings("ignore:1 contrast pair")
@pytest.mark.parametrize("method", STEERING)
def test_every_method_is_fitted_kept_and_steers(run, method):
    kept, *others = fitted(run, method)
    apart = method in ("pca-activations", "melbo")
    name = f"{method}-1" if apart else method
    assert kept.path == run.path / "steers" / f"{name}.safetensors"
    assert kept.parts and all(part.method == method for part in kept.parts)
    assert len(others) == (method == "pca-activations")
    edits = run.edits(vector={name: 1.0})
    prompt = PAIRS[0].prompt
    with steer(run.model, edits, tokenizer=run.tokenizer) as receipt:
        write(run.model, run.tokenizer, [prompt], max_new_tokens=4, temperature=0.0)
    assert sum(edit.n_edited for edit in receipt.edits) > 0
    assert max(edit.n_changed for edit in receipt.edits) > 0


def test_all_layers_are_fitted_on_one_reading(run, monkeypatch):
    n = len(decoder_layers(run.model))
    found = fitted(run, "lat", name="each", layers="all")
    assert [kept.name for kept in found] == [f"each-{i}" for i in range(n)]
    for kept in found:
        ((part,),) = (kept.parts,)
        (alone,) = fitted(run, "lat", name="one", layers=str(part.point))
        torch.testing.assert_close(alone.parts[0].vector, part.vector)


def test_a_kept_method_of_several_parts_is_no_single_direction(run):
    fitted(run, "iti", name="both", options={"heads": 2})
    with pytest.raises(SteeringError, match="no single direction"):
        run.load_vector("both")
    with pytest.raises(SteeringError, match="give a plain number"):
        run.edits(vector={"both": "0.5n"})
    with pytest.raises(RunError, match="is not a name"):
        fitted(run, "lat", name="../up")
    with pytest.raises(ConfigError, match="only reads"):
        fitted(run, "ccs")


def test_the_two_signs_of_a_component_are_two_directions(run):
    plus, minus = (kept.parts[0] for kept in fitted(run, "pca-activations", name="pc"))
    torch.testing.assert_close(plus.vector, -minus.vector)


def test_two_places_of_one_layer_are_kept_apart(run):
    found = fitted(run, "lat", name="two", layers="layers.1.resid_pre,layers.1.resid_post")
    names = ["two-layers-1-resid_pre", "two-layers-1-resid_post"]
    assert [kept.name for kept in found] == names
    pre, post = (run.load_vector(name) for name in names)
    assert (pre.point.site, post.point.site) == ("resid_pre", "resid_post")


def said(capsys, *arguments):
    code = main(["vector", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_methods_are_listed_with_their_papers(capsys):
    code, out, _ = said(capsys, "--list")
    assert code == 0
    for name, method in METHODS.items():
        assert f" {name} {method.line} {method.paper} " in f" {' '.join(out.split())} "
    assert all(len(line) <= 80 for line in out.splitlines())
    assert {one["name"] for one in json.loads(said(capsys, "--list", "--json")[1])} > set(METHODS)


def test_the_command_fits_by_any_method(capsys, run, file):
    code, out, _ = said(
        capsys, run.path, "--pairs", file, "--name", "cli", "--method", "lat", "--layer", "all"
    )
    assert code == 0 and out.count("AUROC") == len(decoder_layers(run.model))
    code, out, _ = said(
        capsys, run.path, "--pairs", file, "--name", "few", "--method", "iti",
        "--set", "heads=1", "--set", "direction=probe", "--json",
    )  # fmt: skip
    ((kept,), _) = (json.loads(out), code)
    assert [part["method"] for part in kept["parts"]] == ["iti"]
    code, out, _ = said(capsys, run.path, "--pairs", file, "--method", "ccs")
    assert code == 0 and "it reads, and steers nothing" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{run}", "--list says"),
        ("{run} --pairs {file}", "give the direction a name"),
        ("{run} --pairs {file} --name x --method latt", "no method 'latt' (did you mean 'lat'?)"),
        ("{run} --pairs {file} --name x --diagnose --noise .1", "of pairs as they are"),
        ("{run} --pairs {file} --name x --diagnose --method melbo", "fitted on activations"),
        ("{run} --pairs {file} --name x --set centred", "expected OPTION=VALUE"),
        ("{run} --pairs {file} --name x --set alpha=2", "no option 'alpha'"),
        ("{run} --pairs {file} --name x --method iti --set alpha=much", "a number, as 15.0"),
        ("{run} --pairs {file} --name x --layer layers.99.resid_post", "99"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(capsys, run, file, arguments, message):
    words = [word.format(run=run.path, file=file) for word in arguments.split()]
    code, _, err = said(capsys, *words)
    (line,) = [line for line in err.splitlines() if line.startswith("saesteer: ")]
    assert code == 2 and message in line
