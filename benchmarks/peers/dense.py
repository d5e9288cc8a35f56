"""A plain dense loop in torch: autograd and fused Adam."""

import torch
import torch.nn.functional as F
from peers.task import Task
from torch import Tensor


class Dense:
    """TopK or BatchTopK as most people would write it down."""

    def __init__(self, task: Task, weights: dict[str, Tensor]) -> None:
        self._task = task
        names = ("encoder", "b_enc", "decoder", "b_dec")
        self._weights = [weights[name].clone().requires_grad_() for name in names]
        self._optimiser = torch.optim.Adam(self._weights, lr=task.lr, fused=True)

    def step(self, x: Tensor) -> float:
        """Learn from x [batch, d]; return the loss before it."""
        encoder, b_enc, decoder, b_dec = self._weights
        pre = F.linear(x - b_dec, encoder, b_enc).relu()
        if self._task.architecture == "topk":
            best = pre.topk(self._task.k, dim=-1, sorted=False)
            code = torch.zeros_like(pre).scatter(-1, best.indices, best.values)
        else:
            flat = pre.flatten()
            best = flat.topk(self._task.k * len(x), sorted=False)
            code = torch.zeros_like(flat).scatter(0, best.indices, best.values).view_as(pre)
        loss = (code @ decoder + b_dec - x).square().sum(-1).mean() / self._task.variance
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        return float(loss)
