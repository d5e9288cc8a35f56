"""`saesteer steer --vector` edits the tokens that a method is for, as Python does."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from saesteer import vectors
from saesteer.cli.steer_options import Given, Scoped
from saesteer.directions.pairs import Pair
from saesteer.errors import SteeringError
from saesteer.run import Run
from saesteer.steering.bake import bake
from saesteer.steering.positions import Positions
from tests.command import rows, run
from tests.some_pairs import planted_pairs

PAIRS = planted_pairs("sea", 32)
PROMPT = "Story A. The boy named Max"


@pytest.fixture(scope="module")
def folder(small_run, tmp_path_factory):
    """A run that keeps directions with positions of their own, and one for all plain tokens."""
    path = tmp_path_factory.mktemp("positions") / "run"
    shutil.copytree(small_run.path, path)
    own = Run(path, Run.open(path).config, model_of=small_run)
    vectors.fit(
        own, (Pair("", "The sailor saw", "The cook heard"),), name="by-token", method="act-add"
    )
    vectors.fit(own, PAIRS, name="out", method="ablate")
    vectors.fit(own, PAIRS, name="sea")
    return path


def python_edits(folder, row, **given):
    """The receipt's edits of the same texts, steered in Python."""
    own = Run.open(folder)
    with own.steer(**given) as receipt:
        text = own.generate(PROMPT, max_new_tokens=6, temperature=0.0)
    assert text == row["steered"]
    return receipt.to_dict()["edits"]


@pytest.mark.parametrize("name", ["by-token", "out", "sea"])
def test_the_command_edits_the_tokens_that_python_edits(capsys, folder, name):
    line = f'steer {folder} --vector {name}=1 --prompt "{PROMPT}" --max-new-tokens 6'
    (row,) = rows(capsys, f"{line} --temperature 0")
    ours, theirs = row["receipt"]["edits"], python_edits(folder, row, vector={name: 1.0})
    assert [one["edit"] for one in ours] == [one["edit"] for one in theirs]
    positions = [one["positions"] for one in ours]
    assert positions == [one["positions"] for one in theirs]
    rows_of_each = [places for (prompt,) in positions for places in prompt]
    if name == "by-token":  # after BOS and "The", one place each, and no generated token
        assert rows_of_each == [[2], [3]]
    else:  # from BOS on, or after it, up to the last token that passes through the model
        first = 0 if name == "out" else 1
        assert all(places == list(range(first, places[-1] + 1)) for places in rows_of_each)
        assert all(places[-1] > len(PROMPT.split()) for places in rows_of_each)
    assert row["steered"] != row["baseline"] or name != "sea"


def test_an_ablation_is_that_of_the_weights(folder, tmp_path):
    own = Run.open(folder)
    edits = Scoped().applied(Given(vector=("out=1",)).edits(own), own)
    assert all(edit.where == Positions(special=True) for edit in edits)
    ids = torch.tensor([own.tokenizer(PROMPT)["input_ids"]])
    with own.steer(edits=edits):
        steered = own.model(ids).logits
    bake(own.model, own.edits(vector={"out": 1.0}), tmp_path / "ablated")
    ablated = AutoModelForCausalLM.from_pretrained(tmp_path / "ablated")
    torch.testing.assert_close(steered, ablated(ids).logits, atol=1e-3, rtol=1e-3)
    assert float((steered - own.model(ids).logits).abs().max()) > 0.1


def test_what_is_given_besides_positions_leaves_them(folder):
    own = Run.open(folder)
    given = Given(vector=("by-token=1", "sea=1"))
    plain = given.edits(own)
    edits = Scoped(condition="3>0.5", fade="decay:5", keep_norm=True).applied(plain, own)
    assert [edit.where for edit in edits] == [edit.where for edit in plain]
    assert all(edit.when is not None and edit.schedule and edit.keep_norm for edit in edits)
    (sea,) = Scoped("prompt", last=2).applied(Given(vector=("sea=1",)).edits(own), own)
    assert sea.where == Positions(generated=False, last=2)


@pytest.mark.parametrize("where", ["--where prompt", "--last 2", "--special", "--every 2"])
@pytest.mark.parametrize("name", ["by-token", "out"])
def test_positions_of_two_minds_are_refused(capsys, folder, name, where):
    line = f'steer {folder} --vector sea=1 --vector {name}=1 --prompt "{PROMPT}" {where}'
    _, err = run(capsys, line, code=2)
    named = "act-add" if name == "by-token" else "ablate"
    assert "brings its own positions" in err and named in err and "leave out --where" in err


def test_in_python_it_is_an_error_of_steering(folder):
    own = Run.open(folder)
    with pytest.raises(SteeringError, match="brings its own positions"):
        Scoped(first=1).applied(own.edits(vector={"out": 1.0}), own)
