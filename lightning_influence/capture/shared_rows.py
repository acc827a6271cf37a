"""Rows that a layer computes once for all samples, such as the embeddings of positions, followed to where they are added.

Such a row is broadcast over the batch by the addition that uses it, and the gradient that reaches the layer is already
summed over the samples. The gradient of the *sum* is not: it has a row for each sample, which is the sample's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_influence.core.torch_function import keywords_of

_ADDITIONS = {
    torch.add,
    Tensor.add,
    Tensor.add_,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.__iadd__,
}


class SharedRows(TorchFunctionMode):
    """Sees the additions that broadcast shared rows over the batch; changes nothing.

    Args:
        n_samples: of the batch.
    """

    def __init__(self, n_samples: int) -> None:
        super().__init__()
        self._n = n_samples
        self._gradients: dict[int, list[Tensor]] = {}
        self._rows: dict[int, Tensor] = {}  # held, so that no other tensor takes their place in memory

    def follow(self, rows: Tensor) -> int:
        """Look for additions of ``rows`` ``(1, ...)``; by what is returned their gradient is asked for."""
        self._rows[id(rows)] = rows
        return id(rows)

    def gradient_of(self, rows: int, total: Tensor) -> Tensor:
        """The gradient ``(n, ...)`` of every sample, from the ``total`` ``(1, ...)`` that reached the rows.

        What came through something else than an addition (a term of the loss that no sample brings or takes with it, say)
        is shared equally.
        """
        contributions = self._gradients.pop(rows, [])
        each = torch.stack(contributions).sum(0) if contributions else total.new_zeros(self._n, *total.shape[1:])
        rest = total - each.sum(0, keepdim=True)
        if contributions and rest.norm() <= 1e-4 * each.norm():  # rounding
            return each
        return each + rest / self._n

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = keywords_of(func, kwargs)
        result = func(*args, **kwargs)
        if self._rows and func in _ADDITIONS and not kwargs:
            shared = [id(arg) for arg in args[:2] if id(arg) in self._rows]
            if len(shared) == 1 and self._broadcasts(result, self._rows[shared[0]]):
                result.register_hook(partial(_note, self._gradients.setdefault(shared[0], [])))
        return result

    def _broadcasts(self, result: Any, rows: Tensor) -> bool:
        return (
            isinstance(result, Tensor)
            and result.requires_grad
            and result.shape[1:] == rows.shape[1:]
            and len(result) == self._n
        )


def _note(gradients: list[Tensor], gradient: Tensor) -> None:
    """Detached: a hook that holds a part of the graph that it hangs on is never freed."""
    gradients.append(gradient.detach())
