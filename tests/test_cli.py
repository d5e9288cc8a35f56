"""The command line: every command, every help page, and one line for every mistake."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saesteer import config
from saesteer.cli.main import COMMANDS, main, usage
from saesteer.world import corpus

ROOT = Path(__file__).parents[1]
PROMPT = "Story A. Once there was a girl named"


def run(capsys, line):
    """Exit code, stdout and stderr of a command line."""
    capsys.readouterr()
    try:
        code = main(shlex.split(line))
    except SystemExit as left:  # tyro's own: --help and malformed options
        code = left.code
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def folder(small_run, tmp_path):
    """A copy of the small run that a test may change."""
    shutil.copytree(small_run.path, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_explains_each_option(capsys, command):
    code, out, _ = run(capsys, f"{command} --help")
    assert code == 0
    assert f"saesteer {command}" in out
    assert "--" in out


def test_usage_names_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and out.strip() == usage()
    assert all(f"  {name} " in out for name in COMMANDS)
    assert run(capsys, "--version")[1].startswith("saesteer 0.")


def test_train_then_eval_index_search_feature(capsys, small_config, tmp_path):
    made = tmp_path / "c.toml"
    config.write(made, small_config)
    line = f"train {made} --run {tmp_path / 'r'} --sae.d-sae 64 --train.tokens 20000"
    code, out, err = run(capsys, line)
    assert code == 0, err
    assert "64 features" in out
    assert json.loads((tmp_path / "r/sae/cfg.json").read_text())["d_sae"] == 64
    code, out, err = run(capsys, f"eval {tmp_path / 'r'}")
    assert code == 0 and "explained variance" in out, err
    code, out, _ = run(capsys, f"eval {tmp_path / 'r'} --json")
    assert json.loads(out)["l0"] > 0
    # What the SAE was trained on stays known: evaluation and publishing rest on it.
    before = config.read(tmp_path / "r/config.toml")
    assert run(capsys, f"cache {made} --run {tmp_path / 'r'} --cache.held-out 0.5")[0] == 0
    assert config.read(tmp_path / "r/config.toml") == before
    assert run(capsys, f"index {tmp_path / 'r'}")[0] == 0
    code, out, _ = run(capsys, f"search {tmp_path / 'r'} boat --limit 2")
    assert code == 0 and "feature" in out
    hits = json.loads(run(capsys, f"search {tmp_path / 'r'} boat --limit 2 --json")[1])
    assert len(hits) == 2
    code, out, _ = run(capsys, f"feature {tmp_path / 'r'} {hits[0]['id']}")
    assert code == 0 and "strongest examples" in out
    assert json.loads(run(capsys, f"feature {tmp_path / 'r'} 3 --json")[1])["id"] == 3
    separator = f"cache {made} --run {tmp_path / 's'} --document-separator XX"
    assert run(capsys, separator)[0] == 0
    assert config.read(tmp_path / "s/config.toml").text.document_separator == "XX"
    moved = shutil.move(tmp_path / "r", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "sae")
    assert run(capsys, f"train {moved}")[0] == 0
    assert (tmp_path / "moved/sae").exists() and not (tmp_path / "r").exists()
    moved = shutil.move(tmp_path / "moved", tmp_path / "r")
    # every command after train needs the run folder alone, train itself included
    assert run(capsys, f"train {tmp_path / 'r'}")[0] == 0


def test_steer_shows_baseline_and_steered(capsys, folder, tmp_path):
    code, out, err = run(capsys, f'steer {folder} --clamp 3=4x --add 5=1.5 --prompt "{PROMPT}"')
    assert code == 0, err
    assert out.startswith("baseline  Story A.") and "steered   Story A." in out
    assert "feature 3 set" in out


def test_steer_reads_prompts_and_writes_jsonl(capsys, folder, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text(f"{PROMPT}\n\nStory B.\n" * 2)
    line = f"steer {folder} --clamp 3=4x --prompts {prompts} --out {out} --max-new-tokens 5"
    assert run(capsys, f"{line} --batch-size 3")[0] == 0
    rows = [json.loads(text) for text in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [PROMPT, "Story B."] * 2
    assert all(row["baseline"].startswith(row["prompt"]) for row in rows)
    before = [(row["baseline"], row["steered"]) for row in rows]
    assert run(capsys, f"{line} --batch-size 1")[0] == 0
    rows = [json.loads(text) for text in out.read_text().splitlines()]
    assert [(row["baseline"], row["steered"]) for row in rows] == before
    jsonl = tmp_path / "prompts.jsonl"
    jsonl.write_text(json.dumps({"prompt": PROMPT}))
    code, stdout, _ = run(capsys, f"steer {folder} --add 3=1 --prompts {jsonl} --json")
    assert code == 0 and json.loads(stdout)["receipt"]["edits"]


def test_a_vector_from_pairs(capsys, folder, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = corpus.pairs("sea", 32, seed=0)
    pairs.write_text("\n".join(map(json.dumps, rows)))
    assert run(capsys, f"vector {folder} --pairs {pairs} --name sea")[0] == 0
    code, out, err = run(capsys, f'steer {folder} --vector sea=2 --prompt "{PROMPT}"')
    assert code == 0 and "steered" in out, err
    pairs.write_text("\n".join(map(json.dumps, rows[:5])))
    code, _, err = run(capsys, f"vector {folder} --pairs {pairs} --name few")
    assert code == 0 and "saesteer: warning: 5 " in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian x.toml", "no command 'trian' (did you mean 'train'?)"),
        ("train", "needs a TOML file"),
        ("train none.toml", "no configuration file none.toml"),
        ("search nowhere boat", "no run at nowhere"),
        ("steer {run} --prompt x", "nothing to steer with"),
        ("steer {run} --clamp 3=4x", "nothing to continue"),
        ("steer {run} --clamp 3 --prompt x", "'3' is not FEATURE=STRENGTH"),
        ("steer {run} --clamp three=4x --prompt x", "'three' is not a feature's number"),
        ("steer {run} --clamp 3=4x --clamp 3=5x --prompt x", "given twice"),
        ("steer {run} --clamp 999=4x --prompt x", "999"),
        ("steer {run} --clamp 3=nan --prompt x", "nan"),
        ("steer {run} --clamp 3=4y --prompt x", "4y"),
        ("steer {run} --vector sea=1 --prompt x", "no vector 'sea'"),
        ("steer {run} --clamp 3=4x --prompts none.txt", "no file of prompts"),
        ("steer {run} --clamp 3=4x --prompt x --max-new-tokens 9999", "do not fit"),
        ("steer {run} --clamp 3=4x --prompt x --device quantum", "quantum"),
        ("steer {run} --clamp 3=4x --prompt x --dtype float8", "float8"),
        ("feature {run} 4096", "4096"),
        ("vector {run} --pairs none.jsonl --name x", "none.jsonl"),
        ("eval {run} --text none.txt", "none.txt"),
        ("new {run} --sae x --model planted", "is a run already"),
        ("new {tmp}/new --sae nowhere --model planted", "nowhere"),
        ("new {tmp}/new --sae {run}/sae --model {tmp}/nowhere", "nowhere"),
        ("train {tmp}/bad.toml", "did you mean 'hook_point'"),
        ("train {tmp}/layer.toml", "layers.7"),
        ("train {tmp}/point.toml", "resid_pst"),
        ("train {tmp}/model.toml", "no-such-model"),
        ("train {tmp}/short.toml", "context"),
        ("train {tmp}/empty.toml", "empty.txt"),
        ("train {tmp}/readonly.toml", "cannot write"),
        ("steer {run} --clamp 3=1e39 --prompt x", "beyond what activations can hold"),
        ("steer {run} --clamp 3=1 --clamp 03=2 --prompt x", "given twice"),
        ("steer {run} --clamp 3=1 --prompt x --temperature nan", "temperature nan"),
        ("search {run}", "what is to be found?"),
        ("search {run} boat --like x", "what is to be found?"),
        ("search {run} --pos a.txt", "--pos and --neg go together"),
        ("search {run} --pos {tmp}/a.txt --neg {tmp}/a.txt", "a.txt"),
        ("search {run} --like x --sort effect", "orders what words find"),
        ("search {run} boat --limit 0", "--limit 0"),
        ('search {run} "boat density<many"', "many"),
        ("search {run} --near 4096", "4096"),
        ('read {run} ""', "without a token"),
        ("notes {run} --tag sea", "which feature?"),
        ("notes {run} 4096", "4096"),
        ("notes {run} 3 --star --unstar", "give one of them"),
        ("notes {run} --import {tmp}/none.json", "none.json"),
        ("index {run} --effects few", "--effects 'few'"),
        ("index {run} --top 0", "top is 0"),
        ("judge {run}", "who is to judge?"),
        ("judge {run} --address localhost --name x", "is no address"),
        ("judge {run} --address http://localhost:1", "give --name"),
        ("judge {run} --model planted --features some", "--features 'some'"),
        ("export {run} - --format neuronpedia", "name a folder"),
        ("export {run} {tmp}/x.csv --source 1-x", "go with --format neuronpedia"),
        ("import {run} {tmp}", "is a run already"),
        ("import {tmp}/new {tmp}/none", "none"),
        ("train {run} --train.batch-size 0", "train.batch_size is 0; expected at least 1"),
        ("train {run} --cache.held-out 1.5", "cache.held_out is 1.5"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys, small_run, small_config, tmp_path, line, message
):
    (tmp_path / "bad.toml").write_text("cache.hook_piont = 'x'")
    (tmp_path / "short.txt").write_text("Story A.")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "file").write_text("")
    text = f'[text]\nsource = "{small_config.text.source}"\n'
    point = '[cache]\nhook_point = "layers.1.resid_post"\ntokens = 1000\n'
    for name, body in {
        "layer": f'run = "{tmp_path}/a"\n{text}[cache]\nhook_point = "layers.7.resid_post"',
        "point": f'run = "{tmp_path}/b"\n{text}[cache]\nhook_point = "layers.1.resid_pst"',
        "model": f'run = "{tmp_path}/c"\nmodel.id = "no-such-model"\n{text}{point}',
        "short": f'run = "{tmp_path}/d"\n[text]\nsource = "{tmp_path}/short.txt"\n{point}',
        "empty": f'run = "{tmp_path}/e"\n[text]\nsource = "{tmp_path}/empty.txt"\n{point}',
        "readonly": f'run = "{tmp_path}/file/run"\n{text}{point}',
    }.items():
        (tmp_path / f"{name}.toml").write_text(body)
    code, out, err = run(capsys, line.format(run=small_run.path, tmp=tmp_path))
    said = [x for x in err.splitlines() if x.startswith("saesteer: ")]
    assert code == 2, err
    assert len(said) == 1 and message in said[0]
    assert "Traceback" not in err and not out


def test_a_failure_of_ours_is_one_line_and_exit_code_1(capsys, small_run, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("saesteer.run.Run.search", broken)
    code, _, err = run(capsys, f"search {small_run.path} boat")
    assert code == 1
    assert (
        err.strip()
        .splitlines()[-1]
        .startswith(
            "saesteer: a failure of ours: ZeroDivisionError: two lines; run it again with --debug"
        )
    )
    with pytest.raises(ZeroDivisionError):
        main(["search", str(small_run.path), "boat", "--debug"])


@pytest.mark.parametrize("wait", ["cache", "train"])
def test_ctrl_c_is_one_line_and_the_next_run_goes_on(small_config, tmp_path, wait):
    made = tmp_path / "c.toml"
    config.write(made, small_config)
    line = [sys.executable, "-m", "saesteer", "train", str(made), "--run", str(tmp_path / "r")]
    line += ["--train.tokens", "40000000", "--train.checkpoint-every", "20"]
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    wanted = {"cache": "activations/*", "train": "checkpoints/step-*/state.json"}[wait]
    deadline = time.monotonic() + 180
    while not any((tmp_path / "r").glob(wanted)) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 2, err
    assert b"Traceback" not in err
    assert b"saesteer: stopped; what was finished is kept" in err
    assert not (tmp_path / "r" / "sae").exists()
    done = subprocess.run(
        [*line[:-3], "60000"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    if wait == "train":  # checkpoints of a longer plan: refused by name, not taken for this one
        assert done.returncode == 2 and "steps" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
