"""Words that were replaced: arguments and options keep working under the old one until 1.0, with a warning."""

from __future__ import annotations

import warnings
from typing import TypeVar

from lightning_influence.errors import ConfigurationError

T = TypeVar("T")


def renamed(new: str, value: T, old: str, old_value: T, *, shown: bool = False) -> T:
    """The value of an argument that may still be given under its old word; None is "not given" for both.

    Args:
        new, old: the words as a user writes them.
        shown: as of `warn_renamed`.

    Raises:
        ConfigurationError: both are given.
    """
    if old_value is None:
        return value
    if value is not None:
        raise ConfigurationError(
            f"{new} and {old} are both given; {old} is the old word for {new}, so give {new} alone."
        )
    warn_renamed(new, old, shown=shown, stacklevel=4)
    return old_value


def warn_renamed(new: str, old: str, *, shown: bool = False, stacklevel: int = 3) -> None:
    """Warn of an old word, at the call of the function that was given it.

    Args:
        shown: whether Python shows the warning by default, as it has to on a command line.
    """
    kind = FutureWarning if shown else DeprecationWarning
    warnings.warn(f"{old} is the old word for {new} and goes in 1.0; give {new} instead.", kind, stacklevel=stacklevel)
