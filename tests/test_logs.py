"""training/logs.py: what TensorBoard and W&B hold afterwards, read back."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from saesteer.errors import ConfigError
from saesteer.training.logs import open_logs

SETTINGS = {"architecture": "topk", "k": 8, "lr": 1e-3}


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, round(event.value, 5)) for event in events.Scalars(name)]


def test_no_log_is_a_log(tmp_path: Path) -> None:
    with open_logs([], tmp_path, SETTINGS) as log:
        log(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_tensorboard_holds_the_figures_and_the_settings(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with open_logs(["tensorboard"], tmp_path, SETTINGS) as log:
        for step in (10, 20):
            log(step, {"loss": 1 / step, "l0": 8.0})
    assert scalars(tmp_path, "loss") == [(10, 0.1), (20, 0.05)]
    assert scalars(tmp_path, "l0") == [(10, 8.0), (20, 8.0)]
    written = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
    assert b"| architecture | topk |" in written


def test_a_killed_run_goes_on_in_tensorboard_where_its_checkpoint_stood(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with open_logs(["tensorboard"], tmp_path, SETTINGS) as log:
        for step in (10, 20, 30):
            log(step, {"loss": 1.0})
    with open_logs(["tensorboard"], tmp_path, SETTINGS, start=20) as log:
        for step in (30, 40):
            log(step, {"loss": 2.0})
    assert scalars(tmp_path, "loss") == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]


class FakeRun:
    """What `wandb.init` gives, for a service that can't be reached here."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.exit_code: int | None = None

    def log(self, figures: dict[str, float], step: int) -> None:
        self.lines.append((step, figures))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    wandb = pytest.importorskip("wandb")
    made: list[FakeRun] = []

    def init(**arguments: Any) -> FakeRun:
        made.append(FakeRun(**arguments))
        return made[-1]

    monkeypatch.setattr(wandb, "init", init)
    return made


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, runs: list[FakeRun]) -> None:
    with open_logs(["wandb"], tmp_path / "demo", SETTINGS) as log:
        log(10, {"loss": 1.0})
    with open_logs(["wandb"], tmp_path / "demo", SETTINGS, start=10) as log:
        log(20, {"loss": 0.5})
    with open_logs(["wandb"], tmp_path / "demo", SETTINGS) as log:
        log(10, {"loss": 2.0})
    first, second, anew = runs
    assert first.arguments["id"] == second.arguments["id"] != anew.arguments["id"]
    assert first.arguments["resume"] == "allow"
    assert first.arguments["config"] == SETTINGS
    assert first.arguments["name"] == "demo"
    assert (first.lines, second.lines) == ([(10, {"loss": 1.0})], [(20, {"loss": 0.5})])
    assert first.exit_code == second.exit_code == 0


def test_a_run_that_fails_is_shown_as_failed(tmp_path: Path, runs: list[FakeRun]) -> None:
    with pytest.raises(ZeroDivisionError), open_logs(["wandb"], tmp_path, SETTINGS):
        raise ZeroDivisionError
    assert runs[0].exit_code == 1


def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, without a network: it leaves a run that `wandb sync` can upload."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with open_logs(["wandb"], tmp_path, SETTINGS) as log:
        log(10, {"loss": 1.0})
    name = (tmp_path / "wandb-id").read_text().strip()
    (file,) = (tmp_path / "wandb").glob(f"offline-run-*/run-{name}.wandb")
    # Its own process writes the file, which on a busy machine goes on after the run has ended.
    deadline = time.monotonic() + 60
    while b"loss" not in file.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    if file.stat().st_size < 100:
        pytest.skip("wandb's own process wrote nothing within a minute")
    assert b"loss" in file.read_bytes()


def test_several_logs_get_the_same(tmp_path: Path, runs: list[FakeRun]) -> None:
    pytest.importorskip("tensorboard")
    with open_logs(["tensorboard", "wandb", "wandb"], tmp_path, SETTINGS) as log:
        log(5, {"loss": 0.25})
    assert scalars(tmp_path, "loss") == [(5, 0.25)]
    assert [run.lines for run in runs] == [[(5, {"loss": 0.25})]]


def test_an_unknown_log_and_a_missing_package_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(ConfigError, match="did you mean 'wandb'"),
        open_logs(["wandbb"], tmp_path, SETTINGS),
    ):
        pass
    for name, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        with (
            pytest.raises(ConfigError, match=rf"{name} is not installed.*saesteer\[logging\]"),
            open_logs([name], tmp_path, SETTINGS),
        ):
            pass
