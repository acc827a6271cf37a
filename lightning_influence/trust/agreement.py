"""How well scores agree with measured effects: statistics over the removals, per query (docs/method.md, "Training again")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_influence.errors import ConfigurationError
from lightning_influence.report.provenance import Estimate as Estimate
from lightning_influence.report.tables import in_notebook

if TYPE_CHECKING:
    import pandas as pd

STATISTICS = ("spearman", "pearson", "relative_error")

_CHUNK = 2**18  # numbers resampled at once


@dataclass(frozen=True, repr=False)
class Agreement:
    """Agreement of scores with the truth.

    Attributes:
        spearman, pearson: correlation over the removals.
        relative_error: ``||score - truth|| / ||truth||``; 0 is exact, 1 is what scores of zero reach.
        per_query: ``(n_queries,)`` of each statistic.
        n_removals: rows they rest on.

    Example:
        >>> truth = torch.tensor([[0.1], [-0.2], [0.4], [0.3]])
        >>> agreement_of(truth, truth)
        Agreement(spearman 1.000 [1.000, 1.000], pearson 1.000 [1.000, 1.000], relative error 0.000 [0.000, 0.000] over 4 removals)
    """

    spearman: Estimate
    pearson: Estimate
    relative_error: Estimate
    per_query: Mapping[str, Tensor]
    n_removals: int

    def to_pandas(self) -> pd.DataFrame:
        """One row per query, one column per statistic."""
        import pandas as pd

        return pd.DataFrame({name: values.numpy() for name, values in self.per_query.items()})

    def __str__(self) -> str:
        statistics = ", ".join(f"{name.replace('_', ' ')} {getattr(self, name)}" for name in STATISTICS)
        return f"{statistics} over {self.n_removals} removals"

    def __repr__(self) -> str:
        return f"Agreement({self})"

    def _repr_html_(self) -> str:
        return in_notebook(repr(self), self.to_pandas())


def agreement_of(
    scores: Tensor, truth: Tensor, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Agreement:
    """Agreement of predicted with measured effects, both ``(n_removals, n_queries)``.

    The interval is the percentile bootstrap over removals, the queries being the same in every resample.
    Scores that are all equal rank nothing: their correlation counts as 0.

    Raises:
        ConfigurationError: other shapes, fewer than three removals, values that are not finite, or a query
            that no removal changed.

    Example:
        Scores of twice the size rank the removals as the truth does, and are wrong by the whole of it:

        >>> truth = torch.tensor([[0.1], [-0.2], [0.4], [0.3]])
        >>> twice = agreement_of(2 * truth, truth)
        >>> round(twice.spearman.value, 6), round(twice.relative_error.value, 6)
        (1.0, 1.0)
    """
    _validate(scores, truth)
    scores, truth = scores.detach().double().cpu(), truth.detach().double().cpu()
    per_query = _statistics(scores, truth)
    intervals = _intervals(scores, truth, resamples, confidence, seed)
    estimates = {name: Estimate(float(per_query[name].mean()), *intervals[name]) for name in STATISTICS}
    return Agreement(**estimates, per_query=per_query, n_removals=len(scores))


def sums_over(scores: Tensor, sample_ids: Tensor, subsets: Sequence[Sequence[int] | frozenset[int]]) -> Tensor:
    """Sum of the scores of each subset, ``(n_subsets, n_queries)``: what a linear datamodel predicts for its
    removal. Their Spearman correlation with the truth is the linear datamodeling score (LDS).

    Args:
        scores: ``(n_samples, n_queries)``.
        sample_ids: ``(n_samples,)``; members of a subset that are not among them have no effect.
    """
    members = torch.stack([torch.isin(sample_ids, torch.tensor(sorted(subset))) for subset in subsets])
    return members.double() @ scores.double().cpu()


def _statistics(scores: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Each statistic of every column, ``(k,)``, for ``(n, k)``."""
    return {
        "spearman": _pearson(_ranks(scores), _ranks(truth)),
        "pearson": _pearson(scores, truth),
        "relative_error": (scores - truth).norm(dim=0) / truth.norm(dim=0),
    }


def _ranks(values: Tensor) -> Tensor:
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(values.numpy(), axis=0))


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Of every column; 0 where one of the two is constant."""
    from torchmetrics.functional import pearson_corrcoef

    varies = (a != a[0]).any(0) & (b != b[0]).any(0)
    correlations = a.new_zeros(a.shape[1])
    if varies.any():
        correlations[varies] = pearson_corrcoef(_standard(a[:, varies]), _standard(b[:, varies]))
    return correlations.clamp(-1, 1)


def _standard(values: Tensor) -> Tensor:
    """Columns of mean 0 and variance 1: effects are small numbers, whose variance torchmetrics would take for none."""
    return (values - values.mean(0)) / values.std(0)


def _intervals(
    scores: Tensor, truth: Tensor, resamples: int, confidence: float, seed: int
) -> dict[str, tuple[float, float]]:
    n, q = scores.shape
    rng = np.random.default_rng(seed)
    at_once = max(1, _CHUNK // (n * q))
    samples: dict[str, list[Tensor]] = {name: [] for name in STATISTICS}
    for start in range(0, resamples, at_once):
        drawn = torch.from_numpy(rng.integers(n, size=(n, min(at_once, resamples - start))))
        columns = _statistics(scores[drawn].flatten(1), truth[drawn].flatten(1))
        for name, values in columns.items():
            samples[name].append(values.view(-1, q).mean(1))
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    quantiles = {name: torch.quantile(torch.cat(values), tails).tolist() for name, values in samples.items()}
    return {name: (low, high) for name, (low, high) in quantiles.items()}


def _validate(scores: Tensor, truth: Tensor) -> None:
    if scores.dim() != 2 or scores.shape != truth.shape:
        raise ConfigurationError(
            f"scores of shape {tuple(scores.shape)} and truth of shape {tuple(truth.shape)}; both have to be "
            "(n_removals, n_queries)."
        )
    if len(scores) < 3:
        raise ConfigurationError(f"{len(scores)} removals are too few for a correlation; give at least 3.")
    for name, values in (("scores", scores), ("truth", truth)):
        if not torch.isfinite(values).all():
            raise ConfigurationError(f"{name} holds values that are not finite; agreement with them is undefined.")
    unchanged = (truth == truth[0]).all(0)
    if unchanged.any():
        raise ConfigurationError(
            f"query {int(unchanged.nonzero()[0])} changes equally by every removal (by {float(truth[0, unchanged][0]):g}); remove "
            "samples that the run used, or ask other queries."
        )
