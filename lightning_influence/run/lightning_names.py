"""Lightning's classes by name: the same package is installed as ``lightning`` and as ``pytorch_lightning``.

The classes of one are not those of the other, so an ``isinstance`` of either fails for a user of the other.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Union

_PACKAGES = ("lightning", "pytorch_lightning")


def is_a(value: object, *names: str) -> bool:
    """Whether a value is an instance of one of Lightning's classes, such as ``"LightningDataModule"``."""
    return any(_is_lightning_s(kind) and kind.__name__ in names for kind in type(value).__mro__)


def either(name: str) -> Any:
    """The type of what is an instance of either package's class."""
    return Union[tuple(getattr(import_module(package), name) for package in _PACKAGES)]  # noqa: UP007


def trainer_of(module: object) -> Any:
    """The trainer's class in the package whose module it is."""
    package = next(kind.__module__.partition(".")[0] for kind in type(module).__mro__ if _is_lightning_s(kind))
    return import_module(package).Trainer


def overrides(value: object, hook: str) -> bool:
    """Whether the class of a value, or the value itself, has a hook of its own in the place of Lightning's."""
    if hook in getattr(value, "__dict__", {}):
        return True
    owner = next((kind for kind in type(value).__mro__ if hook in kind.__dict__), None)
    return owner is not None and not _is_lightning_s(owner)


def _is_lightning_s(kind: type) -> bool:
    return kind.__module__.split(".")[0] in _PACKAGES
