"""A peer that runs in a process of its own, and steps when it is told to."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peers.task import Task
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
INSTALLED = HERE.parent.parent / "build" / "peers"


class NotInstalledError(Exception):
    """Says how to install the peer, or why it doesn't start."""


class DictionaryLearning:
    """dictionary_learning's TopKTrainer or BatchTopKTrainer; a context manager, which ends it.

    Args:
        task, weights: as for any other peer.
        batches: [n, batch, d], one a step, over and over.

    Raises:
        NotInstalledError: it isn't in build/peers, or it doesn't start.
    """

    def __init__(self, task: Task, weights: dict[str, Tensor], batches: Tensor) -> None:
        folder = INSTALLED / "dictionary_learning"
        if not folder.exists():
            raise NotInstalledError(
                "not installed: benchmarks/peers/dictionary_learning.txt says how"
            )
        self._variance = task.variance
        self._folder = tempfile.TemporaryDirectory()
        tensors = Path(self._folder.name, "tensors.safetensors")
        names = ("encoder", "b_enc", "decoder", "b_dec")
        save_file(
            {name: weights[name].contiguous() for name in names} | {"batches": batches}, tensors
        )
        self._complaints = Path(self._folder.name, "stderr")
        with self._complaints.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", HERE / "dictionary_learning_worker.py"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
                env=os.environ | {"PYTHONPATH": str(folder)},
            )  # fmt: skip
        given = {
            "architecture": task.architecture, "d": task.d, "d_sae": task.d_sae, "k": task.k,
            "lr": task.lr, "threads": torch.get_num_threads(), "tensors": str(tensors),
        }  # fmt: skip
        try:
            self._ask(json.dumps(given))
        except NotInstalledError:
            self.close()
            raise

    def step(self) -> tuple[float, float]:
        """One step on the next batch: its milliseconds, and the loss before it."""
        answer = json.loads(self._ask("step"))
        return answer["ms"], answer["loss"] / self._variance

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            last = self._complaints.read_text().strip().splitlines()[-1:]
            raise NotInstalledError(f"its process ended: {''.join(last) or 'without a word'}")
        return answer

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._folder.cleanup()
