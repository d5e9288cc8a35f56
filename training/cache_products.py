"""Float32 products on a CPU by the faster of the two libraries in torch.

torch multiplies float32 matrices with MKL, which takes its AVX2 kernels on processors that aren't
Intel's. oneDNN's float32 kernels take AVX-512 wherever it is: they compute the same products,
summed up in another order, in about half the time there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Within it, the model's float32 linear layers are multiplied by oneDNN, where that is faster.

    Results differ from those outside by rounding alone. For passes without gradients.
    """
    linear = _onednn_linear()
    if linear is None:
        yield
        return
    # A module whose `forward` somebody has replaced already is left to them.
    changed = [
        module
        for module in model.modules()
        if type(module) in (nn.Linear, Conv1D)
        and "forward" not in vars(module)
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
    ]
    try:
        for module in changed:
            vars(module)["forward"] = _forward(module, linear)
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)


def _forward(module: Any, linear: Linear) -> Callable[[Tensor], Tensor]:
    # GPT-2's Conv1D keeps its weight [in, out].
    weight: Tensor = module.weight.t() if isinstance(module, Conv1D) else module.weight
    bias: Tensor | None = module.bias

    def forward(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:  # autocast
            return type(module).forward(module, x)
        return linear(x, weight, bias)

    return forward


def _onednn_linear() -> Linear | None:
    """oneDNN's linear layer, where this torch has it and the processor gains from it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.enabled:
        return None
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operator is None:
        return None
    return lambda x, weight, bias: operator(x, weight, bias, "none", [], "")
