"""Checkpoints from which a killed run goes on as if nothing had happened.

    checkpoints/step-00000400/   state.safetensors (weights, Adam's moments, when each latent last
                                 fired) + state.json (step, seconds, the settings that made it)

A folder is written aside and renamed; the two newest are kept, so that one damaged file costs
some steps and not the run.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from saesteer.errors import TrainingError

KEPT = 2
_TENSORS, _FACTS = "state.safetensors", "state.json"


class Checkpoint(NamedTuple):
    """tensors by name; step: steps done; seconds: time spent on them."""

    tensors: dict[str, Tensor]
    step: int
    seconds: float


def save_checkpoint(folder: Path, checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    """Write a checkpoint and drop all but the two newest.

    Raises:
        TrainingError: the folder cannot be written, or the disk is full.
    """
    target = folder / f"step-{checkpoint.step:08d}"
    aside = folder / f".{target.name}.{os.getpid()}.partial"
    facts = {"step": checkpoint.step, "seconds": checkpoint.seconds, "settings": settings}
    try:
        aside.mkdir(parents=True, exist_ok=True)
        data = save(
            {
                name: tensor.detach().cpu().contiguous()
                for name, tensor in checkpoint.tensors.items()
            }
        )
        (aside / _TENSORS).write_bytes(data)
        facts["sha256"] = hashlib.sha256(data).hexdigest()
        (aside / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for path in (aside / _TENSORS, aside / _FACTS):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        if target.exists():  # a damaged one of the same step
            shutil.rmtree(target)
        aside.replace(target)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"cannot write the checkpoint {target}: {error}; free some space or choose a folder "
            "that you can write to, then run again: training goes on from the last one"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in _folders(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def saved_checkpoint(folder: Path, step: int, settings: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint of a step, or None where it is damaged.

    Raises:
        TrainingError: it was made with other settings, each named.
    """
    path = folder / f"step-{step:08d}"
    try:
        facts = json.loads((path / _FACTS).read_text(encoding="utf-8"))
        # Read, not memory-mapped: the file is deleted while training goes on.
        data = (path / _TENSORS).read_bytes()
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            raise ValueError("its bytes are not those that were written")
        found = Checkpoint(load(data), int(facts["step"]), float(facts["seconds"]))
        made_with = dict(facts["settings"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        tqdm.write(f"checkpoint {path} is damaged ({error}); trying the one before")
        return None
    _check_settings(path, made_with, settings)
    return found


def steps_saved(folder: Path) -> list[int]:
    """The steps of which there are checkpoints, oldest first."""
    return [int(path.name.removeprefix("step-")) for path in _folders(folder)]


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _check_settings(path: Path, made_with: dict[str, Any], settings: dict[str, Any]) -> None:
    # Through JSON, so that a tuple is compared as the list that it was saved as.
    now = json.loads(json.dumps(settings))
    names = sorted(set(made_with) | set(now))
    differing = [name for name in names if made_with.get(name) != now.get(name)]
    if differing:
        details = ", ".join(f"{n}={made_with.get(n)} (now {now.get(n)})" for n in differing)
        raise TrainingError(
            f"the checkpoint {path} was made with {details}; train with the same settings to go "
            f"on, or delete {path.parent} to start again"
        )
