"""How long a sweep will take: said once it can be told, where it is long."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

_TELLS = 5.0  # seconds after which it can be told
_LONG = 60.0  # seconds that are announced


class Pace:
    """To be called after every step that a sweep has passed; warns at most once.

    Args:
        what: is swept, in words.
        steps: that will be passed, over all turns.
        held: the most bytes that are held meanwhile.
        cheaper: what would take less.
    """

    def __init__(self, what: str, steps: int, held: int, cheaper: Sequence[str]) -> None:
        self._what, self._steps, self._held, self._cheaper = what, steps, held, cheaper
        self._start, self._passed, self._warned = time.perf_counter(), 0, False

    def __call__(self) -> None:
        self._passed += 1
        elapsed = time.perf_counter() - self._start
        if self._warned or elapsed < _TELLS:
            return
        self._warned = True
        left = elapsed / self._passed * (self._steps - self._passed)
        if left < _LONG:
            return
        warnings.warn(
            f"attribution will take about {left:.0f} s more, and at most {self._held / 1e9:.2g} GB of memory besides the model: "
            f"{self._what}. Less: {'; '.join(self._cheaper)}.",
            stacklevel=2,
        )
