"""What an SAE is worth on text it hasn't seen, beside what a random one and a PCA are worth."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from saesteer.core.hooks import activations
from saesteer.core.points import HookPoint
from saesteer.core.progress import progress
from saesteer.core.sae import Sae
from saesteer.core.shards import ContextBatch
from saesteer.errors import TrainingError
from saesteer.training import baselines, splice

# log10 of density: what fires never is counted apart, as dead.
HISTOGRAM_EDGES = [-6.0, -5.5, -5.0, -4.5, -4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0]
COSINE_EDGES = [i / 20 for i in range(21)]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

# Elements of one chunk of cosines: 64 MB in float32.
_CHUNK = 2**24

Reconstruct = Callable[[Tensor], Tensor]


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    sae: Sae,
    batches: Sequence[ContextBatch],
    *,
    special_ids: Collection[int],
    training: Iterable[ContextBatch] | None = None,
    ce_tokens: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of an SAE on held-out contexts; special tokens are left out of all of them.

    Cross-entropy is that of the model on the same contexts: clean, with each non-special token's
    activation replaced by its reconstruction, by zero, and by the mean activation. Special tokens
    keep theirs. Every next-token prediction counts whose target isn't a special token: what ends
    a document in a packed context is no text. A transcoder is measured where it writes.

    Args:
        batches: contexts with their activations at `sae.hook_point`; read twice.
        special_ids: BOS, EOS, pad.
        training: other contexts, on which the baselines are fitted; None: on `batches` themselves.
        ce_tokens: stop the model runs after the batch in which this many predictions have
            been counted; None: all contexts.
        batch_size: contexts a model run.
        seed: of the random dictionary.

    Returns:
        tokens, ce_tokens: how many tokens and predictions the figures are over;
        explained_variance: 1 - Σ‖y - ŷ‖² / Σ‖y - mean‖²; fvu: 1 - that; l0: latents a token;
        dead_fraction: of latents that fired on none of these tokens;
        ce_clean, ce_reconstructed, ce_zero, ce_mean: nats a token;
        ce_recovered: (ce_zero - ce_reconstructed) / (ce_zero - ce_clean), ce_recovered_mean: the
        same with ce_mean; None where the ablation doesn't hurt;
        kl, kl_zero, kl_mean: KL(clean ‖ replaced) of the next token, nats a token;
        density: list [d_sae], the fraction of tokens each latent fires on;
        density_histogram: log10_edges [13], and counts [12] of the latents that fire at all;
        nearest_cosine: list [d_sae], of each decoder row to the row nearest to it, with its
        nearest_cosine_histogram (edges [21], counts [20]; below 0 in the first) and
        nearest_cosine_quantiles; None where there is one latent only;
        baselines: for "random" (`baselines.random_dictionary`) and "pca"
        (`baselines.principal_components`) at k = rank = round(l0): l0, explained_variance, fvu,
        ce_reconstructed, ce_recovered, ce_recovered_mean, kl, and fitted_on, fitted_tokens.

    Raises:
        TrainingError: no token to evaluate on, or activations that are NaN or infinite.
    """
    rows = _Rows(model, sae.hook_point, sae.write_point, special_ids, sae.W_enc.device)
    fired = torch.zeros(sae.d_sae, dtype=torch.long, device=sae.W_enc.device)
    # In float64: a variance is a small difference of large sums where the mean is large.
    total = torch.zeros(sae.d_out, dtype=torch.float64)
    n, squares, errors = 0, 0.0, 0.0
    for batch in progress("evaluate", None, unit="batch", iterable=batches):
        x, y = rows.of(batch)
        codes = sae.encode(x)
        fired += torch.bincount(codes.latents, minlength=sae.d_sae)
        errors += _squared(y - sae.decode(codes, x))
        squares += _squared(y)
        total += y.double().sum(0).cpu()
        n += len(x)
    if n == 0:
        raise TrainingError(
            "there is no held-out token to evaluate on; cache more text or hold out more of it"
        )
    mean = total / n
    spread = squares - n * float(mean.square().sum())
    fvu = errors / spread if spread > 0 else float("nan")
    density = fired.double().cpu() / n
    l0 = float(fired.sum()) / n
    figures: dict[str, Any] = {
        "tokens": n,
        "explained_variance": 1 - fvu,
        "fvu": fvu,
        "l0": l0,
        "dead_fraction": float((fired == 0).double().mean()),
    }
    others, simple = _baselines(rows, sae, training, batches, max(1, round(l0)), seed)
    for name, variance in _variance(rows, batches, others, spread).items():
        simple[name] |= variance

    def through_sae(x: Tensor) -> Tensor:
        return sae.decode(sae.encode(x), x)

    middle = mean.float()
    counted, found = splice.losses(
        model,
        np.concatenate([np.asarray(batch.tokens) for batch in batches]),
        {
            "reconstructed": _on(sae.W_enc.device, through_sae),
            "zero": lambda x, y: torch.zeros_like(y),
            "mean": lambda x, y: middle.to(y).expand_as(y),
            **{name: _on(sae.W_enc.device, make) for name, make in others.items()},
        },
        read=sae.hook_point,
        write=sae.write_point,
        special_ids=special_ids,
        most=ce_tokens,
        batch_size=batch_size,
    )
    figures |= {"ce_tokens": counted}
    figures |= {f"ce_{way}": found[way][0] for way in ("clean", "reconstructed", "zero", "mean")}
    figures |= _recovered(found, "reconstructed")
    figures |= {"kl_zero": found["zero"][1], "kl_mean": found["mean"][1]}
    for name, values in simple.items():
        values["ce_reconstructed"] = found[name][0]
        values |= _recovered(found, name)
    return figures | {
        "density": density.tolist(),
        "density_histogram": _histogram(density),
        **_cosines(sae.W_dec),
        "baselines": simple,
    }


