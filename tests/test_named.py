"""Edits by name: directions projected out and turned, files of other programs, receipts."""

import shutil
from dataclasses import replace

import pytest
import torch

from saesteer.core.model import HookPoint, fingerprint
from saesteer.directions import Direction
from saesteer.errors import RunError, SteeringError
from saesteer.run import Run
from saesteer.steering import exchange
from saesteer.steering.artifact import save_edits
from tests.command import as_terminal, rows, run
from tests.tiny import tiny_model

PROMPT = "Story A. The boy named Max"


@pytest.fixture
def directed(small_run, tmp_path):
    """A copy of the small run with two vectors, `far` of another place and another model."""
    folder = tmp_path / "run"
    shutil.copytree(small_run.path, folder, ignore=shutil.ignore_patterns("activations", "check*"))
    ours, vector = fingerprint(small_run.model), small_run.sae.direction(7)
    for name, point, model in (
        ("sea", "layers.1.resid_post", ours), ("far", "layers.0.resid_post", "another"),
    ):  # fmt: skip
        Direction(vector, HookPoint.parse(point), "mean-difference", 32, "answer-mean", model).save(
            folder / "steers" / f"{name}.safetensors"
        )
    return folder


def test_directions_are_projected_out_and_turned(capsys, directed, small_run):
    line = f'steer {directed} --prompt "{PROMPT}" --max-new-tokens 8 --seed 5'
    given = {"project": {3: 0, "sea": 2.5}, "rotate": {(3, "sea"): "30deg"}}
    with small_run.steer(edits=Run.open(directed).edits(**given)) as receipt:
        text = small_run.generate(PROMPT, max_new_tokens=8, seed=5)
    found = rows(capsys, f"{line} --project 3=0 --project sea=2.5 --rotate 3,sea=30deg")[0]
    assert found["steered"] == text and found["reading"] == "feature 3"
    assert found["receipt"] == receipt.to_dict()
    out, sea, turned = found["receipt"]["edits"]
    assert out["after_mean"] == pytest.approx(0, abs=1e-5) and out["before_mean"] != 0
    assert sea["after_mean"] == pytest.approx(2.5, rel=1e-5)
    assert turned["relative_size"] > 0 and "rotate by 0.52" in turned["edit"]
    by_file = rows(capsys, f"{line} --project {directed}/steers/sea.safetensors=25")[0]
    assert by_file == rows(capsys, f"{line} --project sea=25")[0]
    assert by_file["reading"] == "projection" and by_file["steered"] != by_file["baseline"]
    means = {"chosen_mean": 25.0, "rejected_mean": -1.0}
    kept = Direction.load(directed / "steers" / "sea.safetensors")
    replace(kept, provenance=means).save(directed / "steers" / "near.safetensors")
    to_class = rows(capsys, f"{line} --project near=chosen")[0]
    assert to_class["steered"] == by_file["steered"]
    swept = rows(capsys, f"{line} --project sea=1 --rotate 3,sea=0.2 --sweep 1,2")[0]
    edits = [edit["edit"] for edit in swept["receipt"]["edits"]]
    assert ["to 2 at" in edits[2], "by 0.4 rad" in edits[3]] == [True, True]
    run(capsys, f"{line} --rotate 3,sea=to1.5 --project 5=0 --keep-norm --save turned")
    kept = rows(capsys, f"{line} --load turned")[0]["receipt"]["edits"]
    assert kept[0]["edit"].startswith("projection on feature 5 to 0 at")
    assert kept[1]["edit"].startswith("rotate to 1.5")


def test_edits_of_other_programs_are_used_as_they_are(capsys, directed, small_run, tmp_path):
    edit = small_run.edits(add={7: 3.0})
    exchange.to_gguf(tmp_path / "sea.gguf", edit, 4, with_special=True)
    exchange.to_lm_eval(tmp_path / "sea.pt", edit, small_run.model, with_special=True)
    line = f'steer {directed} --prompt "{PROMPT}" --max-new-tokens 8'
    ours = rows(capsys, f"{line} --add 7=3 --special")[0]
    for name in ("sea.gguf", "sea.pt"):
        theirs = rows(capsys, f"{line} --load {tmp_path / name}")[0]
        assert theirs["steered"] == ours["steered"] != ours["baseline"]
        positions = [one["receipt"]["edits"][0]["positions"] for one in (theirs, ours)]
        assert positions[0] == positions[1] and positions[0][0][0][0] == 0
    swept = rows(capsys, f"{line} --load {tmp_path / 'sea.gguf'} --sweep 1,2")[0]
    assert swept["sweep"][1]["text"] == ours["steered"] != swept["sweep"][2]["text"]


