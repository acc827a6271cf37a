"""What a training step reads besides its batch and its parameters: when it runs, and the modes and numbers of its modules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Moment:
    """What a training step reads besides its batch.

    Attributes:
        batch_idx: its argument.
        epoch, global_step: of the run.
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
    def of(cls, module: nn.Module, batch_idx: int = 0, epoch: int = 0, global_step: int = 0) -> Moment:
        """With the present modes and numbers of a module."""
        return cls(batch_idx, epoch, global_step, eval_modes(module), numbers_of(module))


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


@contextmanager
def numbers_at(module: nn.Module, numbers: Mapping[str, float]) -> Iterator[None]:
    """The module with other plain numbers in its attributes meanwhile."""
    before = numbers_of(module)
    _set_numbers(module, numbers)
    try:
        yield
    finally:
        _set_numbers(module, before)


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
