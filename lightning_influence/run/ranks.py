"""The processes of a distributed run, as far as influence has to know of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Ranks:
    """One process among those that average their gradients.

    Every method has to be called by all of them, in the same order.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"
    """Where the processes exchange tensors."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes; a new tensor where there are several."""
        if self.size == 1:
            return tensor
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def first(self, value: Any) -> Any:
        """What the first process gives."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held)
        return held[0]

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, in their order."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def wait(self) -> None:
        """Until all of them are here."""
        if self.size > 1:
            dist.barrier()
