"""What a mode is told of the call that it is asked about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_influence.core.torch_function import keywords_of


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **keywords_of(func, kwargs))


def test_losses_under_a_mode_are_those_without() -> None:
    torch.manual_seed(0)
    x, y, w = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3)
    losses: list[Callable[[], torch.Tensor]] = [
        lambda: F.l1_loss(x, y, weight=w),
        lambda: F.l1_loss(x, y, reduction="sum"),
        lambda: F.mse_loss(x, y, weight=w),
        lambda: F.huber_loss(x, y, delta=0.5),
        lambda: F.cross_entropy(x, y.argmax(1), weight=w[0]),
    ]
    for loss in losses:
        expected = loss()
        with Watching():
            seen = loss()
        assert torch.equal(seen, expected)
