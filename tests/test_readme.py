"""Every code block of the README and docs/ and the examples in configs/ are executed.

Hub names are mapped to tiny local stand-ins of the same architecture: what can't be had offline is
the weights, not the path that loads them.
"""

import dataclasses
import inspect
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from saesteer import config
from saesteer.cli.compare import compare
from saesteer.cli.index import judge
from saesteer.cli.main import main
from saesteer.compare import failures, problem_file
from saesteer.compare.arms import ARMS
from saesteer.compare.presets import PRESETS
from saesteer.core import model as models
from saesteer.core import tables
from saesteer.features.query import parse
from saesteer.training.architectures import ARCHITECTURES
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TRAINING = (ROOT / "docs" / "training.md").read_text()
STEERING = (ROOT / "docs" / "steering.md").read_text()
FEATURES = (ROOT / "docs" / "features.md").read_text()
DIRECTIONS = (ROOT / "docs" / "directions.md").read_text()
COMPARISON = (ROOT / "docs" / "comparison.md").read_text()
WORDS = "the boy saw a ship at sea and the old dog heard rain in the house . "


def blocks(language, page=README):
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


def commands(block):
    lines = [line for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a stand-in for GPT-2 and for the text, where the README's names mean them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "my.txt").write_text("<|endoftext|>".join([WORDS * 3] * 200))
    (tmp_path / "prompts.txt").write_text("the boy saw\n")
    pair = {"prompt": "the boy", "chosen": "liked the calm sea", "rejected": "heard the storm"}
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({**pair, "prompt": f"word{i} boy"}) + "\n" for i in range(32))
    )
    hub = models._source

    def local(model_id):
        known = ("openai-community/gpt2", "path/or/hub-id", "path/or/id")
        return str(tmp_path / "gpt2") if model_id in known else hub(model_id)

    def in_layer_1(point):
        return re.sub(r"layers\.\d+", "layers.1", point)

    def small(path):
        """The same configuration, in a size for a test."""
        values = tomllib.loads(Path(path).read_text())
        values.setdefault("text", {})["source"] = str(tmp_path / "my.txt")
        values["cache"] |= {"tokens": 4000, "context_size": 32}
        values["cache"]["hook_point"] = in_layer_1(values["cache"]["hook_point"])
        values["sae"] |= {"d_sae": 64, "k": 8}
        if values["sae"].get("hook_point_out"):
            values["sae"]["hook_point_out"] = in_layer_1(values["sae"]["hook_point_out"])
        if values["sae"].get("widths"):
            values["sae"]["widths"] = [4, 16, 64]
        values.setdefault("rows", {})["buffer"] = 20
        values.setdefault("train", {}).update({"tokens": 20_000, "batch_size": 256})
        return tables.build(config.Config, values, str(path))

    monkeypatch.setattr(models, "_source", local)
    monkeypatch.setattr(config, "read", small)
    return tmp_path


def run_all(lines):
    for line in lines:
        if line[0] == "torchrun":  # tests/test_fitting.py starts two processes
            line = line[line.index("-m") + 1 :]
        assert line[0] == "saesteer"
        assert main(line[1:]) == 0, " ".join(line)


def test_the_first_screen_shows_two_commands_then_gpt2_in_shell_and_python():
    shell, gpt2, *_ = blocks("sh")
    assert [line[:2] for line in commands(shell)] == [["make", "demo"], ["make", "test"]]
    assert len(commands(gpt2)) == 6
    python = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(python) <= 10
    assert README.index(python[-1]) < README.index("## What is exact")


