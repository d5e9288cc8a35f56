"""Activations with known structure, and SAEs trained on them in a second."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saesteer.core.model import HookPoint
from saesteer.core.sae import Sae
from saesteer.training.loop import Job, fit
from saesteer.training.ranks import ALONE, Ranks
from saesteer.training.settings import Settings
from saesteer.training.stream import CachedStream
from saesteer.training.trainer import Trainer

D, D_SAE, K, BATCH, STEPS = 16, 48, 4, 64, 60
IDENTITY: dict[str, Any] = {
    "hook_point": HookPoint(1, "resid_post"),
    "model_id": "tiny",
    "model_fingerprint": "0123456789abcdef",
    "context_size": 8,
}
TRANSCODER = IDENTITY | {
    "hook_point": HookPoint(1, "mlp_out"), "hook_point_out": HookPoint(2, "mlp_out")
}  # fmt: skip


class InMemory:
    """Activations made of a few sparse directions far from the origin, with small noise."""

    def __init__(self, n: int = 3000, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        directions = F.normalize(torch.randn(24, D, generator=generator), dim=-1)
        on = (torch.rand(n, 24, generator=generator) < 0.12).float()
        sizes = on * (1 + torch.rand(n, 24, generator=generator)) * 5
        noise = torch.randn(n, D, generator=generator) * 0.05
        self.x = sizes @ directions + 3 * torch.randn(D, generator=generator) + noise
        self.asked: list[np.ndarray] = []

    def rows(self, indices: np.ndarray) -> Tensor:
        self.asked.append(indices)
        return self.x[torch.from_numpy(indices)]


class Squared(InMemory):
    """What a transcoder is to predict: a function of the same rows of `InMemory`."""

    def __init__(self, n: int = 3000, seed: int = 0) -> None:
        super().__init__(n, seed)
        mix = torch.randn(D, D, generator=torch.Generator().manual_seed(5)) / D**0.5
        self.x = (self.x @ mix).relu() @ mix.T


TRAIN, HELD_OUT = np.arange(2600), np.arange(2600, 3000)


def stream(data: InMemory | None = None, *, ranks: Ranks = ALONE, **changes: Any) -> CachedStream:
    shards: Sequence[InMemory] = (data or InMemory(),)
    if changes.pop("transcoder", False):
        shards = (*shards, Squared())
    arguments = {"batch_size": BATCH, "seed": 0} | changes
    return CachedStream(tuple(shards), TRAIN, HELD_OUT, ranks=ranks, **arguments)


def train(
    data: InMemory | None = None, *, folder: Path | None = None, steps: int = STEPS,
    checkpoint_steps: int | None = None, transcoder: bool = False, ranks: Ranks = ALONE,
    by_features: bool = False, **changes: Any,
) -> Sae:  # fmt: skip
    """Train one SAE on `InMemory` activations; `changes` are those of `Settings`."""
    given = stream(
        data, transcoder=transcoder, ranks=ALONE if by_features else ranks,
        batch_size=changes.pop("batch_size", BATCH),
    )  # fmt: skip
    settings = Settings(**({"architecture": "topk", "d_sae": D_SAE, "k": K, "lr": 3e-3} | changes))
    trainer = Trainer(
        settings, given, steps=steps, identity=TRANSCODER if transcoder else IDENTITY,
        ranks=ranks, by_features=by_features,
    )  # fmt: skip
    (sae,) = fit(
        given, [Job(trainer, folder)], steps=steps, log_every=5, checkpoint_seconds=1e9,
        checkpoint_steps=checkpoint_steps, ranks=ranks,
    )  # fmt: skip
    return sae


def explained(sae: Sae, x: Tensor, target: Tensor | None = None) -> float:
    target = x if target is None else target
    error = target - sae.decode(sae.encode(x), x)
    return 1 - float(error.square().sum() / (target - target.mean(0)).square().sum())


def same(first: Sae, second: Sae) -> bool:
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "r_mag", "b_mag", "W_skip")
    pairs = [(getattr(first, name, None), getattr(second, name, None)) for name in names]
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)
