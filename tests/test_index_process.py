"""`saesteer index` as processes: killed and started again, and shared by two."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from saesteer import run_text
from saesteer.cli.main import main
from saesteer.features.records import Feature
from saesteer.features.search import Index
from saesteer.training.ranks import Ranks

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
# The command, killed once it has kept a part of the pass.
KILLED = """
import os, signal, sys
from saesteer.cli.main import main
from saesteer.features.checkpoint import Checkpoint

def kept_and_killed(self, progress):
    self.save(progress)
    os.kill(os.getpid(), signal.SIGKILL)

Checkpoint.save_if_due = kept_and_killed
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def folder(small_run, tmp_path: Path) -> Path:
    """A copy of the small run without its index."""
    shutil.copytree(small_run.path, tmp_path / "run")
    (tmp_path / "run" / "features.sqlite").unlink()
    return tmp_path / "run"


def features(folder: Path) -> list[Feature]:
    """What an index holds of each feature, but for what is measured with the model's help."""
    with Index.open(folder / "features.sqlite") as index:
        return [
            replace(index.feature(i), output_score=None, own_effect=None, note=None)
            for i in range(index.n_features)
        ]


def killed(folder: Path, *options: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "index", str(folder), *options],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (folder / "features.partial").is_dir() and not (folder / "features.sqlite").exists()


@pytest.mark.parametrize("live", [False, True])
def test_batches_begin_where_they_are_wanted_and_ranks_share_them(small_run, stories, live):
    text = str(stories) if live else None
    every = list(run_text.batches(small_run, text, 30_000, held_out=False))
    for first in (0, 64, 100, 10**6):
        found = list(run_text.batches(small_run, text, 30_000, held_out=False, first=first))
        tokens = [b.tokens for b in every]
        whole = np.concatenate(tokens)[first:]
        assert sum(len(b.tokens) for b in found) == len(whole)
        assert all(
            np.array_equal(b.tokens, whole[b.first_context - first :][: len(b.tokens)])
            for b in found
        )
    shares = [
        list(run_text.batches(small_run, text, 30_000, held_out=False, ranks=Ranks(rank, 3)))
        for rank in range(3)
    ]
    assert all(shares)
    joined = sorted((b for share in shares for b in share), key=lambda b: b.first_context)
    for name in ("tokens", "documents", "activations"):
        one = np.concatenate([getattr(b, name) for b in every])
        assert np.array_equal(np.concatenate([getattr(b, name) for b in joined]), one)


def test_a_killed_index_goes_on_to_the_same(folder, small_run, stories):
    options = ["--text", str(stories), "--tokens", "30000"]
    killed(folder, *options)
    assert main(["index", str(folder), *options]) == 0
    assert not (folder / "features.partial").exists()
    assert features(folder) == features(small_run.path)


def test_a_pass_of_something_else_is_not_gone_on_from(folder, small_run, stories, capsys):
    killed(folder)
    assert main(["index", str(folder), "--top", "5"]) == 2
    assert "begin anew with --restart" in capsys.readouterr().err
    assert main(["index", str(folder), "--text", str(stories)]) == 2
    assert main(["index", str(folder), "--restart"]) == 0
    assert features(folder) == features(small_run.path)


def test_a_pass_of_less_text_is_not_gone_on_from(folder, stories, capsys):
    killed(folder, "--text", str(stories), "--tokens", "30000")
    assert main(["index", str(folder), "--text", str(stories), "--tokens", "20000"]) == 2
    assert "tokens 30000, expected 20000" in capsys.readouterr().err


def test_two_processes_index_what_one_does(folder, small_run, stories):
    options = ["--text", str(stories), "--tokens", "30000"]
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--master-port", str(20000 + (os.getpid() + 7) % 20000),
            "-m", "saesteer", "index", str(folder), *options,
        ],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("128 features in") == 1  # the first process says it for both
    assert not (folder / "features.partial").exists()
    assert features(folder) == features(small_run.path)
