"""Train an SAE on cached activations.

The order of tokens is a fresh permutation of all training rows each epoch, by seed, so a step is
a function of its number and a killed run ends with the same weights as an unbroken one.
"""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saesteer.core.progress import progress
from saesteer.core.sae import Sae
from saesteer.errors import TrainingError, did_you_mean
from saesteer.training.architectures import ARCHITECTURES, Architecture, calibrated_threshold
from saesteer.training.checkpoints import Checkpoint, latest_checkpoint, save_checkpoint
from saesteer.training.metrics import Metrics
from saesteer.training.rows import Rows, batches, spread
from saesteer.training.step import Step, Weights, loss_and_gradients

# Rows from which mean, norm and variance are estimated; on which a threshold is calibrated.
_SAMPLE, _CALIBRATION = 2**15, 2**17


def fit(
    shards: Rows,
    train_rows: np.ndarray,
    held_out_rows: np.ndarray,
    *,
    architecture: str,
    d_sae: int,
    k: int,
    steps: int,
    batch_size: int,
    identity: Mapping[str, Any],
    lr: float | None = None,
    warm_up_steps: int | None = None,
    decay: float = 0.2,
    seed: int = 0,
    b_dec_init: str = "mean",
    aux_coefficient: float = 1 / 32,
    dead_after_tokens: int | None = None,
    checkpoints: Path | None = None,
    metrics: Path | None = None,
    log_every: int = 20,
    checkpoint_steps: int | None = None,
    checkpoint_seconds: float = 120.0,
    device: str | torch.device = "cpu",
) -> Sae:
    """Train an SAE and return it, taking raw activations.

    While training, activations are scaled to a mean norm of √d; that is folded into the biases at
    the end, so decoder rows have norm 1 and activations are in units of the stream.

    Args:
        train_rows, held_out_rows: int64 row indices, from `split_rows`; the held-out ones are
            used for nothing but the threshold of a BatchTopK SAE.
        architecture: a name in `ARCHITECTURES`; k: latents a token.
        identity: the arguments of `Sae` that say where it belongs (hook_point, model_id,
            model_fingerprint, prepend_bos, context_size, notes).
        lr: peak learning rate of Adam; by default 2.5 / √(d · d_sae): the fall with d_sae is that
            of Gao et al. 2024, A.3, the factor was the best measured on a 3M model's stream.
        warm_up_steps: linear rise from 0; by default 5% of the steps, 1000 at most.
        decay: fraction of the steps at the end in which the rate falls linearly to 0.
        b_dec_init: "mean" or "geometric_median" of the training rows.
        aux_coefficient: weight of the AuxK loss for dead latents.
        dead_after_tokens: a latent is dead when it fired on none of that many tokens; by default
            5% of all tokens, 4 batches at least and 10 million at most.
        checkpoints: folder; None to make none. metrics: the JSONL file; None to write none.
        checkpoint_steps, checkpoint_seconds: a checkpoint is made when either has passed.

    Raises:
        TrainingError: bad settings, a checkpoint made with others, NaN or infinity on the way.
    """
    plan = _checked(architecture, d_sae, k, steps, batch_size, b_dec_init, decay, len(train_rows))
    sample = shards.rows(spread(train_rows, _SAMPLE)).to(device)
    _check_finite(sample, "before the first step")
    lr = 2.5 / math.sqrt(sample.shape[1] * d_sae) if lr is None else lr
    warm_up_steps = min(1000, steps // 20) if warm_up_steps is None else warm_up_steps
    if dead_after_tokens is None:
        dead_after_tokens = max(4 * batch_size, min(10_000_000, steps * batch_size // 20))
    settings = {
        "architecture": architecture,
        "d_sae": d_sae,
        "k": k,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "warm_up_steps": warm_up_steps,
        "decay": decay,
        "seed": seed,
        "b_dec_init": b_dec_init,
        "aux_coefficient": aux_coefficient,
        "dead_after_tokens": dead_after_tokens,
        "hook_point": str(identity.get("hook_point")),
        "model": identity.get("model_fingerprint") or identity.get("model_id"),
        "rows": _hash(train_rows),
        "activations": _hash(sample[:1024].cpu().numpy()),
    }
    found = latest_checkpoint(checkpoints, settings) if checkpoints else None
    mean_norm = float(sample.norm(dim=-1).mean())
    if not mean_norm > 0:
        raise TrainingError("every activation is zero; check the hook point and the cache")
    scale = sample.shape[1] ** 0.5 / mean_norm
    variance = max(float((sample - sample.mean(0)).square().sum(-1).mean()) * scale**2, 1e-12)
    weights = _initial(sample * scale, d_sae, seed, b_dec_init)
    last_fired = torch.zeros(d_sae, dtype=torch.long, device=device)
    del sample
    optimiser = torch.optim.Adam([tensor for _, tensor in weights.items()], lr=lr, fused=True)
    if found is not None:
        _restore(found, weights, optimiser, last_fired)
    start, spent = (found.step, found.seconds) if found else (0, 0.0)
    log = Metrics(metrics, start)

    began = saved_at = time.monotonic()
    bar = progress("train", steps * batch_size)
    bar.update(start * batch_size)
    with bar:
        for step, indices in batches(train_rows, batch_size, seed, start, steps):
            y = shards.rows(indices).to(device) * scale
            now = _rate(step, steps, lr, warm_up_steps, decay)
            dead = (step * batch_size - last_fired >= dead_after_tokens).nonzero()[:, 0]
            result = loss_and_gradients(
                weights, y, plan.choose, k,
                variance=variance, dead=dead, aux_coefficient=aux_coefficient,
            )  # fmt: skip
            if not math.isfinite(float(result.loss)):
                _check_finite(y, f"in the batch of step {step + 1}")
                raise TrainingError(
                    f"the loss is {float(result.loss)} at step {step + 1} of {steps}; try a lower "
                    f"learning rate than {lr:g} or a longer warm-up"
                )
            _update(weights, result.gradients, optimiser, now)
            done = step + 1
            last_fired[result.chosen.latents] = done * batch_size
            bar.update(batch_size)
            if done % log_every == 0 or done == steps:
                seconds = spent + time.monotonic() - began
                figures = _figures(result, y, scale, d_sae, len(dead))
                bar.set_postfix_str(
                    "loss {loss:.3f} L0 {l0:.1f} EV {ev:.3f} dead {dead_fraction:.1%}".format(
                        **figures
                    )
                )
                log.write(
                    {"step": done, "tokens": done * batch_size, **figures, "lr": now}
                    | {"tokens_per_s": done * batch_size / max(seconds, 1e-9), "seconds": seconds}
                )
            if checkpoints and (
                done == steps
                or (checkpoint_steps is not None and done % checkpoint_steps == 0)
                or time.monotonic() - saved_at >= checkpoint_seconds
            ):
                elapsed = spent + time.monotonic() - began
                state = Checkpoint(_state(weights, optimiser, last_fired), done, elapsed)
                save_checkpoint(checkpoints, state, settings)
                saved_at = time.monotonic()
    return _finished(shards, held_out_rows, weights, plan, k, scale, batch_size, identity)


def _checked(
    architecture: str, d_sae: int, k: int, steps: int, batch_size: int,
    b_dec_init: str, decay: float, n_rows: int,
) -> Architecture:  # fmt: skip
    if architecture not in ARCHITECTURES:
        raise TrainingError(
            f"unknown architecture {architecture!r}{did_you_mean(architecture, ARCHITECTURES)}: "
            f"use one of {', '.join(ARCHITECTURES)}"
        )
    if not 1 <= k <= d_sae:
        raise TrainingError(f"k is {k}: it must lie between 1 and d_sae = {d_sae}")
    if steps < 1 or batch_size < 1:
        raise TrainingError(f"steps ({steps}) and batch size ({batch_size}) must be 1 or more")
    if b_dec_init not in ("mean", "geometric_median"):
        raise TrainingError(f"b_dec_init is {b_dec_init!r}: use 'mean' or 'geometric_median'")
    if not 0 <= decay <= 1:
        raise TrainingError(f"decay is {decay}: it is a fraction of the steps, between 0 and 1")
    if n_rows < batch_size:
        raise TrainingError(
            f"{n_rows} training tokens are fewer than one batch of {batch_size}; cache more "
            "tokens or use a smaller batch"
        )
    return ARCHITECTURES[architecture]


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def _initial(y: Tensor, d_sae: int, seed: int, b_dec_init: str) -> Weights:
    """Random unit decoder rows, the encoder equal to them, b_dec at the middle of y [n, d]."""
    generator = torch.Generator().manual_seed(seed)
    decoder = F.normalize(torch.randn(d_sae, y.shape[1], generator=generator), dim=-1).to(y.device)
    middle = y.mean(0) if b_dec_init == "mean" else _geometric_median(y)
    return Weights(decoder.clone(), torch.zeros(d_sae, device=y.device), decoder, middle)


def _geometric_median(y: Tensor, rounds: int = 50) -> Tensor:
    """The point with the smallest mean distance to y [n, d], by Weiszfeld's iteration."""
    middle = y.mean(0)
    for _ in range(rounds):
        pull = 1 / (y - middle).norm(dim=-1).clamp_min(1e-8)
        middle = (pull[:, None] * y).sum(0) / pull.sum()
    return middle


def _rate(step: int, steps: int, lr: float, warm_up_steps: int, decay: float) -> float:
    """Learning rate of a step (0-based): a linear rise, a plateau, a linear fall to 0."""
    rise = min(1.0, (step + 1) / (warm_up_steps + 1))
    fall = min(1.0, (steps - step) / (decay * steps)) if decay > 0 else 1.0
    return lr * min(rise, fall)


def _update(weights: Weights, gradients: Weights, optimiser: torch.optim.Adam, lr: float) -> None:
    """One Adam step along the sphere on which decoder rows live."""
    decoder = weights.decoder
    along = (gradients.decoder * decoder).sum(-1, keepdim=True)
    gradients.decoder.sub_(along * decoder)
    for (_, tensor), (_, gradient) in zip(weights.items(), gradients.items(), strict=True):
        tensor.grad = gradient
    optimiser.param_groups[0]["lr"] = lr
    optimiser.step()
    decoder.div_(decoder.norm(dim=-1, keepdim=True).clamp_min(1e-12))


def _figures(result: Step, y: Tensor, scale: float, d_sae: int, dead: int) -> dict[str, float]:
    """What is logged: mse is mean ‖x - x̂‖² a token in the stream's own units, ev the batch's."""
    squared = float(result.error.square().sum())
    spread = float((y - y.mean(0)).square().sum())
    return {
        "loss": float(result.loss),
        "mse": squared / len(y) / scale**2,
        "aux": float(result.aux),
        "l0": float((result.chosen.values > 0).sum()) / len(y),
        "ev": 1 - squared / max(spread, 1e-12),
        "dead_fraction": dead / d_sae,
    }


def _state(weights: Weights, optimiser: torch.optim.Adam, last_fired: Tensor) -> dict[str, Tensor]:
    state = {"last_fired": last_fired}
    for name, tensor in weights.items():
        state[name] = tensor
        state |= {f"{name}.{key}": value for key, value in optimiser.state[tensor].items()}
    return state


def _restore(
    found: Checkpoint, weights: Weights, optimiser: torch.optim.Adam, last_fired: Tensor
) -> None:
    last_fired.copy_(found.tensors["last_fired"])
    for name, tensor in weights.items():
        tensor.copy_(found.tensors[name])
        optimiser.state[tensor] = {
            key: found.tensors[f"{name}.{key}"].to(tensor.device)
            for key in ("step", "exp_avg", "exp_avg_sq")
        }


def _check_finite(x: Tensor, where: str) -> None:
    bad = int((~torch.isfinite(x)).any(-1).sum())
    if bad:
        raise TrainingError(
            f"{bad} of {len(x)} activations {where} hold NaN or infinity; cache them again in "
            "float32 or bfloat16 (float16 overflows at 65504)"
        )


def _finished(
    shards: Rows, held_out_rows: np.ndarray, weights: Weights, plan: Architecture, k: int,
    scale: float, batch_size: int, identity: Mapping[str, Any],
) -> Sae:  # fmt: skip
    """Fold the scale into the biases: a(s·x) / s is what the same encoder makes of x itself."""
    if not all(bool(torch.isfinite(tensor).all()) for _, tensor in weights.items()):
        raise TrainingError("the weights hold NaN or infinity after the last step; lower the rate")
    threshold = None
    if plan.saved_as == "jumprelu":
        chosen = spread(held_out_rows, _CALIBRATION)

        def pre_activations() -> Iterator[Tensor]:
            for first in range(0, len(chosen), batch_size):
                x = shards.rows(chosen[first : first + batch_size]).to(weights.b_dec.device)
                yield weights.pre_activations(x * scale)

        level = calibrated_threshold(pre_activations, k)
        threshold = torch.full_like(weights.b_enc, level / scale).cpu()
    return Sae(
        W_enc=weights.encoder.T.contiguous().cpu(),
        b_enc=(weights.b_enc / scale).cpu(),
        W_dec=weights.decoder.cpu(),
        b_dec=(weights.b_dec / scale).cpu(),
        architecture=plan.saved_as,
        k=k if plan.saved_as == "topk" else None,
        threshold=threshold,
        **identity,
    )
