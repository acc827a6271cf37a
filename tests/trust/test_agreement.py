"""Statistics of agreement: against values worked out by hand, and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_influence.errors import ConfigurationError
from lightning_influence.trust.agreement import agreement_of, sums_over


def columns(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).T


def test_by_hand() -> None:
    """Ranks 1 2 3 4 against 1 3 2 4: 1 - 6 * 2 / (4 * 15) = 0.8; against the reverse: -1."""
    scores = columns([1, 2, 3, 4], [1, 2, 3, 4])
    truth = columns([1, 3, 2, 4], [8, 6, 4, 2])
    found = agreement_of(scores, truth)
    np.testing.assert_allclose(found.per_query["spearman"], [0.8, -1.0])
    np.testing.assert_allclose(found.per_query["pearson"], [0.8, -1.0])
    np.testing.assert_allclose(found.per_query["relative_error"], [(2 / 30) ** 0.5, (70 / 120) ** 0.5])
    assert found.spearman.value == pytest.approx(-0.1) and found.n_removals == 4
    assert list(found.to_pandas().columns) == ["spearman", "pearson", "relative_error"]


def test_ranks_not_values_and_ties() -> None:
    """Ties share their mean rank: ranks 1.5 1.5 3 against 1 2 3 correlate by sqrt(3) / 2."""
    found = agreement_of(columns([5, 5, 70]), columns([1e-9, 2e-9, 9e-4]))
    assert found.spearman.value == pytest.approx(3**0.5 / 2)
    assert agreement_of(columns([1, 10, 100]), columns([-1, 0, 1e-12])).spearman.value == pytest.approx(1.0)


def test_scale_of_effects_does_not_matter() -> None:
    g = torch.Generator().manual_seed(0)
    scores, truth = torch.randn(2, 30, 4, generator=g, dtype=torch.float64)
    large, small = agreement_of(scores, truth), agreement_of(1e-18 * scores, 1e-18 * truth)
    for name, values in large.per_query.items():
        torch.testing.assert_close(small.per_query[name], values)


def test_correlations_are_scipy_s() -> None:
    g = torch.Generator().manual_seed(1)
    truth = torch.randn(40, 3, generator=g)
    scores = truth + torch.randn(40, 3, generator=g)
    found = agreement_of(scores, truth)
    for i in range(3):
        assert float(found.per_query["spearman"][i]) == pytest.approx(stats.spearmanr(scores[:, i], truth[:, i])[0])
        assert float(found.per_query["pearson"][i]) == pytest.approx(stats.pearsonr(scores[:, i], truth[:, i])[0])


@pytest.mark.parametrize("statistic", ["spearman", "pearson"])
def test_interval_is_scipy_s_percentile_bootstrap(statistic: str) -> None:
    g = torch.Generator().manual_seed(2)
    truth = torch.randn(40, 2, generator=g, dtype=torch.float64)
    scores = truth + torch.randn(40, 2, generator=g, dtype=torch.float64)
    correlate = {"spearman": stats.spearmanr, "pearson": stats.pearsonr}[statistic]

    def mean(drawn: np.ndarray) -> float:
        return float(np.mean([correlate(scores[drawn, i], truth[drawn, i])[0] for i in range(2)]))

    peer = stats.bootstrap((np.arange(40),), mean, n_resamples=1500, method="percentile", vectorized=False)
    own = getattr(agreement_of(scores, truth, resamples=4000, confidence=0.95), statistic)
    assert own.low == pytest.approx(peer.confidence_interval.low, abs=0.03)
    assert own.high == pytest.approx(peer.confidence_interval.high, abs=0.03)
    narrow = getattr(agreement_of(scores, truth, resamples=4000, confidence=0.5), statistic)
    assert own.low < narrow.low < narrow.value < narrow.high < own.high


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Bivariate normal with Pearson 0.6: a 90 % interval misses in about a tenth of the samples."""
    g = torch.Generator().manual_seed(3)
    covered = 0
    for _ in range(100):
        a, b = torch.randn(2, 80, 1, generator=g, dtype=torch.float64)
        interval = agreement_of(a, 0.6 * a + 0.8 * b, resamples=300, confidence=0.9).pearson
        covered += interval.low <= 0.6 <= interval.high
    assert 80 <= covered <= 98


def test_resamples_in_chunks_are_the_same_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(4)
    scores, truth = torch.randn(2, 20, 5, generator=g, dtype=torch.float64)
    perfect = agreement_of(truth, truth)
    assert (perfect.spearman.low, perfect.relative_error.high) == (pytest.approx(1.0), 0.0)
    whole = agreement_of(scores, truth, resamples=500).spearman
    monkeypatch.setattr("lightning_influence.trust.agreement._CHUNK", 700)
    parts = agreement_of(scores, truth, resamples=500).spearman
    assert parts.low == pytest.approx(whole.low, abs=0.05) and parts.high == pytest.approx(whole.high, abs=0.05)


def test_constant_scores_agree_with_nothing() -> None:
    found = agreement_of(torch.zeros(5, 1), torch.arange(5.0)[:, None])
    assert found.spearman.value == 0.0 and found.relative_error.value == 1.0


def test_sums_over_subsets() -> None:
    scores = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    found = sums_over(scores, torch.tensor([3, 5, 8]), [{3, 8}, {5}, {4, 5, 8}])
    assert found.tolist() == [[101.0, 202.0], [10.0, 20.0], [110.0, 220.0]]


@pytest.mark.parametrize(
    ("scores", "truth", "says"),
    [
        (torch.zeros(4, 2), torch.zeros(4, 3), r"\(4, 2\) and truth of shape \(4, 3\)"),
        (torch.zeros(2, 1), torch.zeros(2, 1), "2 removals are too few"),
        (torch.zeros(4, 1), torch.tensor([[1.0], [float("nan")], [0], [0]]), "truth holds values that are not finite"),
        (torch.zeros(4, 2), torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]), "query 1 changes equally"),
    ],
)
def test_refused(scores: torch.Tensor, truth: torch.Tensor, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        agreement_of(scores, truth)
