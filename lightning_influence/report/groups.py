"""Groups of samples in a report: what removing each as a whole does."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_influence.core.scores import RowScores
from lightning_influence.errors import ConfigurationError
from lightning_influence.report.tables import in_notebook, score_table, write_csv

if TYPE_CHECKING:
    import pandas as pd

STRAIGHT = 0.1
"""A bend below which scores were off by at most 0.024 of their size, and above it by 0.075 to 4.1 (docs/benchmarks.md, "Groups")."""

ORDERED = 1.0
"""A bend above which not even the order of the scores was that of retraining (there)."""

PREFIX = "groups/"
"""Of the names of the tensors of `Groups.packed`."""

_MEMBERS = PREFIX + "members"  # of one group after the other


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
        bends: how far the query losses are from straight lines where the removal of a group moves the parameters, relative to
            the lines' change; None for a group that was not looked at, or where nothing was looked at.
        members: ids of the samples of each group that the run consumed, ascending; None in a report of an older version.

    Raises:
        ConfigurationError: parts that do not fit together.

    Example:
        Of two groups the first is in two steps and helps, the second is in one of them and harms:

        >>> scores = torch.tensor([[1.0], [-2.0], [0.5]])
        >>> rows = RowScores(torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]), scores, tangent=scores)
        >>> groups = Groups(["news", "forum"], [10, 4], rows, query_ids=[0])
        >>> groups.to_pandas()[["group", "samples", "score", "per_sample"]]
           group  samples  score  per_sample
        0   news       10    1.5        0.15
        1  forum        4   -2.0       -0.50
    """

    names: Sequence[str]
    sizes: Sequence[int]
    rows: RowScores
    query_ids: Sequence[int | str]
    bends: Sequence[float | None] | None = None
    members: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        ids = self.rows.sample_ids
        if self.bends is not None and len(self.bends) != len(self):
            raise ConfigurationError(f"{len(self)} names do not fit {len(self.bends)} bends of groups.")
        if len(self.names) != len(self.sizes) or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self)):
            raise ConfigurationError(
                f"{len(self.names)} names and {len(self.sizes)} sizes do not fit the rows of groups."
            )
        if self.members is not None and [len(ids) for ids in self.members] != list(self.sizes):
            raise ConfigurationError(f"groups of {list(self.sizes)!r:.40} samples do not fit the ids of their members.")

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

    @property
    def as_sizes(self) -> list[bool]:
        """Whether the score of each group is to be read as a size, rather than as a sign and a rank: where the removal moves the
        parameters so little that the query losses are nearly straight lines.
        """
        return [bend is not None and bend < STRAIGHT for bend in self.bends or [None] * len(self)]

    @property
    def readings(self) -> list[str]:
        """What the score of each group may be read as: ``"a size"``, ``"rank only"``, or ``"nothing"`` where the group bends the
        run so far that only training again without it tells.
        """
        bends = self.bends or [None] * len(self)
        return [
            "a size" if as_size else "nothing" if bend is not None and bend >= ORDERED else "rank only"
            for bend, as_size in zip(bends, self.as_sizes, strict=True)
        ]

    def _summed(self, values: Tensor) -> Tensor:
        total = torch.zeros(len(self), self.rows.n_queries, dtype=torch.float64)
        return total.index_add_(0, self.rows.sample_ids, values.double()).to(values.dtype)

    def to_pandas(self) -> pd.DataFrame:
        """One row per group: ``group``, ``samples`` (that the run consumed), one score column per query (``score`` where there
        is one), ``per_sample`` (the mean score over the queries, divided by the samples) and ``nonlinearity`` (mean); where
        it was looked at ``bend``, ``as_size`` (`as_sizes`) and ``read_as`` (`readings`).
        """
        scores, sizes = self.scores, torch.tensor(self.sizes, dtype=torch.float64)
        return score_table(
            scores,
            self.query_ids,
            before={"group": list(self.names), "samples": list(self.sizes)},
            after={
                "per_sample": (scores.double().mean(1) / sizes.clamp(min=1)).numpy(),
                "nonlinearity": self.nonlinearity.mean(1).numpy(),
                **(
                    {}
                    if self.bends is None
                    else {"bend": list(self.bends), "as_size": self.as_sizes, "read_as": self.readings}
                ),
            },
        )

    def to_csv(self, path: str | Path) -> None:
        """Write `to_pandas` as CSV; names that a spreadsheet would run as a formula are quoted."""
        write_csv(self.to_pandas(), path)

    def __repr__(self) -> str:
        sizes = "" if self.bends is None else f"; {sum(self.as_sizes)} of the scores to be read as sizes"
        return f"Groups({len(self)} groups x {self.rows.n_queries} queries: {', '.join(self.names):.60}{sizes})"

    def _repr_html_(self) -> str:
        return in_notebook(repr(self), self.to_pandas())

    # -- as named tensors -------------------------------------------------------------------------------

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON from which `unpacked` makes the same."""
        tensors = {PREFIX + field.name: getattr(self.rows, field.name) for field in fields(RowScores)}
        if self.members is not None:
            tensors[_MEMBERS] = torch.tensor([z for ids in self.members for z in ids], dtype=torch.int64)
        bends = {} if self.bends is None else {"bends": list(self.bends)}
        return tensors, {"names": list(self.names), "sizes": list(self.sizes), **bends}

    @classmethod
    def unpacked(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], query_ids: Sequence[int | str]
    ) -> Groups:
        """The inverse of `packed`."""
        rows = RowScores(*(tensors[PREFIX + field.name] for field in fields(RowScores)))
        names, sizes = [str(name) for name in metadata["names"]], [int(size) for size in metadata["sizes"]]
        bends = metadata.get("bends")
        of_groups = None if bends is None else [None if bend is None else float(bend) for bend in bends]
        ids = iter(tensors[_MEMBERS].tolist()) if _MEMBERS in tensors else None
        members = None if ids is None else [list(itertools.islice(ids, size)) for size in sizes]
        return cls(names, sizes, rows, query_ids, of_groups, members)
