"""The functional losses that a training step calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_influence.core.torch_function import keywords_of
from lightning_influence.run.losses import LOSSES, Dynamics, Reduction, SeenLoss, seen


class LossTap(TorchFunctionMode):
    """Sees the losses that are called meanwhile; changes nothing.

    Attributes:
        seen: of each call what it says of the samples, in order; None for one whose rows cannot be told apart.
        failure: of looking, which is told to whoever asks rather than raised inside the training step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[SeenLoss | None] = []
        self.failure: Exception | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = keywords_of(func, kwargs)
        output = func(*args, **kwargs)
        if func in LOSSES:
            with torch._C.DisableTorchFunction():  # no other mode is to see this look
                try:
                    self.seen.append(seen(func, args, kwargs))
                except Exception as error:
                    self.failure = error
        return output

    @property
    def single(self) -> SeenLoss | None:
        """The loss, where just one was called.

        Raises:
            Exception: what looking at it raised.
        """
        if self.failure is not None:
            raise self.failure
        return self.seen[0] if len(self.seen) == 1 else None

    @property
    def reduction(self) -> Reduction | None:
        """Whether the one loss was a mean, a sum or neither; None where it was not one."""
        return self.single.reduction if self.single is not None else None

    def sample_weights(self, n_samples: int) -> Tensor | None:
        """Weights ``(n_samples,)`` of the samples, whose rows lie together; None where no single mean gives them."""
        if self.single is None or self.reduction != "mean":
            return None
        weights = self.single.sample_weights(n_samples)
        return weights if weights is not None and float(weights.sum()) > 0 else None

    def dynamics(self, n_samples: int) -> Dynamics | None:
        """Of the ``n_samples`` samples, whose rows lie together; None where there was no single loss over classes."""
        return self.single.dynamics(n_samples) if self.single is not None else None


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
        for tap in list(self.listeners):
            tap(losses)
        return output
