"""A module's own training step as a plain function of a batch: quiet, at chosen parameters, and reduced to its loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning import LightningModule
from torch import Tensor, nn

from lightning_influence.errors import ConfigurationError
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


@contextmanager
def at_moment(module: LightningModule, epoch: int, global_step: int) -> Iterator[None]:
    """``current_epoch`` and ``global_step`` of the module, and of its trainer, as they were at some step of a run."""
    real = module._trainer
    moment = _Moment(real, epoch, global_step)
    object.__setattr__(module, "_trainer", moment)
    try:
        yield
    finally:
        object.__setattr__(module, "_trainer", real)


class _Moment:
    """A trainer at another moment; everything else is the real one's."""

    def __init__(self, trainer: Any, epoch: int, global_step: int) -> None:
        self._real, self.current_epoch, self.global_step = trainer, epoch, global_step

    def __getattr__(self, name: str) -> Any:
        if self._real is None:
            raise AttributeError(f"the module has no trainer whose {name!r} could be read; attach it to one")
        return getattr(self._real, name)


def eval_modes(module: nn.Module) -> list[str]:
    """Names of the modules that are in eval mode, as `set_modes` takes them."""
    return [name for name, m in module.named_modules() if not m.training]


def set_modes(module: nn.Module, in_eval: Sequence[str]) -> None:
    """Every submodule in train mode, but for some."""
    names = set(in_eval)
    for name, m in module.named_modules():
        m.training = name not in names


def prepared(module: LightningModule, batch: Any) -> Any:
    """A batch as Lightning hands it to the training step: in the trainer's precision, through the batch hooks of the
    datamodule or, where it has none of its own, of the module, and on the module's device.
    """
    trainer = module._trainer
    if trainer is not None:
        batch = trainer.precision_plugin.convert_input(batch)
    batch = _hook(module, "on_before_batch_transfer")(batch, 0)
    batch = _hook(module, "transfer_batch_to_device")(batch, module.device, 0)
    return _hook(module, "on_after_batch_transfer")(batch, 0)


def _hook(module: LightningModule, name: str) -> Callable[..., Any]:
    data = None if module._trainer is None else module._trainer.datamodule  # type: ignore[attr-defined]
    return getattr(data if data is not None and overrides(data, name) else module, name)


def training_loss(module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """The loss of the module's own training step, whichever of Lightning's signatures it has.

    Raises:
        ConfigurationError: no scalar loss in what it returned.
    """
    step = module.training_step
    names = [p for p in inspect.signature(step).parameters.values() if p.kind != p.VAR_KEYWORD]
    takes_index = len(names) > 1 or any(p.kind == p.VAR_POSITIONAL for p in names)
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
