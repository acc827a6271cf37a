"""A LightningModule as a `Task`: its own training step is the loss, its batch hooks prepare a batch.

Nothing else in the rooms below `lightning` knows what a LightningModule is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import update_wrapper
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from lightning_influence.errors import ConfigurationError
from lightning_influence.run.batches import copied, to_dtype
from lightning_influence.run.lightning_names import is_a, overrides
from lightning_influence.run.losses import scalar_loss
from lightning_influence.run.moment import Moment, numbers_at
from lightning_influence.run.parameters import copy_sharing_parameters
from lightning_influence.run.tap import LossTap
from lightning_influence.run.unchanged import unchanged

if TYPE_CHECKING:
    from lightning import LightningModule

_LOGGING = ("log", "log_dict")


class LightningTask:
    """A `LightningModule` as a `Task`."""

    def __init__(self, module: LightningModule) -> None:
        self.module = module

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def step_name(self) -> str:
        return f"{type(self.module).__name__}.training_step"

    def loss(self, batch: Any, moment: Moment | None = None) -> Tensor:
        if moment is None:
            return training_loss(self.module, batch, 0)
        with at_moment(self.module, moment):
            return training_loss(self.module, batch, moment.batch_idx)

    def prepared(
        self, batch: Any, *, moment: Moment | None = None, datamodule: Any = None, precision: str | None = None
    ) -> Any:
        with nullcontext() if moment is None else at_moment(self.module, moment):
            return prepared(self.module, batch, datamodule=datamodule, precision=precision)

    def to_device(self, batch: Any) -> Any:
        return self.module.transfer_batch_to_device(batch, self.module.device, 0)

    def quiet(self) -> AbstractContextManager[None]:
        return quiet(self.module)

    def unchanged(self) -> AbstractContextManager[None]:
        return unchanged(self.module, _datamodule_of(self.module))

    def twin(self) -> LightningTask | None:
        trainer = self.module._trainer
        copy = copy_sharing_parameters(self.module, also=trainer)
        if copy is None:
            return None
        untap(copy)
        if trainer is not None and trainer.world_size == 1:  # of several processes, each tries steps alone
            object.__setattr__(copy, "_trainer", trainer)
        return self.on(copy)

    def on(self, module: nn.Module) -> LightningTask:
        return LightningTask(module)  # type: ignore[arg-type]

    def optimizer(self) -> torch.optim.Optimizer:
        return _only_optimizer(self.module.configure_optimizers())


def _datamodule_of(module: LightningModule) -> Any:
    """The one that the user wrote, which another may wrap."""
    datamodule = getattr(module._trainer, "datamodule", None)
    wrapped = getattr(datamodule, "__dict__", {}).get("data")
    return wrapped if is_a(wrapped, "LightningDataModule") else datamodule


@contextmanager
def _unheard(module: LightningModule) -> Iterator[None]:
    """Who listens to the training step hears nothing."""
    step = module.__dict__.get("training_step")
    listened = step if isinstance(step, _TappedStep) else None
    listeners = [] if listened is None else listened.listeners
    if listened is not None:
        listened.listeners = []
    try:
        yield
    finally:
        if listened is not None:
            listened.listeners = listeners


@contextmanager
def quiet(module: LightningModule) -> Iterator[None]:
    """``self.log`` and ``self.log_dict`` do nothing, with or without a trainer attached, loggers are dummies, and
    nobody is told the losses of the training step, since it is not the run's own.
    """
    before = {name: module.__dict__[name] for name in _LOGGING if name in module.__dict__}
    for name in _LOGGING:
        object.__setattr__(module, name, _ignore)
    real = module._trainer
    if real is not None:
        dummies = {"logger": real.logger and DummyLogger(), "loggers": [DummyLogger() for _ in real.loggers]}
        object.__setattr__(module, "_trainer", _Beside(real, dummies))
    try:
        with _unheard(module):
            yield
    finally:
        object.__setattr__(module, "_trainer", real)
        for name in _LOGGING:
            object.__delattr__(module, name)
        module.__dict__.update(before)


@contextmanager
def at_moment(module: LightningModule, moment: Moment) -> Iterator[None]:
    """What a training step reads of its trainer, and the module's own plain numbers, as they were at some step of a run."""
    real = module._trainer
    object.__setattr__(module, "_trainer", _TrainerAt(real, moment))
    try:
        with numbers_at(module, moment.numbers):
            yield
    finally:
        object.__setattr__(module, "_trainer", real)


class _Beside:
    """An object of the run in which some attributes are others; what is set stays here.

    Args:
        real: whose all other attributes are; None where there is none.
        instead: the others, by name.
        what: it is, for messages.
    """

    def __init__(self, real: Any, instead: Mapping[str, Any], what: str = "trainer") -> None:
        vars(self).update(instead, _real=real, _what=what)

    def __getattr__(self, name: str) -> Any:
        if self._real is None:
            raise AttributeError(f"the module has no {self._what} whose {name!r} could be read; attach it to a trainer")
        return getattr(self._real, name)