@pytest.mark.parametrize("target", ["demo", "test", "setup", "lint", "bench", "help"])
def test_make_has_the_targets(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_make_help_names_every_target():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert all(f"make {target}" in done.stdout for target in phony.group(1).split())


def test_gpt2_in_shell_then_in_python(workplace, capsys, monkeypatch):
    run_all(commands(blocks("sh")[1]))
    exec(compile(blocks("python")[0], "README.md", "exec"), {})
    assert "feature 12 set" in capsys.readouterr().out


def test_your_own_model_text_and_sae(workplace, capsys):
    (workplace / "my.toml").write_text(blocks("toml")[0])
    lines = commands(blocks("sh")[2])
    run_all(lines[:1])
    borrowed = workplace / "path" / "or" / "release" / "id"
    borrowed.parent.mkdir(parents=True)
    (workplace / "runs" / "mine" / "sae").rename(borrowed)
    run_all(lines[1:])
    assert len((workplace / "texts.jsonl").read_text().splitlines()) == 1


@pytest.fixture
def mine(workplace):
    """`my.toml`, the run that it makes, and its SAE as someone else's."""
    (workplace / "my.toml").write_text(blocks("toml")[0])
    run_all([["saesteer", "train", "my.toml"]])
    shutil.copytree(workplace / "runs/mine/sae", workplace / "path/or/release/id")
    return workplace


def test_training_in_other_ways(mine, capsys):
    run_all(commands(blocks("sh")[3]))
    assert len(json.loads((mine / "runs/sweep/sweep/sweep.json").read_text())) == 3
    assert not (mine / "runs/live/activations").exists()
    assert "nothing was uploaded" in capsys.readouterr().out


def test_the_table_of_architectures_is_what_there_is():
    rows = [line.split("|")[1:-1] for line in README.splitlines() if line.startswith("| `")]
    told = {row[0].strip(" `"): row[2].strip() for row in rows}
    assert told == {name: each.saved_as for name, each in ARCHITECTURES.items()}
    for row in rows:
        chooses = ARCHITECTURES[row[0].strip(" `")].chooses
        assert ("sae.k" if chooses else "sae.sparsity") in row[3]


def test_the_page_on_training(mine, capsys):
    for number, toml in enumerate(blocks("toml", TRAINING)):
        (mine / f"{number}.toml").write_text(toml)
        run_all([["saesteer", "train", f"{number}.toml"]])
    for block in blocks("sh", TRAINING):
        run_all(commands(block))
    assert json.loads((mine / "runs/transcoder/sae/cfg.json").read_text())["d_out"] == 32
    assert {p.suffix for p in (mine / "runs/mine/plots").iterdir()} == {".svg", ".png"}
    assert (mine / "runs/mine/hub/README.md").exists()
    assert (mine / "runs/gpt2-l6-sweep/sweep/topk-k32/features.sqlite").exists()


def test_the_page_on_steering(mine, capsys, monkeypatch):
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained",
        _here(AutoModelForCausalLM.from_pretrained, mine / "gpt2"),
    )  # fmt: skip
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", _here(AutoTokenizer.from_pretrained, mine / "gpt2")
    )
    names: dict[str, object] = {}
    torch.manual_seed(1)  # the page's directions are random: one, so that its condition holds
    for block in blocks("python", STEERING):
        code = re.sub(r"layers\.[46]", "layers.1", block)
        exec(compile(code, "docs/steering.md", "exec"), names)
    assert len(names["texts"]) == 5 and len(names["edits"]) == 2
    run_all([["saesteer", "index", "runs/mine"]])
    for block in blocks("sh", STEERING):
        run_all(commands(block))


def test_the_page_on_directions(mine, capsys):
    (template,) = blocks("toml", DIRECTIONS)
    (mine / "mood.toml").write_text(template)
    for block in blocks("sh", DIRECTIONS):
        run_all(commands(block))
    assert len((mine / "happy.jsonl").read_text().splitlines()) == 32
    out = capsys.readouterr().out
    assert "it reads, and steers nothing" in out and "calm-lat-0: lat of 32 pairs" in out
    names: dict[str, object] = {}
    (python,) = blocks("python", DIRECTIONS)
    exec(compile(python, "docs/directions.md", "exec"), names)


def _small_problem(toml):
    """A problem in a size for a test: few prompts, strengths, numbers of pairs and arms."""
    small = {
        "arms": '["mean-difference", "sae-clamp", "random"]', "most_test": 6, "most_validation": 4,
        "strengths": 2, "n": "[8, 32]", "headline_n": 32,
    }  # fmt: skip
    for key, value in small.items():
        toml, found = re.subn(rf"^{key} = .*$", f"{key} = {value}", toml, flags=re.MULTILINE)
        assert found == 1, key
    return toml


def test_comparing_on_the_first_page(mine, capsys):
    (mine / "pairs.jsonl").write_text(_many_pairs(90))
    new, line = commands(blocks("sh")[4])
    run_all([new])
    (mine / "calm.toml").write_text(_small_problem((mine / "calm.toml").read_text()))
    run_all([line])
    assert "<h1>Feature or vector" in (mine / "runs/mine/compare/calm/report.html").read_text()


