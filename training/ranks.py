"""The processes that train together: one by itself, or those that torchrun started."""

import atexit
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from saesteer.errors import TrainingError


@dataclass(frozen=True)
class Ranks:
    """This process among `size` of them; every method is a no-op where it is alone.

    All processes must call the same methods in the same order.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes what is written once."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor, by rank; their first dimensions may differ."""
        if self.size == 1:
            return [tensor]
        length = torch.tensor([len(tensor)], device=tensor.device)
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length)
        most = max(int(each) for each in lengths)
        padded = tensor.new_zeros(most, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        found = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(found, padded)
        return [each[: int(n)] for each, n in zip(found, lengths, strict=True)]

    def objects(self, value: Any) -> list[Any]:
        """Every process's value (anything picklable), by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until every process is here."""
        self.objects(None)


# One process by itself.
ALONE = Ranks()


def join(device: str) -> tuple[Ranks, str]:
    """Join the processes that torchrun started, if it did; say on which device to work.

    Args:
        device: "cpu", "cuda", …; a bare "cuda" becomes this process's own GPU.

    Raises:
        TrainingError: torchrun's variables are there and the processes don't find one another.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE, device
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        except (RuntimeError, ValueError) as error:
            raise TrainingError(
                f"the {size} processes of torchrun could not join: {' '.join(str(error).split())}; "
                "check MASTER_ADDR and MASTER_PORT, and that all of them run"
            ) from error
        # Else gloo's threads abort the process as it ends, and torchrun then ends all the others.
        atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), size), device
