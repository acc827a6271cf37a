"""What a training step reads besides its batch and its parameters: when it runs, and the modes and numbers of its modules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_influence.run.sharding import MARKS, class_of


@dataclass(frozen=True)
class Moment:
    """What a training step reads besides its batch.

    Attributes:
        batch_idx: its argument.
        epoch, global_step: of the run.
        in_eval: names of the modules that are in eval mode.
        numbers: plain numbers that the modules keep as attributes (a counter, a weight that follows the epoch), as of
            `numbers_of`.
        rates: learning rates of the optimizer's groups; none where they are not known.
        trainer: plain numbers of the run's trainer, by the names of its attributes.
    """

    batch_idx: int = 0
    epoch: int = 0
    global_step: int = 0
    in_eval: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    trainer: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, batch_idx: int = 0, epoch: int = 0, global_step: int = 0) -> Moment:
        """With the present modes and numbers of a module."""
        return cls(batch_idx, epoch, global_step, eval_modes(module), numbers_of(module))


_SMALL = 16  # numbers in a dict that may be settings rather than a history
_LIBRARIES = {"torch", "torchmetrics", "lightning", "pytorch_lightning", "transformers", "peft", "timm"}
"""Whose modules keep settings in their attributes, and nothing that changes from step to step."""


def numbers_of(module: nn.Module) -> dict[str, float]:
    """Plain numbers among the attributes of a module and its submodules, by ``<module>:<attribute>``, and in dicts among them, by
    ``<module>:<attribute>/<key>``.
    """
    return {f"{path}:{name}": value for path, m in _own_modules(module) for name, _, value in _numbers_in(m)}


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
    for path, m in _own_modules(module):
        for name, holder, value in list(_numbers_in(m)):
            recorded = numbers.get(f"{path}:{name}", value)
            if recorded != value or type(recorded) is not type(value):
                holder[name.rpartition("/")[2]] = recorded


def _own_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    named = module.named_modules()
    return ((path, m) for path, m in named if class_of(m).__module__.partition(".")[0] not in _LIBRARIES)


def _numbers_in(module: nn.Module) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Name, where it is kept, and value."""
    attributes = vars(module)
    dicts = [(f"{k}/", v) for k, v in attributes.items() if type(v) is dict and not k.startswith("_")]
    for prefix, held in (("", attributes), *((prefix, d) for prefix, d in dicts if len(d) <= _SMALL)):
        for name, value in held.items():
            plain = type(value) in (bool, int, float) and type(name) is str and "/" not in name
            if plain and name != "training" and name not in MARKS and math.isfinite(value):
                yield f"{prefix}{name}", held, value


def eval_modes(module: nn.Module) -> tuple[str, ...]:
    """Names of the modules that are in eval mode, as `set_modes` takes them."""
    return tuple(name for name, m in module.named_modules() if not m.training)


def set_modes(module: nn.Module, in_eval: Sequence[str]) -> None:
    """Every submodule in train mode, but for some."""
    names = set(in_eval)
    for name, m in module.named_modules():
        m.training = name not in names
