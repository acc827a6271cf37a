"""A module's own training step as a plain function of a batch: quiet, at chosen parameters, and reduced to its loss."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from lightning_influence.errors import ConfigurationError
from lightning_influence.run.batches import copied, to_dtype
from lightning_influence.run.lightning_names import overrides

_LOGGING = ("log", "log_dict")


@contextmanager
def quiet(module: LightningModule) -> Iterator[None]:
    """``self.log`` and ``self.log_dict`` do nothing, with or without a trainer attached."""
    before = {name: module.__dict__[name] for name in _LOGGING if name in module.__dict__}
    for name in _LOGGING:
        object.__setattr__(module, name, _ignore)
    try:
        yield
    finally:
        for name in _LOGGING:
            object.__delattr__(module, name)
        module.__dict__.update(before)


@contextmanager
def parameters_at(module: LightningModule, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with other values in its parameters meanwhile; they and their gradients are afterwards as they were."""
    own = {k: p for k, p in module.named_parameters() if k in values}
    before = {k: (p.data, p.grad) for k, p in own.items()}
    for k, p in own.items():
        p.data = values[k].to(p).view_as(p)  # nothing is copied
    try:
        yield
    finally:
        for k, (data, gradient) in before.items():
            own[k].data, own[k].grad = data, gradient


@contextmanager
def placed(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The module with other tensors in the place of its parameters and buffers, by name; tied ones everywhere.

    Nothing is copied, and autograd sees the tensors that are given. Yields the tensors by name; after the block it
    holds those that the module then had, since a buffer may have been assigned anew.
    """
    owners = {k: _owner(module, k) for k in values}
    originals = {k: owner[name] for k, (owner, name) in owners.items()}
    ids = {id(t): k for k, t in originals.items()}
    every = [
        (table, name, ids[id(t)])
        for m in module.modules()
        for table in (m._parameters, m._buffers)
        for name, t in table.items()
        if t is not None and id(t) in ids
    ]
    before = [(table, name, table[name]) for table, name, _ in every]
    inside = dict(values)
    for table, name, k in every:
        table[name] = values[k]  # type: ignore[assignment]
    try:
        yield inside
    finally:
        for k, (owner, name) in owners.items():
            now = owner[name]
            assert now is not None
            inside[k] = now
        for table, name, tensor in before:
            table[name] = tensor  # type: ignore[assignment]


def _owner(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    path, _, local = name.rpartition(".")
    owner = module.get_submodule(path)
    return (owner._parameters if local in owner._parameters else owner._buffers), local


@dataclass(frozen=True)
class Moment:
    """What a training step reads besides its batch.

    Attributes:
        batch_idx: its argument.
        epoch, global_step: of the trainer.
        in_eval: names of the modules that are in eval mode.
        numbers: plain numbers that the modules keep as attributes (a counter, a weight that follows the epoch), by
            ``<module>:<attribute>``.
    """

    batch_idx: int = 0
    epoch: int = 0
    global_step: int = 0
    in_eval: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def now(cls, trainer: Any, module: nn.Module, batch_idx: int = 0) -> Moment:
        """The present one."""
        return cls(batch_idx, trainer.current_epoch, trainer.global_step, eval_modes(module), numbers_of(module))


@contextmanager
def at_moment(module: LightningModule, moment: Moment) -> Iterator[None]:
    """``current_epoch`` and ``global_step`` of the module, and of its trainer, and its own plain numbers, as they were at some
    step of a run.
    """
    real, numbers = module._trainer, numbers_of(module)
    object.__setattr__(module, "_trainer", _TrainerAt(real, moment))
    _set_numbers(module, moment.numbers)
    try:
        yield
    finally:
        object.__setattr__(module, "_trainer", real)
        _set_numbers(module, numbers)


class _TrainerAt:
    """A trainer at another moment; everything else is the real one's."""

    def __init__(self, trainer: Any, moment: Moment) -> None:
        self._real, self.current_epoch, self.global_step = trainer, moment.epoch, moment.global_step

    def __getattr__(self, name: str) -> Any:
        if self._real is None:
            raise AttributeError(f"the module has no trainer whose {name!r} could be read; attach it to one")
        return getattr(self._real, name)


_LIBRARIES = {"torch", "torchmetrics", "lightning", "pytorch_lightning", "transformers", "peft", "timm"}
"""Whose modules keep settings in their attributes, and nothing that changes from step to step."""


def numbers_of(module: nn.Module) -> dict[str, float]:
    """Plain numbers among the attributes of a module and its submodules, by ``<module>:<attribute>``."""
    return {
        f"{path}:{name}": value
        for path, m in module.named_modules()
        if type(m).__module__.partition(".")[0] not in _LIBRARIES
        for name, value in vars(m).items()
        if type(value) in (bool, int, float) and name != "training" and math.isfinite(value)
    }


def _set_numbers(module: nn.Module, numbers: Mapping[str, float]) -> None:
    owners = dict(module.named_modules())
    for key, value in numbers.items():
        path, _, name = key.rpartition(":")
        if path in owners and name in vars(owners[path]):
            object.__setattr__(owners[path], name, value)


def eval_modes(module: nn.Module) -> tuple[str, ...]:
    """Names of the modules that are in eval mode, as `set_modes` takes them."""
    return tuple(name for name, m in module.named_modules() if not m.training)


def set_modes(module: nn.Module, in_eval: Sequence[str]) -> None:
    """Every submodule in train mode, but for some."""
    names = set(in_eval)
    for name, m in module.named_modules():
        m.training = name not in names


_CONVERTED = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
"""Precisions of a trainer under which batches are converted before they reach the module."""


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
    if precision in _CONVERTED:
        batch = to_dtype(batch, _CONVERTED[precision])
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
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(output).__name__
        raise ConfigurationError(
            f"training_step returned {found}; influence needs a scalar loss, or a dict with one under 'loss'."
        )
    return loss.squeeze()
