"""A concept on a circle, which no one direction can stand for: the days of the planted language."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from saesteer.core.hooks import activations
from saesteer.core.model import HookPoint
from saesteer.world import corpus, exact, lexicon


def circularity(means: NDArray[np.float64]) -> float:
    """How much the means of values in their cyclic order, [k, d], lie on a circle: 0 to 1.

    With M the first Fourier coefficient of the means over the k places, it is the share of the
    variance between the means that lies in the first harmonic, times how round that is:
    2σ₂² / (σ₁² + σ₂²) of its two axes (the real and the imaginary part of M). A circle has 1, a
    line 0, and means with no order, all as far from one another, 2/(k − 1) (a third of seven).
    After the circles of Engels et al. 2024 (arXiv 2405.14860).
    """
    spectrum = np.fft.fft(means - means.mean(axis=0), axis=0)
    harmonics = np.abs(spectrum) ** 2
    between = harmonics[1:].sum()
    if between == 0:
        return 0.0
    first = spectrum[1]
    squares = np.linalg.svd(np.stack([first.real, first.imag]), compute_uv=False) ** 2
    total = squares.sum()
    # Real means: the last harmonic mirrors the first.
    share = 2 * harmonics[1].sum() / between
    return float(share * 2 * squares[1] / total) if total > 0 else 0.0


def day_means(
    model: PreTrainedModel, point: HookPoint, *, n: int = 140, seed: int = 0
) -> NDArray[np.float64]:
    """Mean activation on each day's name, from Monday on, in `n` stories: [7, d] float64."""
    ids = exact.word_ids()
    found: dict[str, list[Tensor]] = {day: [] for day in lexicon.DAYS}
    for prompt, _ in corpus.days(n, seed):
        # "It was DAY." or "Soon it was DAY.": the last day told, where the next hangs on it.
        at = max(i for i, word in enumerate(prompt) if word in found)
        if at >= model.config.max_position_embeddings:
            continue
        tokens = torch.tensor([[ids[word] for word in prompt[: at + 1]]])
        found[prompt[at]].append(activations(model, [point], tokens)[point][0, -1].double().cpu())
    return torch.stack([torch.stack(rows).mean(0) for rows in found.values()]).numpy()
