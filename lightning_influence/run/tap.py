"""The functional losses that a training step calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_influence.core.torch_function import keywords_of
from lightning_influence.run.losses import LOSSES, Dynamics, Reduction, SeenLoss, seen


class LossTap(TorchFunctionMode):
    """Sees the losses that are called meanwhile; changes nothing.

    Args:
        labels: look at the labels, too, for the training dynamics.

    Attributes:
        seen: of each call what it says of the samples, in order; None for one whose rows cannot be told apart.
        failure: of looking, which is told to whoever asks rather than raised inside the training step.
    """

    def __init__(self, *, labels: bool = True) -> None:
        super().__init__()
        self._labels = labels
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
                    self.seen.append(seen(func, args, kwargs, labels=self._labels))
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
