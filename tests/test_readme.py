"""Every code block of the README and the examples in configs/ are executed.

Hub names are mapped to tiny local stand-ins of the same architecture: what can't be had offline is
the weights, not the path that loads them.
"""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from saesteer import config
from saesteer.cli.main import main
from saesteer.core import model as models
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
WORDS = "the boy saw a ship at sea and the old dog heard rain in the house . "


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


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

    def small(path):
        """The same configuration, in a size for a test."""
        values = tomllib.loads(Path(path).read_text())
        values.setdefault("text", {})["source"] = str(tmp_path / "my.txt")
        values["cache"] |= {"tokens": 4000, "context_size": 32}
        values["cache"]["hook_point"] = "layers.1.resid_post"
        values["sae"] |= {"d_sae": 64, "k": 8}
        values.setdefault("train", {}).update({"tokens": 20_000, "batch_size": 256})
        return config._build(config.Config, values, str(path))

    monkeypatch.setattr(models, "_source", local)
    monkeypatch.setattr(config, "read", small)
    return tmp_path


def run_all(lines):
    for line in lines:
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
