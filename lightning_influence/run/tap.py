"""The functional losses that a training step calls, and the weight of every sample in their means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class LossTap(TorchFunctionMode):
    """Sees the losses over classes that are called meanwhile; changes nothing.

    Attributes:
        weights: of each call, the weight ``(rows,)`` of every row of its targets in the mean, float64.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []
        self._inside = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.cross_entropy, F.nll_loss) and not self._inside:
            weights = _row_weights(*args, **kwargs)
            if weights is not None:
                self.weights.append(weights)
            self._inside = True  # a cross-entropy may call the other
            try:
                return func(*args, **kwargs)
            finally:
                self._inside = False
        return func(*args, **kwargs)

    def sample_weights(self, n_samples: int) -> Tensor | None:
        """Weights ``(n_samples,)`` of the samples, whose rows lie together; None where no single mean gives them."""
        if len(self.weights) != 1:
            return None
        rows = self.weights[0]
        if len(rows) == 0 or len(rows) % n_samples:
            return None
        weights = rows.view(n_samples, -1).sum(1)
        return weights if float(weights.sum()) > 0 else None


@torch.no_grad()
def _row_weights(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Weight of each row of the targets in a mean; None where the loss is not a mean over classes given by index."""
    if reduction != "mean" or target.is_floating_point() or target.dim() == 0:
        return None
    counted = target != ignore_index
    weights = counted.double()
    if weight is not None:
        weights *= weight.detach().double()[torch.where(counted, target, 0)]
    return weights.flatten(1).sum(1).cpu() if target.dim() > 1 else weights.cpu()


@contextmanager
def tapped(module: LightningModule, tap: Callable[[LossTap], None]) -> Iterator[None]:
    """Give ``tap`` the losses of every training step of a module; several may listen, and leave in any order."""
    present = module.__dict__.get("training_step")
    step = present if isinstance(present, _TappedStep) else _TappedStep(module.training_step, present)
    step.listeners.append(tap)
    object.__setattr__(module, "training_step", step)
    try:
        yield
    finally:
        step.listeners.remove(tap)
        if not step.listeners:
            untap(module)


def untap(module: LightningModule) -> None:
    """Put a module's own training step back; needed of a copy, whose tap would call the step of the original."""
    step = module.__dict__.get("training_step")
    if isinstance(step, _TappedStep):
        object.__delattr__(module, "training_step")
        if step.present is not None:
            object.__setattr__(module, "training_step", step.present)


class _TappedStep:
    """A training step whose losses are seen.

    Attributes:
        present: the attribute of the module that it stands for, where the module had one of its own.
    """

    def __init__(self, step: Callable[..., Any], present: Any) -> None:
        self._step, self.present = step, present
        self.listeners: list[Callable[[LossTap], None]] = []
        update_wrapper(self, step)

    def __deepcopy__(self, memo: Any) -> _TappedStep:
        return self  # it is taken off the copy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with LossTap() as losses:
            output = self._step(*args, **kwargs)
        for tap in self.listeners:
            tap(losses)
        return output