def nearest_cosine(decoder: Tensor) -> Tensor:
    """Cosine of each decoder row [d_sae, d] to the other row nearest to it: [d_sae].

    Made in chunks, never [d_sae, d_sae] at once. A row of zeros has cosine 0 to every other.
    """
    rows = F.normalize(decoder.float(), dim=-1)
    nearest = []
    for first in range(0, len(rows), step := max(1, _CHUNK // len(rows))):
        cosines = rows[first : first + step] @ rows.T
        own = torch.arange(len(cosines), device=rows.device)
        cosines[own, own + first] = -torch.inf
        nearest.append(cosines.max(dim=-1).values)
    return torch.cat(nearest).clamp(-1, 1)


class _Rows:
    """The plain tokens of a batch: what the SAE reads, x [n, d_in], and y [n, d_out], what it is
    to give back; y is x where both stand at one place."""

    def __init__(
        self, model: PreTrainedModel, read: HookPoint, write: HookPoint,
        special_ids: Collection[int], device: torch.device,
    ) -> None:  # fmt: skip
        self._model, self._read, self._write, self._device = model, read, write, device
        self._special = np.fromiter(special_ids, dtype=np.int64)

    def of(self, batch: ContextBatch) -> tuple[Tensor, Tensor]:
        plain = torch.from_numpy(~np.isin(batch.tokens, self._special))
        x = self._checked(batch.activations[plain], batch)
        if self._write == self._read:
            return x, x
        ids = torch.from_numpy(np.asarray(batch.tokens)).long()
        y = activations(self._model, [self._write], ids)[self._write]
        return x, self._checked(y[plain.to(y.device)], batch)

    def _checked(self, values: Tensor, batch: ContextBatch) -> Tensor:
        values = values.to(self._device).float()
        if not bool(torch.isfinite(values).all()):
            raise TrainingError(
                f"activations of contexts from {batch.first_context} on hold NaN or infinity; "
                "cache them again in float32 or bfloat16"
            )
        return values


def _baselines(
    rows: _Rows, sae: Sae, training: Iterable[ContextBatch] | None,
    batches: Iterable[ContextBatch], k: int, seed: int,
) -> tuple[dict[str, Reconstruct], dict[str, dict[str, Any]]]:  # fmt: skip
    """Both baselines as functions of x, and what is known of them before they are measured."""
    fitted = baselines.moments(
        rows.of(batch)
        for batch in progress("baselines", None, unit="batch", iterable=training or batches)
    )
    dictionary = baselines.random_dictionary(fitted, sae.d_sae, k, seed=seed, at=sae.hook_point).to(
        sae.W_enc.device
    )
    rank = min(k, sae.d_out)
    about = {
        "fitted_on": "the evaluated tokens" if training is None else "training tokens",
        "fitted_tokens": fitted.n,
    }
    return (
        {
            "random": lambda x: dictionary.decode(dictionary.encode(x), x),
            "pca": baselines.principal_components(fitted, rank),
        },
        {"random": {"l0": float(dictionary.k or 0), **about}, "pca": {"l0": float(rank), **about}},
    )


def _variance(
    rows: _Rows, batches: Iterable[ContextBatch], ways: dict[str, Reconstruct], spread: float
) -> dict[str, dict[str, float]]:
    errors = dict.fromkeys(ways, 0.0)
    for batch in progress("compare", None, unit="batch", iterable=batches):
        x, y = rows.of(batch)
        for name, make in ways.items():
            errors[name] += _squared(y - make(x))
    fvu = {name: e / spread if spread > 0 else float("nan") for name, e in errors.items()}
    return {name: {"explained_variance": 1 - f, "fvu": f} for name, f in fvu.items()}


def _on(device: torch.device, make: Reconstruct) -> splice.Replace:
    return lambda x, y: make(x.to(device)).to(y.device)


def _squared(values: Tensor) -> float:
    return float(values.double().square().sum())


def _recovered(found: dict[str, tuple[float, float]], way: str) -> dict[str, Any]:
    clean = found["clean"][0]

    def share(ablated: float) -> float | None:
        worth = ablated - clean
        return (ablated - found[way][0]) / worth if worth > 0 else None

    return {
        "ce_recovered": share(found["zero"][0]),
        "ce_recovered_mean": share(found["mean"][0]),
        "kl": found[way][1],
    }


def _histogram(density: Tensor) -> dict[str, list[Any]]:
    """Latents by log10 density; what lies below the first edge is counted in the first bin."""
    alive = density[density > 0].log10().clamp(HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    counts, _ = np.histogram(alive.numpy(), bins=np.array(HISTOGRAM_EDGES))
    return {"log10_edges": list(HISTOGRAM_EDGES), "counts": counts.tolist()}


def _cosines(decoder: Tensor) -> dict[str, Any]:
    names = ("nearest_cosine", "nearest_cosine_histogram", "nearest_cosine_quantiles")
    if len(decoder) < 2:
        return dict.fromkeys(names)
    nearest = nearest_cosine(decoder).double().cpu().numpy()
    counts, _ = np.histogram(nearest.clip(0, 1), bins=np.array(COSINE_EDGES))
    quantiles = {f"{q:g}": float(np.quantile(nearest, q)) for q in QUANTILES}
    return {
        names[0]: nearest.round(5).tolist(),
        names[1]: {"edges": list(COSINE_EDGES), "counts": counts.tolist()},
        names[2]: quantiles,
    }