class _TrainerAt(_Beside):
    """A trainer, or none, at another moment: its counters and numbers, and the learning rates of its optimizer."""

    def __init__(self, trainer: Any, moment: Moment) -> None:
        counters = {"current_epoch": moment.epoch, "global_step": moment.global_step}
        loggers = {} if trainer is not None else {"logger": DummyLogger(), "loggers": [DummyLogger()]}
        super().__init__(trainer, {**loggers, **moment.trainer, **counters})
        self._rates = moment.rates

    @property
    def optimizers(self) -> list[Any]:
        real = [] if self._real is None else self._real.optimizers
        return [_optimizer_at(real[0] if real else None, self._rates)] if self._rates else real

    @property
    def strategy(self) -> Any:
        real = None if self._real is None else self._real.strategy
        return _Beside(real, {"_lightning_optimizers": self.optimizers}, "strategy")

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        schedulers = [None] if self._real is None else [c.scheduler for c in self._real.lr_scheduler_configs]
        replaced = {"get_last_lr": lambda: list(self._rates)} if self._rates else {}
        return [SimpleNamespace(scheduler=_Beside(s, replaced, "scheduler")) for s in schedulers]


def _optimizer_at(real: torch.optim.Optimizer | None, rates: Sequence[float]) -> torch.optim.Optimizer:
    """An optimizer of nothing, with the groups of another at other learning rates."""
    optimizer = torch.optim.SGD([{"params": [torch.zeros(0)], "lr": rate} for rate in rates])
    for group, own in zip(optimizer.param_groups, [] if real is None else real.param_groups, strict=False):
        group.update({k: v for k, v in own.items() if k not in ("params", "lr")})
    return optimizer


CONVERTED = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
"""Precisions of a trainer under which batches are converted before they reach the module."""


@contextmanager
def default_dtype(module: Any, precision: str | None = None) -> Iterator[None]:
    """What a step makes itself (``torch.zeros``, ``torch.rand``) has the type that it has under a trainer of some precision; by
    default that of the module's trainer.
    """
    named = str(getattr(getattr(module, "_trainer", None), "precision", None)) if precision is None else precision
    before = torch.get_default_dtype()
    torch.set_default_dtype(CONVERTED.get(named, before))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def prepared(module: LightningModule, batch: Any, *, datamodule: Any = None, precision: str | None = None) -> Any:
    """A batch as Lightning hands it to the training step: converted to the trainer's precision, through the hooks of batch
    transfer, on the module's device. The batch that is given stays as it is, also where a hook writes into it.

    Args:
        datamodule: whose hooks win over the module's where it overrides them; by default that of the module's trainer.
        precision: of the run; by default that of the module's trainer.
    """
    trainer = module._trainer
    datamodule = getattr(trainer, "datamodule", None) if datamodule is None else datamodule
    plugin = getattr(trainer, "precision_plugin", None)
    batch = copied(batch)
    if precision in CONVERTED:
        batch = to_dtype(batch, CONVERTED[precision])
    elif precision is None and plugin is not None:
        batch = plugin.convert_input(batch)
    hooks = {
        name: getattr(datamodule if datamodule is not None and overrides(datamodule, name) else module, name)
        for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    }
    batch = hooks["on_before_batch_transfer"](batch, 0)
    batch = hooks["transfer_batch_to_device"](batch, module.device, 0)
    return hooks["on_after_batch_transfer"](batch, 0)


def training_loss(module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """The loss of the module's own training step, whichever of Lightning's signatures it has.

    Raises:
        ConfigurationError: no scalar loss in what it returned.
    """
    step = module.training_step
    names = [p for p in inspect.signature(step).parameters.values() if p.kind != p.VAR_KEYWORD]
    takes_index = len(names) > 1 or any(p.kind == p.VAR_POSITIONAL for p in names)
    batch = copied(batch)
    return loss_of(step(batch, batch_idx) if takes_index else step(batch))


def _ignore(*_: Any, **__: Any) -> None:
    pass


def loss_of(output: Any) -> Tensor:
    """The loss in what a training step returned: itself, or under the key ``loss``.

    Raises:
        ConfigurationError: no scalar loss in it.
    """
    return scalar_loss(output.get("loss") if isinstance(output, Mapping) else output, "training_step")


def _only_optimizer(configured: Any) -> torch.optim.Optimizer:
    """The optimizer in any of the forms that ``configure_optimizers`` may return."""
    if isinstance(configured, torch.optim.Optimizer):
        return configured
    if isinstance(configured, dict):
        return _only_optimizer(configured["optimizer"])
    if isinstance(configured, (list, tuple)) and configured:
        first = configured[0]
        inner = first if isinstance(first, (list, tuple)) else [first]
        if len(inner) == 1:
            return _only_optimizer(inner[0])
    raise ConfigurationError(f"configure_optimizers returned {configured!r}; retraining follows a single optimizer.")


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
        if not self.listeners:
            return self._step(*args, **kwargs)
        with LossTap() as losses:
            output = self._step(*args, **kwargs)
        for tap in list(self.listeners):
            tap(losses)
        return output
