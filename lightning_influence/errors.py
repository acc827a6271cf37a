"""Errors that a user can act on. Each message names what was wrong, the value seen and what to do."""

from collections.abc import Iterable
from typing import Any


class InfluenceError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigurationError(InfluenceError):
    """The run, the module or the arguments cannot be attributed as they are."""


class UnsupportedOptimizer(ConfigurationError):
    """The optimizer is not one whose step is known as a pure elementwise function."""


class UncoveredParameter(ConfigurationError):
    """A trainable parameter whose per-sample gradient no rule yields."""


class LogError(InfluenceError):
    """A directory that is not a log, an empty log, or a log of another model."""


class LogCorrupted(LogError):
    """Bytes of a log that differ from those that were written."""


class CurvatureUnavailable(InfluenceError):
    """The trajectory does not hold what this curvature needs."""


class ReplayDrift(InfluenceError):
    """A replayed segment does not arrive at the next recorded snapshot."""


def check_choice(name: str, value: Any, known: Iterable[Any]) -> None:
    """Refuse another value of an argument than those that are known.

    Raises:
        ConfigurationError: it is another.
    """
    known = tuple(known)
    if value not in known:
        raise ConfigurationError(f"{name}={value!r}; choose one of {', '.join(map(str, known))}")
