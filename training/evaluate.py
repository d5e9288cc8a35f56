"""What an SAE is worth on text it hasn't seen: variance explained, sparsity, the model's loss."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from saesteer.core.hooks import edit
from saesteer.core.progress import progress
from saesteer.core.sae import Sae
from saesteer.core.shards import ContextBatch
from saesteer.core.tokens import Tokens
from saesteer.errors import TrainingError

# log10 of density: what fires never is counted apart, as dead.
HISTOGRAM_EDGES = [-6.0, -5.5, -5.0, -4.5, -4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0]


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    sae: Sae,
    batches: Iterable[ContextBatch],
    *,
    special_ids: Collection[int],
    ce_tokens: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Figures of an SAE on held-out contexts; special tokens are left out of all of them.

    Cross-entropy is that of the model on the same contexts: clean, with each non-special token's
    activation replaced by its reconstruction, by zero, and by the mean activation. Special tokens
    keep theirs. Every next-token prediction counts whose target isn't a special token: what ends
    a document in a packed context is no text.

    Args:
        batches: contexts with their activations at `sae.hook_point`.
        special_ids: BOS, EOS, pad.
        ce_tokens: stop the four model runs after the context in which this many predictions have
            been counted; None: all contexts.
        batch_size: contexts a model run.

    Returns:
        tokens, ce_tokens: how many tokens and predictions the figures are over;
        explained_variance: 1 - Σ‖x - x̂‖² / Σ‖x - mean‖²; fvu: 1 - that; l0: latents a token;
        dead_fraction: of latents that fired on none of these tokens;
        ce_clean, ce_reconstructed, ce_zero, ce_mean: nats a token;
        ce_recovered: (ce_zero - ce_reconstructed) / (ce_zero - ce_clean), ce_recovered_mean: the
        same with ce_mean; None where the ablation doesn't hurt;
        density: list [d_sae], the fraction of tokens each latent fires on;
        density_histogram: log10_edges [13], and counts [12] of the latents that fire at all.

    Raises:
        TrainingError: no token to evaluate on, or activations that are NaN or infinite.
    """
    device = sae.W_enc.device
    special = np.fromiter(special_ids, dtype=np.int64)
    tokens: list[np.ndarray] = []
    n = 0
    fired = torch.zeros(sae.d_sae, dtype=torch.long, device=device)
    # In float64: a variance is a small difference of large sums where the mean is large.
    total = torch.zeros(sae.d_in, dtype=torch.float64)
    squares = errors = 0.0
    for batch in progress("evaluate", None, unit="batch", iterable=batches):
        tokens.append(np.asarray(batch.tokens))
        plain = torch.from_numpy(~np.isin(batch.tokens, special))
        x = batch.activations[plain].to(device).float()
        if not bool(torch.isfinite(x).all()):
            raise TrainingError(
                f"activations of contexts from {batch.first_context} on hold NaN or infinity; "
                "cache them again in float32 or bfloat16"
            )
        codes = sae.encode(x)
        fired += torch.bincount(codes.latents, minlength=sae.d_sae)
        errors += float((x - sae.decode(codes, x)).double().square().sum())
        squares += float(x.double().square().sum())
        total += x.double().sum(0).cpu()
        n += len(x)
    if n == 0:
        raise TrainingError(
            "there is no held-out token to evaluate on; cache more text or hold out more of it"
        )
    mean = total / n
    spread = squares - n * float(mean.square().sum())
    fvu = errors / spread if spread > 0 else float("nan")
    density = fired.double().cpu() / n
    figures: dict[str, Any] = {
        "tokens": n,
        "explained_variance": 1 - fvu,
        "fvu": fvu,
        "l0": float(fired.sum()) / n,
        "dead_fraction": float((fired == 0).double().mean()),
    }
    figures |= _losses(
        model, sae, np.concatenate(tokens), mean.float(), special_ids, ce_tokens, batch_size
    )
    return figures | {"density": density.tolist(), "density_histogram": _histogram(density)}


def _losses(
    model: PreTrainedModel, sae: Sae, tokens: np.ndarray, mean: Tensor,
    special_ids: Collection[int], wanted: int | None, batch_size: int,
) -> dict[str, Any]:  # fmt: skip
    """The four cross-entropies on tokens [contexts, context_size], and what is recovered."""

    def replaced(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tokens], Tensor]:
        def change(x: Tensor, at: Tokens) -> Tensor:
            plain = ~(at.is_special | at.is_padding)
            new = x.clone()
            new[plain] = make(x[plain]).to(x.dtype)
            return new

        return change

    def reconstruction(x: Tensor) -> Tensor:
        own = x.to(sae.W_enc.device)
        return sae.decode(sae.encode(own), own).to(x.device)

    ways: dict[str, Callable[[Tensor], Tensor] | None] = {
        "clean": None,
        "reconstructed": reconstruction,
        "zero": torch.zeros_like,
        "mean": lambda x: mean.to(x).expand_as(x),
    }
    device = next(model.parameters()).device
    special = torch.tensor(sorted(special_ids), dtype=torch.long, device=device)
    sums = dict.fromkeys(ways, 0.0)
    counted = 0
    with progress("loss", None, unit="batch") as bar:
        for first in range(0, len(tokens), batch_size):
            ids = torch.from_numpy(tokens[first : first + batch_size]).long().to(device)
            counts = ~torch.isin(ids[:, 1:], special)
            for name, make in ways.items():
                edits = {} if make is None else {sae.hook_point: replaced(make)}
                with edit(model, edits, special_ids=special_ids):
                    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
                loss = F.cross_entropy(logits[counts].float(), ids[:, 1:][counts], reduction="sum")
                sums[name] += float(loss)
            counted += int(counts.sum())
            bar.update()
            if wanted is not None and counted >= wanted:
                break
    if counted == 0:
        raise TrainingError("no next token to predict in the held-out contexts; use longer ones")
    means = {name: value / counted for name, value in sums.items()}

    def recovered(ablated: float) -> float | None:
        worth = ablated - means["clean"]
        return (ablated - means["reconstructed"]) / worth if worth > 0 else None

    return {
        "ce_tokens": counted,
        **{f"ce_{name}": value for name, value in means.items()},
        "ce_recovered": recovered(means["zero"]),
        "ce_recovered_mean": recovered(means["mean"]),
    }


def _histogram(density: Tensor) -> dict[str, list[Any]]:
    """Latents by log10 density; what lies below the first edge is counted in the first bin."""
    alive = density[density > 0].log10().clamp(HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    counts, _ = np.histogram(alive.numpy(), bins=np.array(HISTOGRAM_EDGES))
    return {"log10_edges": list(HISTOGRAM_EDGES), "counts": counts.tolist()}
