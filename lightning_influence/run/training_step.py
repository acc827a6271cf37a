"""A module's own training step as a plain function of a batch: quiet, at chosen parameters, and reduced to its loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning import LightningModule
from torch import Tensor

from lightning_influence.errors import ConfigurationError

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
