"""What is trained, as everything else sees it: a `Task` is a module, the loss of a batch, and how a batch gets to the module.

Recording, replay, attribution and retraining ask a task and never the framework that trained it. `LightningTask` is a
`LightningModule` as a task, `FunctionTask` a plain module with a function for its loss.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_influence.errors import ConfigurationError
from lightning_influence.run.batches import copied, to_device
from lightning_influence.run.lightning_names import is_a
from lightning_influence.run.lightning_task import LightningTask
from lightning_influence.run.losses import scalar_loss
from lightning_influence.run.moment import Moment, numbers_at
from lightning_influence.run.parameters import copy_sharing_parameters
from lightning_influence.run.unchanged import unchanged


@runtime_checkable
class Task(Protocol):
    """What is trained.

    The optimizer belongs to a run and not to the task: a log holds what its groups said at every step. Only training again
    from the start makes one.
    """

    @property
    def module(self) -> nn.Module:
        """Whose parameters train."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    @property
    def step_name(self) -> str:
        """What computes the loss, for messages."""

    def loss(self, batch: Any, moment: Moment | None = None) -> Tensor:
        """The scalar training loss of a batch as `prepared` gives it, at the module's present parameters, buffers and modes.

        Args:
            moment: of a run, whose modes are not set; None for the present one.

        Raises:
            ConfigurationError: the loss is not a scalar.
        """

    def prepared(
        self, batch: Any, *, moment: Moment | None = None, datamodule: Any = None, precision: str | None = None
    ) -> Any:
        """A batch of a loader as `loss` takes it, on the module's device.

        Args:
            moment: as of `loss`.
            datamodule: that gave the batch, where one did.
            precision: of the run, by Lightning's names; None for the present one.
        """

    def to_device(self, batch: Any) -> Any:
        """A prepared batch that was stored, on the module's device."""

    def quiet(self) -> AbstractContextManager[None]:
        """Losses that are computed meanwhile are not logged."""

    def unchanged(self) -> AbstractContextManager[None]:
        """Whatever is reachable from the module is afterwards as it was."""

    def twin(self) -> Task | None:
        """The same on a copy of the module that shares its parameters, so that metrics, counters and buffers of the module stay
        as they are; None where the module cannot be copied.
        """

    def on(self, module: nn.Module) -> Task:
        """The same for another module of the same kind."""

    def optimizer(self) -> torch.optim.Optimizer:
        """A new optimizer of the module's parameters, as training begins with.

        Raises:
            ConfigurationError: there is none, or several.
        """


class FunctionTask:
    """A plain module whose loss is a function, as a `Task`.

    Args:
        module: whose parameters train.
        loss: ``loss(module, batch) -> scalar``, the training loss of a batch. It must read parameters from the module that
            it is given, and run under autocast by itself where training does.
        optimizer: ``optimizer(module)`` gives a new optimizer of the module's parameters; only retraining needs it.

    Example:
        >>> task = FunctionTask(nn.Linear(2, 1), lambda module, batch: module(batch[0]).square().mean())
        >>> task.loss([torch.zeros(4, 2)]).shape
        torch.Size([])
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        *,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    ) -> None:
        self.module, self._loss, self._optimizer = module, loss, optimizer

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.module.parameters())
        return f"FunctionTask({type(self.module).__name__} of {n:,} parameters; {self.step_name.removeprefix('the ')})"

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    @property
    def step_name(self) -> str:
        return f"the loss function {getattr(self._loss, '__name__', type(self._loss).__name__)}"

    def loss(self, batch: Any, moment: Moment | None = None) -> Tensor:
        with nullcontext() if moment is None else numbers_at(self.module, moment.numbers):
            return scalar_loss(self._loss(self.module, copied(batch)), self.step_name)

    def prepared(
        self, batch: Any, *, moment: Moment | None = None, datamodule: Any = None, precision: str | None = None
    ) -> Any:
        return self.to_device(batch)

    def to_device(self, batch: Any) -> Any:
        return to_device(batch, self.device)

    def quiet(self) -> AbstractContextManager[None]:
        return nullcontext()

    def unchanged(self) -> AbstractContextManager[None]:
        return unchanged(self.module)

    def twin(self) -> FunctionTask | None:
        copy = copy_sharing_parameters(self.module)
        return None if copy is None else self.on(copy)

    def on(self, module: nn.Module) -> FunctionTask:
        return FunctionTask(module, self._loss, optimizer=self._optimizer)

    def optimizer(self) -> torch.optim.Optimizer:
        if self._optimizer is None:
            raise ConfigurationError(
                "training again needs an optimizer; give FunctionTask(module, loss, optimizer=function of the module that "
                "makes one)."
            )
        return self._optimizer(self.module)


def as_task(model: Any) -> Task:
    """A task from a `LightningModule`, or one as it is.

    Raises:
        ConfigurationError: neither.
    """
    if is_a(model, "LightningModule"):
        return LightningTask(model)
    if isinstance(model, Task):
        return model
    raise ConfigurationError(
        f"model is a {type(model).__name__}; give the LightningModule that was trained, or FunctionTask(module, loss) where a "
        "loop of your own trained it."
    )
