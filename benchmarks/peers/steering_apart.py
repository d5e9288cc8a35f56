"""Peers that steer, each in a process of its own with its own environment, told what to do by line.

steering-vectors and repeng can't share our environment: each has a venv in build/peers, made from
its list of pinned packages, with our own packages (the same torch) behind them.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peers import venvs
from peers.apart import HERE, NotInstalledError

APART = ("steering-vectors", "repeng")
PEERS = (*APART, "sae-lens")


class PeerFailedError(Exception):
    """What the peer raised, in a line."""


def python_of(name: str, *, install: bool = True) -> str:
    """The interpreter that runs a program. NotInstalledError: see `venvs.python_of`."""
    return venvs.python_of(name, install=install) if name in APART else sys.executable


class Apart:
    """A steering program in a process of its own; a context manager, which ends it.

    Args:
        name: "ours" or one of PEERS.
        given: the folder that `steering_task.written` wrote.
        install: whether a peer that isn't there is installed.

    Raises:
        NotInstalledError: it can't be installed, or it doesn't start.
    """

    def __init__(self, name: str, given: Path, *, install: bool = True) -> None:
        python = python_of(name, install=install)
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by close)
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [python, "-W", "ignore", HERE / "steering_worker.py", name, given,
             str(torch.get_num_threads())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints, text=True,
            env=environment,
        )  # fmt: skip
        try:
            about = self._answer()
        except PeerFailedError as error:
            self.close()
            raise NotInstalledError(f"it doesn't start: {error}") from error
        self.version: str = about["version"]
        self.cases: list[str] = about["cases"]
        self.wrong: list[str] = about["wrong"]

    def ask(self, what: str, **given: Any) -> dict[str, Any]:
        """What the worker's function of that name answers. Raises PeerFailedError."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"ask": what, **given}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._complaints.seek(0)
            last = self._complaints.read().strip().splitlines()[-1:]
            raise PeerFailedError(f"its process ended: {''.join(last) or 'without a word'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailedError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._complaints.close()

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
