"""Peers that steer, each in a process of its own with its own environment, told what to do by line.

steering-vectors and repeng can't share our environment: each has a venv in build/peers, made from
its list of pinned packages, with our own packages (the same torch) behind them.
"""

import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from peers.apart import HERE, INSTALLED, NotInstalledError

APART = ("steering-vectors", "repeng")
PEERS = (*APART, "sae-lens")


class PeerFailedError(Exception):
    """What the peer raised, in a line."""


def python_of(name: str, *, install: bool = True) -> str:
    """The interpreter that runs a peer; its venv is made where it is missing or out of date.

    Raises:
        NotInstalledError: it can't be installed, or install is False and it isn't.
    """
    if name not in APART:
        return sys.executable
    folder, wanted = INSTALLED / name, (HERE / f"{name}.txt").read_text(encoding="utf-8")
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return str(python)
    if not install:
        raise NotInstalledError("not installed; run without --no-install")
    print(f"installing {name} into {folder} …", file=sys.stderr, flush=True)
    _run(sys.executable, "-m", "venv", "--clear", str(folder))
    _run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r",
         str(HERE / f"{name}.txt"))  # fmt: skip
    (own,) = folder.glob("lib/python*/site-packages")
    # After its own packages, ours.
    (own / "zz_ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    stamp.write_text(wanted, encoding="utf-8")
    return str(python)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (lines or done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise NotInstalledError(f"{' '.join(command[1:4])} failed: {reason}")


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
