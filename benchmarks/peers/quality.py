"""Losses of ours and of sae-lens after equal steps, and what the SAEs as saved explain."""

import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from peers.ours import Given, Shape, task_of
from torch import Tensor

from saesteer.core.progress import progress
from saesteer.training.trainer import Trainer


def learn(
    trainer: Trainer, float32: Trainer | None, about: Shape, given: Given, steps: int
) -> dict[str, Any]:
    """Ours and sae-lens's default for some steps: losses at the end, and EV of what is saved."""
    from peers.sae_lens_trainer import SaeLens

    theirs = SaeLens(task_of(trainer, about), trainer.weights)
    losses: dict[str, list[float]] = {"ours": [], "float32": [], "sae_lens": []}
    batches = itertools.islice(itertools.cycle(given.batches), steps)
    for batch in progress("learn", steps, unit="step", iterable=batches):
        losses["ours"].append(trainer.step(batch)["loss"])
        losses["sae_lens"].append(theirs.step(batch.x * trainer.scales.x))
        if float32 is not None:
            losses["float32"].append(float32.step(batch)["loss"])
    agree({name: values[:1] for name, values in losses.items() if values})
    end = {
        name: statistics.mean(values[-max(1, steps // 10) :])
        for name, values in losses.items()
        if values
    }
    test = given.test * trainer.scales.x
    with tempfile.TemporaryDirectory() as folder:
        trainer.finished().save(Path(folder, "ours"))
        theirs.save(Path(folder, "theirs"))
        ev_ours, l0_ours = quality(Path(folder, "ours"), given.test)
        ev_theirs, l0_theirs = quality(Path(folder, "theirs"), test)
    found: dict[str, Any] = {
        "steps": steps,
        "loss_ratio_at_equal_steps": end["ours"] / end["sae_lens"],
        "loss_ours": end["ours"],
        "loss_sae_lens": end["sae_lens"],
        "ev_ours": ev_ours,
        "ev_sae_lens": ev_theirs,
        "l0_ours": l0_ours,
        "l0_sae_lens": l0_theirs,
        # Where a threshold is saved, what the SAE is worth with the choice that it learnt with.
        "ev_sae_lens_in_training": explained(test, theirs.reconstruct(test)),
    }
    if float32 is not None:
        found["loss_ratio_to_float32"] = end["ours"] / end["float32"]
    return found


def quality(folder: Path, x: Tensor) -> tuple[float, float]:
    """EV and L0 of a saved SAE on x [n, d], as sae-lens loads and runs it."""
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(folder))
    with torch.no_grad():
        code = sae.encode(x)
        return explained(x, sae.decode(code)), float((code > 0).sum(-1).float().mean())


def explained(x: Tensor, out: Tensor) -> float:
    """Explained variance of x [n, d]."""
    return 1 - float((x - out).square().sum() / (x - x.mean(0)).square().sum())


def agree(losses: dict[str, list[float]]) -> None:
    """Stop where first steps with the same weights on the same batch don't give the same loss."""
    for name, (loss, *_) in losses.items():
        # Autocast's losses are bfloat16's; ours may have products in it, which moves them less.
        most = 0.05 if "autocast" in name else 0.01
        if abs(loss / losses["ours"][0] - 1) > most:
            raise SystemExit(
                f"the first loss of {name} is {loss:.6g} and that of ours "
                f"{losses['ours'][0]:.6g}: they don't do the same work, so nothing was timed"
            )
