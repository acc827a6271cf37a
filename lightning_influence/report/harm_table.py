"""A report's own table of suspects, whose harm may still be read under the word that it had before."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lightning_influence.words import warn_renamed

_NEW, _OLD = "relative_harm", "suspicion"


class HarmTable(pd.DataFrame):  # type: ignore[misc]
    """The column ``suspicion`` was renamed ``relative_harm``, for `suspects` of a log means another quantity by it."""

    @property
    def _constructor(self) -> type[HarmTable]:
        return HarmTable

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._named(key, stacklevel=4))

    @property
    def suspicion(self) -> Any:
        return super().__getitem__(self._named(_OLD, stacklevel=4))

    def _named(self, key: Any, stacklevel: int) -> Any:
        if not isinstance(key, str) or key != _OLD or _OLD in self.columns or _NEW not in self.columns:
            return key
        warn_renamed(_NEW, _OLD, stacklevel=stacklevel)
        return _NEW
