"""saesteer eval and push: what they print, draw and leave behind."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from saesteer import config
from saesteer.cli.evaluate import evaluation_table, without_folders
from saesteer.cli.main import main
from saesteer.core.sae import load_sae


def run(capsys: Any, line: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    capsys.readouterr()
    code = main(shlex.split(line))
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture(scope="module")
def folder(small_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the small run, evaluated by the first test."""
    path = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(small_run.path, path, ignore=shutil.ignore_patterns("evaluation.json"))
    return path


def test_push_asks_for_an_evaluation(capsys: Any, folder: Path) -> None:
    code, out, err = run(capsys, f"push {folder} me/x --dry-run")
    assert code == 2 and not out
    assert "run `saesteer eval" in err and err.count("\n") == 1
    assert not (folder / "hub").exists()


def test_eval_prints_everything_within_80_columns(capsys: Any, folder: Path) -> None:
    code, out, err = run(capsys, f"eval {folder} --tokens 3000")
    assert code == 0, err
    assert max(map(len, out.splitlines()[1:-1])) <= 80  # the first and the last name the run
    for said in (
        "explained variance", "L0", "dead features", "CE recovered", "KL, nats a token",
        "random dictionary", "PCA", "planted concepts", "recovered", "distinct features",
        "absorption", "features by density", "nearest neighbour",
    ):  # fmt: skip
        assert said in out, said
    names = {"density.svg", "nearest-cosine.svg", "baselines.svg", "training.svg"}
    assert {p.name for p in (folder / "plots").iterdir()} == names
    figures = json.loads((folder / "evaluation.json").read_text())
    assert f"{figures['explained_variance']:.4f}" in out
    assert evaluation_table(figures) in out


def test_eval_as_json_prints_json_alone(capsys: Any, folder: Path) -> None:
    code, out, err = run(capsys, f"eval {folder} --json --tokens 1000 --plots none --seed 3")
    assert code == 0, err
    figures = json.loads(out)
    assert figures["baselines"].keys() == {"random", "pca"}
    assert figures["baselines"]["pca"]["fitted_on"] == "training tokens"
    assert figures["planted"]["concepts"] and "density" in figures
    assert json.loads((folder / "evaluation.json").read_text()) == figures


def test_eval_without_matplotlib_says_which_extra_and_goes_on(
    capsys: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run(capsys, f"eval {folder} --tokens 1000")
    assert code == 0 and "explained variance" in out
    assert "no plots" in err and "pip install 'saesteer[plots]'" in err


def test_figures_without_ablation_harm_or_neighbours_are_printed(folder: Path) -> None:
    figures = json.loads((folder / "evaluation.json").read_text())
    figures["ce_recovered"] = figures["baselines"]["pca"]["ce_recovered"] = None
    figures["nearest_cosine_histogram"] = None
    figures["planted"]["absorption"][0] |= {"rate": None}
    table = evaluation_table(figures)
    assert "does no harm" in table and "not measurable" in table
    assert "nearest" not in table


def test_push_dry_run_leaves_a_folder_that_loads(capsys: Any, folder: Path) -> None:
    code, out, err = run(capsys, f"push {folder} me/demo --dry-run --license mit")
    assert code == 0, err
    assert "nothing was uploaded" in out
    hub = folder / "hub"
    assert load_sae(hub).hash == load_sae(folder / "sae").hash
    readme = (hub / "README.md").read_text()
    figures = json.loads((folder / "evaluation.json").read_text())
    assert f"{figures['kl']:.4f}" in readme and "license: mit" in readme
    kept = config.read(hub / "config.toml")
    assert kept.train == config.read(folder / "config.toml").train
    assert str(folder.parent) not in (hub / "config.toml").read_text()
    assert kept.text.source == "stories.txt"


def test_push_uploads_that_folder(
    capsys: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []

    class Api:
        def create_repo(self, repo: str, **arguments: Any) -> None:
            sent.append(repo)

        def upload_folder(self, *, folder_path: str, **arguments: Any) -> None:
            sent.extend(sorted(p.name for p in Path(folder_path).iterdir()))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    code, out, err = run(capsys, f"push {folder} me/demo")
    assert code == 0, err
    assert out.strip() == "https://huggingface.co/me/demo"
    assert sent[0] == "me/demo"
    assert {"README.md", "cfg.json", "config.toml", "sae_weights.safetensors"} <= set(sent)


def test_without_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert without_folders(str(tmp_path / "a" / "b.txt")) == "b.txt"
    assert without_folders("./here") == "here"
    assert without_folders("openai-community/gpt2") == "openai-community/gpt2"
    assert without_folders("") == ""
