"""What selection decided, in the order of the decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_influence.report.provenance import RemovalSummary
from lightning_influence.report.tables import in_notebook, write_csv

if TYPE_CHECKING:
    import pandas as pd


@dataclass(repr=False)
class SelectionReport:
    """What was decided, in the order of the decisions.

    Attributes:
        rows: optimizer step at which it was decided, sample ids, scores and weights of each decision.
        removals: how the scores found what a removal changes, and what was verified of it; None where they were given.
    """

    rows: list[tuple[int, Tensor, Tensor, Tensor]] = field(default_factory=list)
    removals: RemovalSummary | None = None

    def add(self, step: int, sample_ids: Tensor, scores: Tensor, weights: Tensor) -> None:
        """Note a decision; ``(n,)`` each."""
        self.rows.append((step, sample_ids.cpu(), scores.detach().float().cpu(), weights.float().cpu()))

    @classmethod
    def merged(cls, parts: Sequence[SelectionReport]) -> SelectionReport:
        """The decisions of several processes, in the order of their steps."""
        rows = sorted((row for part in parts for row in part.rows), key=lambda row: row[0])
        return cls(rows, parts[0].removals if parts else None)

    @property
    def kept(self) -> float:
        """Mean weight over all decisions; NaN before the first."""
        return float(torch.cat([w for *_, w in self.rows]).mean()) if self.rows else float("nan")

    def to_pandas(self) -> pd.DataFrame:
        """One row per decision: ``step``, ``sample_id``, ``score``, ``weight`` (0: removed)."""
        import pandas as pd

        parts = [
            pd.DataFrame({"step": step, "sample_id": ids.numpy(), "score": scores.numpy(), "weight": weights.numpy()})
            for step, ids, scores, weights in self.rows
        ]
        columns = ["step", "sample_id", "score", "weight"]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)

    def to_csv(self, path: str | Path) -> None:
        """Write `to_pandas` as CSV."""
        write_csv(self.to_pandas(), path)

    def __repr__(self) -> str:
        samples = sum(len(ids) for _, ids, *_ in self.rows)
        kept = f"; mean weight {self.kept:.3g}" if self.rows else ""
        how = "" if self.removals is None else f"; {self.removals}"
        return f"SelectionReport({len(self.rows)} decisions on {samples} samples{kept}{how})"

    def _repr_html_(self) -> str:
        return in_notebook(repr(self), self.to_pandas())
