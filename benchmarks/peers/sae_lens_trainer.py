"""sae-lens's own SAETrainer, as a user gets it, and in the ways that could make it faster."""

from pathlib import Path
from typing import Any

import sae_lens
import torch
from peers.task import Task
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

CONFIGS: dict[str, type[Any]] = {
    "topk": sae_lens.TopKTrainingSAEConfig,
    "batchtopk": sae_lens.BatchTopKTrainingSAEConfig,
    "matryoshka": sae_lens.MatryoshkaBatchTopKTrainingSAEConfig,
    "standard": sae_lens.StandardTrainingSAEConfig,
    "jumprelu": sae_lens.JumpReLUTrainingSAEConfig,
    "gated": sae_lens.GatedTrainingSAEConfig,
}
SAES: dict[str, type[Any]] = {
    "topk": sae_lens.TopKTrainingSAE,
    "batchtopk": sae_lens.BatchTopKTrainingSAE,
    "matryoshka": sae_lens.MatryoshkaBatchTopKTrainingSAE,
    "standard": sae_lens.StandardTrainingSAE,
    "jumprelu": sae_lens.JumpReLUTrainingSAE,
    "gated": sae_lens.GatedTrainingSAE,
}
# Longer than any run: AuxK stays off.
_NEVER = 10**12


def ways(architecture: str) -> tuple[str, ...]:
    """Its settings that bear on speed; the first is its default.

    Only TopK has sparse activations, whose backward pass fails on a CPU unless they are left as
    they are instead of being rescaled by decoder norms.
    """
    return ("default", "autocast", *(["sparse"] if architecture == "topk" else []))


class SaeLens:
    """One of its trainers, begun from given weights and without AuxK.

    Its losses are sums over d, ours a fraction of the variance: a penalty that weighs the same has
    a coefficient that is larger by as much. It adds a nested dictionary's losses up, we take their
    mean.
    """

    def __init__(self, task: Task, weights: dict[str, Tensor], way: str = "default") -> None:
        self._levels = 1
        options: dict[str, Any] = {}
        l1 = task.sparsity * task.variance**0.5
        if task.architecture in ("topk", "batchtopk", "matryoshka"):
            sparse = way == "sparse"
            options = {"k": task.k, "use_sparse_activations": sparse}
            options["rescale_acts_by_decoder_norm"] = not sparse
        if task.architecture == "matryoshka":
            options["matryoshka_widths"] = list(task.widths)
            self._levels = len(task.widths)
        if task.architecture in ("standard", "gated"):
            options = {"l1_coefficient": l1}
        if task.architecture == "jumprelu":
            options = {
                "l0_coefficient": task.sparsity * task.variance,
                "jumprelu_bandwidth": task.bandwidth,
            }
        config = CONFIGS[task.architecture](d_in=task.d, d_sae=task.d_sae, **options)
        self.sae = SAES[task.architecture](config)
        self._variance = task.variance
        self._put(weights)
        settings = SAETrainerConfig(
            total_training_samples=_NEVER,
            train_batch_size_samples=task.batch,
            lr=task.lr,
            lr_end=task.lr,
            autocast=way == "autocast",
            dead_feature_window=_NEVER,
            logger=LoggingConfig(log_to_wandb=False),
        )
        self._trainer = SAETrainer(settings, self.sae, iter(()))

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        own = dict(self.sae.named_parameters())
        own["W_enc"].copy_(weights["encoder"].T)
        own["W_dec"].copy_(weights["decoder"])
        own["b_dec"].copy_(weights["b_dec"])
        own["b_gate" if "b_gate" in own else "b_enc"].copy_(weights["b_enc"])
        for name in ("threshold", "r_mag", "b_mag"):
            if name in weights:
                own[name].copy_(weights[name])

    def step(self, x: Tensor) -> float:
        """Learn from x [batch, d]; return the loss before it."""
        loss = self._trainer.step(x).loss
        self._trainer.n_training_steps += 1
        return float(loss.detach()) / (self._variance * self._levels)

    def save(self, folder: Path) -> None:
        """Write the SAE as its users load it."""
        self.sae.save_inference_model(folder)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """What it makes of x [n, d] as in training: BatchTopK chooses among all of x."""
        return self.sae(x)
