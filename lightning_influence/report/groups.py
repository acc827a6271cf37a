"""Groups of samples in a report: what removing each as a whole does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_influence.core.scores import RowScores
from lightning_influence.errors import ConfigurationError
from lightning_influence.report.tables import score_table, write_csv

if TYPE_CHECKING:
    import pandas as pd

_PREFIX = "groups/"


@dataclass(frozen=True, repr=False)
class Groups:
    """Scores of groups of samples, each removed as a whole.

    They are not the sums of the scores of their samples: the optimizer answers to what a group changes of a step's gradient
    together.

    Attributes:
        names: one a group.
        sizes: samples of each group that the run consumed.
        rows: one for every group and step that holds some of it; its ``sample_ids`` are the numbers of the groups.
        query_ids: of the report.
    """

    names: Sequence[str]
    sizes: Sequence[int]
    rows: RowScores
    query_ids: Sequence[int | str]

    def __post_init__(self) -> None:
        ids = self.rows.sample_ids
        if len(self.names) != len(self.sizes) or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self)):
            raise ConfigurationError(
                f"{len(self.names)} names and {len(self.sizes)} sizes do not fit the rows of groups."
            )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def scores(self) -> Tensor:
        """``(n_groups, n_queries)``, the predicted query loss without the group minus with it: positive where it helps."""
        return self._summed(self.rows.scores + self.rows.interaction)

    @property
    def nonlinearity(self) -> Tensor:
        """``(n_groups, n_queries)``, the scores minus those of the first order in the change of the gradient."""
        return self.scores - self._summed(self.rows.tangent)

    def _summed(self, values: Tensor) -> Tensor:
        total = torch.zeros(len(self), self.rows.n_queries, dtype=torch.float64)
        return total.index_add_(0, self.rows.sample_ids, values.double()).to(values.dtype)

    def to_pandas(self) -> pd.DataFrame:
        """One row per group: ``group``, ``samples`` (that the run consumed), one score column per query (``score`` where there
        is one), ``per_sample`` (the mean score over the queries, divided by the samples) and ``nonlinearity`` (mean).
        """
        scores, sizes = self.scores, torch.tensor(self.sizes, dtype=torch.float64)
        return score_table(
            scores,
            self.query_ids,
            before={"group": list(self.names), "samples": list(self.sizes)},
            after={
                "per_sample": (scores.double().mean(1) / sizes.clamp(min=1)).numpy(),
                "nonlinearity": self.nonlinearity.mean(1).numpy(),
            },
        )

    def to_csv(self, path: str | Path) -> None:
        """Write `to_pandas` as CSV; names that a spreadsheet would run as a formula are quoted."""
        write_csv(self.to_pandas(), path)

    def __repr__(self) -> str:
        return f"Groups({len(self)} groups x {self.rows.n_queries} queries: {', '.join(self.names):.60})"

    # -- as named tensors -------------------------------------------------------------------------------

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON from which `unpacked` makes the same."""
        tensors = {_PREFIX + field.name: getattr(self.rows, field.name) for field in fields(RowScores)}
        return tensors, {"names": list(self.names), "sizes": list(self.sizes)}

    @classmethod
    def unpacked(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], query_ids: Sequence[int | str]
    ) -> Groups:
        """The inverse of `packed`."""
        rows = RowScores(*(tensors[_PREFIX + field.name] for field in fields(RowScores)))
        return cls(
            [str(name) for name in metadata["names"]], [int(size) for size in metadata["sizes"]], rows, query_ids
        )


TENSORS = tuple(_PREFIX + field.name for field in fields(RowScores))
"""Names of the tensors of `Groups.packed`."""