def test_what_was_made_for_other_weights_is_used_only_by_force(capsys, directed, small_run):
    line = f'steer {directed} --prompt "{PROMPT}" --max-new-tokens 2'
    save_edits(
        directed / "steers" / "odd.steer.safetensors", small_run.edits(add={7: 1}), tiny_model()
    )
    for edit, message in (("--vector far=1", "on another model"), ("--load odd", "was made for")):
        _, err = run(capsys, f"{line} {edit}", code=2)
        assert message in err and err.count("saesteer: ") == 1
        run(capsys, f"{line} {edit} --force")
    _, err = run(capsys, f"{line} --rotate 3,far=1 --force", code=2)
    assert "feature 3 is at layers.1.resid_post and far at layers.0.resid_post" in err


def test_a_receipt_fits_eighty_columns_and_a_narrow_terminal(capsys, directed, monkeypatch):
    line = f'steer {directed} --clamp 3=1234.5 --project 5=0 --rotate 3,sea=1 --prompt "{PROMPT}"'
    line += " --max-new-tokens 5"
    out, _ = run(capsys, f"{line.replace('5=0', '5=-12345.6')} --sweep 1,2")
    table = out[out.index("edit  ") :].rstrip().splitlines()
    assert max(map(len, table)) <= 80 and "  layers.1.resid_post" in table
    ends = {len(text) for text in table if not text.startswith("  ")}
    assert len(ends) == 1 and len(table) > 7
    joined = " ".join(out.split())
    assert "feature 3 set 2469 at" in joined and "row 2: projection on feature 5 to" in joined
    for columns in (60, 120):
        as_terminal(monkeypatch, columns)
        out, _ = run(capsys, f"{line} --seed 1 --seed 2")
        receipt = out[out.index("edit  ") :].rstrip().splitlines()
        assert max(map(len, receipt)) <= columns
        assert (len(receipt) == 4) == (columns == 120)


def test_directions_are_features_vectors_and_their_files(directed):
    own = Run.open(directed)
    row, point = own.sae.direction(4), own.hook_point
    with pytest.raises(SteeringError, match="fitted on another model"):
        own.edits(project={"far": 0})
    project, rotate = own.edits(
        project={4: 1.5}, rotate={(4, str(own.vector_path("sea"))): "to90deg"}
    )
    assert (project.to, project.point) == (1.5, point) and torch.equal(project.vector, row)
    assert rotate.angle == pytest.approx(torch.pi / 2) and rotate.how == "to"
    assert torch.equal(rotate.first, row) and torch.equal(rotate.second, own.sae.direction(7))
    (radians,) = own.edits(rotate={(4, 9): -0.25})
    assert (radians.angle, radians.how) == (-0.25, "by")
    ids = torch.tensor([own.tokenizer(PROMPT)["input_ids"]])
    with own.steer(project={4: 0}, rotate={(4, 9): "10deg"}) as receipt:
        own.model(ids)
    assert [edit.n_changed > 0 for edit in receipt.edits] == [True, True]
    assert receipt.edits[0].after_mean == pytest.approx(0, abs=1e-4)
    for given, message in (
        ({"project": {4: None}}, "None is no projection on feature 4"),
        ({"rotate": {4: 1.0}}, "rotate=4: a plane is two directions"),
        ({"rotate": {(4, "sea"): "east"}}, "'east' is no angle from feature 4 to sea"),
    ):
        with pytest.raises(SteeringError, match=message):
            own.edits(**given)
    # A vector is not what is loaded as edits.
    with pytest.raises(RunError, match="sea is a vector: --vector sea=1"):
        own.load_edits("sea")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--project 3", "is not DIRECTION=NUMBER"),
        ("--project 3=8x", "'8x' is no projection on feature 3"),
        ("--project 3=0 --sweep 1,2", "has no strength to multiply"),
        ("--project 999=0", "999"),
        ("--project see=0", "has no vector 'see'; it has far, sea; fit"),
        ("--project a/see=0", "no vector 'a/see'; give a name"),
        ("--vector see.safetensors=2", "no vector 'see.safetensors'"),
        ("--rotate 3=1", "a plane is two directions"),
        ("--rotate 3,4,5=1", "a plane is two directions"),
        ("--rotate 3,4=1turn", "'1turn' is no angle from feature 3 to feature 4"),
        ("--rotate 3,4=1.2.3deg", "is no angle"),
        ("--rotate 3,3=1", "parallel"),
        ("--load {run}/features.sqlite", "damaged"),
    ],
)
def test_a_mistake_is_one_line(capsys, directed, options, message):
    out, err = run(capsys, f"steer {directed} --prompt x {options.format(run=directed)}", code=2)
    said = [x for x in err.splitlines() if x.startswith("saesteer: ")]
    assert len(said) == 1 and message in said[0] and not out
