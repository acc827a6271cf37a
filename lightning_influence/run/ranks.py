"""The processes of a distributed run, as far as influence has to know of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_influence.errors import InfluenceError

_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """One process among those that work on the same.

    Every method has to be called by all of them, in the same order.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"
    """Where the processes exchange tensors."""
    group: Any = None
    """The process group of torch that they form; None for all processes."""
    sharded: bool = False
    """Whether each holds a part of every parameter, of its gradient and of its moments (`sharding`), and none the whole."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes; a new tensor where there are several."""
        if self.size == 1:
            return tensor
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def first(self, value: Any) -> Any:
        """What the first process gives."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, group=self.group, group_src=0)
        return held[0]

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, in their order."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def gather_tensors(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors of each process, in their order; names and shapes may differ from process to process."""
        if self.size == 1:
            return [dict(tensors)]
        home = next((t.device for t in tensors.values()), self.device)
        headers = self.gather({name: (t.shape, t.dtype) for name, t in tensors.items()})
        gathered: list[dict[str, Tensor]] = [{} for _ in headers]
        for dtype in sorted({dtype for one in headers for _, dtype in one.values()}, key=str):
            shapes = [{name: shape for name, (shape, of) in one.items() if of == dtype} for one in headers]
            sizes = [sum(shape.numel() for shape in one.values()) for one in shapes]
            flat = torch.zeros(max(sizes), dtype=dtype, device=self.device)
            for name, place in _split(flat, shapes[self.rank]).items():
                place.copy_(tensors[name])
            parts = [torch.empty_like(flat) for _ in headers]
            dist.all_gather(parts, flat, group=self.group)
            for one, part, named in zip(gathered, parts, shapes, strict=True):
                one |= _split(part.to(home), named)
        return gathered

    def agreed(self, work: Callable[[], _T]) -> _T:
        """What ``work`` gives, where every process can do it; where one cannot, none goes on.

        Raises:
            InfluenceError: of the same kind as another process raised; a RuntimeError in the place of any other exception.
        """
        if self.size == 1:
            return work()
        failed: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failed = error
        kind = type(failed) if isinstance(failed, InfluenceError) else RuntimeError
        reasons = self.gather(None if failed is None else (kind, f"{type(failed).__name__}: {failed}"))
        if failed is not None:
            raise failed
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise reason[0](f"process {rank} of {self.size} failed: {reason[1]}")
        return result

    def wait(self) -> None:
        """Until all of them are here."""
        if self.size > 1:
            dist.barrier(group=self.group)


ALONE = Ranks()
"""One process."""


def _split(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Views of a vector's first coordinates, in these shapes."""
    sizes = [shape.numel() for shape in shapes.values()]
    parts = flat[: sum(sizes)].split(sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
