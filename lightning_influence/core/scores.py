"""Scores as rows: one for every (sample, step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lightning_influence.errors import ConfigurationError

_COLUMNS = ("scores", "tangent", "interaction")  # one a query


def mean_score(scores: Tensor) -> Tensor:
    """``(n, n_queries)``, averaged over the queries; 0 where there are none."""
    return scores.double().mean(1).nan_to_num()


@dataclass(frozen=True, repr=False)
class RowScores:
    """Scores of every (sample, step), in order of step.

    Attributes:
        sample_ids, steps: ``(n_rows,)`` int64.
        scores: ``(n_rows, n_queries)``, predicted query loss without the sample minus with it.
        tangent: ``(n_rows, n_queries)``, the same to first order in the change of the gradient.
        interaction: ``(n_rows, n_queries)``, what removing the sample from its later steps, too, adds to the row, since the
            optimizer answers to removals that lie within its memory together; by default nothing.
    """

    sample_ids: Tensor
    steps: Tensor
    scores: Tensor
    tangent: Tensor
    interaction: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.interaction is None:
            object.__setattr__(self, "interaction", torch.zeros_like(self.scores))

    @classmethod
    def joined(cls, blocks: Sequence[RowScores], n_queries: int) -> RowScores:
        """The rows of all blocks, one block after the other; no rows where there are no blocks."""
        if not blocks:
            ids, scores = torch.zeros(0, dtype=torch.int64), torch.zeros(0, n_queries)
            return cls(ids, ids, scores, scores, scores)
        return cls(*(torch.cat([getattr(block, field.name) for block in blocks]) for field in fields(cls)))

    @classmethod
    def beside(cls, parts: Sequence[RowScores]) -> RowScores:
        """The same rows with the queries of all parts, one part's columns after the other's."""
        columns = {name: torch.cat([getattr(part, name) for part in parts], 1) for name in _COLUMNS}
        return replace(parts[0], **columns)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def where(self, rows: Tensor) -> RowScores:
        """The rows for which ``rows`` ``(n_rows,)`` is true."""
        return RowScores(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __repr__(self) -> str:
        return f"RowScores({len(self)} rows x {self.n_queries} queries, {self.n_steps} steps)"

    @property
    def n_queries(self) -> int:
        """Columns of scores."""
        return self.scores.shape[1]

    @property
    def n_steps(self) -> int:
        """Steps up to the last one with a sample."""
        return int(self.steps.max()) + 1 if len(self) else 0

    def of(self, sample_ids: Tensor) -> Tensor:
        """Scores ``(n, q)`` of the samples of a single step, one row for each time that the step holds them.

        Example:
            >>> scores = torch.tensor([[0.5], [-0.25]])
            >>> rows = RowScores(torch.tensor([3, 8]), torch.zeros(2, dtype=torch.int64), scores, scores)
            >>> rows.of(torch.tensor([8, 3, 8]))
            tensor([[-0.2500],
                    [ 0.5000],
                    [-0.2500]])
        """
        row = {z: i for i, z in enumerate(self.sample_ids.tolist())}
        return self.scores[[row[z] for z in sample_ids.tolist()]]

    def per_sample(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Ascending sample ids and the sums ``(n_samples, n_queries)`` of a row quantity over their steps."""
        ids, where = torch.unique(self.sample_ids, return_inverse=True)
        total = torch.zeros(len(ids), values.shape[1], dtype=torch.float64)
        return ids, total.index_add_(0, where, values.double()).to(values.dtype)

    def over_time(self, bins: int) -> tuple[Tensor, Tensor, Tensor]:
        """How much the samples of each step helped and harmed, on average over the queries.

        Args:
            bins: at most this many; a bin is the mean of neighbouring steps where there are more.

        Returns:
            ``(n_bins,)`` each: the first step of a bin, what helped (positive) and what harmed (negative), per step.

        Raises:
            ConfigurationError: fewer than one bin.
        """
        if bins < 1:
            raise ConfigurationError(f"bins={bins}; give 1 or more.")
        n = self.n_steps
        bins = min(n, bins)
        first = -(-torch.arange(bins + 1) * n // max(bins, 1))  # rounded up
        where, means = self.steps.long() * bins // max(n, 1), mean_score(self.scores)
        helped, harmed = (
            torch.zeros(bins, dtype=torch.float64).index_add_(0, where, part) / first.diff()
            for part in (means.clamp(min=0), means.clamp(max=0))
        )
        return first[:-1], helped, harmed
