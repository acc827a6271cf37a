"""Whether per-sample gradients add up to the gradient: at every step, on a small block of coordinates of every parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.core.shares import CoordinateBlock, Form

_TOLERANCE = 0.02  # relative; half-precision backward passes round at 2^-8
_TOLERANCE_HALF = 0.1  # of gradients that are themselves in half precision, which are summed in it
_NOISE = 1e-6  # relative to the whole gradient: what single precision leaves of a sum that cancels


@dataclass(frozen=True)
class NotTheSum:
    """A parameter whose per-sample gradients do not add up to its gradient, and the relative error."""

    parameter: str
    error: float


class SumCheck:
    """Holds the sum of per-sample gradients against the gradient of a step, micro-batch by micro-batch.

    Args:
        parameters: by name, as the shares are.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._blocks = {name: CoordinateBlock.of(p) for name, p in parameters.items()}
        self._sums: Tensor | None = None
        self._local: dict[str, Tensor] | None = None  # gradients of this process alone

    def watch_local(self) -> list[Any]:
        """From now on hold sums against the gradients that this process contributes, before they are averaged with those of
        others; the handles undo it.
        """
        self._local = {}
        return [
            p.register_post_accumulate_grad_hook(partial(self._note, name))  # type: ignore[attr-defined]
            for name, p in self._parameters.items()
            if isinstance(p, nn.Parameter) and p.requires_grad
        ]

    def _note(self, name: str, parameter: Tensor) -> None:
        assert self._local is not None and parameter.grad is not None
        self._local[name] = self._blocks[name].select(parameter.grad.detach()).clone()

    def forget(self) -> None:
        """Gradients have been cleared."""
        self._sums = None
        if self._local is not None:
            self._local = {}

    def add(self, shares: Mapping[str, Form]) -> None:
        """The shares of a micro-batch, by parameter, all of them."""
        sums = block_sums(self._blocks, shares)
        self._sums = sums if self._sums is None else self._sums + sums

    def disagreement(self, gradients: Mapping[str, Tensor], norm: float, scale: float = 1.0) -> NotTheSum | None:
        """Of the sums that were added since the last time.

        Args:
            gradients: of the step, by parameter; none where it had none.
            norm: of the whole gradient.
            scale: by which the gradients of this process alone have to be multiplied.
        """
        sums, local = self._sums, self._local
        self.forget()
        if sums is None:
            return None
        on_blocks = (
            {k: block.select(gradients[k].detach()) for k, block in self._blocks.items() if k in gradients}
            if local is None
            else {k: g * scale for k, g in local.items()}
        )
        return first_disagreement(self._blocks, sums, on_blocks, norm)


def first_disagreement(
    blocks: Mapping[str, CoordinateBlock], sums: Tensor, gradients: Mapping[str, Tensor], norm: float
) -> NotTheSum | None:
    """The first parameter of whose gradient, on its block, the sum of shares is another.

    Args:
        sums: on the blocks, one after the other.
        gradients: on the blocks; a missing one is zero.
        norm: of the whole gradient.
    """
    sizes = [block.size for block in blocks.values()]
    expected = torch.cat(
        [
            gradients[k].flatten().to(sums) if k in gradients else sums.new_zeros(size)
            for k, size in zip(blocks, sizes, strict=True)
        ]
    )
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(sums.device)
    squared = torch.stack([sums - expected, expected]).square()
    errors, norms = squared.new_zeros(2, len(sizes)).index_add_(1, owner, squared).sqrt().tolist()
    for name, error, size in zip(blocks, errors, norms, strict=True):
        half = name in gradients and gradients[name].dtype in (torch.float16, torch.bfloat16)
        if not error <= (_TOLERANCE_HALF if half else _TOLERANCE) * size + _NOISE * norm:
            return NotTheSum(name, error / max(size, 1e-30))
    return None


def block_sums(blocks: Mapping[str, CoordinateBlock], shares: Mapping[str, Form]) -> Tensor:
    """Sums of shares on the blocks, one after the other."""
    return torch.cat([shares[name].sum_at(block).flatten() for name, block in blocks.items()])