def test_the_page_on_comparison(mine, capsys):
    (mine / "pairs.jsonl").write_text(_many_pairs(90))
    run_all([["saesteer", "index", "runs/mine"]])
    (new, first), *others = (commands(block) for block in blocks("sh", COMPARISON))
    run_all([new])
    assert problem_file.read("calm.toml").behaviours[0].words == ("calm", "quiet")
    (toml,) = blocks("toml", COMPARISON)
    (mine / "calm.toml").write_text(_small_problem(f"arms = []\n{toml}"))
    run_all([first, *(line for block in others for line in block)])
    out = mine / "runs/mine/compare/calm"
    told = re.findall(r"^\| ([^|]*\.[^|]*) \| ", COMPARISON, flags=re.MULTILINE)
    names = {name for cell in told for name in re.findall(r"`([a-z]+\.[a-z]+)`", cell)}
    assert names - {path.name for path in out.iterdir()} == {"judge.jsonl"}
    quick = json.loads((mine / "quick/report.json").read_text())
    assert quick["budget"] == 4 and quick["looks_at_test"] == 2
    arms = {arm["arm"] for arm in quick["behaviours"][0]["arms"]}
    # every feature of so small an SAE fires on more than 1% of the tokens
    missed = {one["what"] for one in quick["not_run"]}
    assert arms == {"none", "mean-difference", "random"} and "calm: sae-clamp n=32" in missed
    (python,) = blocks("python", COMPARISON)
    taken = dict(ARMS)
    try:
        exec(compile(python, "docs/comparison.md", "exec"), {})
    finally:
        ARMS.clear()
        ARMS.update(taken)
    assert re.search(r"^backwards -?\d", capsys.readouterr().out, flags=re.MULTILINE)


def test_the_page_on_comparison_names_what_there_is():
    known = {
        f"--{name.rstrip('_')}".replace("_", "-") for name in inspect.signature(compare).parameters
    }
    lines = re.findall(r"^    (saesteer compare .*)$", COMPARISON, flags=re.MULTILINE)
    named = set(
        re.findall(r"--[a-z][a-z-]+", " ".join([COMPARISON.partition("## What")[0], *lines]))
    )
    assert len(lines) == 3 and named <= known | {"--list"}
    told = re.findall(r"^\| `([a-z-]+)` \| ", COMPARISON, flags=re.MULTILINE)
    assert told == list(PRESETS)
    ready = {path.name for path in (ROOT / "configs/problems").glob("*.toml")}
    ready = {name for name in ready if not name.endswith(".templates.toml")}
    assert ready == set(re.findall(r"`([a-z-]+\.toml)` \(", COMPARISON))
    flags = set(re.findall(r"`([a-z -]+)`\n?\s*\(", COMPARISON.partition("planted failure")[2]))
    source = inspect.getsource(failures)
    assert len(flags) == 6 and all(f'"{flag}"' in source for flag in flags)


def _many_pairs(n):
    return "".join(
        json.dumps({
            "prompt": f"word{i} boy", "chosen": "liked the calm sea", "rejected": "heard the storm",
        }) + "\n"
        for i in range(n)
    )  # fmt: skip


def test_the_page_on_features(mine, capsys):
    (mine / "positive.txt").write_text("the calm sea\nthe boy saw a ship\n")
    (mine / "negative.txt").write_text("the old dog\nthe rain in the house\n")
    for block in blocks("sh", FEATURES):
        run_all(commands(block))
    names: dict[str, object] = {}
    (python,) = blocks("python", FEATURES)
    exec(compile(python, "docs/features.md", "exec"), names)
    assert names["alike"] and names["apart"] and names["near"] and names["tokens"]
    assert names["feature"].note.name == "old dogs"
    assert (mine / "gallery/index.html").exists() and (mine / "feature-12.html").exists()


def test_the_page_on_features_names_what_there_is():
    for line in re.findall(r"^    (saesteer judge .*)$", FEATURES, flags=re.MULTILINE):
        options = set(re.findall(r"--[a-z-]+", line))
        known = {f"--{name}".replace("_", "-") for name in inspect.signature(judge).parameters}
        assert options <= known
    for query in re.findall(r"^\| (.*?) \| ", FEATURES, flags=re.MULTILINE):
        for written in re.findall(r"`([^`]+)`", query):
            if not written.endswith(":"):
                assert not parse(written).note


def _here(real, folder):
    """`from_pretrained` that finds a Hub's model in a folder, and folders where they are."""
    return lambda name, **how: real(folder if name == "openai-community/gpt2" else name, **how)


def test_keys_that_pages_name_exist():
    tables = {f.name: f.type for f in dataclasses.fields(config.Config)}
    for page in (README, TRAINING):
        named = re.findall(r"`(model|text|cache|sae|rows|train|sweep)\.([a-z_]+)\b", page)
        assert len(named) > 4
        for table, key in named:
            assert key in {f.name for f in dataclasses.fields(tables[table])}, f"{table}.{key}"


def test_the_short_toml_is_a_whole_configuration(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(blocks("toml")[0])
    read = config.read(path)
    assert read.sae.k == 16 and read.model.id == "path/or/hub-id"


def test_steering_any_model_without_a_run(workplace, capsys, monkeypatch):
    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda _, **k: real(workplace / "gpt2", **k)
    )
    code = blocks("python")[1].replace("[464, 2933, 6807, 284]", "[4, 29, 68, 28]")
    code = code.replace("layers.6", "layers.1")
    exec(compile(code, "README.md", "exec"), {})
    assert "layers.1.resid_post" in capsys.readouterr().out
