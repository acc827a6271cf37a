"""Whether per-sample gradients add up to the gradient: at every step, on a small block of coordinates of every parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.core.shares import Block, Form

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
        self._blocks = {name: Block.of(p) for name, p in parameters.items()}
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
        sums = torch.cat([shares[name].sum_at(block).flatten() for name, block in self._blocks.items()])
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
        found = (
            {k: block.select(gradients[k].detach()) for k, block in self._blocks.items() if k in gradients}
            if local is None
            else {k: g * scale for k, g in local.items()}
        )
        parts = zip(self._blocks, sums.split([block.size for block in self._blocks.values()]), strict=True)
        return first_disagreement(((k, s, found.get(k)) for k, s in parts), norm)


def first_disagreement(sums: Iterable[tuple[str, Tensor, Tensor | None]], norm: float) -> NotTheSum | None:
    """The first of ``(parameter, sum of shares, gradient)`` in which the two differ; a gradient of None is zero.

    Args:
        norm: of the whole gradient.
    """
    names, rows, half = list[str](), list[Tensor](), list[bool]()
    for name, total, gradient in sums:
        expected = torch.zeros_like(total) if gradient is None else gradient.flatten().to(total.dtype)
        rows.append(
            torch.stack([torch.linalg.vector_norm(total.flatten() - expected), torch.linalg.vector_norm(expected)])
        )
        half.append(gradient is not None and gradient.dtype in (torch.float16, torch.bfloat16))
        names.append(name)
    for name, narrow, (error, size) in zip(names, half, torch.stack(rows).tolist() if rows else [], strict=True):
        if not error <= (_TOLERANCE_HALF if narrow else _TOLERANCE) * size + _NOISE * norm:
            return NotTheSum(name, error / max(size, 1e-30))
    return None
